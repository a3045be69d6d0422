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
from redistill.scoring import position_uniforms, scored
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


@pytest.mark.parametrize("keep", [False, True])
def test_scores_do_not_know_it_either(keep):
    samples = [row.sample for row in rows_of_all_groups()]
    student, teacher, how = tiny_llama(VOCAB), tiny_gpt2(VOCAB), Sampling()
    uniforms = position_uniforms(samples, how, torch.Generator().manual_seed(0))
    apart, together = (
        list(scored(student, teacher, samples, VOCAB, how, uniforms, 5, keep=keep, packed=packed))
        for packed in (False, True)
    )
    for (rows, scores, alone), (others, same, state) in zip(apart, together, strict=True):
        assert rows == others and (state is not None) == keep
        if keep:
            read = state.mask.bool()
            assert read.equal(alone.mask.bool()) and state.position.equal(alone.position)
            for one, other in zip(alone.cache.layers, state.cache.layers, strict=True):
                for part in ("keys", "values"):
                    a, b = (getattr(each, part).transpose(1, 2)[read] for each in (one, other))
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for one, other in zip(scores, same, strict=True):
            assert one.teacher_token.equal(other.teacher_token)
            torch.testing.assert_close(one.kl, other.kl, rtol=1e-4, atol=1e-6)
