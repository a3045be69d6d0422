"""A teacher on a server: vLLM, or another with its `/v1/completions`, which says the k most probable ids at every
token of a prompt (`prompt_logprobs`).

Written against vLLM's documentation and tested against a stand-in only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from redistill.engines.vllm_server import PROBE, Server
from redistill.losses.divergences import LOG_FLOOR
from redistill.sample import Sample
from redistill.settings import ServedSettings
from redistill.teachers.signal import TopK

# Log-probabilities come rounded, so what is left of 1 is not known better than this.
LEAST_TAIL = 1e-6


class ServedTeacher:
    """Asks the server that `settings` name. vocabulary: the ids that it shares with the student.

    Errors: ValueError where it cannot be reached or has another tokenizer.
    """

    model = None

    def __init__(self, settings: ServedSettings, tokenizer: PreTrainedTokenizerBase, vocabulary: int):
        self.vocabulary, self._settings = vocabulary, settings
        self._server = Server(
            settings.url.rstrip("/"), settings.timeout, settings.retries, "teacher.server.url"
        )
        self._name = str(self._of(self._server.ask("/v1/models"), "data")[0].get("id"))
        self._check_tokenizer(tokenizer)

    def signal(self, samples: Sequence[Sample]) -> TopK:
        """See `Teacher`. At most `concurrency` requests are under way at once."""
        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            rows = [row for said in pool.map(self._read, samples) for row in said]
        ids = torch.tensor([[token for token, _ in row] for row in rows])
        log_p = torch.tensor([[value for _, value in row] for row in rows], dtype=torch.float64)
        nothing_left = self._settings.top_k == self.vocabulary
        tail = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=LEAST_TAIL).log()
        tail = torch.full_like(tail, LOG_FLOOR) if nothing_left else tail
        return TopK(ids, torch.cat((log_p, tail), dim=1).log_softmax(-1).float())

    def _read(self, sample: Sample) -> list[list[tuple[int, float]]]:
        """At every token of the response the k most probable ids with their log-probabilities, in falling order."""
        sample = sample.for_teacher()
        prompt = [*sample.prompt, *sample.response]
        # A server does not read without writing a token.
        request = {"model": self._name, "prompt": prompt, "max_tokens": 1, "temperature": 0.0}
        asked = {**request, "prompt_logprobs": self._settings.top_k}
        choice = self._of(self._server.ask("/v1/completions", asked), "choices")[0]
        said = self._of(choice, "prompt_logprobs")
        if len(said) != len(prompt):
            raise ValueError(
                f"{self._server.url} read {len(said)} tokens of the {len(prompt)} that were sent: its context must "
                "be longer (vllm serve --max-model-len)."
            )
        return [self._kept(each) for each in said[len(sample.prompt) :]]

    def _kept(self, said: Mapping[str, Any]) -> list[tuple[int, float]]:
        # The token itself comes too, however improbable it is; and ids may be padding that the student lacks.
        found = [(int(token), float(each["logprob"])) for token, each in said.items()]
        known = [(token, value) for token, value in found if token < self.vocabulary and math.isfinite(value)]
        k = self._settings.top_k
        if len(known) < k:
            raise ValueError(
                f"{self._server.url} gives {len(known)} log-probabilities of the {k} asked for: start it with "
                f"--max-logprobs {k}, or set teacher.server.top_k lower."
            )
        return sorted(known, key=lambda each: -each[1])[:k]

    def _of(self, reply: Any, key: str) -> Any:
        found = reply.get(key) if isinstance(reply, dict) else None
        if not isinstance(found, list) or not found:
            raise ValueError(
                f"{self._server.url} sends no {key}: teacher.server.url must be that of `vllm serve`, or of a server "
                "with its /v1/completions and prompt_logprobs."
            )
        return found

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        request = {"model": self._name, "prompt": PROBE, "add_special_tokens": False}
        theirs = self._of(self._server.ask("/tokenize", request), "tokens")
        ours = tokenizer.encode(PROBE, add_special_tokens=False)
        if theirs != ours:
            place = next(
                (at for at, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), len(ours)
            )
            raise ValueError(
                f"{self._server.url} serves {self._name} with another tokenizer than {tokenizer.name_or_path}: token "
                f"{place} of a probe is {theirs[place : place + 1]}, not {ours[place : place + 1]}. Serve a teacher "
                "of the student's family."
            )
