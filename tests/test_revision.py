"""SCRG on a pair of table models whose right answer is worked out by hand, and on a real pair by a twin.

Vocabulary of the tables: 0 is the prompt, 1 to 6 are words, 7 is end of text. The student says what was read
last plus one: "1 2 3 4 5 6 <end>". Every row is peaked: 0.93 for one token and 0.01 for each of the others.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from table_models import table, table_model
from tiny import EOS_ID, VOCAB, tiny_gpt2, tiny_llama
from transformers import MistralConfig, MistralForCausalLM

from redistill.cache import can_be_cut
from redistill.revision import find_error, revise_samples
from redistill.sample import Sample
from redistill.sampling import Sampling
from redistill.scoring import Score, score

END, WORDS = 7, 8
GREEDY = Sampling(temperature=0.0)
CHAIN = {last: {last + 1: 0.93} for last in range(7)}
# After 0 the student finds 1 unlikely and the teacher does not: the largest KL, but they agree on the token.
STUDENT = CHAIN | {0: {2: 0.993}}
TEACHER = CHAIN | {0: {1: 0.993}, 2: {5: 0.51, 3: 0.43}, 4: {6: 0.93}, 6: {3: 0.86, 7: 0.08}}
TEXT = Sample(prompt=(3, 0), response=(1, 2, 3, 4, 5, 6, END), origin="rollout", source="a:1")

KL_AT_0 = 0.992 * math.log(993)
KL_AT_2 = 0.51 * math.log(51) + 0.43 * math.log(43 / 93)
KL_AT_4 = 0.92 * math.log(93)
KL_AT_6 = 0.86 * math.log(86) + 0.08 * math.log(8 / 93)


def tables(teacher=TEACHER, student=STUDENT):
    return table_model(table(student, WORDS)), table_model(table(teacher, WORDS))


def revise(pair, samples, *, rounds=1, teacher_token="argmax", sampling=GREEDY, seed=0, limit=20, **changes):
    settings = {"eos": frozenset({END}), "vocabulary": WORDS, "batch_size": 4} | changes
    return revise_samples(
        *pair,
        samples,
        rounds=rounds,
        teacher_token=teacher_token,
        sampling=sampling,
        generator=torch.Generator().manual_seed(seed),
        max_completion_length=limit,
        **settings,
    )


def scores_of(pair, samples, *, teacher_token="argmax", seed=0, vocabulary=WORDS, batch_size=4, **options):
    generator = torch.Generator().manual_seed(seed)
    return score(
        *pair,
        samples,
        vocabulary=vocabulary,
        teacher_token=teacher_token,
        generator=generator,
        batch_size=batch_size,
        **options,
    )


def test_scores_of_the_tables_are_those_worked_out_by_hand():
    (found,) = scores_of(tables(), [TEXT])
    expected = torch.tensor([KL_AT_0, 0.0, KL_AT_2, 0.0, KL_AT_4, 0.0, KL_AT_6])
    torch.testing.assert_close(found.kl, expected, rtol=1e-5, atol=1e-6)
    assert found.kl.min() >= 0
    assert found.teacher_token.tolist() == [1, 2, 5, 4, 6, 6, 3]
    likelihood = torch.tensor([0.993, 0.93, 0.43, 0.93, 0.01, 0.93, 0.08]).log()
    torch.testing.assert_close(found.teacher_log_likelihood, likelihood, rtol=1e-5, atol=1e-6)
    own = torch.tensor([0.001, 0.93, 0.93, 0.93, 0.93, 0.93, 0.93]).log()
    torch.testing.assert_close(found.reward, likelihood - own, rtol=1e-5, atol=1e-6)


def test_the_error_is_the_largest_kl_where_the_tokens_differ():
    found = Score(
        torch.tensor([9.0, 1.0, 4.0, 4.0, 8.0]), torch.tensor([1, 2, 3, 4, 5]), *[torch.zeros(5)] * 3
    )
    assert find_error(found, (1, 0, 0, 0, 5), 0) == 2  # 9 and 8 agree; the first of two equal ones
    assert find_error(found, (1, 0, 0, 0, 5), 3) == 3
    assert find_error(found, (1, 0, 0, 0, 5), 4) is None
    assert find_error(found, (1, 2, 3, 4, 5), 0) is None
    nothing = Score(torch.zeros(3), torch.tensor([1, 2, 3]), *[torch.zeros(3)] * 3)
    assert find_error(nothing, (1, 2, 0), 0) == 2, "a difference counts even where the KL is zero"
    assert find_error(Score(torch.zeros(0), torch.zeros(0).long(), *[torch.zeros(0)] * 3), (), 0) is None


def test_one_round_puts_the_teachers_word_where_the_two_differ_most():
    (revised,) = revise(tables(), [TEXT])
    assert revised.response == (1, 2, 3, 4, 6, END)
    assert (revised.prompt, revised.origin, revised.source) == (TEXT.prompt, "rollout", "a:1")
    assert not revised.agreed
    (edit,) = revised.edits
    assert (edit.position, edit.rejected, edit.replacement) == (4, 5, 6)
    assert edit.before == TEXT.response
    assert edit.kl == pytest.approx(KL_AT_4, rel=1e-5)
    mean = math.fsum(map(math.log, [0.993, 0.93, 0.43, 0.93, 0.01, 0.93, 0.08])) / 7
    assert edit.log_likelihood == pytest.approx(mean, rel=1e-5)


def test_later_rounds_look_behind_the_last_correction_only():
    # 2: "6 <end>" becomes "6 3" and the student goes on "4 5 6 <end>". 3: of the two differing positions left
    # that lie behind, 5 after 4 has the larger KL. Position 2 differs all the time and is never touched.
    expected = {
        2: (1, 2, 3, 4, 6, 3, 4, 5, 6, END),
        3: (1, 2, 3, 4, 6, 3, 4, 6, END),
        4: (1, 2, 3, 4, 6, 3, 4, 6, 3, 4, 5, 6, END),
    }
    for rounds, response in expected.items():
        (revised,) = revise(tables(), [TEXT], rounds=rounds)
        assert revised.response == response
        assert [edit.position for edit in revised.edits] == [4, 5, 7, 8][:rounds]
        texts = [*(edit.before for edit in revised.edits[1:]), response]
        for edit, after in zip(revised.edits, texts, strict=True):
            assert after[: edit.position] == edit.before[: edit.position]
            assert after[edit.position] == edit.replacement != edit.rejected == edit.before[edit.position]
    assert revise(tables(), [TEXT], rounds=0) == [TEXT]


def test_a_later_round_that_finds_nothing_behind_changes_nothing():
    pair = tables(TEACHER | {6: {END: 0.93}})
    (once,), (thrice,) = revise(pair, [TEXT]), revise(pair, [TEXT], rounds=3)
    assert once == thrice, "position 2 still differs, but lies before the correction"
    assert not thrice.agreed


def test_an_end_of_text_from_the_teacher_ends_the_response():
    pair = tables(TEACHER | {4: {END: 0.93}})
    pair[0].register_forward_pre_hook(lambda *_: pytest.fail("the student wrote on after the end"))
    for rounds in (1, 3):
        (revised,) = revise(pair, [TEXT], rounds=rounds)
        assert revised.response == (1, 2, 3, 4, END)
        assert len(revised.edits) == 1


def test_an_end_of_text_too_early_is_replaced_and_the_student_goes_on():
    (revised,) = revise(tables(), [replace(TEXT, response=(1, 2, END))])
    assert revised.response == (1, 2, 5, 6, END)
    assert (revised.edits[0].position, revised.edits[0].rejected) == (2, END)


def test_agreed_samples_and_empty_ones_stay_as_they_are():
    agreed, empty = replace(TEXT, response=(1, 2, 5, 6, 3)), replace(TEXT, response=())
    found = revise(tables(), [agreed, TEXT, empty], rounds=3)
    assert found[0] == replace(agreed, agreed=True)
    assert (found[2], found[1].agreed) == (replace(empty, agreed=True), False)
    assert revise(tables(), [empty]) == [replace(empty, agreed=True)]
    assert revise(tables(), []) == []
    again = revise(tables(), revise(tables(CHAIN, CHAIN), [TEXT]))
    assert [len(each.edits) for each in again] == [1]
    assert not again[0].agreed, "agreed in an earlier call, corrected in this one"


def test_the_length_limit_holds_in_every_round():
    for limit in range(1, 14):
        (revised,) = revise(tables(), [replace(TEXT, response=TEXT.response[:limit])], rounds=4, limit=limit)
        assert len(revised.response) <= limit
    (revised,) = revise(tables(), [TEXT], rounds=2, limit=7)
    assert revised.response == (1, 2, 3, 4, 6, 3, 4)
    (revised,) = revise(tables(), [TEXT], limit=5)
    assert revised.response == (1, 2, 3, 4, 6), "the teacher's word is the last that fits"
    (revised,) = revise(tables(), [TEXT], limit=3)
    assert revised.response == (1, 2, 5), "an error past the limit is not looked for"
    assert revised.edits[0].before == TEXT.response


def test_only_rows_that_differ_are_written_anew_in_one_call():
    student, teacher = tables()
    read = []
    student.register_forward_pre_hook(
        lambda _, __, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    agreed = replace(TEXT, response=(1, 2, 5, 6, 3))
    revise((student, teacher), [agreed, TEXT, agreed, replace(TEXT, response=(1, 2, END))])
    # Nothing that scoring has read is read again. The first row has only the end to say, the second "6 <end>".
    assert read == [(2, 1), (1, 1)]


def rollouts() -> list[Sample]:
    ids = torch.randint(4, VOCAB, (7, 30), generator=torch.Generator().manual_seed(2)).tolist()
    cuts = [(3, 9), (10, 18), (1, 2), (5, 21), (8, 8), (2, 25), (12, 13)]
    return [
        Sample(tuple(row[:prompt]), tuple(row[prompt:end]), "rollout")
        for row, (prompt, end) in zip(ids, cuts, strict=True)
    ]


def naive_scores(student, teacher, sample: Sample):
    """KL, the teacher's distribution and the likelihood; one forward for each position, in float64."""
    kl, teacher_p, likelihood = [], [], []
    for position, token in enumerate(sample.response):
        ids = torch.tensor([sample.prompt + sample.response[:position]])
        with torch.no_grad():
            p = teacher(input_ids=ids).logits[0, -1].double().softmax(-1)
            q = student(input_ids=ids).logits[0, -1].double().softmax(-1)
        kl.append(float(sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))))
        teacher_p.append(p)
        likelihood.append(math.log(p[token]))
    return kl, teacher_p, likelihood


def test_a_real_pair_is_scored_as_one_position_at_a_time_would_be():
    student, teacher = tiny_llama(layers=1, seed=1), tiny_llama(layers=3, seed=2)
    samples = rollouts()
    for batch_size, chunk in ((3, 256), (7, 4), (1, 1)):
        found = scores_of((student, teacher), samples, vocabulary=VOCAB, batch_size=batch_size, chunk=chunk)
        revised = revise(
            (student, teacher), samples, vocabulary=VOCAB, batch_size=batch_size, eos=frozenset({EOS_ID})
        )
        for sample, each, after in zip(samples, found, revised, strict=True):
            kl, p, likelihood = naive_scores(student, teacher, sample)
            torch.testing.assert_close(each.kl, torch.tensor(kl), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                each.teacher_log_likelihood, torch.tensor(likelihood), rtol=1e-4, atol=1e-5
            )
            best = [int(row.argmax()) for row in p]
            assert each.teacher_token.tolist() == best
            differing = [i for i in range(len(kl)) if best[i] != sample.response[i]]
            if not differing:
                assert after == replace(sample, agreed=True)
                continue
            error = max(differing, key=lambda i: kl[i])
            assert after.edits[0].position == error
            assert after.response[: error + 1] == (*sample.response[:error], best[error])


@pytest.mark.parametrize("barring", ["both", "teacher", "student"])
def test_barred_ids_leave_every_score_finite(barring):
    pair = _, teacher = tiny_gpt2(seed=1), tiny_gpt2(seed=2)
    for model in pair:
        model.lm_head = torch.nn.Linear(model.config.n_embd, VOCAB).requires_grad_(False)
        barred = barring in ("both", "teacher" if model is teacher else "student")
        model.lm_head.bias[-5:] = -math.inf if barred else 0.0
    said = Sample((1, 2, 3), (4, VOCAB - 2, 6, 7), origin="rollout")
    (found,) = scores_of(pair, [said], vocabulary=VOCAB)
    assert all(each.isfinite().all() for each in found.fields())
    # As far apart as log-probabilities can be, where one model cannot say what the other can.
    worst = int(found.kl.argmax())
    assert (found.kl[worst] > 1000) == (barring == "student")
    assert (found.reward[1] < -9e4) == (barring == "teacher") and (found.reward[1] > 9e4) == (
        barring == "student"
    )


def test_the_teachers_word_is_drawn_from_its_own_distribution():
    pair = tables(TEACHER | {2: {5: 0.6, 3: 0.3}})
    total = 3000
    found = scores_of(
        pair, [replace(TEXT, response=(1, 2, 3))] * total, teacher_token="sample", batch_size=500
    )
    drawn = torch.stack([each.teacher_token for each in found])
    share = [float((drawn[:, 2] == token).double().mean()) for token in range(WORDS)]
    # Standard deviation of a share: at most 0.009.
    assert share == pytest.approx([0.1 / 6, 0.1 / 6, 0.1 / 6, 0.3, 0.1 / 6, 0.6, 0.1 / 6, 0.1 / 6], abs=0.036)
    both = float(((drawn[:, 1] == 2) & (drawn[:, 2] == 5)).double().mean())
    assert both == pytest.approx(0.93 * 0.6, abs=0.036), "positions are drawn independently"
    cold = scores_of(pair, [TEXT] * 50, teacher_token="sample", temperature=0.05)
    assert all(each.teacher_token[2] == 5 for each in cold)
    torch.testing.assert_close(cold[0].kl[2], found[0].kl[2])


def test_the_same_generator_state_gives_the_same_revision_however_the_batches_are_cut():
    student, teacher = tiny_llama(layers=1, seed=1), tiny_llama(layers=3, seed=2)
    settings = {"rounds": 2, "teacher_token": "sample", "sampling": Sampling(), "vocabulary": VOCAB}
    settings["eos"] = frozenset(range(40))
    first = revise((student, teacher), rollouts(), **settings, seed=5)
    assert sum(len(each.edits) for each in first) > len(first)
    for batch_size in (1, 3, 7):
        again = revise((student, teacher), rollouts(), **settings, seed=5, batch_size=batch_size)
        assert [each.response for each in again] == [each.response for each in first]
    other = revise((student, teacher), rollouts(), **settings, seed=6)
    assert [each.response for each in other] != [each.response for each in first]


def test_a_batch_of_one_equals_the_row_in_a_batch_of_many_when_greedy():
    for student, teacher in (
        (tiny_llama(layers=1, seed=1), tiny_llama(layers=3, seed=2)),
        (tiny_gpt2(layers=1, seed=1), tiny_gpt2(layers=3, seed=2)),
    ):
        settings = {"rounds": 3, "vocabulary": VOCAB, "eos": frozenset({EOS_ID}), "batch_size": 7}
        many = revise((student, teacher), rollouts(), **settings)
        for sample, row in zip(rollouts(), many, strict=True):
            (single,) = revise((student, teacher), [sample], **settings)
            assert single.response == row.response
            assert [(e.position, e.before) for e in single.edits] == [
                (e.position, e.before) for e in row.edits
            ]


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("limit", [20, 7])
def test_of_the_corrections_the_one_is_accepted_that_the_teacher_rather_writes(rounds, limit):
    """Against each text scored by itself. The first of these rewards is the best in some rows, the last in others."""
    pair = tiny_llama(layers=1, seed=1), tiny_llama(layers=3, seed=2)
    options = {"rounds": rounds, "teacher_token": "sample", "sampling": Sampling(), "limit": limit}
    options |= {"vocabulary": VOCAB, "eos": frozenset(range(40)), "seed": 3}
    earlier = revise(pair, rollouts(), **options | {"seed": 4})
    taken = [0] * (rounds + 1)
    for samples in (rollouts(), earlier):
        always = revise(pair, samples, **options)
        for batch_size in (1, 7):
            better = revise(pair, samples, **options, accept="better", batch_size=batch_size)
            for before, last, found in zip(samples, always, better, strict=True):
                made = last.edits[len(before.edits) :]
                texts = [*(edit.before for edit in made), last.response]
                cut = [replace(before, response=text[:limit]) for text in texts]
                rewards = [float(each.reward.sum()) for each in scores_of(pair, cut, vocabulary=VOCAB)]
                best = max(range(len(texts)), key=rewards.__getitem__)
                kept = last.edits[: len(before.edits) + best]
                assert (found.response, found.agreed) == (texts[best], last.agreed)
                assert [(each.position, each.before) for each in found.edits] == [
                    (each.position, each.before) for each in kept
                ]
                taken[best] += 1
    assert taken[0] and sum(taken[1:]), taken


def test_a_correction_that_ends_the_answer_is_judged_too():
    for rounds in (1, 3):
        (ended,) = revise(tables(TEACHER | {4: {END: 0.93}}), [TEXT], rounds=rounds, accept="better")
        assert ended.response == (1, 2, 3, 4, END) and len(ended.edits) == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", [tiny_gpt2, tiny_llama])
def test_going_on_from_what_was_read_equals_reading_it_again(family, packed, monkeypatch):
    """Writing and, in later rounds, scoring: by both models."""
    pair, counts = (family(VOCAB, seed=1), family(VOCAB, seed=2)), {}
    for who, model in zip(("student", "teacher"), pair, strict=True):

        def counted(_, ids, options, who=who):
            read = options.get("input_ids", ids[0] if ids else None)
            counts[who] = counts.get(who, 0) + read.numel()

        model.base_model.register_forward_pre_hook(counted, with_kwargs=True)
    options = {
        "rounds": 3,
        "teacher_token": "sample",
        "sampling": Sampling(),
        "limit": 24,
        "vocabulary": VOCAB,
    }
    options |= {"eos": frozenset({EOS_ID}), "packed": packed}
    on = revise(pair, rollouts(), **options)
    fewer = counts.copy()
    counts.clear()
    monkeypatch.setattr("redistill.teachers.reading.can_be_cut", lambda _: False)
    anew = revise(pair, rollouts(), **options)
    assert [each.response for each in on] == [each.response for each in anew]
    for one, other in zip(on, anew, strict=True):
        for edit, same in zip(one.edits, other.edits, strict=True):
            assert (edit.position, edit.before) == (same.position, same.before)
            assert edit.kl_tokens == pytest.approx(same.kl_tokens, abs=2e-4)
            assert edit.log_likelihood == pytest.approx(same.log_likelihood, abs=1e-4)
    assert sum(len(each.edits) for each in on) > len(on)
    assert all(fewer[who] < counts[who] for who in counts), (fewer, counts)


def test_a_sliding_window_has_forgotten_what_a_cut_would_need():
    config = MistralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6, pad_token_id=0, bos_token_id=1, eos_token_id=EOS_ID,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MistralForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert not can_be_cut(cache)
    assert can_be_cut(tiny_llama(VOCAB)(input_ids=ids, use_cache=True).past_key_values)
    options = {"limit": 24, "vocabulary": VOCAB, "eos": frozenset({EOS_ID})}
    kept = revise((model, tiny_llama(VOCAB)), rollouts(), **options)
    assert all(each.response[: e.position] == e.before[: e.position] for each in kept for e in each.edits)


def test_chunks_bound_the_logits_modes_are_kept_and_padded_rows_left_out():
    student, teacher = tiny_gpt2(VOCAB + 8, layers=1), tiny_llama(VOCAB + 64)
    student.transformer.drop.p = 0.5
    quiet = scores_of((student, teacher), rollouts(), vocabulary=VOCAB)
    student.train()
    heads = []
    for model in (student, teacher):
        model.lm_head.register_forward_hook(lambda _, __, out: heads.append((len(out), out.requires_grad)))
    found = scores_of((student, teacher), rollouts(), vocabulary=VOCAB, batch_size=7, chunk=10)
    for a, b in zip(quiet, found, strict=True):
        torch.testing.assert_close(a.kl, b.kl, rtol=1e-4, atol=1e-5)
        assert bool((a.teacher_token < VOCAB).all())
    assert max(rows for rows, _ in heads) == 10
    assert not any(grad for _, grad in heads)
    assert (student.training, teacher.training) == (True, False)


def test_the_student_never_says_an_id_past_the_vocabulary():
    (revised,) = revise(tables(), [replace(TEXT, response=(1, 2, 3, 4, 5))], vocabulary=END, limit=9)
    assert revised.response[:5] == (1, 2, 3, 4, 6)
    assert max(revised.response) < END


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match=r"Sample 1 \(a:1\) has no prompt tokens"):
        revise(tables(), [TEXT, replace(TEXT, prompt=())])
    with pytest.raises(ValueError, match="rounds is -1"):
        revise(tables(), [TEXT], rounds=-1)
    with pytest.raises(ValueError, match="max_completion_length is 0"):
        revise(tables(), [TEXT], limit=0)
