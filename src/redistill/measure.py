"""The table of a run: teacher, student before and student after, measured on one set of prompts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from redistill.chat import end_id
from redistill.config import Config
from redistill.evaluation.harness import evaluate_model
from redistill.evaluation.results import peak_memory_bytes, write_results
from redistill.evaluation.score import EvaluationRow
from redistill.models import end_of_text_ids, shared_vocabulary
from redistill.prepare import Prepared
from redistill.runlog import write_whole


@dataclass(frozen=True)
class Bench:
    """What every row of one table is measured with."""

    config: Config
    prepared: Prepared
    folder: Path
    console: Console

    def row(self, name: str) -> EvaluationRow:
        """Measure the teacher (`name` "teacher"), or the student as it is now; every answer is kept."""
        prepared, settings = self.prepared, self.config.evaluation
        model = prepared.teacher if name == "teacher" else prepared.student
        tokenizer = prepared.tokenizer
        if not self.console.is_terminal:
            self.console.print(
                f"Measuring {name} on {len(prepared.evaluation.samples)} prompts", highlight=False
            )
        with self.console.status(f"Measuring {name}") as status:
            return evaluate_model(
                name,
                model,
                None if name == "teacher" else prepared.teacher,
                prepared.evaluation.samples,
                prepared.evaluation.references,
                tokenizer=tokenizer,
                seeds=settings.seeds,
                temperature=settings.temperature,
                top_p=settings.top_p,
                greedy=settings.greedy,
                max_new_tokens=settings.max_new_tokens,
                batch_size=settings.batch_size,
                eos=end_of_text_ids(tokenizer, model) | {end_id(tokenizer, self.config.data.template)},
                vocabulary=shared_vocabulary(tokenizer, tokenizer, prepared.student, prepared.teacher),
                answers_path=self.folder / "answers" / f"{name.replace(' ', '-')}.jsonl",
                progress=lambda what, done, total: status.update(f"Measuring {name}: {what}, {done}/{total}"),
            )

    def rows_before(self, *, going_on: bool) -> list[EvaluationRow]:
        """Teacher and untrained student; measured once a run, kept for when it is interrupted."""
        kept = self.folder / "rows-before.json"
        if going_on and kept.is_file():
            return [EvaluationRow(**row) for row in json.loads(kept.read_text(encoding="utf-8"))]
        rows = [self.row("teacher"), self.row("student before")]
        write_whole(kept, json.dumps([asdict(row) for row in rows]))
        return rows

    def finish(self, earlier: list[EvaluationRow], *, steps: int, seconds: float) -> list[EvaluationRow]:
        """Measure the trained student, write results.json, and return all rows."""
        rows = [*earlier, self.row("student after")]
        write_results(
            self.folder / "results.json",
            rows,
            seeds=list(self.config.evaluation.seeds),
            seconds=seconds,
            peak_memory_bytes=peak_memory_bytes(),
            steps=steps,
            seed=self.config.training.get("seed", 42),
        )
        return rows
