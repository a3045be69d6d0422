"""A table of revisions in the trackers that the engine has started (`training.report_to`), beside its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
)

from redistill.markdown import plain_markdown

NAME = "revisions"
COLUMNS = (
    "step", "source", "prompt", "before", "after", "position", "rejected", "replacement", "kl_before", "gain",
)  # fmt: skip
Row = list[Any]


class RevisionTables(TrainerCallback):
    """Keeps the revisions of a `DistillTrainer` from its run log, and hands them on whenever the engine logs.

    TensorBoard, which has no tables, gets text with a table in Markdown. Nothing is kept where no tracker wants it.
    """

    def __init__(self, trainer: Any):
        self.trainer, self._rows = trainer, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        readers = self.trainer.run_log.readers
        if self._trackers() and self.read not in readers:
            readers.append(self.read)

    def read(self, kind: str, record: Mapping[str, Any]) -> None:
        """A record of the run log."""
        if kind == "revisions":
            self._rows.append(to_row(record, self.trainer.tokenizer))

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rows, self._rows = self._rows, []
        if rows and state.is_world_process_zero:
            for callback in self._trackers():
                send(callback, rows, state.global_step)

    def _trackers(self) -> list[TrainerCallback]:
        known = (MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback)
        return [each for each in self.trainer.callback_handler.callbacks if isinstance(each, known)]


def to_row(record: Mapping[str, Any], tokenizer: Any) -> Row:
    """A record of revisions.jsonl as `COLUMNS`; of the source without folders. gain: in nats per token."""
    tokens = {name: str(tokenizer.decode([record[name]])) for name in ("rejected", "replacement")}
    gain = record["log_likelihood_after"] - record["log_likelihood_before"]
    values = {**record, **tokens, "source": Path(record["source"]).name, "gain": gain}
    return [values[name] for name in COLUMNS]


def send(callback: TrainerCallback, rows: Sequence[Row], step: int) -> None:
    """Give `rows` to the run that `callback` has under way."""
    if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
        callback.tb_writer.add_text(NAME, to_markdown(rows), step)
    elif isinstance(callback, WandbCallback):
        import wandb  # pyright: ignore[reportMissingImports]

        table = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
        wandb.log({NAME: table, "train/global_step": step})
    elif isinstance(callback, TrackioCallback):
        import trackio  # pyright: ignore[reportMissingImports]
        from pandas import DataFrame

        # It reads text as Markdown.
        shown = DataFrame([_shown(row) for row in rows], columns=list(COLUMNS))
        trackio.log({NAME: trackio.Table(dataframe=shown), "train/global_step": step})
    elif isinstance(callback, MLflowCallback):
        import mlflow  # pyright: ignore[reportMissingImports]

        columns = zip(COLUMNS, zip(*rows, strict=True), strict=True)
        mlflow.log_table({name: list(column) for name, column in columns}, f"{NAME}.json")


def _shown(row: Row) -> Row:
    return [plain_markdown(value) if isinstance(value, str) else value for value in row]


def to_markdown(rows: Sequence[Row]) -> str:
    """A table in Markdown; text of data and models is text there."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    lines += [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in _shown(row)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
