"""What `redistill export` does between its options and what it prints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill.chat import Template
from redistill.export import gguf_file, int8, onnx_graph
from redistill.export.check import BROKEN, Agreement, ask, compare
from redistill.loading import first_line
from redistill.models import load_model, load_tokenizer
from redistill.runlog import write_whole
from redistill.sample import Example
from redistill.versions import made_with

Format = Literal["gguf", "onnx", "int8"]
FORMATS: dict[Format, tuple[str, ...]] = {
    "gguf": ("gguf",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "int8": ("torchao",),
}
"""Each format, and the packages that it needs."""


@dataclass(frozen=True)
class Exported:
    """path: the file to use, or the folder of an int8 model. size: bytes of all that was written."""

    path: Path
    agreement: Agreement
    size: int


def export(
    name: str,
    to: Format,
    output: Path,
    examples: Sequence[Example],
    console: Console,
    *,
    template: Template = "chat",
    outtype: gguf_file.OutType = "f16",
) -> Exported:
    """The model `name` (hub id, folder, or an adapter with its base) in the format `to`, in the new folder `output`,
    with check.json beside it.

    examples: their prompts are answered by both. outtype: numbers of a GGUF file.
    Raises ValueError for a missing package, a model that the format cannot hold, an `output` that holds something,
    and a result that says something else than the student.
    """
    _refuse_missing(to)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is not empty: name a new folder for the exported model.")
    tokenizer, student = load_tokenizer(name), load_model(name)
    asked = ask(student, tokenizer, examples, template)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        path = _write(student, tokenizer, to, partial, outtype)
        read = {"gguf": gguf_file.read_gguf, "onnx": onnx_graph.read_onnx, "int8": int8.read_int8}[to]
        agreement = compare(asked, read(path))
        if not agreement.kl < BROKEN:
            raise ValueError(
                f"the {to} model differs from the student by {agreement.kl:.2f} nats per token: this conversion is "
                "wrong, and nothing was kept. Please report it with the model's config.json."
            )
        size = sum(file.stat().st_size for file in partial.rglob("*"))
        record = {
            "student": name,
            "to": to,
            "file": path.name if path.is_file() else None,
            **({"outtype": outtype} if to == "gguf" else {}),
            **agreement.record(),
            "bytes": size,
            "packages": {package: metadata.version(package) for package in FORMATS[to]},
            **made_with(),
        }
        write_whole(partial / "check.json", json.dumps(record, indent=1) + "\n")
        if output.exists():
            output.rmdir()
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(_said(to, agreement, size, output), markup=False, highlight=False, soft_wrap=True)
    return Exported(output / path.relative_to(partial), agreement, size)


def _refuse_missing(to: Format) -> None:
    missing = [package for package in FORMATS[to] if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"exporting to {to} needs {', '.join(missing)}; type: pip install {' '.join(missing)}"
        )


def _write(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    to: Format,
    folder: Path,
    outtype: gguf_file.OutType,
) -> Path:
    if to == "gguf":
        return gguf_file.write_gguf(student, tokenizer, folder, outtype)
    try:
        if to == "onnx":
            return onnx_graph.write_onnx(student, tokenizer, folder)
        return int8.write_int8(student, tokenizer, folder)
    except (ImportError, RuntimeError) as problem:
        raise ValueError(
            f"{', '.join(FORMATS[to])} cannot export this model to {to}: {first_line(problem)}"
        ) from problem


def _said(to: Format, agreement: Agreement, size: int, output: Path) -> str:
    return (
        f"{to}: {agreement.equal} of {agreement.prompts} greedy answers are the student's to the token; forward KL "
        f"{agreement.kl:.2g} nats per token, {agreement.kl_max:.2g} at most, over {agreement.tokens} tokens. "
        f"{size / 1e6:.0f} MB in {output}."
    )
