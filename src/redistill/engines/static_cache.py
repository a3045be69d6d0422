"""Our decode loop over a static cache: tensors of fixed sizes, so that the step can be compiled and replayed.

The same tokens as `generate`, up to rounding: the same model, the same `sample`, the same random numbers.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import CompileConfig, StaticCache

from redistill.engines.writer import Request
from redistill.generate import answering, append_tokens, in_batches, left_padded, read_tokens
from redistill.models import plain_model
from redistill.sampling import sample

# A cache that turns out too short grows by whole steps of so many columns: each size is compiled once.
_GROWS_BY = 256


class StaticLoop:
    """Writes with transformers' static cache and its compiled decode step.

    columns: tokens that the cache holds for a row, prompt and answer together; it grows if that is too few.
    compile_config: how the step is compiled; None: not at all. `compiled_on` is what a device calls for.
    Every batch is filled up to `batch_size` rows, and a row that has ended is read on with the others: shapes never
    change. The cache is kept between calls.
    """

    def __init__(self, model: nn.Module, columns: int, compile_config: CompileConfig | None = None):
        self.model = plain_model(model)
        self.columns = columns
        self._step = self.model.get_compiled_call(compile_config) if compile_config else self.model
        self._cache: StaticCache | None = None
        self._shape = (0, 0)

    def sync(self) -> None:
        """Nothing: the model that is trained is read."""

    def write(self, asked: Request) -> list[tuple[int, ...]]:
        """As `generate`, token for token up to rounding."""
        with answering(self.model):
            return in_batches(
                asked.prompts, asked.limits, asked.batch_size, lambda rows: self._answer(asked, rows)
            )

    def _answer(self, asked: Request, rows: list[int]) -> list[list[int]]:
        device = self.model.device
        filled = [*rows, *[rows[-1]] * (asked.batch_size - len(rows))]
        limits, uniforms = [asked.limits[row] for row in rows], asked.uniforms[filled].to(device)
        ids, mask, position = left_padded([asked.prompts[row] for row in filled], device)
        cache = self._empty_cache(len(filled), ids.shape[1] + max(limits))
        # Columns that are not written yet lie behind every token, where the causal mask hides them.
        mask = torch.cat([mask, mask.new_ones(len(filled), self.columns - mask.shape[1])], dim=-1)
        logits, _ = read_tokens(self.model, ids, mask, position, cache)
        position = position[:, -1:]
        answers: list[list[int]] = [[] for _ in rows]
        writing = set(range(len(rows)))
        for step in range(max(limits)):
            tokens = sample(logits[:, : asked.vocabulary], uniforms[:, step], asked.sampling)
            # A row that has ended stays where it is: its position must not run past those the model has learnt.
            position = position + torch.tensor(
                [[int(place in writing)] for place in range(len(filled))], device=device
            )
            append_tokens(dict(enumerate(tokens.tolist())), answers, writing, limits, asked.eos)
            if not writing:
                break
            logits, _ = read_tokens(self._step, tokens[:, None], mask, position, cache)
        return answers

    def _empty_cache(self, rows: int, columns: int) -> StaticCache:
        if columns > self.columns:
            self.columns = -(-columns // _GROWS_BY) * _GROWS_BY
        if self._cache is None or self._shape != (rows, self.columns):
            self._cache = StaticCache(config=self.model.config, max_cache_len=self.columns)
            self._shape = (rows, self.columns)
        else:
            self._cache.reset()
        return self._cache


def compiled_on(device: torch.device) -> CompileConfig | None:
    """On CUDA the decode step becomes CUDA graphs; elsewhere it runs as it is."""
    return CompileConfig(mode="reduce-overhead", dynamic=False) if device.type == "cuda" else None
