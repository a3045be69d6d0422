"""The method inside `transformers.Trainer`: one subclass, one step deep.

The engine brings optimizer, precision, accumulation, devices, trackers and checkpoints. We put in what it
cannot know: `get_batch_samples` lets the student write and SCRG revise for a whole accumulation window and
counts what will be trained on; `compute_loss` is the objective on one micro-batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import SequentialSampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from redistill import ranks
from redistill.accumulation import Accumulation
from redistill.bad_steps import BadSteps
from redistill.batch import Batch, Counts, Row, Spans, collate, count, no_spans, split_by_length, to_device
from redistill.budget import NO_END, SCHEDULE_STEPS, Spending, cost_of, follow_spending
from redistill.clip_optimizer import ClipOptimizer
from redistill.clock import Clock
from redistill.config import Config
from redistill.engines.choose import engine_of
from redistill.hooks import Hooks
from redistill.hub import HubTrainer
from redistill.in_step import readable
from redistill.losses.chunked import Stats
from redistill.models import ends_of, shared_vocabulary
from redistill.objective import Objective, batch_loss
from redistill.out_of_memory import Halving
from redistill.packing import packs
from redistill.phrases import SpanFinder
from redistill.rollout import Pair, initial_state, within_memory
from redistill.rows import rows_of
from redistill.runlog import RunLog, read
from redistill.sample import Sample
from redistill.scoring import mean_scores, reference_scores
from redistill.steplog import StepWatch, revision_records, step_record, together, trained_on
from redistill.stream import Stream
from redistill.teachers.local import frozen
from redistill.teachers.signal import Teacher
from redistill.trackers import RevisionTables
from redistill.wrapped import fits_whole, loss_inside, refuse_engines, shard

log = logging.getLogger(__name__)


class DistillTrainer(HubTrainer):
    """Trains `model` to be like `teacher_model` on `train_dataset`, with all three levels of the method.

    model: a loaded Hugging Face model, which may be wrapped by peft. teacher_model: another one over one vocabulary
        with it, or any `Teacher`.
    config: a `redistill.Config`; its `training` section becomes `TrainingArguments` as it is.
    processing_class: the tokenizer that made the samples.
    train_dataset, eval_dataset: `Sample`s with the data set's responses (none in prompt-only data); to train on, a
        `Stream` too.
    new_clock: makes the clock of each step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        teacher_model: PreTrainedModel | Teacher,
        config: Config,
        processing_class: PreTrainedTokenizerBase,
        train_dataset: Sequence[Sample],
        eval_dataset: Sequence[Sample] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        new_clock: Callable[[], Clock] = Clock,
    ):
        refuse_engines(config.training)
        if config.rollout.teacher_mix and any(each.teacher_prompt for each in train_dataset):
            raise ValueError(
                "rollout.teacher_mix has the teacher write behind the student's prompts, and these data give it "
                f"others (column {config.data.teacher_prompt}): set rollout.teacher_mix to 0."
            )
        unbounded = {"max_steps": NO_END} if Spending(config.budget).bounded else {}
        args = TrainingArguments(**{**config.training, **unbounded, "remove_unused_columns": False})
        super().__init__(
            model=model,
            args=args,
            data_collator=list,  # pyright: ignore[reportArgumentType]
            train_dataset=train_dataset,  # pyright: ignore[reportArgumentType]
            eval_dataset=list(eval_dataset) if eval_dataset else None,  # pyright: ignore[reportArgumentType]
            processing_class=processing_class,
            callbacks=[*(callbacks or []), Hooks(self), RevisionTables(self)],
        )
        # Our losses are sums over the whole window's token count: the engine must not divide them again.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.config = config
        self.tokenizer = processing_class
        if isinstance(teacher_model, PreTrainedModel):
            vocabulary = shared_vocabulary(processing_class, processing_class, model, teacher_model)
            # Sharded, it goes to the device layer by layer.
            whole = fits_whole(config.training, config.rollout.gather)
            device = args.device if whole else teacher_model.device
            teacher_model = frozen(teacher_model, vocabulary, device, config.teacher)
        self.teacher, vocabulary = teacher_model, teacher_model.vocabulary
        ends = ends_of(processing_class, model, config.data.template)
        if not (packed := packs(model, vocabulary)):
            log.info("batches are padded: the student does not keep several sequences of a row apart.")
        writer = engine_of(config, model, processing_class, args.world_size)
        self.pair = Pair(model, self.teacher, vocabulary, ends, packed, writer)
        start = torch.Generator().manual_seed(args.seed)
        self.objective = Objective(config.objective, start).to(args.device)
        self.clip_optimizer = ClipOptimizer(self.objective, config.objective.dac.learning_rate, args)
        self.rollout_state = initial_state(config.rollout, args.seed)
        self.samples_eval = list(eval_dataset or [])
        self.run_log = RunLog(Path(str(args.output_dir)))
        self.spending = Spending(config.budget)
        self.watch = StepWatch(config.objective)
        self.finder = SpanFinder(processing_class, config.objective.span.chunker)
        self.bad_steps = BadSteps()
        self.writing = Halving("writing answers", "rollout.batch_size", config.rollout.batch_size)
        self.reading = Halving("the loss", "per_device_train_batch_size")
        self.validating = Halving("validation", "per_device_eval_batch_size", args.per_device_eval_batch_size)
        self.new_clock = new_clock
        self._metrics: dict[str, float] = {}
        self._shard_teacher()

    def _shard_teacher(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            shard(self.teacher.model, self.accelerator)

    # What is trained on

    def get_batch_samples(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, epoch_iterator: Iterator[list[Sample]], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Callable[[], Counts]]:
        """One optimizer step's micro-batches of this rank, written, revised and collated together, and what gives the
        counts of all ranks."""
        self.clock = self.new_clock()
        with self.clock.phase("waiting"):
            window = ranks.gather(list(islice(epoch_iterator, num_batches)))
        # As one process would have them: the ranks take batches in turn.
        references = [s for turn in zip(*window, strict=True) for samples in turn for s in samples]
        state, step = self.rollout_state, self.state.global_step
        with self.accelerator.autocast():
            self._drawn = within_memory(
                self.writing, references, self.pair, self.config, state, step, self.progress(), self.clock
            )
        rows = rows_of(self._drawn.share(ranks.index(), ranks.size()), self.config.objective, self._spans)
        self._counts = cache(lambda: Counts(*ranks.total(count(rows))))
        self._step = Accumulation(self._trained(), self._collate)
        return [self._collate(part) for part in split_by_length(rows, len(window[0]))], self._counts

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The engine's; a stream is shuffled already."""
        data = self.train_dataset if train_dataset is None else train_dataset
        return (
            SequentialSampler(data) if isinstance(data, Stream) else super()._get_train_sampler(train_dataset)
        )

    def _collate(self, rows: Sequence[Row]) -> Batch:
        pad = self.tokenizer.pad_token_id
        return collate(rows, pad if isinstance(pad, int) else 0, packed=self.pair.packed)

    def _trained(self) -> list[nn.Parameter]:
        return [*self.pair.student.parameters(), *self.objective.parameters()]

    def progress(self) -> float:
        """Which share of the run is done, 0 to 1: of its budget, or of its steps."""
        if self.spending.bounded:
            return self.spending.fraction()
        return min(self.state.global_step / max(self.state.max_steps, 1), 1.0)

    def _spans(self, sample: Sample) -> Spans:
        if self.config.objective.span_weight == 0 or self.config.objective.span.chunker == "none":
            return no_spans
        return self.finder.ask(sample.response, self.clock)

    # The loss

    def _prepare_inputs(self, inputs: Batch) -> Batch:  # pyright: ignore[reportIncompatibleMethodOverride]
        return to_device(inputs, self.args.device)

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Callable[[], Counts] | None = None,
    ) -> Tensor:
        """The objective on one micro-batch, scaled so that a step's micro-batches and ranks add up."""
        assert num_items_in_batch is not None and not return_outputs
        counted, student, size = num_items_in_batch, self.pair.student, self.pair.vocabulary

        def work() -> tuple[Tensor, Stats]:
            with self.accelerator.autocast():
                return batch_loss(self.objective, student, self.teacher, inputs, counted, size)

        loss, stats = loss_inside(model, student, self.teacher.model, work)
        self._step.add(inputs, loss, stats)
        return loss * self.args.world_size

    def training_step(self, model: nn.Module, inputs: Batch, *rest: Any, **options: Any) -> Tensor:
        """The engine's, timed: both models' forward, the loss and the backward; in pieces if it must be."""
        whole: Any = super().training_step
        with self.clock.phase("loss"):
            return self._step.read(inputs, self.reading, lambda batch: whole(model, batch, *rest, **options))

    def ends_at(self, step: int) -> bool:
        """Whether the run is over after `step`; for a step that was logged."""
        if not self.spending.bounded:
            *_, end = self.set_initial_training_values(self.args, self.get_train_dataloader())
            return step >= end
        return Spending(self.config.budget).add([self.spent_up_to(step)]).fraction() >= 1

    def spent_up_to(self, step: int) -> dict[str, float]:
        """The cost of the steps up to `step`, as logged."""
        return ranks.on_first(lambda: cost_of(read(self.run_log.folder / "steps.jsonl"), step))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """The engine's; under a budget it follows what is spent, since the number of steps is not known."""
        bounded = self.spending.bounded
        scheduler = super().create_scheduler(SCHEDULE_STEPS if bounded else num_training_steps, optimizer)
        if bounded:
            follow_spending(scheduler, self.spending.fraction)
        return scheduler

    # Around a step

    def before_optimizer(self) -> None:
        """Drop the gradients of a step that is not finite, so that nothing is updated; update the clip network."""
        assert self.optimizer is not None
        self.clip_optimizer.gather(self.accelerator.scaler)
        self.bad_steps.leave_out(self._step.losses, self._trained(), self.zero_engine)
        self.clip_optimizer.step(self.optimizer)

    def after_step(self) -> None:
        """Write the step's records; stop a run that no longer yields finite losses."""
        step = self.state.global_step
        done, clock, counts = self._step, self.clock.record(), self._counts()
        trained = together(ranks.gather(trained_on(done.batches, done.stats, done.losses, clock["seconds"])))
        record = step_record(self._drawn, trained, counts, self.pair.eos)
        record |= {"step": step, "loss": trained.loss, "skipped": self.bad_steps.skipped}
        record |= {"lmbda": self.rollout_state.schedule.share, "buffer": len(self.rollout_state.buffer)}
        record |= {**clock, "seconds": trained.seconds}
        self.spending.add([record])
        record["progress"] = self.progress()
        record["tokens_per_second"] = (counts.sft + counts.token) / record["seconds"]
        self.run_log.append("steps", record)
        for revised in revision_records(trained, self.tokenizer):
            self.run_log.append("revisions", {"step": step, **revised})
        self._metrics = {k: v for k, v in record.items() if k not in ("step", "loss")}
        for warning in self.watch.update(record):
            log.warning(warning)
        self.bad_steps.stop_a_lost_run(step, self.run_log.folder)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Every tracker gets the method's own figures beside the engine's."""
        super().log({**self._metrics, **logs} if "loss" in logs else logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Forward KL to the teacher and perplexity on the references; a rise moves the adaptive schedule."""
        samples = self.samples_eval if eval_dataset is None else list(eval_dataset)
        student, size = self.pair.student, self.pair.vocabulary
        gather = self.config.rollout.gather
        with self.accelerator.autocast(), readable(student, self.teacher.model, gather=gather):
            own = ranks.mine(samples)
            found = self.validating.run(
                len(own), lambda rows: reference_scores(student, self.teacher, own, size, rows)
            )
        scores = mean_scores(ranks.gather(found))
        weights = self.config.objective
        loss = weights.sft_weight * scores["nll"] + weights.token_weight * scores["kl"]
        self.rollout_state.schedule.update(loss)
        metrics = {"loss": loss, "kl": scores["kl"], "perplexity": math.exp(min(scores["nll"], 700.0))}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.run_log.append("evaluations", {"step": self.state.global_step, **metrics})
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
