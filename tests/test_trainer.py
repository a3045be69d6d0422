"""The whole step inside the engine: one loss curve however the batch is cut, and resume equals uninterrupted."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer

from redistill import DistillTrainer, Sample
from redistill.bad_steps import NotFinite
from redistill.batch import Counts
from redistill.checkpoint import latest, rotate
from redistill.config import Config
from redistill.losses.chunked import Part
from redistill.models import load_model
from redistill.phrases import SpanFinder
from redistill.rollout import Drawn
from redistill.runlog import read
from redistill.steplog import step_record, trained_on

TOKENIZER = tiny_tokenizer()


def samples(count, seed=0):
    words = TOKENIZER.decode(
        TOKENIZER.encode("the old river runs past a mill where small boats wait")
    ).split()
    generator = torch.Generator().manual_seed(seed)
    made = []
    for place in range(count):
        chosen = torch.randint(len(words), (4 + place % 5,), generator=generator).tolist()
        prompt = TOKENIZER.encode(" ".join(words[i] for i in chosen[:2]))
        text = TOKENIZER.encode(" " + " ".join(words[i] for i in chosen))
        made.append(Sample(tuple(prompt), (*text, TOKENIZER.eos_token_id), source=f"made:{place}"))
    return made


def recipe(folder, *, batch=8, accumulate=1, steps=6, **changes):
    sections = {
        "student": {"model_name_or_path": "tiny"},
        "teacher": {"model_name_or_path": "tiny"},
        "data": {"path": "none", "eval_split": "none"},
        "rollout": {"lmbda": 0.5, "per": "sample", "replay_ratio": 0.3, "max_completion_length": 12,
                    "schedule": "adaptive", "schedule_start": 0.4, "schedule_epsilon": 0.0, "replay_capacity": 20},
        "revision": {"rounds": 1},
        "objective": {"chunk_size": 32, "span_weight": 5.0, "dac": {"coverage": 0.1, "learning_rate": 0.01}},
        "training": {
            "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulate, "learning_rate": 0.01, "logging_steps": 1,
            "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "use_cpu": True, "report_to": "none",
            "disable_tqdm": True, "seed": 3, "save_total_limit": 2,
        },
    }  # fmt: skip
    for name, section in changes.items():
        sections[name] = {**sections[name], **section}
    return Config.model_validate(sections)


def trainer(config, student=None):
    student = student or tiny_llama(len(TOKENIZER), layers=2, seed=1)
    teacher = tiny_llama(len(TOKENIZER), layers=2, hidden=48, seed=2)
    return DistillTrainer(student, teacher, config, TOKENIZER, samples(24), samples(6, seed=9))


def curve(folder):
    volatile = ("seconds", "tokens_per_second")
    return [
        {k: v for k, v in record.items() if not k.startswith(volatile)}
        for record in read(folder / "steps.jsonl")
    ]


def assert_same_curve(one, other, tolerance=2e-4):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=1e-5), (a["step"], key)


def train_and_die_at(run, step):
    """Training that ends in an error after `step`, which is logged but not saved."""
    after = run.after_step

    class Died(Exception):
        pass

    def die():
        after()
        if run.state.global_step == step:
            raise Died

    run.after_step = die
    with pytest.raises(Died):
        run.train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(recipe(folder))
    run.train()
    return folder, run


def test_every_term_is_logged_and_the_loss_is_their_sum(whole):
    records = curve(whole[0])
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for r in records:
        assert r["span"] >= 0 and 0 <= r["token"] <= r["kl"] * 1.001
        assert r["loss"] == pytest.approx(r["sft"] + r["token"] + 5.0 * r["span"], rel=1e-4)
        assert 0 <= r["lower"] < r["upper"] <= 1 and 0 < r["retained_mass"] <= 1.0001
    assert any(r.get("share_revised", 0) > 0 for r in records)
    assert all(("share_cut" in r) == ("share_revised" in r) for r in records)
    phases = {"waiting", "rollout", "scoring", "revision", "spans", "loss", "optimizer"}
    for r in read(whole[0] / "steps.jsonl"):
        seconds = {k: v for k, v in r.items() if k.startswith("seconds_")}
        scrg = set() if r["student_samples"] > r["replayed"] else {"scoring", "revision"}
        assert seconds.keys() == {f"seconds_{name}" for name in phases - scrg}
        assert 0.5 * r["seconds"] < sum(seconds.values()) <= r["seconds"], "phases lie side by side"
    assert list(read(whole[0] / "revisions.jsonl")) and len(list(read(whole[0] / "evaluations.jsonl"))) == 3


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 2), (1, 8)])
def test_one_loss_curve_however_the_batch_is_cut(whole, tmp_path, batch, accumulate):
    trainer(recipe(tmp_path, batch=batch, accumulate=accumulate)).train()
    assert_same_curve(curve(tmp_path), curve(whole[0]))


def test_phrases_are_looked_for_while_the_models_read(tmp_path):
    references = {"lmbda": 0.0, "schedule": "constant"}
    run, read_by_both = trainer(recipe(tmp_path, steps=2, rollout=references)), threading.Event()
    run.teacher.model.model.register_forward_hook(lambda *_: read_by_both.set())
    find = run.finder._chunker

    def only_then(text):
        assert read_by_both.wait(timeout=60), "the step waits for phrases before the models have read"
        return find(text)

    run.finder = SpanFinder(TOKENIZER, only_then)
    run.train()
    other = trainer(recipe(tmp_path / "other", steps=2, rollout=references))
    other.train()
    assert_same_curve(curve(tmp_path), curve(tmp_path / "other"), tolerance=1e-6)
    assert curve(tmp_path)[0]["spans"] > 0


def test_what_finding_phrases_raises_ends_the_step(tmp_path):
    run = trainer(recipe(tmp_path, steps=1))
    run.finder = SpanFinder(TOKENIZER, lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.train()


def test_slices_do_not_change_the_curve(whole, tmp_path):
    trainer(recipe(tmp_path, objective={"chunk_size": 5})).train()
    assert_same_curve(curve(tmp_path), curve(whole[0]))


def test_stop_and_resume_equals_uninterrupted(whole, tmp_path):
    first = trainer(recipe(tmp_path))
    train_and_die_at(first, 5)
    last = latest(tmp_path)
    assert last is not None and last.name == "checkpoint-4"
    second = trainer(recipe(tmp_path))
    second.train(resume_from_checkpoint=str(last))
    assert_same_curve(curve(tmp_path), curve(whole[0]), tolerance=1e-7)
    for a, b in zip(second.pair.student.parameters(), whole[1].pair.student.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(second.objective.parameters(), whole[1].objective.parameters(), strict=True):
        assert torch.equal(a, b)
    assert second.rollout_state.buffer.state() == whole[1].rollout_state.buffer.state()
    assert second.rollout_state.schedule == whole[1].rollout_state.schedule


def test_the_clip_network_learns_at_its_own_rate(whole):
    fresh = trainer(recipe(whole[0].parent / "fresh"))
    moved = [
        not torch.equal(a, b)
        for a, b in zip(fresh.objective.parameters(), whole[1].objective.parameters(), strict=True)
    ]
    assert any(moved)


def test_checkpoint_is_a_plain_model_and_only_the_newest_stay(whole):
    folder, run = whole
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    loaded = load_model(folder / "checkpoint-6")
    for a, b in zip(loaded.parameters(), run.pair.student.parameters(), strict=True):
        assert torch.equal(a, b)


def spoilt(part: Part, factor: float) -> Part:
    return part._replace(loss=part.loss * factor, by_logits=part.by_logits * factor)


def test_a_step_that_is_not_finite_updates_nothing_and_three_stop_the_run(tmp_path):
    run = trainer(recipe(tmp_path, rollout={"lmbda": 0.0, "schedule": "constant"}))
    forward, calls = run.objective.forward, []

    def poisoned(*args):
        calls.append(run.state.global_step)
        return spoilt(forward(*args), float("nan") if run.state.global_step in poison else 1.0)

    run.objective.forward = poisoned
    poison = {1}
    before = {}
    create = run.create_optimizer

    def remember(*args):
        before.update({n: p.detach().clone() for n, p in run.pair.student.named_parameters()})
        return create(*args)

    run.create_optimizer = remember
    run.train()
    assert run.bad_steps.skipped == 1
    assert all(torch.isfinite(p).all() for p in run.pair.student.parameters())
    assert any(not torch.equal(before[n], p) for n, p in run.pair.student.named_parameters())

    stopped = trainer(recipe(tmp_path / "stopped", rollout={"lmbda": 0.0, "schedule": "constant"}))
    start = [p.detach().clone() for p in stopped.pair.student.parameters()]
    whole_forward = stopped.objective.forward
    stopped.objective.forward = lambda *a: spoilt(whole_forward(*a), float("inf"))
    with pytest.raises(NotFinite, match=r"3 steps in a row.*none yet|3 steps in a row.*checkpoint-2"):
        stopped.train()
    assert all(torch.equal(a, b) for a, b in zip(start, stopped.pair.student.parameters(), strict=True))


def test_prompt_only_data_and_plain_losses(tmp_path):
    bare = [Sample(s.prompt, (), source=s.source) for s in samples(8)]
    config = recipe(tmp_path, steps=2, objective={"token_loss": "jensen_shannon", "dac": {}, "span_weight": 0.0},
                    rollout={"schedule": "constant"})  # fmt: skip
    run = trainer(config)
    run.train_dataset = bare
    run.train()
    records = curve(tmp_path)
    assert all(r["student_samples"] == 8 and "sft" not in r and "lower" not in r for r in records)


def test_bf16_stays_near_fp32(whole, tmp_path):
    config = recipe(tmp_path, steps=1)
    trainer(
        config.model_copy(update={"training": {**config.training, "bf16": True, "eval_strategy": "no"}})
    ).train()
    one, other = curve(tmp_path)[0], curve(whole[0])[0]
    assert one["sft"] == pytest.approx(other["sft"], rel=0.02) and one["sft"] != other["sft"]


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from redistill import checkpoint
from test_trainer import recipe, trainer
real = checkpoint.save_state
def dies(folder, *rest):
    if folder.name == "checkpoint-4":
        (folder / "model.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(folder, *rest)
checkpoint.save_state = dies
trainer(recipe(Path(sys.argv[2]))).train()
"""


def test_killed_while_saving_the_previous_checkpoint_loads(whole, tmp_path, request):
    code = [sys.executable, "-c", KILLED_WHILE_SAVING, str(request.path.parent), str(tmp_path)]
    ended = subprocess.run(code, capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()[-2000:]
    last = latest(tmp_path)
    assert last is not None and last.name == "checkpoint-2"
    run = trainer(recipe(tmp_path))
    run.train(resume_from_checkpoint=str(last))
    assert_same_curve(curve(tmp_path), curve(whole[0]), tolerance=1e-7)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6


def test_share_cut_counts_fresh_answers_without_an_end():
    answers = [((4, 2), "rollout"), ((4, 4), "rollout"), ((2, 4), "rollout"), ((4, 4), "replay")]
    drawn = Drawn((), {place: Sample((1,), ids, origin) for place, (ids, origin) in enumerate(answers)})
    assert (
        step_record(drawn, trained_on([], [], [], 0.0), Counts(0, 0, 0), frozenset({2}))["share_cut"] == 2 / 3
    )


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"x")

    def left():
        return sorted(path.name for path in tmp_path.iterdir())

    everything = left()
    for limit in (None, 0, 4):
        rotate(tmp_path, limit)
        assert left() == everything
    rotate(tmp_path, 3, best=str(tmp_path / "checkpoint-2"))
    assert left() == ["checkpoint-10", "checkpoint-2", "checkpoint-6"]
    rotate(tmp_path, 1, best=str(tmp_path / "checkpoint-2"))
    assert left() == ["checkpoint-10", "checkpoint-2"]
    rotate(tmp_path, 1)
    assert left() == ["checkpoint-10"]
