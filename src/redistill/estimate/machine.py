"""Where a step is to run: how much memory a process has there, how several share a student, and what is to come."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from redistill.config import Config
from redistill.estimate.depth import Phase, Walk, walk
from redistill.estimate.ledger import Parts
from redistill.estimate.weightless import Configs
from redistill.meters import matmul_rate

# What the estimate is held to against measured peaks (docs/memory.md); so much room is left.
ACCURACY = 0.15
# Held by CUDA itself in each process. Ours, not measured.
CUDA_ITSELF = 2**29


@dataclass(frozen=True)
class Machine:
    """device: "cpu" or "cuda". processes: one for each GPU, or 1. memory: bytes of each, None if not known. itself:
    bytes that a process holds before it has any tensor."""

    device: str
    processes: int
    memory: int | None
    itself: int

    @property
    def room(self) -> float:
        """Bytes that an estimate may come to."""
        assert self.memory is not None
        return self.memory / (1 + ACCURACY)


@dataclass(frozen=True)
class TeacherSaver:
    """A saver of the teacher's bytes alone, which are reckoned and not walked. settings: what switches it on; none
    where this version does not have it. bits: of each parameter, None where they stay. layers: so many of the largest
    are in one place at once, beside the rest."""

    name: str
    settings: tuple[str, ...] = ()
    bits: float | None = None
    layers: int = 0

    def size(self, teacher: int, walk: Walk) -> int:
        """Bytes, where the teacher has `teacher` now."""
        whole = teacher if self.bits is None else round(walk.teacher.parameters * self.bits / 8)
        return min(teacher, whole + self.layers * walk.teacher.layer)


@dataclass(frozen=True)
class Sharding:
    """How several processes share a student: the parts of which each holds an equal share; and what starts it.
    settings: what it needs besides."""

    name: str
    shared: tuple[str, ...]
    launch: str
    settings: tuple[str, ...] = ()


TEACHER_SAVERS: tuple[TeacherSaver, ...] = (
    TeacherSaver("teacher in 8 bits", ("teacher.load_in_8bit=true",), bits=8),
    # A scale of 16 bits for every 64 numbers.
    TeacherSaver("teacher in 4 bits", ("teacher.load_in_4bit=true",), bits=4.25),
    TeacherSaver("teacher read once and kept", ("teacher.cache=FOLDER", "rollout.lmbda=0"), bits=0),
    TeacherSaver("teacher on the host, layer by layer", bits=0, layers=2),
)

_ALL, _FSDP2 = ("optimizer", "gradients", "student", "teacher"), "--use_fsdp --fsdp_version 2"

_ZERO, _IN_STEP = "--use_deepspeed --zero_stage {}", "rollout.gather=false"

SHARDINGS: tuple[Sharding, ...] = (
    Sharding("DDP", (), "--multi_gpu"),
    Sharding("ZeRO-2", ("optimizer", "gradients"), _ZERO.format(2)),
    Sharding("FSDP2", _ALL, _FSDP2),
    Sharding("ZeRO-3", _ALL, _ZERO.format(3)),
    Sharding("FSDP2, answers in step", _ALL, _FSDP2, (_IN_STEP,)),
    Sharding("ZeRO-3, answers in step", _ALL, _ZERO.format(3), (_IN_STEP,)),
)
"""The faster one first."""

# Each process reads or writes by itself in these: models are put together for them, if so set (`in_step.readable`).
BY_ITSELF = ("rollout", "scoring", "revision", "policy", "validation", "measuring")


def sharded(
    parts: Parts, sharding: Sharding, processes: int, walk: Walk, phase: str, *, gather: bool
) -> Parts:
    """The bytes of one of several processes; a whole part p becomes p / processes. One process: as they are.

    DDP holds the gradients a second time, in buckets that stay. A model that is shared is brought together a layer at
    a time while the next is on its way, and so is its gradient; and, if `gather`, whole in the phases `BY_ITSELF`.
    """
    if processes == 1:
        return parts
    models = {"student": walk.student.layer, "teacher": walk.teacher.layer}
    shared = set(sharding.shared) - (set(models) if gather and phase in BY_ITSELF else set())
    shares = {name: -(-size // processes) if name in shared else size for name, size in parts.items()}
    if not sharding.shared:
        shares["gradients"] = shares.get("gradients", 0) + walk.student.gradients
    for name in shared & set(models) & set(parts):
        shares[name] += 2 * models[name]
    return shares


class Walks:
    """The walks through a step of variations of one recipe, each of them once."""

    def __init__(self, configs: Configs, machine: Machine):
        self._configs, self.machine, self._found = configs, machine, dict[str, Walk]()

    def walk(self, config: Config) -> Walk:
        """As `depth.walk`."""
        key = config.model_dump_json(exclude_unset=True)
        if key not in self._found:
            self._found[key] = walk(config, self._configs, self.machine.device)
        return self._found[key]

    def phases(self, config: Config, sharding: Sharding = SHARDINGS[0]) -> tuple[Phase, ...]:
        """Those of one process, with what it holds before any tensor."""
        walk, machine, many = self.walk(config), self.machine, self.machine.processes
        gather = config.rollout.gather and not sharding.settings
        itself, vllm = machine.itself, config.rollout.vllm
        if config.rollout.engine == "vllm" and vllm.mode == "colocate":
            itself += round((machine.memory or 0) * vllm.gpu_memory_utilization)
        return tuple(
            replace(
                each,
                parts=sharded(each.parts, sharding, many, walk, each.name, gather=gather)
                | {"process": itself},
            )
            for each in walk.phases
        )

    def saved(self, config: Config, saver: TeacherSaver) -> tuple[Phase, ...]:
        """With the teacher's bytes as `saver` leaves them."""
        walk = self.walk(config)

        def less(parts: Parts) -> Parts:
            return parts | {"teacher": saver.size(parts.get("teacher", 0), walk)}

        return tuple(replace(each, parts=less(each.parts)) for each in self.phases(config))


def peak(phases: tuple[Phase, ...]) -> int:
    """The most bytes of any."""
    return max(each.peak for each in phases)


def machine_for(config: Config, gpus: int | None = None, memory: float | None = None) -> Machine:
    """`gpus` of `memory` GiB each, or the CPU for 0; what is None is as on this machine, where the recipe would run.

    Raises ValueError for GPUs and a recipe that does not use any.
    """
    here = torch.cuda.device_count()
    if config.training.get("use_cpu"):
        if gpus:
            raise ValueError(
                "training.use_cpu is true, so no GPU is used: --set training.use_cpu=false, or --gpus 0."
            )
        gpus = 0
    gpus = here if gpus is None else gpus
    known = None if memory is None else round(memory * 2**30)
    if gpus:
        if known is None and here:
            known = torch.cuda.get_device_properties(0).total_memory
        return Machine("cuda", gpus, known, CUDA_ITSELF)
    known = known or _line_of("/proc/meminfo", "MemTotal")
    return Machine("cpu", 1, known, _line_of("/proc/self/status", "VmRSS") or 0)


def rate_on(machine: Machine, config: Config, tflops: float | None) -> float | None:
    """Operations per second of a matrix product: as given, or measured where this is such a machine; else None."""
    if tflops is not None:
        return tflops * 1e12
    if machine.device == "cuda" and not torch.cuda.is_available():
        return None
    training = config.training
    mixed = (
        "bfloat16" if training.get("bf16") else "float16" if training.get("fp16") else config.student.dtype
    )
    return matmul_rate(torch.device(machine.device), getattr(torch, mixed), repeat=2)


def _line_of(file: str, name: str) -> int | None:
    """The bytes in a line of one of Linux's files; None elsewhere."""
    try:
        lines = Path(file).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
