"""A stand-in for vLLM: the calls and replies that its documentation describes, over a tiny model on the CPU.

It is strict where we could err: an argument that it does not know is a TypeError, and a prompt that it has read
before is answered with the weights of that time until the prefix cache is reset.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from redistill.sampling import Sampling, sample


@dataclass(kw_only=True)
class SamplingParams:
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logit_bias: dict[int, float] | None = None
    detokenize: bool = True


@dataclass
class Engine:
    """A model loaded from a folder."""

    folder: str
    loads: list[str] = field(default_factory=list)
    asked: list[SamplingParams] = field(default_factory=list)
    read_before: dict = field(default_factory=dict)

    def __post_init__(self):
        self.load(self.folder)

    def load(self, folder):
        assert Path(folder).is_absolute()
        self.loads.append(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def reset_prefix_cache(self):
        self.read_before.clear()

    @torch.no_grad()
    def answer(self, prompt: list[int], how: SamplingParams) -> list[int]:
        self.asked.append(how)
        model = self.read_before.setdefault(tuple(prompt), self.model)
        assert how.ignore_eos and how.repetition_penalty == 1.0
        generator = torch.Generator().manual_seed(how.seed or 0)
        sampling = Sampling(how.temperature, how.top_p, how.top_k, how.min_p)
        said: list[int] = []
        while len(said) < how.max_tokens and not (said and said[-1] in (how.stop_token_ids or ())):
            logits = model(torch.tensor([[*prompt, *said]])).logits[:, -1]
            for token, bias in (how.logit_bias or {}).items():
                logits[:, int(token)] += bias
            said += sample(logits, torch.rand(1, generator=generator), sampling).tolist()
        return said


def fake_vllm() -> ModuleType:
    """A module to stand in `sys.modules`. `llms`: what was made."""
    module = ModuleType("vllm")
    module.llms = []

    class LLM:
        def __init__(self, model, *, skip_tokenizer_init=False, dtype="auto", max_model_len=None,
                     gpu_memory_utilization=0.9, generation_config="auto"):  # fmt: skip
            self.engine = Engine(model)
            self.made_with = SimpleNamespace(
                tokenizer=not skip_tokenizer_init, dtype=dtype, columns=max_model_len, config=generation_config,
                memory=gpu_memory_utilization,
            )  # fmt: skip
            module.llms.append(self)

        def generate(self, prompts, sampling_params=None, use_tqdm=True, lora_request=None):
            assert all(set(each) == {"prompt_token_ids"} for each in prompts)
            found = []
            for each, how in zip(prompts, sampling_params, strict=True):
                assert not how.detokenize and not self.made_with.tokenizer
                said = self.engine.answer(each["prompt_token_ids"], how)
                found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=said)]))
            return found

        def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
            assert method == "reload_weights"
            self.engine.load(kwargs["weights_path"])

        def reset_prefix_cache(self):
            self.engine.reset_prefix_cache()

    module.LLM, module.SamplingParams, module.TokensPrompt = LLM, SamplingParams, dict
    return module


@contextmanager
def serving(
    folder,
    tokenizer,
    mischief: Callable[[str, BaseHTTPRequestHandler], bool] = lambda *_: False,
    max_logprobs: int = 384,
):
    """A server of the model in `folder`: its url and its `Engine`. mischief: is shown every path and the handler, and
    returns True when it has replied itself (or has not). max_logprobs: the most it gives for a token."""
    engine = Engine(str(folder))

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, value, code=200):
            text = b"" if value is None else json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def do_GET(self):
            if not mischief(self.path, self):
                assert self.path == "/v1/models"
                self.reply({"object": "list", "data": [{"id": str(folder), "max_model_len": 512}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not mischief(self.path, self):
                self.reply(replies[self.path](body))

    def score(body):
        """Every token of the prompt but the first: its k most probable ids, and the token itself."""
        prompt, k = body.pop("prompt"), body.pop("prompt_logprobs")
        assert body == {"model": str(folder), "max_tokens": 1, "temperature": 0.0}
        with torch.no_grad():
            rows = engine.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        said = [None]
        for row, token in zip(rows, prompt[1:], strict=False):
            order = row.argsort(descending=True).tolist()
            kept = {*order[: min(k, max_logprobs)], token}
            said.append({str(i): {"logprob": float(row[i]), "rank": 1 + order.index(i)} for i in kept})
        return {"choices": [{"index": 0, "text": "x", "prompt_logprobs": said}]}

    def complete(body):
        if "prompt_logprobs" in body:
            return score(body)
        assert body.pop("model") == str(folder) and body.pop("return_token_ids")
        prompt = body.pop("prompt")
        said = engine.answer(prompt, SamplingParams(**body))
        return {"choices": [{"index": 0, "text": "", "token_ids": said, "prompt_token_ids": prompt}]}

    def rpc(body):
        assert body["method"] == "reload_weights"
        engine.load(body["kwargs"]["weights_path"])
        return {"results": [None]}

    replies = {
        "/v1/completions": complete,
        "/collective_rpc": rpc,
        "/reset_prefix_cache": lambda _: engine.reset_prefix_cache(),
        "/tokenize": lambda body: {"tokens": tokenizer.encode(body["prompt"], add_special_tokens=False)},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", engine
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
