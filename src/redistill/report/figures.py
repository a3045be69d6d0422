"""Numbers as a person would say them."""

from __future__ import annotations


def percent(share: float) -> str:
    """0.74 -> "74 %"."""
    return f"{100 * share:.0f} %"


def count(parameters: float) -> str:
    """134515008 -> "134.5M"."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit * 0.99995:
            return f"{parameters / unit:.1f}{letter}"
    return f"{parameters:.0f}"


def size(amount: float) -> str:
    """Bytes in decimal units."""
    for unit, letter in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= unit:
            return f"{amount / unit:.1f} {letter}" if amount < 100 * unit else f"{amount / unit:.0f} {letter}"
    return f"{amount:.0f} B"


def duration(seconds: float) -> str:
    """A time as a person would say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def p_text(p: float) -> str:
    """A p-value, never as an exact 0."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def signed(value: float, digits: int) -> str:
    """0.5 -> "+0.50"; with a minus sign that no line is broken behind."""
    return f"{value:+.{digits}f}".replace("-", "−")
