"""What a figure was made with: versions of the packages, and the commit of this code."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("redistill", "torch", "transformers", "tokenizers", "rouge-score")


def made_with() -> dict[str, Any]:
    """`versions` of the packages that make a score, and `git`, the commit they were made at."""
    return {"versions": versions(), "git": git_hash()}


def versions() -> dict[str, str]:
    """Versions of redistill, the libraries and python; "unknown" for one not installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "unknown"
    return {**found, "python": platform.python_version()}


def git_hash() -> str:
    """The commit of the checkout this code runs from, "-dirty" behind it where files differ from it.

    "unknown" for an installed copy: the checkout around its environment may be another project's.
    """
    package = Path(__file__).resolve().parent
    git = shutil.which("git")
    if git is None:
        return "unknown"

    def ask(*words: str) -> str:
        told = subprocess.run([git, "-C", str(package), *words], capture_output=True, text=True, check=False)
        return told.stdout.strip() if told.returncode == 0 else ""

    top = ask("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() / "src" / "redistill" != package:
        return "unknown"
    return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "unknown"
