"""Several sequences in a row: nothing is lost or laid over another, and no model reads across."""

from itertools import product
from types import MethodType

import pytest
import torch
from test_models import MODELS
from tiny import VOCAB, tiny_gpt2, tiny_llama, tiny_qwen2
from transformers import MambaConfig, MambaForCausalLM

from redistill.batch import Counts, Row, collate
from redistill.config import ObjectiveSettings
from redistill.objective import Objective, batch_loss
from redistill.packing import first_fit, lay_out, packs
from redistill.sample import Sample
from redistill.sampling import Sampling
from redistill.scoring import Scorer, position_uniforms
from redistill.teachers.local import LocalTeacher

COUNTS = Counts(80.0, 80.0, 20.0)


@pytest.mark.parametrize("seed", range(5))
def test_every_sequence_lies_somewhere_and_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (30,), generator=generator).tolist()
    sequences = [[number + 1] * length for number, length in enumerate(lengths)]
    layout = lay_out(sequences, pad_id=0, packed=True)
    flat, positions = layout.input_ids.flatten(), layout.position_ids.flatten()
    width = layout.input_ids.shape[1]
    assert max(lengths) <= width <= 2 * max(lengths)
    assert layout.input_ids.numel() <= 1.08 * sum(lengths)
    assert int((flat > 0).sum()) == sum(lengths)
    for ids, start in zip(sequences, layout.first, strict=True):
        assert flat[start : start + len(ids)].tolist() == ids
        assert positions[start : start + len(ids)].tolist() == list(range(len(ids)))
        assert start // width == (start + len(ids) - 1) // width


def test_first_fit_puts_the_longest_first_and_leaves_no_row_that_two_would_share():
    assert first_fit([3, 8, 5, 2, 2], 8) == [(1, 5), (0, 0), (1, 0), (2, 0), (2, 2)]
    assert first_fit([], 1) == []


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_kind_of_positions_can_be_packed(name):
    assert packs(MODELS[name](), VOCAB) == (
        not name.startswith("opt")
    )  # OPT makes its mask without positions


def test_what_cannot_be_packed_is_found_out():
    small = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert not packs(MambaForCausalLM(small), VOCAB)

    def sees_the_row(self, input_ids, position_ids=None, **options):
        # With a mask of its own the decoder no longer looks for sequences in the positions.
        return self.inner(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=torch.ones_like(input_ids),
            **options,
        )

    def counts_the_row(self, input_ids, position_ids=None, **options):
        del position_ids
        return self.inner(input_ids=input_ids, **options)

    for wrong in (sees_the_row, counts_the_row):
        model = tiny_llama(VOCAB)
        model.model.inner = model.model.forward
        model.model.forward = MethodType(wrong, model.model)
        assert not packs(model, VOCAB)


def rows_of_all_groups():
    generator = torch.Generator().manual_seed(1)
    rows = []
    for (sft, distill), prompt, answer in product(
        ((False, True), (True, True), (True, False)), (2, 9, 17), (3, 11)
    ):
        ids = torch.randint(4, VOCAB, (prompt + answer,), generator=generator).tolist()
        spans = tuple(place // 3 for place in range(answer))
        rows.append(Row(Sample(tuple(ids[:prompt]), tuple(ids[prompt:])), sft, distill, lambda s=spans: s))
    return rows


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_qwen2])
def test_loss_and_gradients_do_not_know_whether_rows_were_packed(make):
    rows, found = rows_of_all_groups(), []
    for packed in (False, True):
        student, teacher = make(VOCAB), tiny_llama(VOCAB, layers=3)
        objective = Objective(ObjectiveSettings(), torch.Generator().manual_seed(0))
        batch = collate(rows, 0, packed=packed)
        read_by = LocalTeacher(teacher, VOCAB, packed)
        loss, stats = batch_loss(objective, student, read_by, batch, lambda: COUNTS, VOCAB)
        loss.backward()
        gradients = [p.grad.double().flatten() for p in student.parameters() if p.grad is not None]
        found.append((loss, stats["kl"], torch.cat(gradients), len(batch["input_ids"])))
    apart, together = found
    assert together[3] < apart[3] == len(rows)
    for one, other in zip(apart[:3], together[:3], strict=True):
        assert torch.linalg.vector_norm(one - other) <= 1e-5 * torch.linalg.vector_norm(one)


def test_scores_do_not_know_it_either_nor_what_was_kept():
    samples = [row.sample for row in rows_of_all_groups()][:7]
    student, teacher, how = tiny_llama(VOCAB), tiny_gpt2(VOCAB), Sampling()
    uniforms = position_uniforms(samples, how, torch.Generator().manual_seed(0))
    start, found = [0] * len(samples), []
    for packed, keep in product((False, True), repeat=2):
        scorer = Scorer(student, teacher, VOCAB, how, packed=packed, keep=keep)
        found.append((scorer.score(samples, start, start, uniforms), scorer.own.state))
    for scores, _ in found[1:]:
        for one, other in zip(found[0][0], scores, strict=True):
            assert one.teacher_token.equal(other.teacher_token)
            torch.testing.assert_close(one.kl, other.kl, rtol=1e-4, atol=1e-6)
    assert [state is not None for _, state in found] == [False, True, False, True]
    apart, together = found[1][1], found[3][1]
    read = apart.mask.bool()
    assert read.equal(together.mask.bool()) and apart.position.equal(together.position)
    for one, other in zip(apart.cache.layers, together.cache.layers, strict=True):
        for part in ("keys", "values"):
            a, b = (getattr(each, part).transpose(1, 2)[read] for each in (one, other))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
