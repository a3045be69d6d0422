"""How the process keeps its memory on Linux."""

from __future__ import annotations

import ctypes
import os

# glibc's mallopt: which setting, and bytes.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = {_MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 512 * 2**20, _TOP_PAD: 64 * 2**20}


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, up to 512 MB, for the next tensor; whether it took the settings.

    Left alone it hands tensors of a few megabytes back to the system at once, and each next one is made of fresh
    pages: on a CPU that can cost several times the arithmetic on it. Someone's own MALLOC_ variables or
    GLIBC_TUNABLES come first; another C library is left as it is.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(setting, size) == 1 for setting, size in _SETTINGS.items()])
