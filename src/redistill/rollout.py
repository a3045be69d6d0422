"""The sequence level: what the student is trained on in one optimizer step.

References come in; for a share of them (`lmbda`) the student's own answer takes the place of the reference:
a fresh one, corrected by SCRG, or an earlier one from the replay buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from redistill import ranks
from redistill.clock import Clock
from redistill.config import Config, RevisionSettings, RolloutSettings
from redistill.engines.writer import Loop, Request, Writer
from redistill.generate import draw_uniforms
from redistill.in_step import readable
from redistill.out_of_memory import Halving
from redistill.policy import with_advantages
from redistill.prepacked import prepacked
from redistill.replay import ReplayBuffer, ShareSchedule, capacity
from redistill.revision import revise_samples
from redistill.sample import Sample
from redistill.sampling import Sampling
from redistill.scoring import Score, score
from redistill.teachers.signal import Teacher


@dataclass(frozen=True)
class Pair:
    """Student and teacher over one vocabulary. eos: the ids that end a text. packed: whether the student `packs`.
    writer: who writes the student's answers; None: our own loop."""

    student: PreTrainedModel
    teacher: Teacher
    vocabulary: int
    eos: frozenset[int]
    packed: bool = False
    writer: Writer | None = None


@dataclass
class RolloutState:
    """What a resumed run must find again, the same on all ranks: buffer, schedule and random generator."""

    buffer: ReplayBuffer
    schedule: ShareSchedule
    generator: torch.Generator


@dataclass(frozen=True)
class Drawn:
    """What one optimizer step is trained on.

    references: the data set's samples of this step. student: index into them -> the student's answer that is
    distilled on in that reference's place.
    """

    references: tuple[Sample, ...]
    student: dict[int, Sample]

    def share(self, rank: int, of: int) -> Drawn:
        """What one of several ranks trains on: short and long samples in like number, each in one share."""
        ordered = sorted(range(len(self.references)), key=self._length)
        places = sorted(ordered[rank::of])
        student = {to: self.student[at] for to, at in enumerate(places) if at in self.student}
        return Drawn(tuple(self.references[place] for place in places), student)

    def _length(self, place: int) -> int:
        sample = self.student.get(place, self.references[place])
        return len(sample.prompt) + len(sample.response)


def initial_state(rollout: RolloutSettings, seed: int) -> RolloutState:
    """An empty buffer, the schedule at its start and a generator seeded with `seed`."""
    if rollout.schedule == "adaptive":
        schedule = ShareSchedule(
            rollout.schedule_start, rollout.lmbda, rollout.schedule_step, rollout.schedule_epsilon
        )
    else:
        schedule = ShareSchedule(rollout.lmbda, rollout.lmbda)
    return RolloutState(ReplayBuffer(capacity(rollout)), schedule, torch.Generator().manual_seed(seed))


def sequence_level(
    references: Sequence[Sample],
    pair: Pair,
    config: Config,
    state: RolloutState,
    step: int,
    progress: float = 0.0,
    clock: Clock | None = None,
) -> Drawn:
    """Choose for each reference whether the student's answer takes its place, and write, replay and revise it.

    A reference without a response (prompt-only data) always gets a student's answer. Fresh answers go to the
    buffer after their revision; replayed ones are revised anew only if `revision.revise_replayed`. step: how
    many optimizer steps were done before; progress: which share of the run that is. clock: gets the phases rollout,
    scoring, revision and policy.

    In a run of several processes `references` are those of all of them, and so is what comes back: every rank draws
    the same lots and random numbers, writes and revises its share, and gets the others' (see `ranks.divided`).
    """
    rollout, revision, clock = config.rollout, config.revision, clock or Clock()
    generator, per = state.generator, rollout.per
    share = state.schedule.share if step >= rollout.warmup_steps else 0.0
    chosen = _lots(len(references), share, per, generator)
    places = [place for place, sample in enumerate(references) if chosen[place] or not sample.response]
    earlier = _lots(len(places), replay_share(rollout, progress), per, generator)
    replay_places = [place for place, old in zip(places, earlier, strict=True) if old][: len(state.buffer)]
    replayed = [replace(s, origin="replay") for s in state.buffer.draw(len(replay_places), generator)]
    fresh_places = [place for place in places if place not in set(replay_places)]

    models = (pair.student, pair.teacher.model) if places else ()
    with readable(*models, gather=rollout.gather), prepacked(*models[:1]):
        with clock.phase("rollout"):
            if pair.writer and places:
                pair.writer.sync()
            fresh = write(pair, [references[place] for place in fresh_places], rollout, generator)
        if revision.revise_replayed:
            fresh_and_old = revise(pair, [*fresh, *replayed], rollout, revision, generator, clock)
            fresh, replayed = fresh_and_old[: len(fresh)], fresh_and_old[len(fresh) :]
        else:
            fresh = revise(pair, fresh, rollout, revision, generator, clock)
        if config.objective.policy.weight and fresh:
            with clock.phase("policy"):
                fresh = judge(pair, fresh, config)

    state.buffer.push(fresh)
    student = dict(zip([*replay_places, *fresh_places], [*replayed, *fresh], strict=True))
    return Drawn(tuple(references), student)


def within_memory(
    halving: Halving,
    references: Sequence[Sample],
    pair: Pair,
    config: Config,
    state: RolloutState,
    step: int,
    progress: float,
    clock: Clock,
) -> Drawn:
    """`sequence_level`; where the memory does not suffice, once more from the same random numbers, with fewer rows at
    once: the same answers, up to rounding."""
    before = state.generator.get_state()

    def attempt(rows: int) -> Drawn:
        rollout = config.rollout.model_copy(update={"batch_size": rows})
        smaller = config.model_copy(update={"rollout": rollout})
        return sequence_level(references, pair, smaller, state, step, progress, clock)

    return halving.run(len(references), attempt, lambda: state.generator.set_state(before))


def replay_share(rollout: RolloutSettings, progress: float) -> float:
    """The share of student answers that come from the buffer. rising: DistiLLM's (its code calls it by the
    share of new answers, "decreasing")."""
    return rollout.replay_ratio * (progress if rollout.replay_schedule == "rising" else 1.0)


def sampling(rollout: RolloutSettings) -> Sampling:
    """How the student writes during training."""
    return Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p)


def write(
    pair: Pair, references: Sequence[Sample], rollout: RolloutSettings, generator: torch.Generator
) -> list[Sample]:
    """The student's own answers to the prompts of `references`."""
    partner = None
    if rollout.teacher_mix:
        if pair.teacher.model is None:
            raise ValueError("rollout.teacher_mix needs the teacher's model in this process: set it to 0.")
        partner = (pair.teacher.model, rollout.teacher_mix)
    how, steps = sampling(rollout), rollout.max_completion_length
    uniforms = draw_uniforms(len(references), steps, how, generator)

    def answer(places: list[int]) -> list[tuple[int, ...]]:
        asked = Request(
            [references[place].prompt for place in places],
            limits=[steps] * len(places),
            sampling=how,
            eos=pair.eos,
            vocabulary=pair.vocabulary,
            uniforms=uniforms[places],
            batch_size=rollout.batch_size,
        )
        return (pair.writer or Loop(pair.student, partner)).write(asked)

    return [
        Sample(sample.prompt, said, "rollout", sample.source, teacher_prompt=sample.teacher_prompt)
        for sample, said in zip(references, ranks.divided(len(references), answer), strict=True)
    ]


def revise(
    pair: Pair,
    samples: Sequence[Sample],
    rollout: RolloutSettings,
    revision: RevisionSettings,
    generator: torch.Generator,
    clock: Clock,
) -> list[Sample]:
    """SCRG on `samples`, as the settings say; nothing is done with `rounds` 0."""
    if revision.rounds == 0 or not samples:
        return list(samples)
    return revise_samples(
        pair.student,
        pair.teacher,
        samples,
        rounds=revision.rounds,
        teacher_token=revision.teacher_token,
        sampling=sampling(rollout),
        generator=generator,
        eos=pair.eos,
        vocabulary=pair.vocabulary,
        max_completion_length=rollout.max_completion_length,
        batch_size=rollout.batch_size,
        clock=clock,
        packed=pair.packed,
        writer=pair.writer,
        accept=revision.accept,
    )


def judge(pair: Pair, samples: Sequence[Sample], config: Config) -> list[Sample]:
    """`samples` with what MiniLLM's policy gradient needs of them; one forward of both models."""

    def read(places: list[int]) -> list[Score]:
        return score(
            pair.student,
            pair.teacher,
            [samples[place] for place in places],
            vocabulary=pair.vocabulary,
            teacher_token="argmax",
            generator=None,
            batch_size=config.rollout.batch_size,
            packed=pair.packed,
        )

    scores = ranks.divided(len(samples), read)
    return with_advantages(samples, scores, config.objective.policy, config.rollout.teacher_mix)


def _lots(count: int, probability: float, per: str, generator: torch.Generator) -> list[bool]:
    drawn = torch.rand(1 if per == "step" else count, generator=generator) < probability
    return drawn.expand(count).tolist()
