"""vLLM as a server of its own (`vllm serve`), which loads the student's weights from a folder that it can see.

Written against vLLM's documentation (/v1/completions with token ids, /tokenize, /collective_rpc, /reset_prefix_cache;
the last two need VLLM_SERVER_DEV_MODE=1) and tested against a stand-in only.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from redistill.engines.vllm_local import in_words
from redistill.engines.weights import WeightFolders
from redistill.engines.writer import Request, check_answer
from redistill.generate import in_batches
from redistill.settings import VllmSettings

# Letters, digits, signs and two other scripts: tokenizers that agree on it are one.
PROBE = "The 3 rivers (2019) don't run past 1,250 mills; ¿qué? 河は流れる\n\tfor i in range(10):"


class ServedVllm:
    """Writes with a vLLM server. Errors: ValueError where it cannot be reached or has another tokenizer."""

    def __init__(self, model: nn.Module, settings: VllmSettings, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self._server = Server(settings.url, settings.timeout, settings.retries, "rollout.vllm.url")
        self._folders = WeightFolders(settings.weights_dir)
        self._name = self._model_name()
        self._check_tokenizer(tokenizer)

    def sync(self) -> None:
        """Write the student's weights to a folder and have the server load them."""
        with self._folders.written(self.model) as folder:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._server.ask("/collective_rpc", reload)
            # It holds keys and values of the earlier weights.
            self._server.ask("/reset_prefix_cache", {})

    def write(self, asked: Request) -> list[tuple[int, ...]]:
        """As `generate`, but for the sampling: a row has a seed of its own. `batch_size` requests run at once.

        Errors: ValueError as in `generate`, `Server.ask` and `check_answer`.
        """

        def answer(row: int) -> tuple[int, ...]:
            said = self._complete(list(asked.prompts[row]), in_words(asked, row, self.model))
            return check_answer(said, asked, row, f"vLLM at {self._server.url}")

        with ThreadPoolExecutor(max(1, asked.batch_size)) as pool:
            return in_batches(
                asked.prompts,
                asked.limits,
                max(1, len(asked.prompts)),
                lambda rows: list(pool.map(answer, rows)),
            )

    def _complete(self, prompt: list[int], how: dict[str, Any]) -> list[int]:
        request = {**how, "model": self._name, "prompt": prompt, "return_token_ids": True}
        choice = self._of(self._server.ask("/v1/completions", request), "choices")[0]
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise ValueError(f"{self._server.url} read another prompt than the one sent: it must not be cut.")
        return self._of(choice, "token_ids")

    def _of(self, reply: Any, key: str) -> Any:
        found = reply.get(key) if isinstance(reply, dict) else None
        if not isinstance(found, list) or (key != "token_ids" and not found):
            raise ValueError(
                f"{self._server.url} sends no {key}: rollout.vllm.url must be that of `vllm serve`, version 0.17 or "
                "later."
            )
        return found

    def _model_name(self) -> str:
        return str(self._of(self._server.ask("/v1/models"), "data")[0].get("id"))

    def _check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        request = {"model": self._name, "prompt": PROBE, "add_special_tokens": False}
        theirs = self._of(self._server.ask("/tokenize", request), "tokens")
        if theirs != tokenizer.encode(PROBE, add_special_tokens=False):
            raise ValueError(
                f"{self._server.url} serves {self._name} with another tokenizer than the student's: start it on the "
                "student's own model."
            )


_WEIGHT_UPDATES = ("/collective_rpc", "/reset_prefix_cache")


class Server:
    """A JSON server. timeout: seconds for one reply. retries: new tries after a failure that may pass. setting: that
    which has the url, for what is said of it."""

    def __init__(self, url: str, timeout: float, retries: int, setting: str):
        self.url, self.timeout, self.retries, self._setting = url.rstrip("/"), timeout, retries, setting

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server replies to `body` (POST), or to nothing (GET); None where it replies nothing.

        A server that is away, slow, broken (5xx) or breaks off is asked anew after 1, 2, 4, .. seconds: to repeat any
        of our requests does no harm. Errors: ValueError when that does not help, and for a refusal (4xx).
        """
        failure = ""
        for again in range(self.retries + 1):
            try:
                return self._ask_once(path, body)
            except urllib.error.HTTPError as error:
                said = _words(error)
                if error.code < 500:
                    hint = (
                        " Start it with VLLM_SERVER_DEV_MODE=1, which weight updates need."
                        if error.code == 404 and path in _WEIGHT_UPDATES
                        else ""
                    )
                    raise ValueError(f"{self.url}{path} refuses ({error.code}: {said}).{hint}") from None
                failure = f"fails ({error.code}: {said})"
            except TimeoutError:
                failure = f"gave no reply within {self.timeout:g} s"
            except (http.client.HTTPException, ValueError):
                failure = "broke off its reply"
            except OSError as error:
                slow = isinstance(getattr(error, "reason", None), TimeoutError)
                failure = (
                    f"gave no reply within {self.timeout:g} s" if slow else f"cannot be reached ({error})"
                )
            if again < self.retries:
                time.sleep(2.0**again)
        raise ValueError(
            f"{self.url}{path} {failure}, {self.retries + 1} times in a row: is the server of {self._setting} "
            "alive? Start it again and go on from the last checkpoint."
        )

    def _ask_once(self, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            text = reply.read()
        return json.loads(text) if text.strip() else None


def _words(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(500).decode(errors="replace").split())
    except OSError:
        return error.reason
