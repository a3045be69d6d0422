"""Writes docs/demo.svg, the end of a demo run as a terminal shows it: python docs/make_picture.py RUN_FOLDER

Reads results.json and revisions.jsonl of the run and the tokenizer of its student; nothing is made up.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from redistill.console import evaluation_table, marked_from_sample, show_revision
from redistill.data import load_examples
from redistill.demo.pipeline import HERE, sample_of, telling_revisions
from redistill.evaluation.score import EvaluationRow
from redistill.runlog import read
from redistill.splits import question


def main(run: Path) -> None:
    """Draw the table and the revisions of `run`."""
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    rows = [EvaluationRow(**row) for row in json.loads((run / "results.json").read_text())["rows"]]
    questions = {
        Path(example.source).name: question(example) for example in load_examples(str(HERE)).examples
    }
    console = Console(record=True, width=88, file=io.StringIO(), force_terminal=True)
    console.print(evaluation_table(rows))
    for record in telling_revisions(read(run / "revisions.jsonl"), 2):
        console.print()
        console.print(
            show_revision(
                marked_from_sample(
                    sample_of(record),
                    tokenizer,
                    prompt=questions[Path(record["source"]).name],
                    log_likelihood=record["log_likelihood_after"],
                )
            )
        )
    target = Path(__file__).parent / "demo.svg"
    # Without rich's web fonts: the picture must not fetch anything.
    svg = re.sub(r"@font-face\s*{[^}]*}", "", console.export_svg(title="redistill demo"))
    target.write_text(svg, encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
