"""Whether a recipe fits into a given memory, and which switches make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from redistill.config import Config
from redistill.estimate.depth import Phase, Walk
from redistill.estimate.machine import SHARDINGS, TEACHER_SAVERS, Machine, Sharding, Walks, peak
from redistill.estimate.savers import SAVERS, Overrides, Saver, levels, with_settings
from redistill.estimate.weightless import read_configs
from redistill.replay import most_bytes


@dataclass(frozen=True)
class Switched:
    """A saver alone, as far as it goes, and the phases under it. settings: none where it is no setting. changes: of
    the result. available: this version has it."""

    name: str
    settings: Overrides
    time: str
    changes: str
    available: bool
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class Suggestion:
    """What makes it fit: settings, how the processes share the student, and the phases then. fits: otherwise it is
    all that there is, and too little."""

    settings: Overrides
    sharding: Sharding
    phases: tuple[Phase, ...]
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """A recipe on a machine, all of it for one process. savers: each alone. suggestion: None where it fits, or where
    the memory is not known. rate: operations per second of a matrix product, None if not known.
    replay: bytes of a full replay buffer, in the host's memory whatever the device."""

    machine: Machine
    walk: Walk
    phases: tuple[Phase, ...]
    savers: tuple[Switched, ...]
    suggestion: Suggestion | None
    rate: float | None
    replay: int = 0

    @property
    def peak(self) -> int:
        """Bytes."""
        return peak(self.phases)

    @property
    def fits(self) -> bool | None:
        """With room to spare; None where the memory is not known."""
        return None if self.machine.memory is None else self.peak <= self.machine.room

    @property
    def flops(self) -> int:
        """Of the matrix products of one step."""
        return sum(each.flops for each in self.phases)

    @property
    def floor(self) -> float | None:
        """The seconds that they take at `rate`."""
        return None if self.rate is None else self.flops / self.rate

    def record(self) -> dict[str, Any]:
        """All of it as JSON values: `docs/run-folder.md` names the keys."""
        found = self.suggestion
        return {
            "device": self.machine.device,
            "processes": self.machine.processes,
            "memory_bytes": self.machine.memory,
            "student_parameters": self.walk.student.parameters,
            "trained_parameters": self.walk.student.trained,
            "teacher_parameters": self.walk.teacher.parameters,
            **_lines(self.phases),
            "replay_bytes": self.replay,
            "fits": self.fits,
            "flops": self.flops,
            "matmul_flops_per_second": self.rate,
            "floor_seconds": self.floor,
            "savers": [
                {**asdict(each), "settings": list(each.settings), **_lines(each.phases)}
                for each in self.savers
            ],
            "suggestion": found
            and {
                "settings": list(found.settings),
                "sharding": found.sharding.name if self.machine.processes > 1 else None,
                "fits": found.fits,
                **_lines(found.phases),
            },
        }


def _lines(phases: tuple[Phase, ...]) -> dict[str, Any]:
    return {
        "phases": [{**asdict(each), "peak_bytes": each.peak} for each in phases],
        "peak_bytes": peak(phases),
    }


def estimate(config: Config, machine: Machine, rate: float | None = None, savers: bool = False) -> Estimate:
    """What a step of `config` holds on `machine`, and where that is too much what to switch.

    savers: what each of them brings, too. Raises ValueError for models whose config cannot be had or used.
    """
    walks = Walks(read_configs(config), machine)
    phases = walks.phases(config)
    too_much = machine.memory is not None and peak(phases) > machine.room
    return Estimate(
        machine,
        walks.walk(config),
        phases,
        tuple(_each_alone(config, walks)) if savers else (),
        suggest(config, walks) if too_much else None,
        rate,
        most_bytes(config),
    )


def _each_alone(config: Config, walks: Walks) -> Iterator[Switched]:
    """Every way to share the student, every saver, and those that are to come."""
    for sharding in SHARDINGS[1:] if walks.machine.processes > 1 else ():
        phases = walks.phases(config, sharding)
        name, time = f"student shared by {sharding.name}", "talk between GPUs"
        time += ", for every token" * bool(sharding.settings)
        yield Switched(name, sharding.settings, time, "nothing", True, phases)
    for saver in SAVERS:
        settings = levels(saver, config, walks.machine.device)[-1]
        if settings:
            phases = walks.phases(with_settings(config, settings))
            yield Switched(saver.name, settings, saver.time, saver.changes, True, phases)
    for each in TEACHER_SAVERS:
        yield Switched(each.name, each.settings, "", "", bool(each.settings), walks.saved(config, each))


def suggest(config: Config, walks: Walks) -> Suggestion:
    """The cheapest that fits.

    Cheapest: nothing that changes the training if it can be; then as little sharing between processes as can be; then
    the dearest saver is left out if it can be, then the next, and of those that stay as few steps are taken as will
    do. Savers only ever save, so this is the least set in that order, found in a few walks.
    """
    ways = (_of("nothing", "rounding"), _of("nothing", "rounding", "training"))
    shardings = SHARDINGS if walks.machine.processes > 1 else SHARDINGS[:1]
    found = [Suggestion((), shardings[0], walks.phases(config), False)]
    for savers in ways:
        for sharding in shardings:
            found.append(_with(config, walks, savers, sharding))
            if found[-1].fits:
                return found[-1]
    return min(found, key=lambda each: peak(each.phases))


def _of(*changes: str) -> list[Saver]:
    return [each for each in SAVERS if each.changes in changes]


def _with(config: Config, walks: Walks, savers: Sequence[Saver], sharding: Sharding) -> Suggestion:
    steps = [levels(each, config, walks.machine.device) for each in savers]
    taken = [len(each) - 1 for each in steps]

    def phases(taken: Sequence[int]) -> tuple[Phase, ...]:
        return walks.phases(with_settings(config, _together(steps, taken)), sharding)

    def fits(taken: Sequence[int]) -> bool:
        return peak(phases(taken)) <= walks.machine.room

    for place, saver in enumerate(savers):
        without = [*taken[:place], 0, *taken[place + 1 :]]
        if saver.two_edged and peak(phases(without)) <= peak(phases(taken)):
            taken = without
    if fits(taken):
        for place in reversed(range(len(savers))):
            fewer = ([*taken[:place], level, *taken[place + 1 :]] for level in range(taken[place]))
            taken = next((each for each in fewer if fits(each)), taken)
    settings = (*_together(steps, taken), *sharding.settings)
    return Suggestion(settings, sharding, phases(taken), fits(taken))


def _together(steps: Sequence[Sequence[Overrides]], taken: Sequence[int]) -> Overrides:
    return tuple(override for each, level in zip(steps, taken, strict=True) for override in each[level])
