"""A student as an ONNX graph, by the exporter of transformers itself; read back by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill.export.check import Logits


def write_onnx(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """`model.onnx` with its weights beside it: input_ids and attention_mask [rows, T] -> logits [rows, T, V], fp32,
    any number of rows and tokens, no key/value cache. With the tokenizer."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    # Two rows and a few tokens: an axis of one would be taken for a constant.
    ids = torch.arange(16).view(2, 8) % model.config.vocab_size
    cached, model.config.use_cache = model.config.use_cache, False
    try:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True)).save_pretrained(folder)
    finally:
        model.config.use_cache = cached
    tokenizer.save_pretrained(folder)
    return folder / "model.onnx"


def read_onnx(path: Path) -> Logits:
    """The graph in ONNX Runtime, on the CPU."""
    import numpy
    import onnxruntime  # pyright: ignore[reportMissingImports]

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def logits(ids: Tensor) -> Tensor:
        values = ids.numpy()
        found = session.run(["logits"], {"input_ids": values, "attention_mask": numpy.ones_like(values)})
        return torch.from_numpy(found[0])

    return logits
