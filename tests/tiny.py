"""Tiny models and one tiny tokenizer, made on the spot: random weights, no download, milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIALS = (END_OF_TEXT, IM_START, IM_END, PAD)  # ids 0, 1, 2, 3
EOS_ID, PAD_ID = 2, 3
VOCAB = 384

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What the merges are learned from; the 256 bytes are always there, so any text can be written.
_TEXT = (
    "The quick brown fox has quickly jumped over the lazy dog in the park near the old river.",
    "What is the capital of France? The capital of France is Paris.",
    "Write a short answer to the question below, and explain the reason in one sentence.",
    "user system assistant question answer instruction response because there where which would their",
    "She gave the children three apples, and they were eating them on the stairs in the morning.",
    "for i in range(10): print(i)\n\treturn a + b == 3",
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 384 tokens; end of text is <|im_end|> (2), pad is <|pad|> (3), ChatML template."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(_TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=IM_END,
        bos_token=IM_START,
        unk_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


# Not 0.02: with it a model this narrow is almost uniform, and a test of its answers would test nothing.
_SPREAD = 0.2


def _seeded(build, config, seed: int):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config)
    model.generation_config.pad_token_id = PAD_ID
    return model.eval()


def tiny_llama(
    vocab_size: int = VOCAB, layers: int = 2, hidden: int = 32, seed: int = 0, *, tied: bool = False
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=_SPREAD,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return _seeded(LlamaForCausalLM, config, seed)


def tiny_qwen2(
    vocab_size: int = VOCAB, layers: int = 2, hidden: int = 32, seed: int = 0, *, tied: bool = True
) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=_SPREAD,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return _seeded(Qwen2ForCausalLM, config, seed)


def tiny_gpt2(vocab_size: int = VOCAB, layers: int = 2, hidden: int = 32, seed: int = 0) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=hidden,
        n_layer=layers,
        n_head=4,
        n_positions=512,
        initializer_range=_SPREAD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=EOS_ID,
    )
    return _seeded(GPT2LMHeadModel, config, seed)


def tiny_opt(
    vocab_size: int = VOCAB, layers: int = 2, hidden: int = 32, seed: int = 0, *, embedding: int | None = None
) -> OPTForCausalLM:
    """`embedding`: word_embed_proj_dim, where it differs from `hidden` (OPT-350M's shape)."""
    config = OPTConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        word_embed_proj_dim=embedding or hidden,
        ffn_dim=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        init_std=_SPREAD,
        dropout=0.0,
        bos_token_id=1,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    return _seeded(OPTForCausalLM, config, seed)


@dataclass(frozen=True)
class TinyFolders:
    """What `save_tiny` wrote; student and teacher hold the tokenizer too."""

    student: Path
    teacher: Path
    tokenizer: Path


def save_tiny(folder: Path, *, student_layers: int = 1, teacher_layers: int = 3) -> TinyFolders:
    """Writes `folder`/student, /teacher, /tokenizer in safetensors, for tests of the command line."""
    tokenizer = tiny_tokenizer()
    folders = TinyFolders(folder / "student", folder / "teacher", folder / "tokenizer")
    tokenizer.save_pretrained(folders.tokenizer)
    for path, layers, seed in ((folders.student, student_layers, 1), (folders.teacher, teacher_layers, 2)):
        tiny_llama(len(tokenizer), layers=layers, seed=seed).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return folders
