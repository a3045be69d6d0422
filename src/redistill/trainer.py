"""The method inside `transformers.Trainer`: one subclass, one step deep.

The engine brings optimizer, precision, accumulation, devices, trackers and checkpoints. We put in what it
cannot know: `get_batch_samples` lets the student write and SCRG revise for a whole accumulation window and
counts what will be trained on; `compute_loss` is the objective on one micro-batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints

from redistill import checkpoint
from redistill.batch import Batch, Counts, Row, collate, count, split_by_length, to_device
from redistill.chat import end_id
from redistill.config import Config
from redistill.losses.chunked import Stats, merge
from redistill.models import end_of_text_ids, shared_vocabulary
from redistill.objective import Objective, TermWatch, batch_loss, reference_scores
from redistill.phrases import load_chunker, span_ids
from redistill.rollout import Drawn, Pair, initial_state, sequence_level
from redistill.runlog import RunLog
from redistill.sample import Sample
from redistill.steplog import revision_records, step_record

log = logging.getLogger(__name__)

BAD_STEPS_IN_A_ROW = 3


class NotFinite(RuntimeError):
    """The loss or its gradients were NaN or infinite in three steps in a row."""


class DistillTrainer(Trainer):
    """Trains `model` to be like `teacher_model` on `train_dataset`, with all three levels of the method.

    model, teacher_model: loaded Hugging Face models (the student may be wrapped by peft) over one vocabulary.
    config: a `redistill.Config`; its `training` section becomes `TrainingArguments` as it is.
    processing_class: the tokenizer that made the samples.
    train_dataset, eval_dataset: `Sample`s with the data set's responses (none in prompt-only data).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel,
        config: Config,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Sequence[Sample],
        eval_dataset: Sequence[Sample] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = TrainingArguments(**{**config.training, "remove_unused_columns": False})
        super().__init__(
            model=model,
            args=args,
            data_collator=_as_they_are,  # pyright: ignore[reportArgumentType]
            train_dataset=list(train_dataset),  # pyright: ignore[reportArgumentType]
            eval_dataset=list(eval_dataset) if eval_dataset else None,  # pyright: ignore[reportArgumentType]
            processing_class=processing_class,
            callbacks=[*(callbacks or []), _Hooks(self)],
        )
        # Our losses are sums over the whole window's token count: the engine must not divide them again.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.config = config
        self.tokenizer = processing_class
        self.teacher = teacher_model.eval().requires_grad_(False)
        nn.Module.to(self.teacher, args.device)
        vocabulary = shared_vocabulary(processing_class, processing_class, model, teacher_model)
        ends = end_of_text_ids(processing_class, model) | {end_id(processing_class, config.data.template)}
        self.pair = Pair(model, teacher_model, vocabulary, ends)
        start = torch.Generator().manual_seed(args.seed)
        self.objective = Objective(config.objective, start).to(args.device)
        self.rollout_state = initial_state(config.rollout, args.seed + args.process_index)
        self.samples_eval = list(eval_dataset or [])
        self.run_log = RunLog(Path(str(args.output_dir)))
        self.watch = TermWatch(config.objective)
        self.chunker = load_chunker(config.objective.span.chunker)
        self.bad_in_a_row = self.skipped = 0
        self._metrics: dict[str, float] = {}

    # What is trained on

    def get_batch_samples(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, epoch_iterator: Iterator[list[Sample]], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Counts]:
        """One optimizer step's micro-batches, written, revised and collated together, and what is in them."""
        self._started = time.perf_counter()
        self._stats: list[Stats] = []
        self._losses: list[Tensor] = []
        micro = list(islice(epoch_iterator, num_batches))
        references = [sample for samples in micro for sample in samples]
        with self.accelerator.autocast():
            step = self.state.global_step
            self._drawn = sequence_level(references, self.pair, self.config, self.rollout_state, step)
        started = time.perf_counter()
        rows = [row for place in range(len(references)) for row in self._rows(place, self._drawn)]
        self._drawn.seconds["spans"] = time.perf_counter() - started
        self._counts = self._over_ranks(count(rows), device)
        pad = self.tokenizer.pad_token_id
        self._batches = [
            collate(part, pad if isinstance(pad, int) else 0, self.config.objective.chunk_size)
            for part in split_by_length(rows, len(micro))
        ]
        return list(self._batches), self._counts

    def _rows(self, place: int, drawn: Drawn) -> list[Row]:
        """A reference is fitted; it, or the student's answer in its place, is distilled on."""
        reference, answer = drawn.references[place], drawn.student.get(place)
        fit = self.config.objective.sft_weight > 0 and bool(reference.response)
        if answer is None:
            return [Row(reference, self._spans(reference), fit, True)]
        rows = [Row(answer, self._spans(answer), False, True)]
        return [*rows, Row(reference, (-1,) * len(reference.response), True, False)] if fit else rows

    def _spans(self, sample: Sample) -> tuple[int, ...]:
        if self.config.objective.span_weight == 0 or self.config.objective.span.chunker == "none":
            return (-1,) * len(sample.response)
        return tuple(span_ids(sample.response, self.tokenizer, self.chunker))

    def _over_ranks(self, counts: Counts, device: torch.device) -> Counts:
        if self.args.world_size == 1:
            return counts
        total = self.accelerator.reduce(torch.tensor(counts, dtype=torch.float64, device=device), "sum")
        assert isinstance(total, Tensor)
        return Counts(*total.tolist())

    # The loss

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        return to_device(inputs, self.args.device)

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Tensor:
        """The objective on one micro-batch, scaled so that a step's micro-batches and ranks add up."""
        assert num_items_in_batch is not None and not return_outputs
        if not inputs["slices"]:
            return torch.zeros((), device=self.args.device, requires_grad=True)
        with self.accelerator.autocast():
            student, size = self.pair.student, self.pair.vocabulary
            loss, stats = batch_loss(self.objective, student, self.teacher, inputs, num_items_in_batch, size)
        self._stats.append(stats)
        self._losses.append(loss.detach())
        return loss * self.args.world_size

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The engine's optimizer, with the clip network as a parameter group of its own learning rate."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        parameters = list(self.objective.parameters())
        if fresh and parameters:
            rate = self.config.objective.dac.learning_rate
            optimizer.add_param_group({"params": parameters, "lr": rate, "weight_decay": 0.0})
        return optimizer

    # Around a step

    def before_optimizer(self) -> None:
        """Drop the gradients of a step whose loss or gradients are not finite, so that nothing is updated."""
        trained = [*self.pair.student.parameters(), *self.objective.parameters()]
        if all(bool(torch.isfinite(loss)) for loss in self._losses) and _finite_gradients(trained):
            self.bad_in_a_row = 0
            return
        for parameter in trained:
            parameter.grad = None
        self.skipped += 1
        self.bad_in_a_row += 1

    def after_step(self) -> None:
        """Write the step's records; stop a run that no longer yields finite losses."""
        self.objective.zero_grad()
        step = self.state.global_step
        stats = merge(self._stats)
        record = step_record(self._drawn, self._batches, stats, self._counts)
        record |= {"step": step, "loss": float(sum(self._losses, torch.zeros(()))), "skipped": self.skipped}
        record |= {"lmbda": self.rollout_state.schedule.share, "buffer": len(self.rollout_state.buffer)}
        record["seconds"] = time.perf_counter() - self._started
        record["tokens_per_second"] = (self._counts.sft + self._counts.token) / record["seconds"]
        self.run_log.append("steps", record)
        for revised in revision_records(self._batches, stats, self.tokenizer):
            self.run_log.append("revisions", {"step": step, **revised})
        self._metrics = {k: v for k, v in record.items() if k not in ("step", "loss")}
        for warning in self.watch.update(record):
            log.warning(warning)
        if self.bad_in_a_row >= BAD_STEPS_IN_A_ROW:
            last = checkpoint.latest(self.run_log.folder)
            raise NotFinite(
                f"loss or gradients were not finite in {self.bad_in_a_row} steps in a row, up to step {step}; "
                f"nothing was updated in them. Last good checkpoint: {last or 'none yet'}. "
                "Lower training.learning_rate, or objective.dac.learning_rate, and go on from there."
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every tracker gets the method's own figures beside the engine's."""
        super().log({**self._metrics, **logs} if "loss" in logs else logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Forward KL to the teacher and perplexity on the references; a rise moves the adaptive schedule."""
        samples = self.samples_eval if eval_dataset is None else list(eval_dataset)
        size = self.args.per_device_eval_batch_size
        with self.accelerator.autocast():
            scores = reference_scores(self.pair.student, self.teacher, samples, self.pair.vocabulary, size)
        weights = self.config.objective
        loss = weights.sft_weight * scores["nll"] + weights.token_weight * scores["kl"]
        self.rollout_state.schedule.update(loss)
        metrics = {"loss": loss, "kl": scores["kl"], "perplexity": math.exp(min(scores["nll"], 700.0))}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.run_log.append("evaluations", {"step": self.state.global_step, **metrics})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    _unfinished: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._unfinished or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the engine write beside the run's checkpoints, add our state, then move it in as a whole."""
        run = self.run_log.folder
        checkpoint.clear_unfinished(run)
        self._unfinished = run / checkpoint.UNFINISHED
        try:
            with checkpoint.saving(run):
                super()._save_checkpoint(model, trial)
                written = self._unfinished / f"{checkpoint.PREFIX}{self.state.global_step}"
                checkpoint.save_state(written, self.objective, self.rollout_state)
                checkpoint.finish(written, run, self.state)
        finally:
            self._unfinished = None
            checkpoint.clear_unfinished(run)
        best = self.state.best_model_checkpoint
        rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=False)

    def load_weights(self, folder: Path) -> None:
        """Student, clip network and rollout state as a checkpoint has them, without going on to train."""
        self._load_from_checkpoint(str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        checkpoint.load_state(Path(resume_from_checkpoint), self.objective, self.rollout_state)


class _Hooks(TrainerCallback):
    """The engine's moments that are ours."""

    def __init__(self, trainer: DistillTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.run_log.rewind(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.before_optimizer()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.after_step()


def _as_they_are(samples: list[Any]) -> list[Any]:
    return samples


def _finite_gradients(parameters: Sequence[nn.Parameter]) -> bool:
    """One look at the device for all of them."""
    sums = [p.grad.float().sum() for p in parameters if p.grad is not None]
    return not sums or bool(torch.isfinite(torch.stack([s.to(sums[0].device) for s in sums])).all())
