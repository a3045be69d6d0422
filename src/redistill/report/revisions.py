"""The revisions a page shows: the newest, and those that helped and hurt most; each cut into tokens."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping
from typing import Any

from redistill.report.plain import cut, number, numbers, short, text, with_kl

Record = Mapping[str, Any]


class Revisions:
    """Takes in every record of revisions.jsonl and remembers the telling ones.

    most: how many of them; half are the newest, a quarter each helped and hurt most.
    """

    def __init__(self, most: int) -> None:
        self._newest: deque[tuple[int, Record]] = deque(maxlen=max(1, most // 2))
        self._best: list[tuple[float, int, Record]] = []
        self._worst: list[tuple[float, int, Record]] = []
        self._extremes = max(1, most // 4)
        self.total, self.helped, self._gains, self._measured = 0, 0, 0.0, 0

    def add(self, record: Record) -> None:
        """One more; what is no revision is passed over."""
        if not text(record.get("after")) and not text(record.get("before")):
            return
        self.total += 1
        self._newest.append((self.total, record))
        gain = gain_of(record)
        if gain is None:
            return
        self._measured, self._gains, self.helped = (
            self._measured + 1,
            self._gains + gain,
            self.helped + (gain > 0),
        )
        for heap, key in ((self._best, gain), (self._worst, -gain)):
            push = heapq.heappush if len(heap) < self._extremes else heapq.heappushpop
            push(heap, (key, self.total, record))

    def data(self) -> dict[str, Any]:
        """`shown`, oldest first, of `total`; `helped`: how many raised the teacher's log-likelihood; `gain`: mean."""
        chosen = dict(self._newest)
        chosen |= {place: record for heap in (self._best, self._worst) for _, place, record in heap}
        gain = self._gains / self._measured if self._measured else None
        shown = [row_of(place, chosen[place]) for place in sorted(chosen)]
        return {"shown": shown, "total": self.total, "helped": self.helped, "gain": short(gain)}


def gain_of(record: Record) -> float | None:
    """Rise of the teacher's mean log-likelihood, nats per token."""
    before, after = (number(record.get(f"log_likelihood_{when}")) for when in ("before", "after"))
    return None if before is None or after is None else after - before


def row_of(place: int, record: Record) -> dict[str, Any]:
    """A record as the page draws it: cut into tokens where the record has their borders."""
    before, after = text(record.get("before")), text(record.get("after"))
    old, new = cut(before, record.get("before_ends")), cut(after, record.get("after_ends"))
    position = record.get("position")
    position = position if isinstance(position, int) else None
    if old is None or new is None or position is None or not 0 <= position < min(len(old), len(new)):
        parts = _by_text(before, after)
    else:
        parts = _by_token(old, new, position, record)
    facts = {
        "kl": short(record.get("kl_before")),
        "was": short(record.get("log_likelihood_before")),
        "now": short(record.get("log_likelihood_after")),
        "gain": short(gain_of(record)),
        "position": position,
        "length": len(old) if old is not None else None,
    }
    step = record.get("step")
    return {
        "number": place,
        "step": step if isinstance(step, int) else None,
        "source": text(record.get("source")),
        "prompt": text(record.get("prompt")),
        **facts,
        **parts,
    }


def _by_token(old: list[str], new: list[str], position: int, record: Record) -> dict[str, Any]:
    kl_old, kl_new = numbers(record.get("kl_before_tokens")), numbers(record.get("kl_after"))
    kept = with_kl(new[:position], kl_old or kl_new)
    behind = slice(position + 1, None)
    return {
        "kept": kept,
        "rejected": old[position] or text(record.get("rejected_text")),
        "replacement": new[position] or text(record.get("replacement_text")),
        "old": with_kl(old[behind], kl_old[behind]),
        "new": with_kl(new[behind], kl_new[behind]),
        "tokens": True,
    }


def _by_text(before: str, after: str) -> dict[str, Any]:
    """Without the tokens' borders: what both have in common, and what does not."""
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    return {
        "kept": [[after[:same], None]],
        "rejected": "",
        "replacement": "",
        "old": [[before[same:], None]],
        "new": [[after[same:], None]],
        "tokens": False,
    }
