"""Values as they were read, made fit for a page: numbers that are numbers, and tokens cut out of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any


def number(value: Any) -> float | None:
    """A finite number, or None for whatever else a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def short(value: Any, digits: int = 5) -> float | None:
    """`number` with so many significant digits: a page of 50,000 steps is mostly digits."""
    found = number(value)
    return None if found is None else float(f"{found:.{digits}g}")


def text(value: Any) -> str:
    """A text, or "" for whatever else."""
    return value if isinstance(value, str) else ""


def numbers(value: Any) -> list[float | None]:
    """A list of numbers with four digits; empty for whatever else."""
    return [short(each, 4) for each in value] if isinstance(value, list) else []


def cut(whole: str, ends: Any) -> list[str] | None:
    """The tokens of a text, from where each ends in it; None where that was not recorded or does not fit.

    Of tokens that share a character the first has it.
    """
    if not isinstance(ends, list) or any(not isinstance(end, int) for end in ends):
        return None
    edges = [0, *ends]
    if edges[-1] != len(whole) or edges != sorted(edges):
        return None
    return [whole[a:b] for a, b in pairwise(edges)]


def with_kl(tokens: Sequence[str], kl: Sequence[float | None]) -> list[list[Any]]:
    """[text, KL or None] of each token."""
    known = [*kl, *[None] * len(tokens)][: len(tokens)]
    return [[piece, value] for piece, value in zip(tokens, known, strict=True)]
