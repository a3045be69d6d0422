"""transformers' continuous batching (`generate_batch`): a paged cache, and rows that come and go at every step.

It samples by itself: answers have the right distribution but are not those of `generate`, and a row's answer depends
on the others. Greedy answers are those of `generate`, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from redistill.engines.writer import Request, check_answer, padding_ids, row_seed
from redistill.generate import answering, in_batches
from redistill.models import plain_model

_PAGE = 64


class PagedBatching:
    """Writes with `generate_batch`. At most `batch_size` rows are in the cache at once, which exists during a call.

    Its thread does not see autocast: the model is read in the number format of its weights.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = plain_model(model)

    def sync(self) -> None:
        """Nothing: the model that is trained is read, and no cache outlives a call."""

    def write(self, asked: Request) -> list[tuple[int, ...]]:
        """As `generate`, but for the sampling: equal requests give equal answers, no more.

        Errors: ValueError as in `generate`, and when the engine gives up on a prompt.
        """
        # The engine seeds torch's global generators.
        with answering(self.model), torch.random.fork_rng():
            return in_batches(
                asked.prompts,
                asked.limits,
                max(1, len(asked.prompts)),
                lambda rows: self._answer(asked, rows),
            )

    def _answer(self, asked: Request, rows: list[int]) -> list[tuple[int, ...]]:
        prompts = [list(asked.prompts[row]) for row in rows]
        # One number for all rows: what is past a row's own limit was not asked for.
        most = max(asked.limits[row] for row in rows)
        found = self.model.generate_batch(
            inputs=prompts,
            generation_config=_how(asked, most, padding_ids(self.model, asked.vocabulary)),
            continuous_batching_config=_cache_for(
                prompts, most, asked.batch_size, row_seed(asked.uniforms) % 2**32
            ),
        )
        answers = [result.generated_tokens for result in found.values() if result.error is None]
        if len(answers) < len(rows):
            raise ValueError(
                f"generate_batch answered {len(answers)} of {len(rows)} prompts: see its messages above, or set "
                "rollout.engine to loop."
            )
        return [
            check_answer(said[: asked.limits[row]], asked, row, "generate_batch")
            for row, said in zip(rows, answers, strict=True)
        ]


def _how(asked: Request, most: int, silent: range) -> GenerationConfig:
    how = asked.sampling
    kinds = {"temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}
    kinds |= {"min_p": how.min_p} if how.min_p else {}
    return GenerationConfig(
        do_sample=how.temperature > 0,
        **(kinds if how.temperature > 0 else {}),
        eos_token_id=sorted(asked.eos) or -1,
        suppress_tokens=list(silent) or None,
        max_new_tokens=most,
    )


def _cache_for(prompts: list[list[int]], most: int, rows: int, seed: int) -> ContinuousBatchingConfig:
    """Room for `rows` rows of the longest prompt and answer, in place of most of the memory that is free."""
    longest = max(map(len, prompts)) + most
    return ContinuousBatchingConfig(
        page_size=_PAGE,
        num_blocks=rows * (-(-longest // _PAGE) + 1),
        max_batch_tokens=max(longest, rows),
        max_requests_per_batch=rows,
        auto_switch_to_flash=False,
        seed=seed,
    )
