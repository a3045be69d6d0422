"""Writes docs/panel.svg, the panel of a run as a terminal shows it: python docs/make_panel.py RUN TOKENIZER

Reads recipe.yaml, steps.jsonl and revisions.jsonl of the run's folder, up to the last step with a revision; nothing
is made up.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import yaml
from rich.console import Console
from transformers import AutoTokenizer

from redistill.console import StepDisplay
from redistill.runlog import read


def main(run: Path, tokenizer: Path) -> None:
    """Draw the panel as it stood after the last step in which an answer was revised."""
    revisions = {record["step"]: record for record in read(run / "revisions.jsonl")}
    last, now = max(revisions), [0.0]
    total = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["training"]["max_steps"]
    out = Console(record=True, width=88, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    quiet = Console(file=io.StringIO(), force_terminal=True, width=88)
    display = StepDisplay(quiet, tokenizer=AutoTokenizer.from_pretrained(tokenizer), clock=lambda: now[0])
    display.start(0, total)
    for record in read(run / "steps.jsonl"):
        if record["step"] > last:
            break
        now[0] += record["seconds"]
        if record["step"] in revisions:
            display.read("revisions", revisions[record["step"]])
        display.show(record["step"], record)
    display.close()
    out.print(display.panel())
    target = Path(__file__).parent / "panel.svg"
    # Without rich's web fonts: the picture must not fetch anything.
    svg = re.sub(r"@font-face\s*{[^}]*}", "", out.export_svg(title="redistill train"))
    target.write_text(svg, encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
