"""A teacher in the process that takes less room: quantized, on several devices, or away while it does not read."""

from importlib.util import find_spec

import pytest
import torch
from pydantic import ValidationError
from test_trainer import TOKENIZER, curve, recipe, samples
from tiny import VOCAB, save_tiny, tiny_llama
from transformers import AutoModelForCausalLM

from redistill import DistillTrainer
from redistill.loading import load_model
from redistill.packing import packs
from redistill.prepare import load_teacher
from redistill.sample import Sample
from redistill.settings import TeacherSettings
from redistill.teachers.local import LocalTeacher, frozen
from redistill.teachers.offload import Offloaded

CPU = torch.device("cpu")


def settings(**changes):
    return TeacherSettings(model_name_or_path="tiny", **changes)


READ = [Sample((5, 9, 11), (40, 7, 2)), Sample((8,), (300, 2))]


def addresses(model):
    return {name: value.data_ptr() for name, value in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_on_the_device_while_it_reads_and_only_then(tied):
    """The device is the CPU: what is copied there lies elsewhere, and what was left behind is what comes back."""
    model = tiny_llama(tied=tied)
    values, home = {name: value.clone() for name, value in model.state_dict().items()}, addresses(model)
    away = Offloaded(model, model.lm_head, CPU)
    assert away.head.weight.data_ptr() != model.lm_head.weight.data_ptr()
    with pytest.raises(ZeroDivisionError), away.there():
        there = addresses(model)
        assert there.keys() == home.keys() and not {*there.values()} & {*home.values()}
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        raise ZeroDivisionError
    assert addresses(model) == home
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_one_that_is_away_in_between_says_the_same():
    model = tiny_llama(layers=3)
    plain = LocalTeacher(model, VOCAB - 7, packs(model, VOCAB)).signal(READ)
    found = frozen(model, VOCAB - 7, CPU, settings(offload=True))
    assert found.packed and found.offloaded is not None
    said = found.signal(READ)
    assert torch.equal(said.hidden, plain.hidden) and said.head.vocabulary == VOCAB - 7
    assert torch.equal(said.head.logits(said.hidden), plain.head.logits(plain.hidden))
    assert said.head.module is found.offloaded.head is not model.lm_head


def test_training_is_the_same_with_it(tmp_path):
    runs = []
    for offload in (False, True):
        config = recipe(tmp_path / str(offload), steps=2, teacher={"offload": offload})
        student, teacher = tiny_llama(len(TOKENIZER), seed=1), tiny_llama(len(TOKENIZER), hidden=48, seed=2)
        DistillTrainer(student, teacher, config, TOKENIZER, samples(16), samples(4, seed=9)).train()
        runs.append(curve(tmp_path / str(offload)))
    assert runs[0] == runs[1] and len(runs[0]) == 2


def test_a_map_of_devices_is_left_as_it_was_made(tmp_path):
    folder = save_tiny(tmp_path).teacher
    mapped, plain = load_model(folder, device_map="cpu"), load_model(folder)
    # Moved to the meta device it could not read.
    said = frozen(mapped, VOCAB, torch.device("meta"), settings(device_map="cpu")).signal(READ)
    assert torch.equal(said.hidden, frozen(plain, VOCAB, CPU, settings()).signal(READ).hidden)
    mapped.lm_head.to("meta")
    with pytest.raises(
        ValueError, match=r"teacher\.device_map leaves the teacher's output layer without a device"
    ):
        frozen(mapped, VOCAB, CPU, settings(device_map="auto"))


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_reach_transformers_or_the_package_is_named(bits, tmp_path, monkeypatch):
    folder, asked = save_tiny(tmp_path).teacher, {}
    config = recipe(
        tmp_path, teacher={"model_name_or_path": str(folder), f"load_in_{bits}bit": True, "dtype": "bfloat16"}
    )
    if find_spec("bitsandbytes") is None:
        with pytest.raises(ValueError, match=r'pip install "redistill\[bitsandbytes\]"'):
            load_teacher(config, "cpu")
    whole = AutoModelForCausalLM.from_pretrained

    def instead(name, quantization_config, device_map, **more):
        asked.update(how=quantization_config, where=device_map)
        return whole(name, **more)

    monkeypatch.setattr("redistill.loading.find_spec", lambda _: object())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", instead)
    load_teacher(config, "cuda")
    assert asked["where"] == "cuda" and getattr(asked["how"], f"load_in_{bits}bit")
    if bits == 4:
        assert (
            asked["how"].bnb_4bit_compute_dtype == torch.bfloat16
            and asked["how"].bnb_4bit_quant_type == "nf4"
        )


WRONG = [
    ({"teacher": {"load_in_4bit": True, "load_in_8bit": True}}, "are both set"),
    ({"teacher": {"load_in_4bit": True, "offload": True}}, r"teacher\.offload moves"),
    ({"teacher": {"device_map": "auto", "offload": True}}, r"teacher\.offload moves"),
    (
        {"teacher": {"load_in_8bit": True}, "student": {"model_name_or_path": None, "prune": {"keep": 1}}},
        "redistill prune",
    ),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_what_does_not_go_together_is_refused(changes, said, tmp_path):
    with pytest.raises(ValidationError, match=said):
        recipe(tmp_path, **changes)
