"""Every engine writes what our own loop writes, as far as it can: the same tokens, or the same greedy ones."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_cli import place, redistill  # noqa: F401
from test_trainer import TOKENIZER, assert_same_curve, curve, recipe, train_and_die_at, trainer
from tiny import tiny_gpt2, tiny_llama, tiny_opt, tiny_qwen2
from transformers import CompileConfig

from redistill import Sample
from redistill.checkpoint import latest
from redistill.engines.choose import engine_of
from redistill.engines.paged import PagedBatching
from redistill.engines.static_cache import StaticLoop
from redistill.engines.writer import Loop, Request, check_answer, row_seed
from redistill.revision import revise_samples
from redistill.sampling import Sampling

PROMPTS = [[5, 9, 11, 40, 7], [300], [8, 8, 120, 77, 6, 50, 200, 31, 90], [4, 250], [60, 61, 62], [300]]
LIMITS = [12, 14, 5, 0, 9, 14]
GREEDY, DRAWN = Sampling(0.0), Sampling(1.1, top_p=0.95, top_k=60, min_p=0.001)
FAMILIES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2, "opt": tiny_opt}


def asked(sampling=DRAWN, *, seed=0, batch_size=3, vocabulary=380, eos=frozenset(range(60)), limits=LIMITS):
    uniforms = torch.rand(len(PROMPTS), max(limits), generator=torch.Generator().manual_seed(seed))
    return Request(PROMPTS, limits, sampling, eos, vocabulary, uniforms, batch_size)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_static_cache_says_what_the_loop_says(family, sampling):
    model = FAMILIES[family]().train()
    # 16 columns are too few for the second call: the cache grows.
    writer = StaticLoop(model, columns=16)
    for seed, limits in ((0, [2] * 6), (1, LIMITS), (2, LIMITS)):
        request = asked(sampling, seed=seed, limits=limits)
        said = writer.write(request)
        assert said == Loop(model).write(request)
        assert limits != LIMITS or len({len(each) for each in said}) > 3, "rows must end at different steps"
    assert all(module.training for module in model.modules())


def test_a_static_row_that_has_ended_does_not_run_past_the_last_position():
    model = tiny_gpt2()
    long = list(range(70, 70 + 250)) * 2
    request = Request([[*long, 1, 2], [7, 8]], [10, 60], GREEDY, frozenset(), 384, torch.zeros(2, 60), 2)
    assert len(long) + 2 + 10 == model.config.n_positions
    alone = [Loop(model).write(Request([p], [n], GREEDY, frozenset(), 384, torch.zeros(1, 60), 1))[0]
             for p, n in zip(request.prompts, request.limits, strict=True)]  # fmt: skip
    assert StaticLoop(model, 600).write(request) == alone


def test_the_static_step_is_compiled_once_for_prompts_limits_and_batches_of_any_size():
    model, graphs = tiny_llama(), []

    def count(graph, inputs):
        graphs.append([tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor)])
        return graph.forward

    torch._dynamo.reset()
    writer = StaticLoop(model, 64, CompileConfig(backend=count, mode="default", dynamic=False))
    first = asked()
    assert writer.write(first) == Loop(model).write(first)
    compiled = len(graphs)
    assert compiled
    fewer = Request([[9, 9]], [7], DRAWN, frozenset(), 384, first.uniforms[:1], 3)
    for request in (asked(seed=5, limits=[3, 14, 1, 2, 14, 9]), fewer):
        assert writer.write(request) == Loop(model).write(request)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # as an optimizer does it, in place
    assert writer.write(first) == Loop(model).write(first)
    assert len(graphs) == compiled


def answers(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(4, 380, (size,), generator=generator).tolist() for size in (9, 3, 6, 11, 1)[:count]]
    return [Sample((1, 8 + at), tuple(ids), "rollout") for at, ids in enumerate(made)]


@pytest.mark.parametrize("engine", [StaticLoop, PagedBatching])
def test_scrg_writes_on_through_an_engine_as_it_does_from_the_kept_cache(engine):
    student, teacher = tiny_llama(seed=1), tiny_llama(seed=2, hidden=48)
    drawn = engine is StaticLoop
    options = {"rounds": 3, "teacher_token": "argmax", "sampling": DRAWN if drawn else GREEDY,
               "eos": frozenset({2}), "vocabulary": 384, "max_completion_length": 12, "batch_size": 2}  # fmt: skip
    writer = StaticLoop(student, 32) if drawn else PagedBatching(student)

    def revise(**more):
        return revise_samples(
            student, teacher, answers(5), generator=torch.Generator().manual_seed(4), **options, **more
        )

    revised = revise(writer=writer)
    for one, other in zip(revised, revise(), strict=True):
        assert one.response == other.response and len(one.edits) == len(other.edits)
        for a, b in zip(one.edits, other.edits, strict=True):
            assert replace(a, kl=0.0, kl_tokens=()) == replace(b, kl=0.0, kl_tokens=())
            # What is kept lies a sequence a row, what is only read lies packed: equal up to rounding.
            assert a.kl == pytest.approx(b.kl, rel=1e-5)
            assert a.kl_tokens == pytest.approx(b.kl_tokens, abs=2e-4)
    assert max(len(each.edits) for each in revised) == 3


def test_paged_batching_says_what_the_loop_says_when_greedy():
    model = tiny_llama().train()
    attention, state = model.config._attn_implementation, torch.random.get_rng_state()
    request = asked(GREEDY)
    assert PagedBatching(model).write(request) == Loop(model).write(request)
    assert model.config._attn_implementation == attention and model.training
    assert torch.equal(torch.random.get_rng_state(), state), "the engine seeds the global generator"


def test_paged_batching_samples_by_all_settings_and_repeats_itself():
    model = tiny_llama()
    writer = PagedBatching(model)
    # min_p 1 leaves the most probable token alone: sampling is greedy then, within the vocabulary.
    narrow = Sampling(1.0, min_p=1.0)
    assert writer.write(asked(narrow, vocabulary=300)) == Loop(model).write(asked(GREEDY, vocabulary=300))
    drawn = writer.write(asked())
    assert drawn == writer.write(asked()) != writer.write(asked(seed=1))
    assert drawn != Loop(model).write(asked())


def test_paged_batching_that_gives_up_is_an_error(monkeypatch):
    model = tiny_llama()
    monkeypatch.setattr(type(model), "generate_batch", lambda *_, **__: {})
    with pytest.raises(ValueError, match="answered 0 of 5 prompts"):
        PagedBatching(model).write(asked())


def test_what_is_no_whole_answer_is_refused():
    request = Request([[1]], [4], GREEDY, frozenset({2}), 10, torch.zeros(1, 4), 1)
    for whole in ([5, 2], [5, 6, 7, 8], [2], [5, 6, 7, 2]):
        assert check_answer(whole, request, 0, "it") == tuple(whole)
    for broken, said in (
        ([5, 6], "after 2 of 4 tokens"),
        ([], "after 0 of 4 tokens"),
        ([5, 6, 7, 8, 9], "wrote 5 tokens where 4"),
        ([5, 2, 6], "wrote on behind the end-of-text token 2"),
        ([5, 10, 2], "wrote token 10"),
        ([5, -1, 2], "wrote token -1"),
    ):
        with pytest.raises(ValueError, match=said):
            check_answer(broken, request, 0, "it")


def test_a_seed_stands_for_its_numbers():
    one, other = torch.rand(2, 8, generator=torch.Generator().manual_seed(1))
    assert row_seed(one) == row_seed(one.double()) != row_seed(other)
    assert 0 <= row_seed(one) < 2**63


def test_an_engine_that_cannot_mix_in_the_teacher_or_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only the loop mixes in the teacher"):
        recipe(tmp_path, rollout={"engine": "static", "teacher_mix": 0.2})
    with pytest.raises(ValueError, match=r'pip install "redistill\[vllm\]"'):
        engine_of(recipe(tmp_path, rollout={"engine": "vllm"}), tiny_llama(), TOKENIZER)
    with pytest.raises(ValueError, match="one process, and this one has 2"):
        engine_of(recipe(tmp_path, rollout={"engine": "vllm"}), tiny_llama(), TOKENIZER, 2)
    assert recipe(tmp_path, rollout={"vllm": {"mode": "server"}}).warnings()
    assert not recipe(tmp_path, rollout={"vllm": {"mode": "server"}, "engine": "vllm"}).warnings()


def test_a_static_run_has_the_curve_of_the_loop_and_resumes_to_it(tmp_path):
    for engine in ("loop", "static"):
        trainer(recipe(tmp_path / engine, rollout={"engine": engine}, steps=4)).train()
    expected = curve(tmp_path / "loop")
    assert any(record["student_samples"] for record in expected)
    assert_same_curve(expected, curve(tmp_path / "static"))
    config = recipe(tmp_path / "killed", rollout={"engine": "static"}, steps=4)
    train_and_die_at(trainer(config), 3)
    trainer(config).train(resume_from_checkpoint=str(latest(tmp_path / "killed")))
    assert_same_curve(expected, curve(tmp_path / "killed"))


def test_the_command_line_trains_with_the_static_engine(place):  # noqa: F811
    said = redistill(
        "train", "recipe.yaml", "--output", "static", "--set", "rollout.engine=static", cwd=place
    )
    assert "Traceback" not in said.stdout
    steps = [json.loads(line) for line in (place / "static" / "steps.jsonl").read_text().splitlines()]
    assert len(steps) == 4 and sum(step["student_samples"] for step in steps)
    redistill("train", "recipe.yaml", "--output", "loop", cwd=place)
    loop = [json.loads(line) for line in (place / "loop" / "steps.jsonl").read_text().splitlines()]
    assert [step["loss"] for step in steps] == pytest.approx([step["loss"] for step in loop], rel=1e-4)
