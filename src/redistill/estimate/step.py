"""One training step of a recipe at its limits, walked through without memory: what each phase holds and computes.

At its limits: every prompt has `data.max_prompt_length` tokens, every answer `rollout.max_completion_length`, every
batch is full, and the student's answers take the references' places. What depends on numbers and not on shapes (which
rows end first, where an answer is cut) is set to the most it can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from redistill.batch import Batch, Counts, Row, collate, count
from redistill.cache import make_room
from redistill.config import Config
from redistill.estimate.engine import autocast_of, checkpoint_layers, optimizer_of
from redistill.estimate.ledger import Account, Ledger
from redistill.estimate.stand_in import SizedObjective, holding_layers, laid_out, loss_needs, narrowed
from redistill.estimate.weightless import (
    Configs,
    brought_to_cpu,
    layers_of,
    output_rows,
    student_of,
    teacher_of,
)
from redistill.generate import Decoding, answering, decode_one_token, prefill, select_rows
from redistill.models import head_of, plain_model
from redistill.objective import batch_loss, block_size
from redistill.rollout import sampling
from redistill.rows import distils
from redistill.sample import Sample
from redistill.sampling import Sampling, mixed_logits, sample
from redistill.scoring import Scorer
from redistill.teachers.local import LocalTeacher


class Walker:
    """Walks through the phases of a step of `config` on a kind of device ("cpu", "cuda").

    Arithmetic: every token of an answer as if it were the last, and a corrected answer as if the error were in its
    middle. every: phases are split after so many layers of student and teacher, and before as many from the end.
    Errors: ValueError for models that cannot be made of `configs`.
    """

    def __init__(self, config: Config, configs: Configs, device: str, every: tuple[int, int] = (1, 1)):
        self.config, self.device, self.ledger = config, device, Ledger()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.teacher, self.student = teacher_of(config, configs).eval(), student_of(config, configs)
        with self._fake, self.ledger:
            for who, model in (("teacher", self.teacher), ("student", self.student)):
                with self.ledger.noting(who):
                    brought_to_cpu(model)
        self.every: dict[str, int] = dict(zip(("student", "teacher"), every, strict=True))
        self.vocabulary = min(output_rows(self.student), output_rows(self.teacher))
        self.trained = [each for each in self.student.parameters() if each.requires_grad]
        training, rollout = config.training, config.rollout
        self.batch = int(training.get("per_device_train_batch_size", 8))
        self.micro = int(training.get("gradient_accumulation_steps", 1))
        self.rows = min(rollout.batch_size, self.batch * self.micro)
        self.batches = -(-self.batch * self.micro // self.rows)
        self.writes = rollout.lmbda > 0
        self._reading = False

    def walk(self) -> dict[str, Account]:
        """Every phase, by name. Raises ValueError for an optimizer that cannot be made."""
        config = self.config
        needs = loss_needs(config.objective, self.vocabulary)
        optimizer = optimizer_of(config.training, self.student)
        with self._fake, self.ledger, self._hooks():
            self._measuring(self.teacher)
            kept = self._optimizer(*optimizer)
            if self.writes:
                with autocast_of(config.training), self._prepacked(self.student):
                    kept = kept, self._rollout()
                    self._scoring()
            self._loss(needs)
            self._drop_gradients()
            with self.ledger.phase("saving"):
                pass
            if config.training.get("eval_strategy", "no") != "no":
                with self.ledger.phase("validation", 0), autocast_of(config.training):
                    self._score(int(config.training.get("per_device_eval_batch_size", 8)))
            self._measuring(self.student)
            del kept
        return self.ledger.accounts

    # The phases

    def _rollout(self) -> list[Decoding]:
        """The student writes. Returns what an engine keeps for the next time."""
        rollout, engine = self.config.rollout, self.config.rollout.engine
        if engine == "vllm":
            return []
        models = [self.student, *([self.teacher] if rollout.teacher_mix else [])]
        rows = rollout.batch_size if engine == "static" else self.rows
        with self.ledger.phase("rollout", self.batches), self._prepacked(*models[1:]):
            states = self._write(models, rows, rollout.max_completion_length, rollout.teacher_mix)
        return states if engine == "static" else []

    def _scoring(self) -> None:
        """SCRG, which writes on from what was read; and the reading for the policy gradient."""
        revision = self.config.revision
        if revision.rounds:
            looks = revision.rounds + (revision.accept == "better")
            self.ledger.begin()
            scorer = self._score(self.rows, self.config.rollout.engine == "loop", again=looks > 1)
            self.ledger.end("scoring", self.batches * looks)
            state = scorer.own.lend(last=looks == 1)
            if state is not None:
                self._write_on(state)
                self.ledger.end("revision", self.batches * revision.rounds)
            del scorer, state
        if self.config.objective.policy.weight:
            with self.ledger.phase("policy", self.batches):
                self._score(self.rows)

    def _loss(self, needs: tuple[int, int]) -> None:
        """The last of a step's micro-batches, which finds the gradients of those before it."""
        if self.micro > 1:
            self._make_gradients()
        batch, counts = self._batch()
        heads = [head_of(each, self.vocabulary) for each in (self.student, self.teacher)]
        beside = narrowed(heads, self.config.training) if self.device == "cuda" else 0
        objective = SizedObjective(self.config.objective, needs, beside)
        block = block_size(self.device, self.vocabulary)
        self.student.train()
        checkpoint_layers(self.config.training, self.student)
        self.ledger.begin()
        self._reading = True
        with autocast_of(self.config.training):
            teacher = LocalTeacher(self.teacher, self.vocabulary)
            loss, _ = batch_loss(
                objective, self.student, teacher, batch, lambda: counts, self.vocabulary, block
            )
        self._reading, self.ledger.part = False, "activations"
        self.ledger.end("loss", self.micro)
        loss.backward()
        self.ledger.end("backward", self.micro)

    def _optimizer(self, kind: Any, options: dict[str, Any]) -> Any:
        """Its first step, in which it makes what it keeps."""
        self._make_gradients()
        optimizer = kind(self.trained, **options)
        with self.ledger.phase("optimizer"), self.ledger.noting("optimizer"):
            for each in self.trained:
                assert each.grad is not None
                each.grad.float().sum()  # `bad_steps.py` looks at them
            optimizer.step()
        self._drop_gradients()
        return optimizer

    def _measuring(self, model: nn.Module) -> None:
        """The answers that a model writes before training, or after it."""
        settings, rollout = self.config.evaluation, self.config.rollout
        if "evaluation" in self.config.model_fields_set:
            with self.ledger.phase("measuring", 0), self._prepacked(model):
                self._write([model], settings.batch_size, settings.max_new_tokens)
        if self.config.data.responses == "teacher" and model is self.teacher:
            with self.ledger.phase("measuring", 0), self._prepacked(model):
                self._write([model], rollout.batch_size, rollout.max_completion_length)

    # What they are made of

    def _write(
        self, models: Sequence[nn.Module], rows: int, answer: int, share: float = 0.0
    ) -> list[Decoding]:
        """The longest answers to the longest prompts; where the models stand before the last token."""
        prompts = [(0,) * self.config.data.max_prompt_length] * rows
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(answering(model))
            states = [prefill(model, prompts)[1] for model in models]
            for state in states:
                make_room(state.cache)
            states = [self._grown(state, answer - 2) for state in states]
            self._next_token(models, states, share, times=answer - 1)
        return states

    def _prepacked(self, *models: nn.Module) -> AbstractContextManager[None]:
        found = {("" if each is self.student else "teacher's ") + "prepacked": each for each in models}
        return laid_out(self.ledger, found if self.device == "cpu" else {})

    def _write_on(self, state: Decoding) -> None:
        """Behind what was read and as much again as fits into the room that it is then given."""
        student, half = self.student, self.config.rollout.max_completion_length // 2
        state = select_rows(state, torch.arange(len(state.position)))
        with answering(student):
            _, state = decode_one_token(student, torch.zeros_like(state.position), state)
            make_room(state.cache)
            self._next_token([student], [state], 0.0, times=half)

    def _next_token(
        self, models: Sequence[nn.Module], states: Sequence[Decoding], share: float, times: int
    ) -> None:
        """One of `times`."""
        before, tokens = self.ledger.flops.copy(), torch.zeros_like(states[0].position)
        read = [decode_one_token(each, tokens, state) for each, state in zip(models, states, strict=True)]
        logits = [each[:, : self.vocabulary] for each, _ in read]
        with self.ledger.noting("logits"):
            together = mixed_logits(logits[0], logits[1], share) if share else logits[0]
            sample(together, torch.zeros(len(tokens)), sampling(self.config.rollout))
        once = self.ledger.flops - before
        self.ledger.flops += Counter({who: (times - 1) * count for who, count in once.items()})

    def _grown(self, state: Decoding, by: int) -> Decoding:
        """The state after `by` tokens more."""
        if by <= 0:
            return state
        with self.ledger.noting("cache"):
            for layer in holding_layers(state.cache):
                rows, heads, _, width = layer.keys.shape
                keys = layer.keys.new_empty(rows, heads, by, width)
                layer.update(keys, keys)
        mask = torch.cat([state.mask, state.mask.new_ones(len(state.mask), by)], dim=-1)
        return Decoding(state.cache, mask, state.position + by)

    def _score(self, rows: int, keep: bool = False, again: bool = False) -> Scorer:
        """Both models read answers. What is given holds what is held while they are revised."""
        samples, chance = [self._sample()] * rows, torch.zeros(self.config.rollout.max_completion_length)
        how = Sampling(1.0 if self.config.revision.teacher_token == "sample" else 0.0)
        scorer = Scorer(self.student, self.teacher, self.vocabulary, how, keep=keep, again=again)
        scorer.score(samples, range(rows), [0] * rows, [chance] * rows)
        return scorer

    def _sample(self) -> Sample:
        prompt, answer = self.config.data.max_prompt_length, self.config.rollout.max_completion_length
        own = (0,) * (self.config.data.max_teacher_prompt_length or 0)
        return Sample((0,) * prompt, (0,) * answer, teacher_prompt=own)

    def _batch(self) -> tuple[Batch, Counts]:
        """The largest micro-batch: where the student writes, its answers and the references that they replace."""
        objective, one = self.config.objective, self._sample()
        fits, spans = objective.sft_weight > 0, (0,) * len(one.response)
        rows = [Row(one, fits and not self.writes, distils(objective), lambda: spans)] * self.batch
        if self.writes and fits:
            rows += [Row(one, True, False)] * self.batch
        batch = collate(rows, 0)
        models = (self.student, self.teacher)
        if {plain_model(each).config._attn_implementation for each in models} <= {"sdpa", "eager"}:
            # With a mask, as where some rows hold several sequences.
            shape = batch["input_ids"].shape
            batch["position_ids"] = torch.arange(shape[1]).expand(shape)
        return batch, count(rows)

    def _make_gradients(self) -> None:
        with self.ledger.noting("gradients"):
            for each in self.trained:
                each.grad = torch.empty_like(each)

    def _drop_gradients(self) -> None:
        for each in self.student.parameters():
            each.grad = None

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        """Say what caches and gradients are for, who reads and when that ends; split phases between the layers."""
        with ExitStack() as hooks:
            for who, model in {"student": self.student, "teacher": self.teacher}.items():
                decoder, layers, every = plain_model(model).base_model, layers_of(model), self.every[who]
                for hook in (
                    decoder.register_forward_pre_hook(partial(self._reads, who)),
                    decoder.register_forward_hook(partial(self._has_read, who)),
                    layers[every - 1].register_forward_hook(lambda *_: self.ledger.split()),
                    layers[-every].register_forward_pre_hook(self._splits_backward),
                ):
                    hooks.callback(hook.remove)
            for each in self.trained:
                hooks.callback(each.register_post_accumulate_grad_hook(self._accumulated).remove)
            yield

    def _reads(self, who: str, *_: Any) -> None:
        self.ledger.who = who

    def _has_read(self, who: str, _module: Any, _ids: Any, output: Any) -> None:
        self.ledger.who = "student"
        part = "cache" if who == "student" else "teacher's cache"
        for layer in holding_layers(output.get("past_key_values")):
            self.ledger.move([layer.keys, layer.values], part)
        if self._reading:
            self.ledger.end(f"{who} reads", self.micro)
            last = who == "teacher" or not distils(self.config.objective)
            self.ledger.part = "logits" if last else "activations"

    def _splits_backward(self, _module: Any, given: tuple[Any, ...]) -> None:
        if given and given[0].requires_grad:
            given[0].register_hook(lambda _: self.ledger.split())

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.ledger.move([parameter.grad], "gradients")
