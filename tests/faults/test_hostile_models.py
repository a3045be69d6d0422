"""Model folders from anybody: weights that are pickles, code that wants to run, files that are broken."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import hostile
import pytest
import torch
from runs import often
from test_damaged import hurt
from tiny import save_tiny
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill.chat import prompt_ids
from redistill.loading import load_model, load_tokenizer
from redistill.sample import Example


class Pickled:
    """What opens a file the moment it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def model(tmp_path) -> Path:
    return save_tiny(tmp_path / "models").student


WEIGHTS = ("pytorch_model.bin", "model.pt", "model.pth", "adapter_model.bin")


@pytest.mark.parametrize("name", WEIGHTS)
def test_pickled_weights_are_refused_and_never_opened(model, tmp_path, name):
    (model / "model.safetensors").unlink()
    trap = tmp_path / "opened"
    (model / name).write_bytes(pickle.dumps(Pickled(trap)))
    if name.startswith("adapter"):
        (model / "config.json").unlink()
        (model / "adapter_config.json").write_text(
            json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"})
        )
    with pytest.raises(ValueError, match="safetensors"):
        load_model(model)
    assert not trap.exists()


def test_pickles_beside_safetensors_are_never_opened(model, tmp_path):
    trap = tmp_path / "opened"
    for name in (*WEIGHTS, "training_args.bin", "optimizer.pt", "tokenizer.pkl"):
        (model / name).write_bytes(pickle.dumps(Pickled(trap)))
    load_model(model)
    load_tokenizer(model)
    assert not trap.exists()


def test_an_index_that_names_a_pickle_or_leaves_the_folder_is_refused(model, tmp_path):
    trap = tmp_path / "opened"
    (tmp_path / "models" / "evil.bin").write_bytes(pickle.dumps(Pickled(trap)))
    (model / "model.safetensors").rename(model / "spare.safetensors")
    for target in ("../evil.bin", "/etc/hostname", "nowhere.safetensors"):
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": target}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=r"names weights outside|could not be loaded"):
            load_model(model)
    assert not trap.exists()


def test_code_in_a_folder_is_not_run(model, tmp_path):
    trap = tmp_path / "run"
    code = f"import os\nos.mkdir({str(trap)!r})\nclass Evil: pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (model / name).write_text(code)
    for file, key in (("config.json", "auto_map"), ("tokenizer_config.json", "auto_map")):
        known = json.loads((model / file).read_text())
        known[key] = {
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
            "AutoTokenizer": ["tokenization_evil.Evil", None],
        }
        known["model_type"] = "evil"
        (model / file).write_text(json.dumps(known))
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(model)
    with contextlib.suppress(ValueError):  # it may be loaded by the file that it has
        load_tokenizer(model)
    assert not trap.exists()


TEMPLATES = {
    "reaches out": "{{ cycler.__init__.__globals__.os.mkdir('TRAP') }}",
    "divides": "{{ 1 / 0 }}",
    "is no template": "{% for %}",
    "adds what cannot be added": "{{ messages + 1 }}",
    "loops": "{% for i in range(1000000000) %}x{% endfor %}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_chat_template_is_one_sentence(model, tmp_path, name):
    trap = tmp_path / "run"
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = TEMPLATES[name].replace("TRAP", str(trap))
    with hostile.soon(), pytest.raises(ValueError, match="chat template") as refused:
        prompt_ids(Example("hello"), tokenizer, template="chat", system=None)
    hostile.is_sentence(str(refused.value))
    assert not trap.exists()


def test_broken_files_are_one_sentence_or_a_model(model, tell, chance):
    wanted, refused = often(30, 2_000), 0
    names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    for turn in range(wanted):
        name = names[turn % len(names)]
        before = (model / name).read_bytes()
        hurt(model / name, chance.choice(["flipped", "cut", "zeroed", "gone"]), chance)
        load = load_tokenizer if name.startswith("tokenizer") else load_model
        try:
            found = load(model)
            assert isinstance(found, PreTrainedModel | PreTrainedTokenizerBase)
        except ValueError as problem:
            hostile.is_sentence(str(problem))
            refused += 1
        (model / name).write_bytes(before)
    assert refused
    tell(f"model folders with a broken file: {wanted}, {refused} refused in one sentence, the others loaded")


def test_a_teacher_that_is_not_a_number_is_named(place, lives):
    from safetensors.torch import load_file, save_file

    shutil.copytree(place / "teacher", place / "broken-teacher", dirs_exist_ok=True)
    weights = load_file(place / "broken-teacher" / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, place / "broken-teacher" / "model.safetensors", {"format": "pt"})
    life = lives.train("never", place, {"teacher.model_name_or_path": "broken-teacher"})
    assert life.wait() == 2, life.said()
    assert "not finite" in life.said() and "LlamaForCausalLM" in life.said(), life.said()
