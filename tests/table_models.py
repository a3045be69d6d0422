"""Language models whose next-token distribution is a table looked up by the last token, nothing else.

A real Llama of one layer does it: the embedding is the identity, the layer adds zero, the final norm scales a
one-hot vector by sqrt(V), and the output matrix holds the table. So every way into a model (decoder, head,
key/value cache, forward) is the real one, and what must come out can be worked out by hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

Rows = dict[int, dict[int, float]]


def distribution(given: dict[int, float], vocabulary: int) -> list[float]:
    """The probabilities given, and what is left of 1 in equal parts for every other token."""
    rest = (1.0 - sum(given.values())) / (vocabulary - len(given))
    return [given.get(token, rest) for token in range(vocabulary)]


def table(rows: Rows, vocabulary: int) -> Tensor:
    """[V, V] probabilities; row a is what follows token a. A token without a row is followed by anything."""
    return torch.tensor(
        [distribution(rows.get(last, {}), vocabulary) for last in range(vocabulary)], dtype=torch.float64
    )


def table_model(probabilities: Tensor) -> LlamaForCausalLM:
    """A causal language model with q(next | text) = probabilities[last token of the text]; V must be even."""
    size = probabilities.shape[0]
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(probabilities.log().T / math.sqrt(size))
    return model
