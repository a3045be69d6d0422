"""Padding, shifting, masking: positions predict the right tokens, groups and phrases are never cut."""

import pytest
import torch

from redistill.batch import Counts, Row, collate, count, mark, split_by_length
from redistill.sample import Sample


def row(prompt, response, sft=True, distill=True, spans=None):
    return Row(Sample(tuple(prompt), tuple(response)), sft, distill, lambda: spans or ())


def test_positions_predict_their_targets_whatever_the_padding():
    rows = [row([1, 2, 3], [4, 5]), row([6], [7, 8, 9, 2]), row([3, 3], [1])]
    batch = collate(rows, pad_id=2)
    flat = batch["input_ids"].flatten()
    seen = {}
    for position, target in zip(batch["select"].tolist(), batch["targets"].tolist(), strict=True):
        place, _ = divmod(position, batch["input_ids"].shape[1])
        seen.setdefault(place, []).append((int(flat[position]), target))
    # The token before the response predicts its first token; the end of text (2, also the pad id) is kept.
    assert sorted(seen.values()) == sorted([[(3, 4), (4, 5)], [(6, 7), (7, 8), (8, 9), (9, 2)], [(3, 1)]])


def test_groups_lie_apart_and_the_teacher_reads_only_what_is_distilled():
    rows = [
        row([1], [2, 3], True, False),
        row([1], [4], False, True),
        row([1], [5, 6], True, True),
        row([1], []),
    ]
    batch = collate(rows, 0)
    assert [(s.sft, s.distill) for s in mark(batch).slices] == [(False, True), (True, True), (True, False)]
    assert batch["distilled"] == 2 and batch["distill_positions"] == 3
    assert batch["targets"].tolist() == [4, 5, 6, 2, 3]
    assert count(rows) == Counts(sft=4, token=3, span=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 64])
def test_slices_cover_everything_and_never_cut_a_phrase(size):
    generator = torch.Generator().manual_seed(size)
    rows = []
    for _ in range(6):
        lengths = torch.randint(1, 5, (8,), generator=generator).tolist()
        spans = [i if i % 3 else -1 for i, length in enumerate(lengths) for _ in range(length)]
        rows.append(row([1], range(len(spans)), spans=spans))
    marks = mark(collate(rows, 0), size)
    spans = marks.spans.tolist()
    edges = [(s.start, s.stop) for s in marks.slices]
    assert edges[0][0] == 0 and edges[-1][1] == len(spans)
    assert all(a[1] == b[0] for a, b in zip(edges, edges[1:], strict=False))
    if size > 1:
        for start, stop in edges:
            assert stop == len(spans) or spans[stop] != spans[stop - 1] or spans[stop] == -1
            assert stop - start <= max(size, 5)
    # Phrases of different rows keep different numbers.
    assert count(rows).span == len({a for a, b in zip(spans, spans[1:], strict=False) if a == b >= 0})


def test_split_by_length_loses_nothing_and_keeps_neighbours_in_length():
    rows = [row([1] * n, [2]) for n in (5, 1, 9, 3, 7)]
    parts = split_by_length(rows, 3)
    assert sorted(len(r.sample.prompt) for part in parts for r in part) == [1, 3, 5, 7, 9]
    assert [len(part) for part in parts] == [2, 1, 2] and len(parts[0][0].sample.prompt) == 1
    assert split_by_length([], 2) == [[], []]


def test_a_batch_of_nothing():
    batch = collate([row([1], [])], 0)
    assert mark(batch).slices == () and len(batch["targets"]) == 0
