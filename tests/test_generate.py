"""Answers: those of transformers' own loop where it is greedy, the exact distribution where it samples."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from table_models import table, table_model
from tiny import EOS_ID, VOCAB, tiny_gpt2, tiny_llama, tiny_opt, tiny_qwen2
from torch import nn

from redistill.generate import generate
from redistill.sampling import Sampling, filter_logits, sample

GREEDY = Sampling(temperature=0.0)
NO_EOS: frozenset[int] = frozenset()
PROMPTS = [[5, 9, 11, 40, 7], [300], [8, 8, 120, 77, 6, 50, 200, 31, 90], [4, 250], [60, 61, 62]]
FAMILIES = {"llama": tiny_llama, "qwen2": tiny_qwen2, "gpt2": tiny_gpt2, "opt": tiny_opt}


def answer(model, prompts, *, limits, sampling=GREEDY, eos=NO_EOS, seed=0, batch_size=8, vocabulary=None):
    generator = torch.Generator().manual_seed(seed)
    return generate(
        model,
        prompts,
        limits=limits if isinstance(limits, list) else [limits] * len(prompts),
        sampling=sampling,
        eos=eos,
        generator=generator,
        batch_size=batch_size,
        vocabulary=vocabulary,
    )


def chi_square(counts: Counter, probabilities: dict, total: int) -> tuple[float, float]:
    """The statistic over the outcomes that can happen, and its mean plus six standard deviations."""
    possible = {key: p for key, p in probabilities.items() if p > 0}
    assert set(counts) <= set(possible)
    statistic = sum((counts[key] - total * p) ** 2 / (total * p) for key, p in possible.items())
    freedom = len(possible) - 1
    return statistic, freedom + 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family):
    model = FAMILIES[family]()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=VOCAB + 1,
        )
        expected.append(tuple(whole[0, len(prompt) :].tolist()))
    assert len(set(expected)) == len(PROMPTS)
    assert answer(model, PROMPTS, limits=14) == expected
    # With one of the ids that are said as end of text, each answer ends with the first of them.
    end = expected[0][6]
    cut = [said[: said.index(end) + 1] if end in said else said for said in expected]
    assert answer(model, PROMPTS, limits=14, eos=frozenset({end})) == cut
    limits = [1, 14, 0, 6, 3]
    expected = [said[:limit] for said, limit in zip(expected, limits, strict=True)]
    assert answer(model, PROMPTS, limits=limits) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_its_neighbours_or_on_the_cut_into_batches(family):
    model = FAMILIES[family]()
    sampling = Sampling(temperature=1.1, top_p=0.95, top_k=60, min_p=0.001)
    kwargs = {"limits": 20, "sampling": sampling, "eos": frozenset(range(0, 40)), "seed": 4}
    together = answer(model, PROMPTS, **kwargs)
    assert len({len(said) for said in together}) > 1, (
        "rows must end at different steps for this to test anything"
    )
    for batch_size in (1, 2, 3):
        assert answer(model, PROMPTS, **kwargs, batch_size=batch_size) == together
    assert answer(model, PROMPTS[:1], **kwargs) == together[:1]
    assert answer(model, PROMPTS, **(kwargs | {"seed": 5})) != together


def test_the_cache_is_used_under_gradient_checkpointing_and_the_model_left_as_it_was():
    model = tiny_llama()
    expected = answer(model, PROMPTS, limits=6)
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert answer(model, PROMPTS, limits=6) == expected
    hook.remove()
    assert read == [max(map(len, PROMPTS)), 1, 1, 1, 1, 1]
    assert [module.training for module in model.modules()] == before
    assert model.config.use_cache is False
    assert model.is_activation_checkpointing


def test_the_modes_are_restored_after_an_error_too():
    model = tiny_gpt2().train()
    with pytest.raises(IndexError):
        answer(model, [[VOCAB + 7]], limits=1)
    assert all(module.training for module in model.modules())


def test_dropout_is_off_and_nothing_has_a_gradient():
    model = tiny_llama().train()
    model.model.layers[0].mlp.register_module("drop", nn.Dropout(0.9))
    model.model.layers[0].mlp.register_forward_hook(lambda module, _, out: module.drop(out))
    grad = []
    model.lm_head.register_forward_hook(lambda _, __, out: grad.append(out.requires_grad))
    first = answer(model, PROMPTS, limits=8)
    assert first == answer(model, PROMPTS, limits=8)
    assert not any(grad)


def test_rows_that_have_ended_leave_the_batch():
    model = tiny_llama()
    sizes = []
    model.model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    said = answer(model, PROMPTS + PROMPTS[:3], limits=[2, 2, 8, 3, 5, 5, 0, 6], batch_size=8)
    assert list(map(len, said)) == [2, 2, 8, 3, 5, 5, 0, 6]
    # 5 different prompts for 7 rows; after step 2 two are gone; after step 3 one more, a fifth of those left,
    # so it stays for now;
    # after step 5 two more.
    assert sizes == [5, 7, 5, 5, 5, 2, 1, 1]


def test_nothing_to_say_reads_nothing():
    model = tiny_llama()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was read"))
    assert answer(model, PROMPTS, limits=[0, 0, -3, 0, 0]) == [()] * 5
    assert answer(model, [], limits=4) == []


def test_ids_past_the_vocabulary_are_never_said():
    rows = {0: {5: 0.9, 1: 0.06}, 1: {4: 0.9, 2: 0.06}, 2: {5: 0.5, 3: 0.3}}
    model = table_model(table(rows, 6))
    assert answer(model, [[0]], limits=1) == [(5,)]
    assert answer(model, [[0]], limits=3, vocabulary=4) == [(1, 2, 3)]
    drawn = answer(model, [[0]] * 200, limits=3, sampling=Sampling(), vocabulary=4, batch_size=200)
    assert {token for said in drawn for token in said} == {0, 1, 2, 3}


def naive_filter(logits: list[float], sampling: Sampling) -> list[float]:
    """Probabilities in float64 after the three filters, token by token."""
    scaled = [value / sampling.temperature for value in logits]
    kept = set(range(len(scaled)))
    if sampling.top_k:
        kept = set(sorted(kept, key=lambda k: -scaled[k])[: sampling.top_k])

    def normalized() -> dict[int, float]:
        weights = {k: math.exp(scaled[k]) for k in kept}
        return {k: weight / sum(weights.values()) for k, weight in weights.items()}

    if sampling.top_p < 1:
        p, mass, chosen = normalized(), 0.0, set()
        for k in sorted(kept, key=lambda k: -scaled[k]):
            if mass < sampling.top_p:
                chosen.add(k)
            mass += p[k]
        kept = chosen
    p = normalized()
    kept = {k for k in kept if p[k] >= sampling.min_p * max(p.values())}
    p = normalized()
    return [p.get(k, 0.0) for k in range(len(scaled))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6, top_k=3),
        Sampling(top_k=400),
        Sampling(top_k=1),
        Sampling(top_p=0.8),
        Sampling(temperature=1.7, top_p=1e-6),
        Sampling(min_p=0.2),
        Sampling(min_p=1.0),
        Sampling(temperature=1.3, top_k=9, top_p=0.7, min_p=0.1),
    ],
    ids=str,
)
def test_filters_are_exact(sampling):
    logits = 2 * torch.randn(40, 23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.tensor([naive_filter(row, sampling) for row in logits.tolist()], dtype=torch.float64)
    found = filter_logits((logits / sampling.temperature).float(), sampling).softmax(-1).double()
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_a_nucleus_is_the_same_however_much_of_the_vocabulary_holds_it():
    """A sharp row needs a few tokens, a flat one half of all; side by side and each alone; ties stay together."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 6000, generator=generator) * torch.tensor([[6.0], [1.0], [0.05]])
    ordered, order = logits.double().softmax(-1).sort(-1, descending=True)
    inside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered < 0.7)
    together = filter_logits(logits, Sampling(top_p=0.7))
    assert torch.equal(together.isfinite(), inside)
    assert [len(row) < 256 for row in map(torch.nonzero, inside)] == [True, False, False]
    for row in range(3):
        assert torch.equal(filter_logits(logits[row : row + 1], Sampling(top_p=0.7))[0], together[row])
    tied = torch.tensor([[0.0, 1.0, 1.0, 1.0, -1.0]])
    assert filter_logits(tied, Sampling(top_p=0.3)).isfinite().tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7, top_k=6), Sampling(top_p=0.75), Sampling(min_p=0.15)],
    ids=str,
)
def test_tokens_come_as_often_as_they_should(sampling):
    total = 20_000
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, generator=generator)
    drawn = sample(logits.expand(total, -1), torch.rand(total, generator=generator), sampling)
    exact = dict(enumerate(naive_filter(logits.tolist(), sampling)))
    statistic, bound = chi_square(Counter(drawn.tolist()), exact, total)
    assert statistic < bound
    # The bound is one that a slightly wrong temperature breaks.
    wrong = naive_filter(
        logits.tolist(), Sampling(sampling.temperature * 1.2, sampling.top_p, sampling.top_k)
    )
    if sampling == Sampling():
        statistic, bound = chi_square(Counter(drawn.tolist()), dict(enumerate(wrong)), total)
        assert statistic > bound


def test_whole_answers_come_as_often_as_they_should():
    """Steps are independent draws: the frequency of every two-token answer, and of those cut by the end."""
    p = table({0: {1: 0.6, 2: 0.3}, 1: {1: 0.2, 2: 0.5}, 2: {3: 0.7}}, 4)
    total, end = 4000, 3
    said = answer(
        table_model(p), [[0]] * total, limits=2, sampling=Sampling(), eos=frozenset({end}), batch_size=total
    )
    exact = {}
    for first in range(4):
        if first == end:
            exact[(first,)] = float(p[0, first])
            continue
        for second in range(4):
            exact[first, second] = float(p[0, first] * p[first, second])
    statistic, bound = chi_square(Counter(said), exact, total)
    assert statistic < bound


def test_the_ends_of_the_unit_interval_belong_to_possible_tokens():
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.0, 0.3, 0.1, -torch.inf]]).expand(2, -1)
    assert sample(logits, torch.tensor([0.0, 1 - 2.0**-24]), Sampling()).tolist() == [2, 4]
    # 1 itself stands for a level that rounding lifted over the sum.
    assert sample(logits[:1], torch.tensor([1.0]), Sampling()).tolist() == [3]
    broken = torch.full((1, 6), torch.nan)
    assert 0 <= int(sample(broken, torch.tensor([0.5]), Sampling(top_p=0.9))) < 6


def test_greedy_takes_nothing_from_the_generator_and_sampling_does():
    generator = torch.Generator().manual_seed(9)
    state = generator.get_state()
    kwargs = {"limits": [3], "eos": frozenset({EOS_ID}), "generator": generator, "batch_size": 1}
    generate(tiny_llama(), [[5]], sampling=GREEDY, **kwargs)
    assert torch.equal(generator.get_state(), state)
    generate(tiny_llama(), [[5]], sampling=Sampling(), **kwargs)
    assert not torch.equal(generator.get_state(), state)


def test_bad_requests_are_refused_with_the_row_and_the_value():
    model = tiny_llama()
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        answer(model, [[4], []], limits=2)
    with pytest.raises(ValueError, match="2 prompts but 1 limits"):
        answer(model, [[4], [5]], limits=[2])
    with pytest.raises(ValueError, match="batch_size is 0"):
        answer(model, [[4]], limits=2, batch_size=0)
    for name, value in {"temperature": -0.1, "top_p": 0.0, "top_k": -1, "min_p": 1.5}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            Sampling(**{name: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_comes_again_is_read_once_and_answered_as_if_alone(family, monkeypatch):
    from redistill import generate as module

    model = FAMILIES[family]()
    uniforms = torch.rand(3, 10, generator=torch.Generator().manual_seed(5))
    read = []
    real = module.prefill
    monkeypatch.setattr(
        module, "prefill", lambda model, prompts: read.append(len(prompts)) or real(model, prompts)
    )
    options = {"sampling": Sampling(1.0), "eos": NO_EOS, "generator": None}
    prompts = [PROMPTS[0], PROMPTS[2], PROMPTS[0]]
    together = generate(model, prompts, limits=[10, 4, 7], batch_size=3, uniforms=uniforms, **options)
    alone = [
        generate(model, [prompt], limits=[limit], batch_size=1, uniforms=uniforms[row : row + 1], **options)[
            0
        ]
        for row, (prompt, limit) in enumerate(zip(prompts, [10, 4, 7], strict=True))
    ]
    assert together == alone and read == [2, 1, 1, 1] and together[0][:7] != together[2]


def test_a_row_at_its_limit_is_not_read_past_the_positions_of_the_model():
    model = tiny_gpt2(VOCAB)
    room = model.config.n_positions
    generator = torch.Generator().manual_seed(0)
    long = torch.randint(4, VOCAB, (room - 10,), generator=generator).tolist()
    prompts, limits = [long, *[[5 + row] for row in range(7)]], [10, *[40] * 7]
    how = {"sampling": Sampling(0.0), "eos": frozenset[int](), "generator": None}
    together = generate(model, prompts, limits=limits, batch_size=8, **how)
    assert [len(answer) for answer in together] == limits
    assert together == [
        generate(model, [prompt], limits=[limit], batch_size=1, **how)[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
