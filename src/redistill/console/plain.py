"""Model text made safe for a terminal."""

from __future__ import annotations

import unicodedata

_TURNED = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain_text(text: str) -> str:
    """`text` without control characters (terminal escapes among them), marks that turn the direction of
    writing, and lone surrogates; line breaks stay, tabs become spaces."""
    kept = (c for c in text if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or c in _TURNED))
    return "".join(kept).expandtabs(4)


def one_line(text: str) -> str:
    """`plain_text` with line breaks shown as ↵."""
    return plain_text(text).replace("\n", "↵")
