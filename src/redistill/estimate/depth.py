"""A walk through a step of deep models from two of shallow ones: between equal layers everything grows evenly."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from redistill.config import Config
from redistill.estimate.ledger import Account, Parts
from redistill.estimate.step import Walker
from redistill.estimate.weightless import Configs, Size, sizes

PHASES = (
    "rollout", "scoring", "revision", "policy", "student reads", "teacher reads", "loss", "backward", "optimizer",
    "saving", "validation", "measuring",
)  # fmt: skip
"""In the order of a run. The four from "student reads" are what the clock calls "loss"."""

OF_TEACHER = ("teacher", "teacher's cache", "teacher's prepacked")
_SHOWN = {"teacher's cache": "cache", "prepacked": "activations", "teacher's prepacked": "activations"}


@dataclass(frozen=True)
class Phase:
    """parts: bytes by part when the phase holds most. flops: of its matrix products, as often as a step has it."""

    name: str
    parts: Parts
    flops: int

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Walk:
    """A step's phases, and the two models."""

    phases: tuple[Phase, ...]
    student: Size
    teacher: Size


def walk(config: Config, configs: Configs, device: str) -> Walk:
    """The step of `config` on a kind of device ("cpu", "cuda").

    Walked through with two and with three layers of each model (with as many times that as layers differ), and with
    what a layer adds for each of the others: bytes and operations are straight lines in the number of layers, in each
    stretch of a phase that is split between them. Where the bytes of the whole models do not lie on that line (first
    layers of another kind), and for shallow models, all layers are walked through.
    Raises ValueError for models or an optimizer that cannot be made.
    """
    whole = sizes(config, configs)
    every = period(configs.student), period(configs.teacher)
    depths = configs.student.num_hidden_layers, configs.teacher.num_hidden_layers
    more = [depth / layers - 2 for depth, layers in zip(depths, every, strict=True)]
    found = None
    if min(more) > 1:
        shallow = [of_depths(configs, *(times * layers for layers in every)) for times in (2, 3)]
        two, three = (sizes(config, each) for each in shallow)
        lines = (_line(a.bytes, b.bytes, times) for a, b, times in zip(two, three, more, strict=True))
        if [*lines] == [each.bytes for each in whole]:
            accounts = [Walker(config, each, device, every).walk() for each in shallow]
            found = extrapolated(accounts[0], accounts[1], *more)
    if found is None:
        found = Walker(config, configs, device, every).walk()
    return Walk(tuple(_phase(name, found[name]) for name in PHASES if name in found), *whole)


def _phase(name: str, account: Account) -> Phase:
    parts = max(account.stretches, key=lambda each: sum(each.values()))
    joined = Counter[str]()
    for part, size in parts.items():
        joined[_SHOWN.get(part, part)] += size
    return Phase(name, dict(joined), account.flops.total())


def extrapolated(
    two: dict[str, Account], three: dict[str, Account], student: float, teacher: float
) -> dict[str, Account] | None:
    """The accounts for as many times more layers of student and teacher; None where the two are not of one form."""
    if {name: len(each.stretches) for name, each in two.items()} != {
        name: len(each.stretches) for name, each in three.items()
    }:
        return None

    def line(before: dict[str, int], after: dict[str, int]) -> Counter[str]:
        return Counter(
            {
                name: _line(
                    before.get(name, 0), after.get(name, 0), teacher if name in OF_TEACHER else student
                )
                for name in {*before, *after}
            }
        )

    return {
        name: Account(
            tuple(
                dict(+line(one, other))
                for one, other in zip(two[name].stretches, three[name].stretches, strict=True)
            ),
            line(two[name].flops, three[name].flops),
        )
        for name in two
    }


def _line(two: int, three: int, more: float) -> int:
    return two + round(more * (three - two))


def period(config: PreTrainedConfig) -> int:
    """After how many layers what the config says of each repeats; all of them where it does not."""
    depth, found = config.num_hidden_layers, 1
    for value in _by_layer(config).values():
        repeats = (n for n in range(1, depth) if value[:-n] == value[n:])
        found = math.lcm(found, next(repeats, depth))
    return min(found, depth)


def of_depths(configs: Configs, student: int, teacher: int) -> Configs:
    """Both models with their first layers only."""
    return replace(
        configs, student=_with_depth(configs.student, student), teacher=_with_depth(configs.teacher, teacher)
    )


def _with_depth(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    short = copy.deepcopy(config)
    for name, value in _by_layer(config).items():
        setattr(short, name, value[:depth])
    short.num_hidden_layers = depth
    return short


def _by_layer(config: PreTrainedConfig) -> dict[str, list[object]]:
    depth = config.num_hidden_layers
    return {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == depth and depth > 1
    }
