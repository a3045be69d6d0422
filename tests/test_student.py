from __future__ import annotations

import copy

import pytest
import torch
from tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_opt, tiny_qwen2
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from redistill.loading import load_model
from redistill.models import add_lora, parameter_count
from redistill.settings import LoraSettings
from redistill.student import block_influence, choose_layers, prune_layers, select_layers

KEPT = (0, 2, 3, 5)
PROMPTS = [[7, 9, 11, 13, 17], [19, 23], [29, 31, 37], [41] * 12]


def sliding_qwen3(layers: int = 6) -> Qwen3ForCausalLM:
    """Its last three layers see two tokens back only, so that the kinds of layers must follow the layers."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        use_sliding_window=True,
        sliding_window=2,
        max_window_layers=3,
        tie_word_embeddings=True,
        eos_token_id=2,
        pad_token_id=3,
    )
    return Qwen3ForCausalLM(config).eval()


MAKERS = {
    "llama": lambda: tiny_llama(layers=6, tied=True),
    "qwen2": lambda: tiny_qwen2(layers=6),
    "qwen3": sliding_qwen3,
    "gpt2": lambda: tiny_gpt2(layers=6),
    "opt": lambda: tiny_opt(layers=6, embedding=16),
}
BLOCKS = {
    "llama": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
}


def step(model, ids, past, use_cache):
    with torch.no_grad():
        return model(input_ids=ids, past_key_values=past, use_cache=use_cache)


def greedy(model, prompt: list[int], count: int, *, cached: bool) -> list[int]:
    """Greedy decoding by hand, so that nothing but the model's cache is under test."""
    ids, past, answer = torch.tensor([prompt]), None, []
    for _ in range(count):
        output = step(model, ids, past, cached)
        best = int(output.logits[0, -1].argmax())
        answer.append(best)
        past = output.past_key_values if cached else None
        ids = torch.tensor([[best]]) if cached else torch.tensor([prompt + answer])
    return answer


def skipping(model, blocks: str, kept: tuple[int, ...], ids: torch.Tensor) -> torch.Tensor:
    """The logits of `model` with the other layers switched off by hooks: what pruning must equal."""

    def pass_through(_module, args, output):
        return args[0] if isinstance(output, torch.Tensor) else (args[0], *output[1:])

    layers = model.get_submodule(blocks)
    hooks = [layer.register_forward_hook(pass_through) for i, layer in enumerate(layers) if i not in kept]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("name", MAKERS)
def test_pruned_model_is_the_model_without_those_layers(name, tmp_path):
    model = MAKERS[name]()
    before = copy.deepcopy(model.state_dict())
    config_before = model.config.to_dict()
    ids = torch.tensor([PROMPTS[0] + PROMPTS[2]])
    pruned = prune_layers(model, KEPT)
    with torch.no_grad():
        logits = pruned(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, skipping(model, BLOCKS[name], KEPT, ids))

    assert pruned.config.num_hidden_layers == len(pruned.get_submodule(BLOCKS[name])) == 4
    tied = pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight
    assert tied == bool(model.config.tie_word_embeddings)
    assert pruned.get_input_embeddings().weight is not model.get_input_embeddings().weight

    pruned.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert parameter_count(again) == parameter_count(pruned) < parameter_count(model)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, logits)

    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    assert model.config.to_dict() == config_before
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", MAKERS)
def test_key_value_cache_works_after_pruning(name):
    pruned = prune_layers(MAKERS[name](), KEPT)
    with_cache = greedy(pruned, PROMPTS[0], 12, cached=True)
    assert with_cache == greedy(pruned, PROMPTS[0], 12, cached=False)
    length = len(PROMPTS[0]) + 12
    theirs = pruned.generate(
        torch.tensor([PROMPTS[0]]), do_sample=False, max_length=length, eos_token_id=None, pad_token_id=3
    )
    assert theirs[0, len(PROMPTS[0]) :].tolist() == with_cache


def test_kinds_of_layers_follow_the_layers():
    model = sliding_qwen3()
    assert model.config.layer_types == ["full_attention"] * 3 + ["sliding_attention"] * 3
    pruned = prune_layers(model, KEPT)
    assert pruned.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2


@pytest.mark.parametrize("name", MAKERS)
def test_block_influence_is_the_mean_over_real_tokens(name):
    """Against the hidden states the model itself returns, one prompt at a time, without padding."""
    model = MAKERS[name]().train()
    blocks = model.get_submodule(BLOCKS[name])
    captured: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        block.register_forward_hook(
            lambda _m, args, out: captured.append((args[0], out if isinstance(out, torch.Tensor) else out[0]))
        )
        for block in blocks
    ]
    rows = []
    model.eval()
    for prompt in PROMPTS:
        captured.clear()
        with torch.no_grad():
            model(input_ids=torch.tensor([prompt]))
        rows.append(
            torch.stack([1 - torch.cosine_similarity(a[0].double(), b[0].double(), -1) for a, b in captured])
        )
    for hook in hooks:
        hook.remove()
    expected = torch.cat(rows, dim=1).mean(dim=1)

    model.train()
    ids = torch.zeros(4, 12, dtype=torch.long)
    mask = torch.zeros(4, 12, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    halves = [(ids[:2], mask[:2]), (ids[2:], mask[2:])]
    found = torch.tensor(block_influence(model, halves), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.training
    assert not any(block._forward_hooks for block in blocks)


def test_layers_that_do_nothing_are_dropped_first():
    model = tiny_llama(layers=5)
    with torch.no_grad():
        for index in (1, 3):
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()
    assert select_layers(model, 3, PROMPTS) == (0, 2, 4)
    pruned = prune_layers(model, (0, 2, 4))
    ids = torch.tensor([PROMPTS[3]])
    torch.testing.assert_close(pruned(ids).logits, model(ids).logits)


def test_choose_layers_keeps_order_and_prefers_the_earlier_of_equals():
    assert choose_layers([0.1, 0.9, 0.5, 0.9, 0.5], 3) == (1, 2, 3)
    with pytest.raises(ValueError, match="cannot keep 6 of 5 layers"):
        choose_layers([0.0] * 5, 6)


@pytest.mark.parametrize(
    ("keep", "layers"),
    [
        ("every_second", (0, 2, 4)),
        ("first:2", (0, 1)),
        ("last:2", (4, 5)),
        ("spread:3", (0, 2, 5)),
        ("spread:1", (0,)),
        ("0-2,5", (0, 1, 2, 5)),
        ([4, 0], (0, 4)),
        (6, (0, 1, 2, 3, 4, 5)),
        ("6", (0, 1, 2, 3, 4, 5)),
    ],
)
def test_rules_and_lists(keep, layers):
    assert select_layers(tiny_gpt2(layers=6), keep) == layers


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ("sometimes", "'sometimes' is not a number, a list like 0-3,7,9 or a rule"),
        ("first:9", "'first:9' does not fit a model of 6 layers"),
        ("4-2", "at least one"),
        ([0, 6], "different numbers from 0 to 5"),
        ([1, 1], "different numbers"),
        (0, "cannot keep 0 of 6 layers"),
        (3, "at least one prompt"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, said):
    with pytest.raises(ValueError, match=said):
        select_layers(tiny_gpt2(layers=6), keep)


def test_models_that_cannot_be_pruned_are_refused_by_name():
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM .* cannot be pruned: supported are llama"):
        prune_layers(Gemma2ForCausalLM(config), [0])
    with pytest.raises(ValueError, match="merge them first"):
        prune_layers(add_lora(tiny_llama(), LoraSettings(target_modules=("q_proj",))), [0])
    numbered = GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=VOCAB, scale_attn_by_inverse_layer_idx=True
    )
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        prune_layers(GPT2LMHeadModel(numbered), [1])
