"""A student as one GGUF file for llama.cpp, written with its Python package `gguf`.

No well-kept package has llama.cpp's own converter, so what it knows of these architectures stands here: the names
come from the package's table, the order of Llama's query and key rows from how ggml turns positions.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill.export.check import Logits
from redistill.loading import quiet_loading

OutType = Literal["f32", "f16", "q8_0"]
ARCHITECTURES = ("llama", "qwen2", "qwen3")
FILE = "student-{}.gguf"
# How text is cut before merging, by llama.cpp's names: the steps of tokenizer.json that mean the same.
_GPT2, _SMOLLM = ("ByteLevel",), ("Digits", "ByteLevel")
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_SPLIT % r"\p{N}": "qwen2", _SPLIT % r"\p{N}{1,3}": "llama-bpe"}


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, outtype: OutType
) -> Path:
    """The file in `folder`: matrices in `outtype`, everything else in f32.

    Raises ValueError for an architecture, rotary scaling or tokenizer that is not written here, before anything is.
    """
    import gguf

    kind = model.config.model_type
    refuse_unknown(model)
    pre = pre_tokenizer(tokenizer)
    path = folder / FILE.format(outtype)
    writer = gguf.GGUFWriter(path, kind)
    _write_config(writer, model, outtype)
    _write_vocabulary(writer, model, tokenizer, pre)
    arch = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[kind]
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, tensor in _tensors(model):
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ValueError(f"{name} has no place in a GGUF file of {kind}: this model cannot be exported.")
        to = _type_of(tensor, outtype)
        data = gguf.quants.quantize(_ordered(name, tensor, model).float().numpy(), to)
        writer.add_tensor(known, data, raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refuse_unknown(model: PreTrainedModel) -> None:
    """Raises ValueError for what this writer does not know."""
    config = model.config
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}, and this is {config.model_type}: "
            "use llama.cpp's convert_hf_to_gguf.py."
        )
    scaling = rope(model).get("rope_type", "default")
    if scaling != "default" or getattr(config, "use_sliding_window", False):
        what = "sliding windows" if scaling == "default" else f"rotary scaling {scaling!r}"
        raise ValueError(f"{what} cannot be written as GGUF here: use llama.cpp's convert_hf_to_gguf.py.")


def rope(model: PreTrainedModel) -> dict[str, Any]:
    """The rotary settings of a model's configuration."""
    return dict(getattr(model.config, "rope_parameters", None) or {})


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        # llama.cpp takes the embedding where a file has no head.
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            yield name, tensor.detach().cpu()


def _ordered(name: str, tensor: Tensor, model: PreTrainedModel) -> Tensor:
    """ggml turns neighbouring pairs of a Llama head, transformers its two halves: the rows change places."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        name.split(".")[-2]
    )
    if config.model_type != "llama" or heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def _type_of(tensor: Tensor, outtype: OutType) -> Any:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    wanted = GGMLQuantizationType[outtype.upper()]
    if tensor.dim() < 2:
        return GGMLQuantizationType.F32
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if tensor.shape[-1] % block == 0 else GGMLQuantizationType.F16


def _write_config(writer: Any, model: PreTrainedModel, outtype: OutType) -> None:
    import gguf

    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_name("student")
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[outtype]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope(model).get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_vocabulary(
    writer: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pre: str
) -> None:
    from gguf import SpecialVocab, TokenType

    size = model.config.vocab_size
    named = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {index: token.special for index, token in tokenizer.added_tokens_decoder.items()}
    types = [
        TokenType.UNUSED if index not in named
        else TokenType.NORMAL if index not in added
        else TokenType.CONTROL if added[index]
        else TokenType.USER_DEFINED
        for index in range(size)
    ]  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([named.get(index, f"[PAD{index}]") for index in range(size)])
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory() as place:
        tokenizer.save_pretrained(place)
        model.config.save_pretrained(place)
        SpecialVocab(place, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name of how this tokenizer cuts text before merging.

    Raises ValueError for a tokenizer that is no byte-level BPE, or cuts in a way that is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    steps = parts.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = tuple(step.get("type") for step in steps)
    if parts["model"].get("type") == "BPE" and kinds and kinds[-1] == "ByteLevel":
        if kinds == _GPT2 and steps[0].get("use_regex"):
            return "gpt-2"
        if kinds == _SMOLLM and steps[0].get("individual_digits"):
            return "smollm"
        pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ("Split", "ByteLevel") else None
        if pattern in _SPLITS:
            return _SPLITS[pattern]
    raise ValueError(
        "this tokenizer cuts text in a way that is not known here (GGUF is written for the byte-level BPE of GPT-2, "
        "SmolLM, Qwen 2 and Llama 3): use llama.cpp's convert_hf_to_gguf.py."
    )


def read_gguf(path: Path) -> Logits:
    """The file read back by transformers, with its numbers as they are in the file."""
    from transformers import AutoModelForCausalLM, GgufConfig

    # The bar of the GGUF reader listens to no setting of transformers', so it is sent nowhere.
    with quiet_loading(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        ).eval()

    def logits(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(input_ids=ids).logits

    return logits
