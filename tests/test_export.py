"""Exported models say what the student says: real converters on tiny models, and a conversion that is wrong."""

import io
import json

import pytest
import torch
from gguf import GGUFReader, TokenType
from rich.console import Console
from tiny import EOS_ID, save_tiny, tiny_gpt2, tiny_llama, tiny_qwen2, tiny_tokenizer
from tokenizers import Regex, pre_tokenizers

from redistill.export import FORMATS, command, export, gguf_file
from redistill.export.check import ask, compare
from redistill.models import load_model
from redistill.sample import Example

TOKENIZER = tiny_tokenizer()
EXAMPLES = [Example(f"What is {n} and {n}?", source=str(n)) for n in range(5)]
MODELS = {
    "llama": lambda: tiny_llama(len(TOKENIZER), seed=3),
    "llama-tied": lambda: tiny_llama(len(TOKENIZER) + 8, seed=4, tied=True),
    "qwen2": lambda: tiny_qwen2(len(TOKENIZER), seed=5),
}


def saved(folder, name):
    MODELS[name]().save_pretrained(folder / "student")
    TOKENIZER.save_pretrained(folder / "student")


@pytest.fixture(params=MODELS)
def student(request, tmp_path):
    saved(tmp_path, request.param)
    return tmp_path / "student"


def exported(student, to, **options):
    said = io.StringIO()
    output = student.parent / f"out-{to}"
    found = export(str(student), to, output, EXAMPLES, Console(file=said, width=200), **options)
    record = json.loads((output / "check.json").read_text())
    assert record["kl"] == found.agreement.kl and record["prompts"] == 5
    assert f"{found.agreement.equal} of 5 greedy answers" in said.getvalue()
    return found


def test_gguf_holds_the_very_weights_and_the_vocabulary(student):
    found = exported(student, "gguf", outtype="f32")
    assert found.agreement.equal == 5 and found.agreement.kl_max < 1e-8
    model = load_model(student)
    logits, ids = gguf_file.read_gguf(found.path), torch.tensor([[1, 40, 50, 60, 70]])
    assert torch.allclose(logits(ids), model(ids).logits, atol=1e-6)
    fields = GGUFReader(found.path).fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[: len(TOKENIZER)] == TOKENIZER.convert_ids_to_tokens(range(len(TOKENIZER)))
    assert len(tokens) == model.config.vocab_size
    assert types[:4] == [TokenType.CONTROL] * 4 and types[4] == TokenType.NORMAL
    assert set(types[len(TOKENIZER) :]) <= {TokenType.UNUSED}
    assert fields["tokenizer.ggml.eos_token_id"].contents() == EOS_ID
    # transformers gives a Qwen 2 model the way of cutting text that its class has.
    assert fields["tokenizer.ggml.pre"].contents() == (
        "qwen2" if model.config.model_type == "qwen2" else "gpt-2"
    )
    assert fields["tokenizer.chat_template"].contents() == TOKENIZER.chat_template


def test_fewer_bits_cost_a_little_and_say_how_much(tmp_path):
    saved(tmp_path, "qwen2")
    half = exported(tmp_path / "student", "gguf", outtype="f16")
    (tmp_path / "out-gguf").rename(tmp_path / "half")
    byte = exported(tmp_path / "student", "gguf", outtype="q8_0")
    assert 0 < half.agreement.kl < 1e-5 < byte.agreement.kl < 0.02
    assert byte.size < 0.7 * half.size


def test_a_wrong_conversion_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    saved(tmp_path, "llama")
    monkeypatch.setattr(gguf_file, "_ordered", lambda *given: given[1])
    with pytest.raises(ValueError, match=r"nats per token: this conversion is wrong"):
        exported(tmp_path / "student", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_the_check_compares_token_by_token():
    model, other = MODELS["llama"](), tiny_llama(len(TOKENIZER), seed=9)
    asked = ask(model, TOKENIZER, EXAMPLES)
    same = compare(asked, lambda ids: model(ids).logits.detach())
    assert same.equal == same.prompts == 5 and same.kl_max < 1e-6
    assert same.tokens == sum(len(row.response) for row in asked.rows)
    different = compare(asked, lambda ids: other(ids).logits.detach())
    assert different.equal == 0 and different.kl > 0.5 and different.kl_max > different.kl

    def one_token_off(ids):
        logits = model(ids).logits.detach().clone()
        logits[0, -2] = logits[0, -2].roll(1)
        return logits

    assert compare(asked, one_token_off).equal == 0


@pytest.mark.parametrize("to", ["onnx", "int8"])
def test_onnx_and_int8(to, tmp_path):
    saved(tmp_path, "llama-tied")
    found = exported(tmp_path / "student", to)
    assert found.agreement.kl < {"onnx": 1e-6, "int8": 0.02}[to]
    assert to == "int8" or found.agreement.equal == 5
    assert (tmp_path / f"out-{to}" / "tokenizer.json").is_file()


def pre(*steps):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return tokenizer


def test_how_text_is_cut_is_told_by_llama_cpps_names():
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert gguf_file.pre_tokenizer(TOKENIZER) == "gpt-2"
    digits = pre_tokenizers.Digits(individual_digits=True)
    assert gguf_file.pre_tokenizer(pre(digits, pre_tokenizers.ByteLevel(add_prefix_space=False))) == "smollm"
    for pattern, name in gguf_file._SPLITS.items():
        assert (
            gguf_file.pre_tokenizer(pre(pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level)) == name
        )
    with pytest.raises(ValueError, match=r"cuts text.*convert_hf_to_gguf"):
        gguf_file.pre_tokenizer(pre(pre_tokenizers.Split(Regex("x+"), "isolated"), byte_level))


def test_what_cannot_be_exported_is_one_sentence(tmp_path, monkeypatch):
    student = save_tiny(tmp_path).student
    console = Console(file=io.StringIO())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="full is not empty"):
        export(str(student), "gguf", tmp_path / "full", EXAMPLES, console)
    gpt2 = tiny_gpt2(len(TOKENIZER))
    with pytest.raises(ValueError, match="this is gpt2"):
        gguf_file.write_gguf(gpt2, TOKENIZER, tmp_path, "f16")
    scaled = tiny_llama(len(TOKENIZER))
    scaled.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="rotary scaling 'linear'"):
        gguf_file.write_gguf(scaled, TOKENIZER, tmp_path, "f16")
    assert not list(tmp_path.glob("*.gguf"))
    monkeypatch.setattr(command, "find_spec", lambda _: None)
    for to, packages in FORMATS.items():
        with pytest.raises(ValueError, match=f"{to} needs .*pip install {' '.join(packages)}"):
            export(str(student), to, tmp_path / "new", EXAMPLES, console)
