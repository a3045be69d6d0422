"""Models and tokenizers from a folder or the hub: safetensors only, no code from the hub, one clear error.

Whoever uses the loaded model finds both functions in `models.py` too.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("float32", "bfloat16", "float16", "auto")


def default_cache() -> Path:
    """Where what was made once is kept: $REDISTILL_CACHE, or ~/.cache/redistill."""
    return Path(os.environ.get("REDISTILL_CACHE") or Path.home() / ".cache" / "redistill").expanduser()


def best_device() -> str:
    """Where models read and write fastest here: the first CUDA device that is visible, or the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, padding on the right; without a pad token, that is end of text.

    Nothing here masks by the pad id: masks are made from lengths. Raises ValueError when it cannot be had.
    """
    from transformers import AutoTokenizer

    refuse_missing_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False, padding_side="right"
        )
    except Exception as problem:  # what a damaged or hostile folder makes the libraries raise is of any class
        raise ValueError(
            f"the tokenizer of {str(name)!r} could not be loaded: {first_line(problem)}"
        ) from problem
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str | Path,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    attn_implementation: str | None = None,
    device: str = "cpu",
    device_map: str | None = None,
    bits: Literal[4, 8] | None = None,
) -> PreTrainedModel:
    """The causal language model of a folder or hub id, from safetensors, in eval mode, on `device`.

    dtype: one of `DTYPES`; "auto" is what the checkpoint was saved in. A folder that holds only an adapter
    (peft) gives its base model with the adapter merged in. device_map: where its parts lie, in place of `device`.
    bits: quantized by bitsandbytes. Raises ValueError with what to do for a missing
    folder or hub entry, for pickled weights, and for a checkpoint that leaves weights random.
    """
    from transformers import AutoModelForCausalLM

    from redistill.out_of_memory import is_out_of_memory

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known: use one of {', '.join(DTYPES)}.")
    refuse_missing_folder(name)
    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _load_merged(folder, dtype=dtype, attn_implementation=attn_implementation, device=device)
    if folder.is_dir():
        _refuse_unreadable_folder(folder)
    placed: dict[str, Any] = {}
    if device_map is not None or bits is not None:
        placed["device_map"] = device_map or device
    if bits is not None:
        placed["quantization_config"] = _quantization(bits, dtype)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            **placed,
            dtype=dtype,
            revision=revision or "main",
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        raise ValueError(
            f"the model {str(name)!r} could not be loaded: {first_line(problem)} "
            "(only safetensors weights are read, and no code from the hub is run)"
        ) from problem
    model, notes = loaded
    if missing := sorted(notes["missing_keys"]):
        raise ValueError(
            f"the checkpoint {str(name)!r} has no weights for {len(missing)} parts of the model "
            f"({', '.join(missing[:3])}): they would be random. Use a complete causal language model."
        )
    return model.eval() if placed else model.eval().to(device)


def _quantization(bits: Literal[4, 8], dtype: str) -> Any:
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise ValueError('8 and 4 bits need bitsandbytes: pip install "redistill[bitsandbytes]".')
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    # QLoRA's (Dettmers et al. 2023).
    how = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    return BitsAndBytesConfig(load_in_4bit=True, **how)


def _load_merged(
    folder: Path, *, dtype: str, attn_implementation: str | None, device: str
) -> PreTrainedModel:
    from peft import PeftModel

    base = base_of_adapter(folder)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"{folder} holds an adapter without adapter_model.safetensors: save it again with `save_pretrained` of "
            "peft."
        )
    model = load_model(base, dtype=dtype, attn_implementation=attn_implementation, device=device)
    wrapped = PeftModel.from_pretrained(model, str(folder))
    _untie_adapted(model)
    merged: Any = wrapped.merge_and_unload()
    return merged.eval()


def _untie_adapted(model: PreTrainedModel) -> None:
    """An adapter on one of two tied layers is its alone: merged into their weight, it would act on both."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    plain: list[Any] = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    if plain != ends and plain[0].weight is plain[1].weight:
        plain[1].weight = nn.Parameter(plain[0].weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def base_of_adapter(folder: Path) -> str:
    """The base model that a folder with an adapter states: a hub id or a folder. Of a run that was moved as a whole,
    the folder of that name beside the adapter's.

    Raises ValueError where none is stated.
    """
    try:
        stated = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))[
            "base_model_name_or_path"
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        stated = None
    if not isinstance(stated, str) or not stated:
        raise ValueError(
            f"{folder} holds an adapter without the name of its base model: write the base's folder or hub id as "
            "base_model_name_or_path into adapter_config.json."
        )
    beside = folder.resolve().parent / Path(stated).name
    moved = Path(stated).is_absolute() and not Path(stated).exists() and (beside / "config.json").is_file()
    return str(beside) if moved else stated


def refuse_missing_folder(name: str | Path) -> None:
    """Raises ValueError for a path, which a hub id is not, where no folder is."""
    text = str(name)
    is_path = isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if is_path and not Path(text).is_dir():
        raise ValueError(
            f"there is no folder {text!r}: give the folder of a saved model, or a hub id (owner/name)."
        )


def _refuse_unreadable_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is not the folder of a saved model.")
    for index in folder.glob("*.safetensors.index.json"):
        _refuse_foreign_weights(index)
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} holds only pickled weights ({pickled[0]}), and only safetensors is read, because a "
            "pickle can run code. If you trust the file, convert it once: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('converted')."
        )
    raise ValueError(f"{folder} holds no *.safetensors weights.")


def _refuse_foreign_weights(index: Path) -> None:
    """An index may name pickles, and files of other folders; both would be opened."""
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} cannot be read: get the model anew.") from None
    for name in named:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} names weights outside of the folder, or pickles: get the model anew.")


def output_rows(name: str | Path, revision: str | None = None) -> int:
    """How many ids a model that is not loaded has, from its config.json; an adapter's are its base model's."""
    from transformers import AutoConfig

    folder = Path(name)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return output_rows(base_of_adapter(folder))
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as problem:
        raise ValueError(
            f"the config of {str(name)!r} could not be loaded: {first_line(problem)}"
        ) from problem
    return int(config.get_text_config().vocab_size)


def first_line(problem: Exception) -> str:
    """The first line of an error of a library, as one sentence: the rest is advice for its own users."""
    return str(problem).strip().split("\n", 1)[0].rstrip(".") + "."


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Switches transformers' progress bars off, and back to what they were on leaving."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
