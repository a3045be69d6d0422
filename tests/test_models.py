from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tiny import (
    VOCAB,
    save_tiny,
    tiny_gpt2,
    tiny_llama,
    tiny_opt,
    tiny_qwen2,
    tiny_tokenizer,
)
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from redistill.models import (
    add_lora,
    check_forward,
    end_of_text_ids,
    head_of,
    hidden_states,
    load_model,
    load_tokenizer,
    parameter_count,
    shared_vocabulary,
)
from redistill.settings import LoraSettings

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gemma2():
    # A cap this low bends every logit, so that leaving it out cannot pass.
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0)).eval()


def granite():
    return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=5.0)).eval()


def cohere():
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25)).eval()


def lora_llama():
    """LoRA on attention and on the head, its B matrices not zero as peft starts them."""
    settings = LoraSettings(r=4, lora_alpha=8, target_modules=("q_proj", "v_proj", "lm_head"))
    model = add_lora(tiny_llama(), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(7))
    return model.eval()


MODELS = {
    "llama": tiny_llama,
    "llama_tied": lambda: tiny_llama(tied=True),
    "qwen2": tiny_qwen2,
    "gpt2": tiny_gpt2,
    "opt": tiny_opt,
    "opt_projected": lambda: tiny_opt(embedding=16),
    "gemma2": gemma2,
    "granite": granite,
    "cohere": cohere,
    "lora": lora_llama,
}


def right_padded() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, VOCAB, (3, 9), generator=generator)
    mask = (torch.arange(9) < torch.tensor([9, 4, 7])[:, None]).long()
    return ids, mask


@pytest.mark.parametrize("name", MODELS)
def test_decoder_and_head_equal_the_models_own_forward(name):
    model, vocabulary = MODELS[name](), VOCAB - 5
    ids, mask = right_padded()
    select = torch.tensor([0, 5, 8, 9, 12, 18, 24])
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits.reshape(27, -1)[select, :vocabulary]
        ours = head_of(model, vocabulary).logits(hidden_states(model, ids, select))
        alone = hidden_states(model, ids[1:2, :4], torch.tensor([0, 3]))
    assert ours.shape == (7, vocabulary)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head_of(model, vocabulary).logits(alone), own[3:5], rtol=1e-4, atol=1e-4)
    check_forward(model, vocabulary)


def test_lora_reaches_the_forward_and_only_lora_is_trained():
    model = lora_llama()
    ids, _ = right_padded()
    select = torch.tensor([2, 3])
    head = head_of(model, VOCAB)
    changed = head.logits(hidden_states(model, ids, select))
    with model.disable_adapter():
        plain = head.logits(hidden_states(model, ids, select))
    assert (changed - plain).abs().max() > 0.1
    changed.sum().backward()
    with_gradient = {name for name, one in model.named_parameters() if one.grad is not None}
    assert with_gradient == {name for name, one in model.named_parameters() if "lora_" in name}
    assert [one.shape for one in head.parameters()] == [(4, 32), (VOCAB, 4)]
    frozen = tiny_llama().requires_grad_(False)
    assert head_of(frozen, VOCAB).parameters() == []


def test_lora_trains_under_gradient_checkpointing():
    model = add_lora(tiny_llama(), LoraSettings(r=2, target_modules=("q_proj",))).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    ids, _ = right_padded()
    hidden_states(model, ids, torch.tensor([8])).square().sum().backward()
    gradients = [one.grad for name, one in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 2
    assert all(one is not None and one.abs().sum() > 0 for one in gradients)


def test_a_scale_nobody_told_us_of_is_refused():
    model = tiny_llama()
    check_forward(model, VOCAB)
    own_forward = model.forward

    def tripled(*args, **kwargs):
        output = own_forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = tripled
    with pytest.raises(ValueError, match="LlamaForCausalLM computes its logits in a way"):
        check_forward(model, VOCAB)


def test_head_refuses_more_columns_than_the_model_has():
    with pytest.raises(ValueError, match=f"{VOCAB + 1} is not within the {VOCAB} rows"):
        head_of(tiny_llama(), VOCAB + 1)


def test_padded_rows_are_trimmed_and_said(caplog):
    tokenizer = tiny_tokenizer()
    student, teacher = tiny_llama(VOCAB + 8), tiny_llama(VOCAB + 40)
    with caplog.at_level(logging.WARNING):
        assert shared_vocabulary(tokenizer, tokenizer, student, teacher) == VOCAB + 8
    assert "student has 392 output rows and teacher 424" in caplog.text


def test_different_tokenizers_are_refused_with_the_first_differences():
    ours, theirs = tiny_tokenizer(), tiny_tokenizer()
    theirs.add_tokens(["only-here"])
    grown = tiny_llama(VOCAB + 1)
    assert shared_vocabulary(ours, theirs, grown, grown) == VOCAB + 1  # one more word is no obstacle
    ours.add_tokens(["something-else"])
    with pytest.raises(ValueError, match=r"1 of the student's 385 tokens differ.*'something-else' is 384"):
        shared_vocabulary(ours, theirs, grown, grown)
    with pytest.raises(ValueError, match="ids up to 384, but the teacher model has 384 rows"):
        shared_vocabulary(ours, tiny_tokenizer(), grown, tiny_llama(VOCAB))


def test_end_of_text_joins_tokenizer_and_generation_settings():
    tokenizer, model = tiny_tokenizer(), tiny_llama()
    assert end_of_text_ids(tokenizer, model) == {2}
    model.generation_config.eos_token_id = [0, 7]
    assert end_of_text_ids(tokenizer, model) == {0, 2, 7}
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="end-of-text"):
        end_of_text_ids(tokenizer, model)


def test_tied_weights_are_counted_once():
    assert parameter_count(tiny_llama()) - parameter_count(tiny_llama(tied=True)) == VOCAB * 32


def test_folders_load_in_the_type_asked_for(tmp_path):
    folders = save_tiny(tmp_path)
    model = load_model(folders.student)
    assert model.dtype == torch.float32 and not model.training
    assert load_model(str(folders.student), dtype="bfloat16").dtype == torch.bfloat16
    assert {each.device.type for each in load_model(folders.student, device="meta").parameters()} == {"meta"}
    assert load_tokenizer(folders.tokenizer).get_vocab() == tiny_tokenizer().get_vocab()
    ids, mask = right_padded()
    torch.testing.assert_close(model(ids, mask).logits, tiny_llama(layers=1, seed=1)(ids, mask).logits)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_of_two_tied_layers_is_merged_into_that_one(target, tmp_path):
    base, ids = tiny_llama(tied=True), torch.arange(8)[None]
    base.save_pretrained(tmp_path / "base")
    model = add_lora(load_model(tmp_path / "base"), LoraSettings(r=4, target_modules=("q_proj", target)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(7))
    model.eval().save_pretrained(tmp_path / "adapter")
    load_model(tmp_path / "adapter").save_pretrained(tmp_path / "merged")
    wanted = model(ids).logits
    assert (wanted - base(ids).logits).abs().max() > 0.01
    for folder in ("adapter", "merged"):
        torch.testing.assert_close(load_model(tmp_path / folder)(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_saved_adapter_loads_merged_into_its_base(tmp_path):
    base = save_tiny(tmp_path).student
    model = add_lora(load_model(base), LoraSettings(r=2, target_modules=("q_proj", "down_proj")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    model.eval().save_pretrained(tmp_path / "adapter")
    ids, mask = right_padded()
    merged = load_model(tmp_path / "adapter")
    torch.testing.assert_close(merged(ids, mask).logits, model(ids, mask).logits, rtol=1e-4, atol=1e-4)
    assert (merged(ids, mask).logits - load_model(base)(ids, mask).logits).abs().max() > 0.01


def test_pickled_weights_are_refused_with_the_way_to_convert(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin\), and only safetensors is read.*convert it once"
    ):
        load_model(tmp_path)


def test_a_checkpoint_that_leaves_weights_random_is_refused(tmp_path):
    tiny_llama(layers=1).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 2'))
    with pytest.raises(ValueError, match="no weights for 9 parts of the model"):
        load_model(tmp_path)


def test_what_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="there is no folder"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="'nobody/nothing' could not be loaded"):
        load_model("nobody/nothing")
    with pytest.raises(ValueError, match="tokenizer of 'nobody/nothing' could not be loaded"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(ValueError, match="dtype 'fp8' is not known"):
        load_model(Path("any"), dtype="fp8")
