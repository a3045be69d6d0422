"""vLLM behind the interface, against a stand-in: the step's own weights, whole answers only, failures said.

The real vLLM was never run.
"""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_trainer import TOKENIZER, assert_same_curve, curve, recipe, trainer
from tiny import tiny_gpt2, tiny_llama, tiny_tokenizer
from vllm_stand_in import fake_vllm, serving

from redistill.engines.choose import engine_of
from redistill.engines.vllm_local import LocalVllm
from redistill.engines.vllm_server import ServedVllm
from redistill.engines.weights import WeightFolders, whole_weights
from redistill.engines.writer import Loop, Request
from redistill.models import load_model
from redistill.sampling import Sampling

SIZE = len(TOKENIZER)
PROMPTS = [[5, 9, 11, 40, 7], [300], [8, 8, 120, 77], [4, 250]]
LIMITS = [8, 9, 0, 5]


def student(seed=1):
    return tiny_llama(SIZE, layers=2, seed=seed)


def asked(temperature=0.0, *, vocabulary=SIZE, rows=(0, 1, 2, 3), eos=frozenset(range(40))):
    uniforms = torch.rand(4, 9, generator=torch.Generator().manual_seed(7))
    return Request(
        [PROMPTS[row] for row in rows], [LIMITS[row] for row in rows], Sampling(temperature, top_p=0.9),
        eos, vocabulary, uniforms[list(rows)], 2,
    )  # fmt: skip


def lora(model):
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@contextmanager
def engine(
    mode, model, tmp_path, monkeypatch, *, tokenizer=TOKENIZER, mischief=lambda *_: False, timeout=30.0
):
    """A writer of `model`, and the stand-in's engine (once there is one)."""
    settings = {"engine": "vllm", "vllm": {"mode": mode, "weights_dir": str(tmp_path / "weights")}}
    if mode == "colocate":
        fake = fake_vllm()
        monkeypatch.setitem(sys.modules, "vllm", fake)
        yield engine_of(recipe(tmp_path, rollout=settings), model, TOKENIZER), lambda: fake.llms[0].engine
        return
    # The server starts from other weights than the student's: without a sync it says something else.
    student(seed=9).save_pretrained(tmp_path / "served")
    with serving(tmp_path / "served", tokenizer, mischief) as (url, there):
        settings["vllm"] |= {"url": url, "retries": 2, "timeout": timeout}
        yield engine_of(recipe(tmp_path, rollout=settings), model, TOKENIZER), lambda: there


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("kind", [lambda model: model, lora], ids=["whole", "lora"])
def test_answers_are_those_of_the_weights_of_the_last_sync(mode, kind, tmp_path, monkeypatch):
    model = kind(student())
    with engine(mode, model, tmp_path, monkeypatch) as (writer, there):
        said = []
        for _ in range(3):
            writer.sync()
            said.append(writer.write(asked()))
            assert said[-1] == Loop(model).write(asked())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.3)
            assert writer.write(asked()) == said[-1], "it has weights of its own"
        assert len({str(each) for each in said}) == 3
        assert said[0][2] == ()
        assert len(set(there().loads[-3:])) == 3, "every folder has a name of its own"
        assert len(list((tmp_path / "weights").glob("*/*"))) == 1, "earlier folders are removed"
    del writer
    assert not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_a_drawn_row_does_not_depend_on_its_neighbours_and_stays_in_the_vocabulary(
    mode, tmp_path, monkeypatch
):
    with engine(mode, student(), tmp_path, monkeypatch) as (writer, there):
        writer.sync()
        drawn = writer.write(asked(1.0, vocabulary=200, eos=frozenset()))
        assert drawn == writer.write(asked(1.0, vocabulary=200, eos=frozenset()))
        for row in range(4):
            assert writer.write(asked(1.0, vocabulary=200, eos=frozenset(), rows=[row])) == [drawn[row]]
        assert list(map(len, drawn)) == LIMITS and max(max(each, default=0) for each in drawn) < 200
        assert drawn != writer.write(asked(0.0, vocabulary=200, eos=frozenset()))
        seeds = [how.seed for how in there().asked[:3]]
        assert len(set(seeds)) == 3 and there().asked[-1].seed is None


def run(folder, **rollout):
    greedy = {"temperature": 0.0, "lmbda": 0.8, "schedule": "constant"}
    config = recipe(folder, steps=3, revision={"rounds": 2}, rollout={**greedy, **rollout})
    trainer(config, student()).train()
    return curve(folder)


@pytest.fixture(scope="module")
def of_the_loop(tmp_path_factory):
    return run(tmp_path_factory.mktemp("loop"))


@pytest.mark.parametrize(("mode", "kind"), [("colocate", LocalVllm), ("server", ServedVllm)])
def test_a_run_has_the_curve_of_the_loop_and_not_without_the_sync(
    mode, kind, of_the_loop, tmp_path, monkeypatch
):
    assert sum(record.get("share_revised", 0) for record in of_the_loop) > 0
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm())
    student().save_pretrained(tmp_path / "served")
    with serving(tmp_path / "served", TOKENIZER) as (url, _):
        settings = {"engine": "vllm", "vllm": {"mode": mode, "url": url}}
        assert_same_curve(of_the_loop, run(tmp_path / "vllm", **settings))
        sync, calls = kind.sync, []
        monkeypatch.setattr(kind, "sync", lambda self: calls.append(0) or (len(calls) == 1 and sync(self)))
        stale = run(tmp_path / "stale", **settings)
        assert len(calls) > 1
        with pytest.raises(AssertionError):
            assert_same_curve(of_the_loop, stale)


def test_a_colocated_vllm_is_started_as_the_recipe_says(tmp_path, monkeypatch):
    fake = fake_vllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)
    settings = {"engine": "vllm", "max_completion_length": 20, "vllm": {"gpu_memory_utilization": 0.4}}
    for training, dtype in (({}, "float32"), ({"bf16": True}, "bfloat16")):
        config = recipe(tmp_path, rollout=settings, data={"max_prompt_length": 30}, training=training)
        engine_of(config, student(), TOKENIZER).sync()
        made = fake.llms[-1].made_with
        assert (made.dtype, made.columns, made.memory, made.config) == (dtype, 50, 0.4, "vllm")


class Mischief:
    """Does something wrong on a path, `times` over (None: always)."""

    def __init__(self, path, deed, times=None):
        self.path, self.deed, self.left, self.seen = path, deed, times, 0

    def __call__(self, path, handler):
        if path != self.path or self.left == 0:
            return False
        self.seen += 1
        self.left = None if self.left is None else self.left - 1
        self.deed(handler)
        return True


def breaks_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"token_')


def hangs_up(handler):
    handler.close_connection = True


def says(value, code=200):
    return lambda handler: handler.reply(value, code)


def choice(**fields):
    return says({"choices": [{"prompt_token_ids": None, **fields}]})


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        (breaks_off, "broke off its reply"),
        (hangs_up, "broke off its reply"),
        (says({"error": "busy"}, 503), r"fails \(503: .*busy"),
        (lambda _: threading.Event().wait(1.5), r"gave no reply within 0\.5 s"),
    ],
    ids=["half a reply", "hangs up", "503", "slow"],
)
def test_a_failure_that_passes_is_outlived_and_one_that_lasts_is_said(deed, words, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr("redistill.engines.vllm_server.time.sleep", pauses.append)
    model, mischief = student(), Mischief("/v1/completions", deed, times=2)
    with engine("server", model, tmp_path, monkeypatch, mischief=mischief, timeout=0.5) as (writer, _):
        writer.sync()
        one = asked(rows=[0])
        assert writer.write(one) == Loop(model).write(one)
        assert mischief.seen == 2 and pauses == [1.0, 2.0]
        mischief.left = None
        with pytest.raises(ValueError, match=rf"/v1/completions {words}.*3 times in a row: is the server"):
            writer.write(one)
        assert mischief.seen == 5


@pytest.mark.parametrize(
    ("path", "deed", "said"),
    [
        ("/collective_rpc", says({"detail": "Not Found"}, 404), r"refuses \(404.*VLLM_SERVER_DEV_MODE=1"),
        ("/v1/completions", says({"message": "too long"}, 400), r"refuses \(400: .*too long"),
        ("/v1/completions", choice(token_ids=[50, 60]), "after 2 of 8 tokens"),
        ("/v1/completions", choice(token_ids=[50] * 9), "wrote 9 tokens where 8"),
        ("/v1/completions", choice(token_ids=[SIZE, 1]), f"wrote token {SIZE}"),
        ("/v1/completions", choice(text="no ids"), "sends no token_ids"),
        ("/v1/completions", choice(token_ids=[1], prompt_token_ids=[9, 11, 40, 7]), "read another prompt"),
        ("/v1/completions", says({"choices": []}), "sends no choices"),
        ("/v1/completions", says([1, 2]), "sends no choices"),
    ],
)
def test_a_reply_that_cannot_be_right_is_refused_at_once(path, deed, said, tmp_path, monkeypatch):
    mischief = Mischief(path, deed)
    with (
        engine("server", student(), tmp_path, monkeypatch, mischief=mischief) as (writer, _),
        pytest.raises(ValueError, match=said),
    ):
        writer.sync()
        writer.write(asked(rows=[0]))
    assert mischief.seen == 1


def test_no_server_another_server_and_another_tokenizer_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("redistill.engines.vllm_server.time.sleep", lambda _: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    settings = {"engine": "vllm", "vllm": {"mode": "server", "url": url}}
    with pytest.raises(ValueError, match=r"cannot be reached .*4 times in a row"):
        engine_of(recipe(tmp_path, rollout=settings), student(), TOKENIZER)
    other = tiny_tokenizer()
    other.add_tokens(["rivers"])
    nothing = Mischief("/v1/models", says({"hello": "world"}))
    for changes, said in (
        ({"mischief": nothing}, r"sends no data: .*vllm serve"),
        ({"tokenizer": other}, "another tokenizer"),
    ):
        with (
            pytest.raises(ValueError, match=said),
            engine("server", student(), tmp_path, monkeypatch, **changes),
        ):
            pass


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_lora_student_is_written_merged_and_left_as_it_was(build, tmp_path):
    model = lora(build(seed=3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with WeightFolders(str(tmp_path)).written(model) as folder:
        ids = torch.tensor([PROMPTS[0]])
        merged = load_model(str(folder))
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, build(seed=3)(ids).logits, atol=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapter_on_a_tied_head_is_refused():
    model = get_peft_model(tiny_llama(tied=True), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head.weight has an adapter and is tied"):
        whole_weights(model)
