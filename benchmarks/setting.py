"""On what a benchmark ran: the paragraph above its tables. For the scripts beside it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path

import torch


def setting(device: str, *, repeat: int, packages: tuple[str, ...] = ()) -> list[str]:
    """Lines of Markdown: date; machine, versions of torch and `packages`, commit, command, how often it was run."""
    where = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{torch.get_num_threads()} threads of {_processor()}"
    )
    versions = [f"torch {torch.__version__}", *(f"{name} {metadata.version(name)}" for name in packages)]
    command = " ".join(["python", *(_without_folders(each) for each in sys.argv)])
    made = f"{where}; {', '.join(versions)}, redistill {_commit()}; `{command}`, median of {repeat}."
    return ["", f"## {date.today()}", "", made]


def _without_folders(argument: str) -> str:
    """Where a user keeps models and data is nobody's business; scripts keep the path that one types."""
    path = Path(argument)
    return path.name if path.is_absolute() and path.exists() else argument


def _commit() -> str:
    """Of this checkout, "-dirty" behind it where files differ from it."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or metadata.version("redistill")


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({_vectors()}, {os.cpu_count()} cores)"
    return platform.processor()


def _vectors() -> str:
    """The widest vector instructions of this processor that torch uses."""
    return torch.backends.cpu.get_cpu_capability()
