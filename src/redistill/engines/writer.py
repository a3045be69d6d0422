"""The one interface of all that writes answers, its plainest implementation, and what engines owe their callers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from redistill.generate import generate
from redistill.models import plain_model
from redistill.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """Prompts to be answered, and how; the fields are the arguments of `generate`.

    uniforms: [rows, steps], the only source of chance: an engine that cannot sample by them seeds itself with them
        (`row_seed`).
    """

    prompts: Sequence[Sequence[int]]
    limits: Sequence[int]
    sampling: Sampling
    eos: frozenset[int]
    vocabulary: int
    uniforms: Tensor
    batch_size: int


class Writer(Protocol):
    """Writes a model's answers to prompts."""

    def sync(self) -> None:
        """Take over the model's weights as they are now. Called before the first answers of an optimizer step."""
        ...

    def write(self, asked: Request) -> list[tuple[int, ...]]:
        """An answer to every prompt, in their order, as `generate` gives it. Errors: ValueError as there."""
        ...


@dataclass(frozen=True)
class Loop:
    """Our own decode loop (`generate`) over the model itself. partner: as in `generate`."""

    model: nn.Module
    partner: tuple[nn.Module, float] | None = None

    def sync(self) -> None:
        """Nothing: the loop reads the model that is trained."""

    def write(self, asked: Request) -> list[tuple[int, ...]]:
        """`generate` itself."""
        return generate(
            self.model,
            asked.prompts,
            limits=asked.limits,
            sampling=asked.sampling,
            eos=asked.eos,
            generator=None,
            batch_size=asked.batch_size,
            vocabulary=asked.vocabulary,
            uniforms=asked.uniforms,
            partner=self.partner,
        )


def row_seed(uniforms: Tensor) -> int:
    """A seed in [0, 2^63) that stands for the numbers given, of any shape; equal ones give equal seeds."""
    numbers = uniforms.float().cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest()) >> 1


def check_answer(answer: Sequence[int], asked: Request, row: int, engine: str) -> tuple[int, ...]:
    """The answer, if it is a whole one: ids of the vocabulary that end with the first end-of-text id or at the limit.

    Errors: ValueError that names `engine` and what is wrong.
    """
    limit, eos = asked.limits[row], asked.eos
    foreign = [token for token in answer if not 0 <= token < asked.vocabulary]
    if foreign:
        raise ValueError(
            f"{engine} wrote token {foreign[0]}, which the vocabulary of {asked.vocabulary} does not have: it must "
            "serve the student's own model and tokenizer."
        )
    if len(answer) > limit:
        raise ValueError(f"{engine} wrote {len(answer)} tokens where {limit} were asked for.")
    ends = [place for place, token in enumerate(answer) if token in eos]
    if ends and ends[0] + 1 < len(answer):
        raise ValueError(
            f"{engine} wrote on behind the end-of-text token {answer[ends[0]]}: it must stop there."
        )
    if not ends and len(answer) < limit:
        raise ValueError(
            f"{engine} ended an answer after {len(answer)} of {limit} tokens without an end-of-text token: "
            "let it serve prompts and answers of the lengths that the recipe allows."
        )
    return tuple(answer)


def padding_ids(model: nn.Module, vocabulary: int) -> range:
    """The ids of the rows that pad the output matrix and stand for no token."""
    head: Any = plain_model(model).get_output_embeddings()
    return range(vocabulary, head.weight.shape[0])
