"""How likely a model finds each of a few replies to a prompt; nothing is generated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from redistill.batch import Row, collate, to_device
from redistill.generate import answering
from redistill.models import head_of, hidden_states, plain_model, positions_of
from redistill.sample import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = tuple[int, ...]


class ReplyReader:
    """Reads prompts with `model`, and says how likely each of `replies` is after them.

    Replies that share what is read before their last token share a row: usually one row per prompt does.
    Errors: ValueError for replies that are the same ids, or none.
    """

    def __init__(self, model: PreTrainedModel, replies: Sequence[Ids]):
        self.model, self.spines = model, spines_of(replies)
        places = [_place(reply, self.spines) for reply in replies]
        device = next(model.parameters()).device
        pairs = [pair for each in places for pair in each]
        self._at, self._tokens = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
        self._ends = torch.tensor([0, *map(len, replies)]).cumsum(0).tolist()

    def check_lengths(self, prompts: Iterable[Ids]) -> None:
        """Raises ValueError where a prompt with its longest reply has more tokens than the model has positions."""
        positions = positions_of(self.model)
        longest = max(map(len, prompts)) + max(map(len, self.spines))
        if positions is not None and longest > positions:
            raise ValueError(
                f"a pair needs {longest} tokens and the judge reads at most {positions}: lower "
                "max_answer_tokens or max_question_tokens, or use another judge."
            )

    def read(self, prompts: Sequence[Ids]) -> list[tuple[float, ...]]:
        """The log-likelihoods of the replies (nats) after each prompt, all prompts in one batch. No gradients."""
        model, spines = self.model, self.spines
        rows = [Row(Sample(ids, spine), True, False) for ids in prompts for spine in spines]
        head = head_of(model, plain_model(model).config.get_text_config().vocab_size)
        with answering(model):
            batch = to_device(collate(rows, pad_id=0), self._at.device)
            hidden = hidden_states(model, batch["input_ids"], batch["select"])
            scores = head.logits(hidden).float().log_softmax(dim=-1)
            chosen = scores.view(len(prompts), -1, scores.shape[-1])[:, self._at, self._tokens].double().cpu()
            sums = torch.stack([chosen[:, a:b].sum(dim=1) for a, b in pairwise(self._ends)], dim=1)
        return [tuple(row) for row in sums.tolist()]


def spines_of(replies: Sequence[Ids]) -> list[Ids]:
    """The replies whose reading covers all others. Raises ValueError for replies that are the same ids, or none."""
    if len(set(replies)) < len(replies) or not all(replies):
        raise ValueError("the judge's tokenizer cannot tell the replies apart: use another judge.")
    spines: list[Ids] = []
    for reply in sorted(replies, key=len, reverse=True):
        if not any(spine[: len(reply) - 1] == reply[:-1] for spine in spines):
            spines.append(reply)
    return spines


def _place(reply: Ids, spines: Sequence[Ids]) -> list[tuple[int, int]]:
    """Of every token of the reply: the position at which it is predicted (those of all spines in a row), and
    the token."""
    number = next(n for n, spine in enumerate(spines) if spine[: len(reply) - 1] == reply[:-1])
    offset = sum(len(spine) for spine in spines[:number])
    return [(offset + place, token) for place, token in enumerate(reply)]
