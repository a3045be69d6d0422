"""Ids in, ids out: answers of any causal language model, with a key/value cache, for whole lists of prompts.

Knows nothing of text, templates or training. A row's answer depends on its own prompt, its limit and its own
random numbers only: neither on its neighbours nor on how the prompts were cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from redistill.cache import make_room
from redistill.prepacked import prepacked
from redistill.sampling import Sampling, mixed_logits, sample


@dataclass(frozen=True)
class Decoding:
    """Where a batch of `B` rows stands.

    cache: the model's own cache of `L` columns.
    mask: [B, L], 1 for a token and 0 for padding on the left.
    position: [B], the position of each row's next token.
    """

    cache: Any
    mask: Tensor
    position: Tensor

    def cut(self, lengths: Tensor) -> Decoding:
        """Forget all but the first `lengths` tokens of each row. For rows that are padded on the right: there a
        token's column is its position. The cache is cut to the longest row; in the others the mask hides the rest.
        """
        longest = int(lengths.max())
        if longest < self.mask.shape[1]:
            self.cache.crop(longest - self.mask.shape[1])  # a negative number: what to forget
        column = torch.arange(longest, device=lengths.device)
        return Decoding(self.cache, (column < lengths[:, None]).long(), lengths)


@contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards every module is in the mode it was in before.

    Gradient checkpointing acts in training mode only and would drop the key/value cache: here it is asleep.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in in_training:
            module.training = True


def prefill(model: nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Decoding]:
    """Read the prompts, padded on the left. Returns the logits of each row's next token [B, V] and the state.

    Positions count tokens, not columns, so that a padded row is read as it would be alone: the learned
    positions of GPT-2 and OPT as well as rotary ones.
    """
    return read_tokens(model, *left_padded(prompts, next(model.parameters()).device), None)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions, each [B, longest prompt], with padding on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    length = torch.tensor([len(prompt) for prompt in prompts], device=device)
    column = torch.arange(width, device=device)
    mask = (column >= width - length[:, None]).long()
    return ids, mask, (column - (width - length[:, None])).clamp(min=0)


def decode_one_token(model: nn.Module, tokens: Tensor, state: Decoding) -> tuple[Tensor, Decoding]:
    """Append one token [B] to each row. Returns the logits of the next one [B, V] and the new state."""
    mask = torch.cat([state.mask, state.mask.new_ones(len(tokens), 1)], dim=-1)
    return read_tokens(model, tokens[:, None], mask, state.position[:, None], state.cache)


def select_rows(state: Decoding, rows: Tensor) -> Decoding:
    """Keep the given rows of the state, so that those that have ended cost nothing more."""
    # The one way to pick rows that every kind of cache layer has, those of linear attention too.
    state.cache.reorder_cache(rows)
    return Decoding(state.cache, state.mask[rows], state.position[rows])


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    limits: Sequence[int],
    sampling: Sampling,
    eos: frozenset[int],
    generator: torch.Generator | None,
    batch_size: int,
    vocabulary: int | None = None,
    uniforms: Tensor | None = None,
    partner: tuple[nn.Module, float] | None = None,
) -> list[tuple[int, ...]]:
    """Answer every prompt, in the order given. A prompt that comes several times in a batch is read once.

    limits: the most new tokens of each row; a row with 0 or less gets () without being read.
    eos: ids that end an answer and are part of it.
    generator: one uniform number per row and step is drawn from it beforehand (none when greedy); None is
        torch's global generator.
    batch_size: the most rows read at once. It changes speed and memory, never an answer (up to rounding).
    uniforms: [rows, steps] in [0, 1), drawn by the caller in place of `generator`: several seeds in one call.
    vocabulary: ids from here on (rows that pad the output matrix) are never said.
    partner: another model over the same vocabulary and its share a in [0, 1): tokens are drawn from
        (1 - a) * model + a * partner (MiniLLM's teacher-mixed sampling); `sampling` acts on that mixture.
    The model is in evaluation mode meanwhile, keeps its key/value cache even where gradient checkpointing is
    on, and is left as it was found. No gradients.
    Errors: those of `in_batches`, and ValueError for a model that returns no cache.
    """
    if uniforms is None:
        uniforms = draw_uniforms(len(prompts), max([0, *limits]), sampling, generator)

    def answer(rows: list[int]) -> list[list[int]]:
        return _generate_batch(
            model,
            [prompts[row] for row in rows],
            [limits[row] for row in rows],
            uniforms[rows].to(next(model.parameters()).device),
            sampling=sampling,
            eos=eos,
            vocabulary=vocabulary,
            partner=partner,
        )

    other = partner[0] if partner else model
    with answering(model), answering(other), prepacked(model, other):
        return in_batches(prompts, limits, batch_size, answer)


def in_batches(
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    batch_size: int,
    answer: Callable[[list[int]], Sequence[Sequence[int]]],
) -> list[tuple[int, ...]]:
    """What `answer` gives for batches of rows, in the order of `prompts`; () for a row with a limit of 0 or less.

    Errors: ValueError for an empty prompt, for limits of another number than prompts, for a batch size under 1.
    """
    _check_request(prompts, limits, batch_size)
    # The longest first: what does not fit into memory fails at once, and rows of one batch are padded little.
    waiting = sorted(
        (row for row, limit in enumerate(limits) if limit > 0),
        key=lambda row: (-len(prompts[row]), tuple(prompts[row])),
    )
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    for start in range(0, len(waiting), batch_size):
        rows = waiting[start : start + batch_size]
        for row, said in zip(rows, answer(rows), strict=True):
            answers[row] = tuple(said)
    return answers


def draw_uniforms(rows: int, steps: int, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """The random numbers of `rows` answers of at most `steps` tokens; none are drawn when greedy."""
    if sampling.temperature == 0:
        return torch.zeros(rows, steps)
    return torch.rand(rows, steps, generator=generator, device=generator.device if generator else "cpu")


def _generate_batch(
    model: nn.Module,
    prompts: list[Sequence[int]],
    limits: list[int],
    uniforms: Tensor,
    *,
    sampling: Sampling,
    eos: frozenset[int],
    vocabulary: int | None,
    partner: tuple[nn.Module, float] | None,
) -> list[list[int]]:
    different = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    models = [model, *([partner[0]] if partner else [])]
    read = [prefill(each, list(different)) for each in models]
    if len(different) < len(prompts):
        copies = torch.tensor([different[tuple(prompt)] for prompt in prompts], device=uniforms.device)
        read = [(logits[copies], select_rows(state, copies)) for logits, state in read]
    return _write(
        models, read, limits, uniforms, sampling, eos, vocabulary, share=partner[1] if partner else 0.0
    )


def go_on(
    model: nn.Module,
    tokens: Tensor,
    state: Decoding,
    *,
    limits: list[int],
    uniforms: Tensor,
    sampling: Sampling,
    eos: frozenset[int],
    vocabulary: int | None = None,
) -> list[list[int]]:
    """What the model writes behind `state` and one given token [B] a row; the rest as in `generate`.

    limits: at least 1 each. The state is used up. To be called inside `answering`.
    """
    read = decode_one_token(model, tokens, state)
    return _write([model], [read], limits, uniforms.to(tokens.device), sampling, eos, vocabulary)


def _write(
    models: list[nn.Module],
    read: list[tuple[Tensor, Decoding]],
    limits: list[int],
    uniforms: Tensor,
    sampling: Sampling,
    eos: frozenset[int],
    vocabulary: int | None,
    share: float = 0.0,
) -> list[list[int]]:
    """Token by token from what the models have `read`, until every row has ended or is at its limit."""
    answers: list[list[int]] = [[] for _ in limits]
    logits, states = _apart(read, vocabulary)
    for state in states:
        make_room(state.cache)
    rows = list(range(len(limits)))
    writing = set(rows)
    # A row that has ended is read on with the others, but not at positions that the model may not have.
    last = states[0].position + torch.tensor(limits, device=logits[0].device) - 1
    for step in range(max(limits)):
        together = mixed_logits(*logits, share) if share else logits[0]
        tokens = sample(together, uniforms[rows, step], sampling)
        append_tokens(dict(zip(rows, tokens.tolist(), strict=True)), answers, writing, limits, eos)
        if not writing:
            break
        # Leaving the batch copies the cache: worth it when a quarter of the rows leaves together.
        if 4 * len(writing) <= 3 * len(rows):
            kept = [place for place, row in enumerate(rows) if row in writing]
            rows = [rows[place] for place in kept]
            chosen = torch.tensor(kept, device=tokens.device)
            tokens, last = tokens[chosen], last[chosen]
            states = [select_rows(each, chosen) for each in states]
        states = [replace(each, position=each.position.minimum(last)) for each in states]
        read = [decode_one_token(each, tokens, state) for each, state in zip(models, states, strict=True)]
        logits, states = _apart(read, vocabulary)
    return answers


def append_tokens(
    tokens: dict[int, int],
    answers: list[list[int]],
    writing: set[int],
    limits: Sequence[int],
    eos: frozenset[int],
) -> None:
    """Append each row's token to its answer; a row that has ended or is at its limit leaves `writing`."""
    for row, token in tokens.items():
        if row in writing:
            answers[row].append(token)
            if token in eos or len(answers[row]) == limits[row]:
                writing.remove(row)


def _apart(
    read: list[tuple[Tensor, Decoding]], vocabulary: int | None
) -> tuple[list[Tensor], list[Decoding]]:
    return [logits[:, :vocabulary] for logits, _ in read], [state for _, state in read]


def read_tokens(
    model: Callable[..., Any], ids: Tensor, mask: Tensor, position: Tensor, cache: Any
) -> tuple[Tensor, Decoding]:
    """Read ids [B, n] behind what the cache holds (None: nothing); mask: [B, all columns]. Returns the logits of each
    row's next token [B, V] and the new state. Errors: ValueError for a model that returns no cache."""
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    if out.past_key_values is None:
        raise ValueError(
            f"{type(model).__name__} returns no key/value cache: answers need a model that keeps one."
        )
    return out.logits[:, -1], Decoding(out.past_key_values, mask, position[:, -1] + 1)


def _check_request(prompts: Sequence[Sequence[int]], limits: Sequence[int], batch_size: int) -> None:
    if len(limits) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(limits)} limits: give one limit for each prompt.")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: give 1 or more.")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"Prompt {row} has no tokens: give at least a begin-of-text token.")
