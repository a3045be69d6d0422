"""A student with 8-bit weights: a Hugging Face folder, by torchao through transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from redistill.export.check import Logits
from redistill.loading import quiet_loading


def write_int8(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """The folder: weights of the linear layers in int8 with one scale a row, embeddings and head as they were.

    It loads like any model where torchao is installed.
    """
    from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    with tempfile.TemporaryDirectory(dir=folder.parent) as place, quiet_loading():
        model.save_pretrained(place)
        small = AutoModelForCausalLM.from_pretrained(
            place, dtype=model.dtype, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
        )
        small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read_int8(path: Path) -> Logits:
    """The folder as transformers loads it."""
    with quiet_loading():
        model = AutoModelForCausalLM.from_pretrained(path).eval()

    def logits(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(input_ids=ids).logits

    return logits
