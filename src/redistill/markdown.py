"""Text of data and models made safe for a page of Markdown."""

from __future__ import annotations

import re

# What Markdown or HTML may take for more than a character: the last three only where they can mean something.
_MEANT = re.compile(
    r"[\\`*\[\]#|~<>&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=\S)|(?i:(?<=www)\.)|(?<!\S)(?:[-+]|(?<=\d)[.)])(?=\s)"
)


def plain_markdown(text: str) -> str:
    """`text` on one line, which a reader of Markdown shows as it is: no markup, no HTML, no links, and without
    control characters and marks that turn the direction of writing."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else "" for c in text)
    return _MEANT.sub(lambda found: f"&#{ord(found[0])};", " ".join(line.split()))


def fenced(text: str, language: str = "") -> str:
    """`text` as a block of code, whatever it holds."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
