"""vLLM in the training process (`vllm.LLM`): it holds its own copy of the student, renewed before every step.

Written against vLLM's documentation (`LLM`, `SamplingParams`, `TokensPrompt`, `collective_rpc("reload_weights")`) and
tested against a stand-in only.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from redistill.engines.weights import WeightFolders
from redistill.engines.writer import Request, check_answer, padding_ids, row_seed
from redistill.generate import in_batches
from redistill.settings import VllmSettings

# The most that vLLM takes away from a logit: the token becomes e^100 times less likely.
_NEVER = -100.0


class LocalVllm:
    """Writes with a `vllm.LLM` of the student.

    columns: the most tokens of prompt and answer together. dtype: of vLLM's copy of the weights.
    Errors: ValueError where vLLM is not installed.
    """

    def __init__(self, model: nn.Module, settings: VllmSettings, *, columns: int, dtype: str):
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError(
                'rollout.engine is vllm but vLLM is not installed: pip install "redistill[vllm]", or set '
                "rollout.vllm.mode to server."
            ) from None
        self._vllm: Any = vllm
        self._llm: Any = None
        self.model, self.settings = model, settings
        self._columns, self._dtype = columns, dtype
        self._folders = WeightFolders(settings.weights_dir)

    def sync(self) -> None:
        """Write the student's weights to a folder and have vLLM load them; the first time, start it."""
        with self._folders.written(self.model) as folder:
            if self._llm is None:
                self._llm = self._vllm.LLM(
                    model=str(folder),
                    skip_tokenizer_init=True,
                    dtype=self._dtype,
                    max_model_len=self._columns,
                    gpu_memory_utilization=self.settings.gpu_memory_utilization,
                    generation_config="vllm",
                )
            else:
                self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
                # It holds keys and values of the earlier weights.
                self._llm.reset_prefix_cache()

    def write(self, asked: Request) -> list[tuple[int, ...]]:
        """As `generate`, but for the sampling: a row has a seed of its own. vLLM chooses how many rows run at once.

        Errors: ValueError as in `generate` and `check_answer`.
        """
        assert self._llm is not None, "sync() comes before write()"

        def answer(rows: list[int]) -> list[tuple[int, ...]]:
            how = [
                self._vllm.SamplingParams(**in_words(asked, row, self.model), detokenize=False)
                for row in rows
            ]
            prompts = [self._vllm.TokensPrompt(prompt_token_ids=list(asked.prompts[row])) for row in rows]
            found = self._llm.generate(prompts, how, use_tqdm=False)
            return [
                check_answer(list(each.outputs[0].token_ids), asked, row, "vLLM")
                for row, each in zip(rows, found, strict=True)
            ]

        return in_batches(asked.prompts, asked.limits, max(1, len(asked.prompts)), answer)


def in_words(asked: Request, row: int, model: nn.Module) -> dict[str, Any]:
    """One row's request, in the words that `SamplingParams` and the server's /v1/completions share.

    Every default that a model's generation_config.json may change is said.
    """
    how = asked.sampling
    return {
        "max_tokens": asked.limits[row],
        "temperature": how.temperature,
        "top_p": how.top_p,
        "top_k": how.top_k,
        "min_p": how.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": row_seed(asked.uniforms[row]) if how.temperature else None,
        "stop_token_ids": sorted(asked.eos),
        "ignore_eos": True,  # ours are in stop_token_ids
        "logit_bias": {token: _NEVER for token in padding_ids(model, asked.vocabulary)} or None,
    }
