"""The one forward that every later stage uses, and what student and teacher have in common.

The forward is cut in two, so that nobody holds logits of a whole batch: `hidden_states` runs the decoder and
gathers the positions asked for, `Head.logits` turns a slice of them into a row of logits each. Together they
equal the model's own forward at those positions. Models stay plain Hugging Face models.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from redistill.chat import Template, end_id
from redistill.loading import first_line, load_model, load_tokenizer
from redistill.zero import parameter_count

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from redistill.settings import LoraSettings

__all__ = [
    "Head",
    "add_lora",
    "check_forward",
    "end_of_text_ids",
    "ends_of",
    "head_of",
    "hidden_states",
    "load_model",
    "load_tokenizer",
    "parameter_count",
    "plain_model",
    "read_all",
    "shared_vocabulary",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """The output side of a model: logits = cap(scale * module(hidden)), its first `vocabulary` columns.

    scale: 1 for most; Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`.
    softcap: c of c * tanh(logits / c) (Gemma 2), None without.
    """

    module: nn.Module
    scale: float
    softcap: float | None
    vocabulary: int

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, H] hidden states -> [n, vocabulary] logits in the head's dtype, gradients to both sides."""
        return self.finish(self.module(hidden)[..., : self.vocabulary])

    def finish(self, projected: Tensor) -> Tensor:
        """What the module gave, scaled and capped."""
        if self.scale != 1.0:
            projected = projected * self.scale
        if self.softcap is not None:
            projected = torch.tanh(projected / self.softcap) * self.softcap
        return projected

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained: tied embeddings, a LoRA on the head, or none (frozen teacher)."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model inside `model`, with the adapter layers of a PEFT wrapper still in place.

    Raises ValueError for prompt-learning adapters (their virtual tokens live in the wrapper, outside the
    decoder) and for anything that is not a Hugging Face model.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model
    from peft import PeftModel

    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise ValueError(
                "prompt-learning adapters (prompt or prefix tuning) are not supported: use LoRA, "
                "or merge the adapter into its model first."
            )
        inner = model.get_base_model()
        if isinstance(inner, PreTrainedModel):
            return inner
    raise ValueError(
        f"{type(model).__name__} is not a Hugging Face model: load it with redistill.models.load_model, "
        "and unwrap data-parallel wrappers before asking for its hidden states."
    )


def positions_of(model: nn.Module) -> int | None:
    """The most tokens of a sequence, by the model's config; None where it states none."""
    return plain_model(model).config.get_text_config().to_dict().get("max_position_embeddings")


def head_of(model: nn.Module, vocabulary: int) -> Head:
    """The model's `Head`, its logits cut to `vocabulary` columns (see `shared_vocabulary`).

    The scale and soft-cap come from the model's config under the names transformers gives them.
    `check_forward` verifies the result against the model itself. Raises ValueError when the model has no
    output embedding or fewer rows than `vocabulary`.
    """
    inner = plain_model(model)
    module = inner.get_output_embeddings()
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{type(inner).__name__} has no output embedding: a causal language model is needed."
        )
    rows = _output_rows(inner)
    if not 0 < vocabulary <= rows:
        raise ValueError(f"vocabulary {vocabulary} is not within the {rows} rows of {type(inner).__name__}.")
    settings: dict[str, Any] = inner.config.get_text_config().to_dict()
    softcap = settings.get("final_logit_softcapping")
    return Head(module, _logit_scale(settings), None if softcap is None else float(softcap), vocabulary)


def _logit_scale(settings: dict[str, Any]) -> float:
    scale = float(settings.get("logit_scale") or 1.0)
    scale *= float(settings.get("lm_head_multiplier") or 1.0)
    if scaling := settings.get("logits_scaling"):
        # HyperCLOVA X kept Granite's name and turned its meaning round.
        multiplies = str(settings.get("model_type", "")).startswith("hyperclovax")
        scale *= float(scaling) if multiplies else 1.0 / float(scaling)
    return scale


def hidden_states(
    model: nn.Module, input_ids: Tensor, select: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """The decoder's last hidden states (after its final norm) at the selected positions; the head is not run.

    input_ids: [B, L], padded on the right: what follows a token never reaches it, so no mask is needed. select:
    [N] flat indices into B*L (row * L + column), on the same device. position_ids: [B, L], where a row holds
    several sequences: each starts at 0 and sees itself only, in a model that `packs`. Returns [N, H] in the
    model's dtype, with gradients where they are enabled. Row n predicts the token that follows position select[n].
    """
    return read_all(model, input_ids, select, position_ids, use_cache=False)[0]


def read_all(
    model: nn.Module,
    input_ids: Tensor,
    select: Tensor,
    position_ids: Tensor | None = None,
    use_cache: bool = True,
    mask: Tensor | None = None,
    cache: Any = None,
) -> tuple[Tensor, Any]:
    """`hidden_states`, and the key/value cache of all columns; None if it is not wanted or the model keeps none.
    mask: which columns each sees, where positions do not tell. cache: of what was read before."""
    inner = plain_model(model)
    decoder, name = inner.base_model, type(inner).__name__
    if decoder is inner:
        raise ValueError(f"{name} has no decoder of its own: a causal language model is needed.")
    where = {"position_ids": position_ids, "attention_mask": mask, "past_key_values": cache}
    where = {name: value for name, value in where.items() if value is not None}
    output = decoder(input_ids=input_ids, use_cache=use_cache, return_dict=True, **where)
    hidden = output.last_hidden_state
    selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, select)
    return selected, output.get("past_key_values") if use_cache else None


@torch.no_grad()
def check_forward(model: nn.Module, vocabulary: int) -> None:
    """Compares `head_of(...).logits(hidden_states(...))` with the model's own logits on four tokens.

    An architecture that scales its logits in a way `head_of` does not know would otherwise train on wrong
    distributions without a sound, and so would one whose weights are NaN. Raises ValueError naming the class. Costs
    one tiny forward.
    """
    inner = plain_model(model)
    ids = torch.arange(4, device=inner.device)[None] % vocabulary
    was_training = model.training
    model.eval()
    try:
        own = inner(input_ids=ids, use_cache=False).logits[0, :, :vocabulary].float()
        select = torch.arange(4, device=inner.device)
        ours = head_of(model, vocabulary).logits(hidden_states(model, ids, select)).float()
    finally:
        model.train(was_training)
    if bool(own.isnan().any()):
        raise ValueError(f"{type(inner).__name__} gives logits that are not finite: its weights are broken.")
    if not torch.allclose(own, ours, rtol=2e-2, atol=2e-2 * float(own.abs().max())):
        raise ValueError(
            f"{type(inner).__name__} computes its logits in a way redistill does not know (off by up to "
            f"{float((own - ours).abs().max()):.3g}): please report it with the model's name."
        )


def _output_rows(model: PreTrainedModel) -> int:
    embedding = model.get_output_embeddings()
    assert isinstance(embedding, nn.Module)
    return cast(Tensor, embedding.weight).shape[0]


def shared_vocabulary(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_model: nn.Module | int,
    teacher_model: nn.Module | int,
) -> int:
    """The number of token ids that mean the same to student and teacher: the smaller model's rows. A model that is
    not loaded is given by its number of rows.

    Rows that only one model has are padding (Qwen's 151936 and 152064): trimmed, and said in the log. Raises
    ValueError when a token has different ids, an id has different tokens, or the student's tokenizer can
    write an id that one of the models has no row for; tokens that only one side knows are no obstacle.
    """
    ours, theirs = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    names = {index: token for token, index in theirs.items()}
    differing = [
        (index, token)
        for token, index in ours.items()
        if theirs.get(token, index) != index or names.get(index, token) != token
    ]
    if differing:
        shown = "; ".join(
            f"{token!r} is {index} for the student and {theirs.get(token, 'unknown')} for the teacher"
            for index, token in sorted(differing)[:3]
        )
        raise ValueError(
            f"student and teacher have different tokenizers: {len(differing)} of the student's {len(ours)} "
            f"tokens differ from the teacher's {len(theirs)} ({shown}). Token-level distillation needs one "
            "vocabulary: choose a student of the teacher's family, make one with `redistill prune`, or train with "
            "teacher.align: bytes (docs/teacher.md)."
        )
    rows = {
        name: model if isinstance(model, int) else _output_rows(plain_model(model))
        for name, model in (("student", student_model), ("teacher", teacher_model))
    }
    vocabulary = min(rows.values())
    if (highest := max(ours.values())) >= vocabulary:
        who = min(rows, key=lambda name: rows[name])
        raise ValueError(
            f"the student's tokenizer writes ids up to {highest}, but the {who} model has {vocabulary} rows: "
            f"use the tokenizer that came with the {who}, or give the model the missing rows first."
        )
    if rows["student"] != rows["teacher"]:
        log.warning(
            "student has %d output rows and teacher %d: the rows past %d are padding and are left out.",
            rows["student"],
            rows["teacher"],
            vocabulary,
        )
    return vocabulary


def end_of_text_ids(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> frozenset[int]:
    """Every id that ends a response: the tokenizer's and those of the model's generation settings."""
    found: set[int] = set()
    settings = plain_model(model).generation_config
    for value in (tokenizer.eos_token_id, None if settings is None else settings.eos_token_id):
        if isinstance(value, int):
            found.add(value)
        elif value is not None:
            found.update(int(one) for one in value)
    if not found:
        raise ValueError(
            "neither the tokenizer nor the model names an end-of-text token: set `eos_token` in the "
            "tokenizer's tokenizer_config.json."
        )
    return frozenset(found)


def ends_of(tokenizer: PreTrainedTokenizerBase, model: nn.Module, template: Template) -> frozenset[int]:
    """Every id that ends an answer under `template`: the model's own, and the one that the template closes with."""
    return end_of_text_ids(tokenizer, model) | {end_id(tokenizer, template)}


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """`model` wrapped with trainable LoRA layers (Hu et al. 2021, through peft), everything else frozen.

    Raises ValueError when no layer has the names in `target_modules`.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    options: dict[str, Any] = {
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": list(names) if isinstance(names := settings.target_modules, tuple) else names,
    }
    try:
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    except ValueError as problem:
        raise ValueError(f"student.lora.target_modules: {first_line(problem)}") from problem
    assert isinstance(wrapped, PeftModel)
    return wrapped
