"""A teacher on a server: what it says is what the model would, failures pass or are said, no wrong server serves."""

import threading

import pytest
import torch
from pydantic import ValidationError
from test_trainer import TOKENIZER, curve, recipe, samples
from test_vllm import Mischief, breaks_off, says
from tiny import tiny_llama, tiny_tokenizer
from vllm_stand_in import serving

from redistill import DistillTrainer
from redistill.settings import ServedSettings
from redistill.teachers.local import LocalTeacher
from redistill.teachers.served import ServedTeacher
from redistill.teachers.signal import most_probable

SIZE = len(TOKENIZER)


def teacher():
    return tiny_llama(SIZE, layers=2, hidden=48, seed=2)


@pytest.fixture
def folder(tmp_path):
    teacher().save_pretrained(tmp_path / "served")
    return tmp_path / "served"


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr("redistill.engines.vllm_server.time.sleep", found.append)
    return found


def asking(url, tokenizer=TOKENIZER, vocabulary=SIZE, **changes):
    return ServedTeacher(
        ServedSettings(url=url, **{"top_k": 6, "retries": 2, **changes}), tokenizer, vocabulary
    )


def test_it_says_what_the_model_would(folder):
    asked, live = samples(5), LocalTeacher(teacher(), SIZE)
    hidden = live.signal(asked)
    with serving(folder, TOKENIZER) as (url, _):
        for k in (1, 6, SIZE):
            said = asking(url, top_k=k).signal(asked)
            wanted = most_probable(hidden.head.logits(hidden.hidden).detach(), k)
            # Of all of them, some are equally probable up to rounding.
            assert torch.equal(said.ids, wanted.ids) or k == SIZE
            assert torch.equal(said.ids.sort().values, wanted.ids.sort().values)
            torch.testing.assert_close(said.log_p[:, :-1], wanted.log_p[:, :-1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(said.log_p[:, -1], wanted.log_p[:, -1], atol=1e-3, rtol=1e-3)


def test_a_run_with_corrections_has_the_curve_of_the_model_in_the_process(folder, tmp_path):
    changes = {"revision": {"teacher_token": "argmax"}, "steps": 3}
    config = recipe(tmp_path / "live", **changes)
    student = tiny_llama(SIZE, layers=2, seed=1)
    DistillTrainer(student, teacher(), config, TOKENIZER, samples(24), samples(6, seed=9)).train()
    with serving(folder, TOKENIZER) as (url, _):
        config = recipe(tmp_path / "served-run", **changes)
        student = tiny_llama(SIZE, layers=2, seed=1)
        served = asking(url, top_k=SIZE)
        DistillTrainer(student, served, config, TOKENIZER, samples(24), samples(6, seed=9)).train()
    live, remote = curve(tmp_path / "live"), curve(tmp_path / "served-run")
    assert len(live) == len(remote) == 3 and any(record.get("share_revised") for record in live)
    for one, other in zip(live, remote, strict=True):
        for key in ("loss", "token", "kl", "teacher_log_likelihood", "student_samples", "error_position"):
            assert (key in one) == (key in other)
            assert one.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=2e-3, abs=1e-3), key


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        (breaks_off, "broke off its reply"),
        (says({"error": "busy"}, 503), r"fails \(503: .*busy"),
        (lambda _: threading.Event().wait(1.0), r"gave no reply within 0\.4 s"),
    ],
    ids=["half a reply", "503", "slow"],
)
def test_a_failure_that_passes_is_outlived_and_one_that_lasts_is_said(deed, words, folder, pauses):
    mischief = Mischief("/v1/completions", deed, times=2)
    with serving(folder, TOKENIZER, mischief) as (url, _):
        served = asking(url, timeout=0.4)
        assert len(served.signal(samples(1)).ids) and pauses == [1.0, 2.0]
        mischief.left = None
        with pytest.raises(
            ValueError, match=rf"{words}.*3 times in a row: is the server of teacher\.server\.url"
        ):
            served.signal(samples(1))


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ({"choices": [{"text": "no log-probabilities"}]}, "sends no prompt_logprobs"),
        ({"choices": [{"prompt_logprobs": [None, {"5": {"logprob": -1.0}}]}]}, "read 2 tokens of the"),
        ({"choices": []}, "sends no choices"),
    ],
)
def test_a_reply_that_cannot_be_right_is_refused(reply, said, folder):
    with (
        serving(folder, TOKENIZER, Mischief("/v1/completions", says(reply))) as (url, _),
        pytest.raises(ValueError, match=said),
    ):
        asking(url).signal(samples(1))


def test_too_few_log_probabilities_and_another_tokenizer_are_said(folder):
    with (
        serving(folder, TOKENIZER, max_logprobs=3) as (url, _),
        pytest.raises(
            ValueError, match=r"gives [34] log-probabilities of the 6 asked for: start it with --max-log"
        ),
    ):
        asking(url).signal(samples(2))
    other = tiny_tokenizer()
    other.add_tokens(["rivers"])
    with (
        serving(folder, other) as (url, _),
        pytest.raises(
            ValueError, match=r"with another tokenizer than .*: token \d+ of a probe is \[384\], not"
        ),
    ):
        asking(url)


def test_no_more_requests_than_allowed_are_under_way(folder):
    under_way, most, lock = set(), [0], threading.Lock()
    waiting = threading.Event()

    def watch(handler):
        with lock:
            under_way.add(id(handler))
            most[0] = max(most[0], len(under_way))
        waiting.wait(0.05)
        with lock:
            under_way.discard(id(handler))

    def mischief(path, handler):
        if path == "/v1/completions":
            watch(handler)
        return False

    with serving(folder, TOKENIZER, mischief) as (url, _):
        asking(url, concurrency=3).signal(samples(12))
    assert most[0] == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": {"server": {}, "cache": "somewhere"}}, "are both set"),
        ({"teacher": {"server": {}}, "rollout": {"teacher_mix": 0.2}}, r"rollout\.teacher_mix"),
        ({"teacher": {"server": {}}, "objective": {"temperature": 2.0}}, r"objective\.temperature"),
    ],
)
def test_what_a_server_cannot_say_is_refused(changes, said, tmp_path):
    with pytest.raises(ValidationError, match=said):
        recipe(tmp_path, **changes)
