"""A student out of a teacher: the same model with fewer layers, chosen by what each changes.

Pruning alone leaves a model that writes little sense; it is the starting point that distillation repairs.
Widths and vocabulary stay the teacher's. Other shapes of student come as a folder or a hub id instead.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from redistill.chat import Template, to_sample
from redistill.models import plain_model
from redistill.sample import Example, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAYERS = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "gpt2": "transformer.h",
    "opt": "model.decoder.layers",
}
"""Where the layers of each supported `config.model_type` are."""

RULES = ("every_second", "first:N", "last:N", "spread:N")

_PROMPTS_AT_ONCE = 8


def _layers_of(model: PreTrainedModel) -> nn.ModuleList:
    path = LAYERS.get(model.config.model_type)
    if path is None:
        raise ValueError(
            f"{type(model).__name__} (model type {model.config.model_type!r}) cannot be pruned: supported "
            f"are {', '.join(LAYERS)}. Use a smaller model of the same family as the student instead."
        )
    layers = model.get_submodule(path)
    assert isinstance(layers, nn.ModuleList)
    return layers


def block_influence(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
    """How much each layer changes what passes through it: 1 - cosine(input, output), mean over real tokens.

    batches: pairs of input_ids and attention_mask, [B, L] each, padded on the right. One forward pass each,
    without gradients and in eval mode; hooks and mode are put back. Returns one number a layer in [0, 2], 0
    where a layer only scales its input (Men et al. 2024, "ShortGPT", arXiv 2403.03853). Raises ValueError for
    an unsupported architecture and when there is no real token.
    """
    inner = plain_model(model)
    layers = _layers_of(inner)
    sums = torch.zeros(len(layers), dtype=torch.float64)
    tokens = 0
    mask = torch.zeros(0, dtype=torch.bool)

    def add(index: int, before: Tensor, after: Tensor) -> None:
        cosine = torch.cosine_similarity(before[mask].float(), after[mask].float(), dim=-1)
        sums[index] += (1.0 - cosine).sum().double().cpu()

    hooks = [
        layer.register_forward_hook(_watch(index, add), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for input_ids, attention_mask in batches:
                mask = attention_mask.to(inner.device).bool()
                tokens += int(mask.sum())
                inner.base_model(
                    input_ids=input_ids.to(inner.device), attention_mask=mask.long(), use_cache=False
                )
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if tokens == 0:
        raise ValueError("block influence needs at least one prompt with at least one token.")
    return (sums / tokens).tolist()


def _watch(index: int, add):
    def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        add(index, before, output if isinstance(output, Tensor) else output[0])

    return hook


def choose_layers(influence: Sequence[float], keep: int) -> tuple[int, ...]:
    """The `keep` layers of most influence, in the model's order; of equals, the earlier one stays."""
    if not 1 <= keep <= len(influence):
        raise ValueError(
            f"cannot keep {keep} of {len(influence)} layers: give a number from 1 to {len(influence)}."
        )
    order = sorted(range(len(influence)), key=lambda index: (-influence[index], index))
    return tuple(sorted(order[:keep]))


def select_layers(
    model: nn.Module, keep: int | str | Sequence[int], prompts: Sequence[Sequence[int]] = ()
) -> tuple[int, ...]:
    """The layers to keep, in the model's order.

    keep: a number (by `block_influence` on `prompts`, token ids of training prompts), a list of layer numbers
    from 0, or text: "20", a list like "0-3,7,9", or a rule: "every_second" (0, 2, 4...), "first:N", "last:N",
    "spread:N" (evenly, with first and last). Raises ValueError for what cannot be read or is out of range.
    """
    depth = len(_layers_of(plain_model(model)))
    if isinstance(keep, str):
        keep = _read_keep(keep.strip(), depth)
    if isinstance(keep, int):
        choose_layers([0.0] * depth, keep)
        if keep == depth:
            return tuple(range(depth))
        return choose_layers(block_influence(model, _right_padded(prompts)), keep)
    return _checked(keep, depth)


def _read_keep(text: str, depth: int) -> int | list[int]:
    if text.isdecimal():
        return int(text)
    if text == "every_second":
        return list(range(0, depth, 2))
    rule, colon, number = text.partition(":")
    if colon and rule in ("first", "last", "spread") and number.isdecimal():
        count = int(number)
        if not 1 <= count <= depth:
            raise ValueError(f"the rule {text!r} does not fit a model of {depth} layers.")
        if rule == "first":
            return list(range(count))
        if rule == "last":
            return list(range(depth - count, depth))
        return [round(index * (depth - 1) / max(count - 1, 1)) for index in range(count)]
    try:
        ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
        return [layer for ends in ranges for layer in range(ends[0], ends[-1] + 1)]
    except ValueError:
        raise ValueError(
            f"layers to keep: {text!r} is not a number, a list like 0-3,7,9 or a rule ({', '.join(RULES)})."
        ) from None


def _checked(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    kept = tuple(sorted(layers))
    if not kept or kept[0] < 0 or kept[-1] >= depth or len(set(kept)) < len(kept):
        raise ValueError(
            f"layers to keep: {list(layers)} must be different numbers from 0 to {depth - 1}, at least one."
        )
    return kept


def _right_padded(prompts: Sequence[Sequence[int]]) -> Iterable[tuple[Tensor, Tensor]]:
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        rows = prompts[start : start + _PROMPTS_AT_ONCE]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long)
        lengths = torch.tensor([len(row) for row in rows])
        yield ids, (torch.arange(longest) < lengths[:, None]).long()


def prune_layers(model: nn.Module, layers: Sequence[int]) -> PreTrainedModel:
    """A new model with deep copies of the given layers, in the model's order; `model` itself is untouched.

    Everything else is copied too, tied embeddings stay tied, `config.num_hidden_layers` and lists with one
    entry a layer (`layer_types`) follow, and the layers are renumbered, so that the key-value cache works and
    a saved copy loads like any model. It has no `name_or_path`, which was the whole model's: adapters would state it
    as their base. Only the kept layers are ever copied. Raises ValueError for an unsupported architecture, for
    adapters that are not merged, and for layer numbers out of range.
    """
    inner = plain_model(model)
    if inner is not model:
        raise ValueError("a model with adapters cannot be pruned: merge them first (`merge_and_unload`).")
    blocks = _layers_of(inner)
    depth = len(blocks)
    kept = _checked(layers, depth)
    if inner.config.to_dict().get("scale_attn_by_inverse_layer_idx"):
        raise ValueError(
            "this GPT-2 scales attention by the layer's number (scale_attn_by_inverse_layer_idx): its layers "
            "cannot be renumbered, so it cannot be pruned."
        )
    # One memo for both copies: what the layers share with the model (config, tied weights) stays shared.
    memo: dict[int, object] = {}
    chosen = nn.ModuleList([copy.deepcopy(blocks[index], memo) for index in kept])
    memo[id(blocks)] = chosen
    pruned = copy.deepcopy(inner, memo)
    for number, layer in enumerate(chosen):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = number
    _shorten(pruned, kept, depth)
    return pruned


def _shorten(pruned: PreTrainedModel, kept: Sequence[int], depth: int) -> None:
    config = pruned.config
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    pruned.name_or_path = config.name_or_path = ""


def texts_of(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: Template
) -> list[tuple[int, ...]]:
    """Prompt and reference of each example as one run of ids, of at most 512: what block influence reads."""
    texts = []
    for example in examples:
        sample = to_sample(
            example,
            tokenizer,
            template=template,
            system=None,
            max_prompt_length=256,
            max_completion_length=256,
            on_long_prompt="truncate",
        )
        if isinstance(sample, Sample):
            texts.append(sample.prompt + sample.response)
    return texts
