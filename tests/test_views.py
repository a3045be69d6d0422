"""An answer seen closely: its numbers are the losses' own, and looking changes nothing."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_trainer import TOKENIZER, curve, recipe, samples, trainer
from tiny import tiny_llama

from redistill.batch import Counts, Row
from redistill.config import ObjectiveSettings
from redistill.hooks import Hooks
from redistill.losses import forward_kl, span_correlation
from redistill.losses.dac_kl import dac_terms
from redistill.losses.divergences import LOG_FLOOR
from redistill.objective import Objective
from redistill.report.page import Report
from redistill.runlog import RunLog, read
from redistill.sample import Edit, Sample
from redistill.teachers.local import teacher_of
from redistill.teachers.signal import TopK, most_probable
from redistill.views import VIEWS, Pair, choose, due, view


def pair_of(student, teacher):
    return Pair(student, teacher_of(teacher, len(TOKENIZER)), len(TOKENIZER))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 2.0, "span": {"distance": "cosine"}},
        {"dac": {"learnable": False, "lower": 0.1, "upper": 0.9}},
        {"token_loss": "jensen_shannon"},
    ],
)
def test_the_numbers_are_those_of_the_losses(changes):
    settings = ObjectiveSettings.model_validate(changes)
    objective = Objective(settings, torch.Generator().manual_seed(0))
    student, teacher = (tiny_llama(len(TOKENIZER), hidden=hidden, seed=hidden).train() for hidden in (32, 48))
    sample = samples(1)[0]
    edit = Edit(0, 5, sample.response[0], 1.0, -2.0, sample.response)
    sample = replace(sample, response=sample.response * 3, edits=(edit,), origin="rollout")
    spans = [place // 3 if place % 4 else -1 for place in range(len(sample.response))]
    seen = view(
        sample,
        spans,
        pair_of(student, teacher),
        objective,
        TOKENIZER,
    )
    assert student.training and teacher.training

    ids, first = torch.tensor([sample.prompt + sample.response]), len(sample.prompt) - 1
    with torch.no_grad():
        q, p = (model.eval()(ids).logits[0, first:-1] for model in (student, teacher))
    torch.testing.assert_close(torch.tensor(seen["kl"]), forward_kl(q, p), atol=6e-5, rtol=0)
    q, p = q / settings.temperature, p / settings.temperature
    places = torch.tensor([each["position"] for each in seen["positions"]])
    assert 0 in places and set(forward_kl(q, p).topk(3).indices.tolist()) <= set(places.tolist())
    if settings.token_loss == "dac_kl":
        levels = (
            objective.clip(q, p)
            if objective.clip is not None
            else [q.new_full((len(q),), v) for v in (0.1, 0.9)]
        )
        terms = dac_terms(q, p, *levels)
        named = {"lower": levels[0], "upper": levels[1], "divergence": terms.divergence,
                 "retained_mass": terms.retained_mass, "retained_classes": terms.retained_classes}  # fmt: skip
        for name, values in named.items():
            found = torch.tensor([each[name] for each in seen["positions"]], dtype=values.dtype)
            torch.testing.assert_close(found, values[places], rtol=1e-4, atol=1e-6)
    else:
        assert not any("kept" in each or "lower" in each for each in seen["positions"])
    for each in seen["positions"]:
        row_p, row_q = p[each["position"]].softmax(-1), q[each["position"]].softmax(-1)
        assert each["teacher"] == sorted(each["teacher"], reverse=True)
        assert each["teacher"][0] == pytest.approx(float(row_p.max()), rel=1e-4)
        assert max(each["student"]) == pytest.approx(float(row_q.max()), rel=1e-4)
        assert TOKENIZER.decode([int(row_p.argmax())]) == each["classes"][0]
    gaps = {}
    for place, gap in enumerate(seen["gaps"]):
        if gap is not None:
            gaps.setdefault(spans[place], []).append(gap)
    expected = span_correlation(q, p, torch.tensor(spans), distance=settings.span.distance)
    assert [sum(each) / len(each) for each in gaps.values()] == pytest.approx(expected.tolist(), rel=1e-3)


def test_looking_changes_neither_the_curve_nor_any_random_number(tmp_path, monkeypatch):
    ends = []
    for name, sees in (("with", lambda *_: True), ("without", lambda *_: False)):
        monkeypatch.setattr("redistill.hooks.due", sees)
        run = trainer(recipe(tmp_path / name))
        run.train()
        ends.append(
            (
                curve(tmp_path / name),
                run.rollout_state.generator.get_state(),
                torch.get_rng_state(),
                list(run.pair.student.parameters()),
            )
        )
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1]) and torch.equal(ends[0][2], ends[1][2])
    assert all(torch.equal(a, b) for a, b in zip(ends[0][3], ends[1][3], strict=True))
    views = list(read(tmp_path / "with" / "views.jsonl"))
    assert [each["step"] for each in views] == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "without" / "views.jsonl").exists()
    for each in views:
        assert each["response"] and len(each["ends"]) == len(each["kl"]) == len(each["spans"]) == len(
            each["gaps"]
        )
        assert each["ends"][-1] == len(each["response"])


def test_views_are_evenly_spread_and_start_with_the_first_step():
    for steps in (5, 54, 1000, 50_000):
        taken = [step for step in range(1, steps + 1) if due((step - 1) / steps, step / steps)]
        assert taken[0] == 1 and len(taken) <= VIEWS + 1 and taken[-1] >= steps * (1 - 1 / VIEWS) - 1
        assert len(taken) >= min(steps, VIEWS)


def test_a_corrected_answer_comes_before_others():
    edit = Edit(0, 1, 2, 0.5, -1.0, (1,))
    plain, revised, replayed, reference = (
        Row(Sample((1,), (token,), origin, edits=edits), sft=False, distill=True)
        for token, origin, edits in (
            (2, "rollout", ()),
            (3, "rollout", (edit,)),
            (4, "replay", (edit,)),
            (5, "reference", ()),
        )
    )
    fitted = replace(reference, distill=False)
    assert choose([fitted, reference, plain, revised, replayed], 7) is revised
    assert choose([fitted, reference, replayed], 7) is replayed
    assert choose([fitted, reference], 7) is reference
    assert choose([fitted], 7) is None
    several = [plain, plain, replace(plain, sample=Sample((1,), (9,), "rollout"))]
    seen = Counter(choose(several, step).sample.response for step in range(9))
    assert seen == {(2,): 6, (9,): 3}


class Few:
    """A teacher that tells its k most probable ids."""

    vocabulary, model = len(TOKENIZER), None

    def __init__(self, logits, k):
        self.logits, self.k = logits, k

    def signal(self, samples):
        return most_probable(self.logits[: len(samples[0].response)], self.k)


@pytest.mark.parametrize("changes", [{}, {"token_loss": "reverse_kl"}, {"dac": {"quantile": "rank"}}])
def test_a_teacher_that_tells_its_most_probable_ids_is_seen_with_their_tail(changes):
    objective = Objective(ObjectiveSettings.model_validate(changes), torch.Generator().manual_seed(0))
    student, sample = tiny_llama(len(TOKENIZER), seed=1), samples(1)[0]
    sample = replace(sample, response=sample.response * 2)
    size, spans = len(sample.response), [place // 3 for place in range(len(sample.response))]
    few = Few(3 * torch.randn(size, len(TOKENIZER), generator=torch.Generator().manual_seed(5)), 6)
    seen = view(sample, spans, Pair(student, few, len(TOKENIZER)), objective, TOKENIZER)
    with torch.no_grad():
        logits = student(torch.tensor([sample.prompt + sample.response])).logits[
            0, len(sample.prompt) - 1 : -1
        ]
    told, targets = few.signal([sample]), torch.tensor(sample.response)
    numbers = Counts(size, size, len(set(spans)))
    stats = objective(logits, told, targets, torch.tensor(spans), True, numbers).stats
    torch.testing.assert_close(torch.tensor(seen["kl"]), stats["kl"].float(), atol=6e-5, rtol=0)
    gaps = {}
    for place, gap in enumerate(seen["gaps"]):
        if gap is not None:
            gaps.setdefault(spans[place], []).append(gap)
    assert sum(sum(each) / len(each) for each in gaps.values()) == pytest.approx(
        float(stats["span"]), rel=1e-3
    )
    for each in seen["positions"]:
        place = each["position"]
        for name in ("lower", "upper", "retained_mass", "retained_classes"):
            assert (name in each) == (name in stats)
            assert name not in each or each[name] == pytest.approx(
                float(stats[name][place]), rel=1e-4, abs=1e-6
            )
        p = told.log_p[place].exp()
        assert each["tail"] == len(TOKENIZER) - 6 and each["tail_teacher"] == pytest.approx(
            float(p[-1]), rel=1e-4
        )
        assert sum(each["teacher"]) + each["tail_teacher"] == pytest.approx(1, rel=1e-4)
        assert sum(each["student"]) + each["tail_student"] == pytest.approx(1, rel=1e-4)
        assert each["classes"][0] == TOKENIZER.decode([int(told.ids[place][p[:-1].argmax()])])
        assert ("tail_kept" in each) == ("kept" in each) == ("lower" in stats)


def test_a_model_that_is_no_longer_finite_is_looked_at_all_the_same():
    student, teacher = tiny_llama(len(TOKENIZER), seed=1), tiny_llama(len(TOKENIZER), seed=2)
    with torch.no_grad():
        student.lm_head.weight.fill_(math.nan)
    sample = samples(1)[0]
    objective = Objective(ObjectiveSettings(), torch.Generator())
    seen = view(
        sample,
        [-1] * len(sample.response),
        pair_of(student, teacher),
        objective,
        TOKENIZER,
    )
    assert seen["positions"] and math.isnan(seen["kl"][0])


def test_a_teacher_that_says_nothing_at_a_token_is_seen_saying_nothing():
    size = len(TOKENIZER)
    objective = Objective(ObjectiveSettings(), torch.Generator().manual_seed(0))
    student, sample = tiny_llama(size, seed=1), samples(1)[0]
    sample = replace(sample, response=sample.response[:4])
    told = Few(3 * torch.randn(len(sample.response), size), 6).signal([sample])
    ids, log_p = told.ids.clone(), told.log_p.clone()
    ids[0], log_p[0, :-1], log_p[0, -1] = size, LOG_FLOOR, 0.0
    ids[1, 4:], log_p[1, 4:-1] = size, LOG_FLOOR
    log_p[1] = log_p[1].log_softmax(-1)

    class Gaps:
        vocabulary, model = size, None

        def signal(self, _):
            return TopK(ids, log_p, gaps=size)

    seen = view(sample, [0] * len(sample.response), Pair(student, Gaps(), size), objective, TOKENIZER)
    first, second = seen["positions"][:2]
    assert seen["kl"][0] == pytest.approx(0, abs=1e-5) and first["classes"] == [] and first["tail"] == size
    assert second["tail"] == size - 4 and len(second["classes"]) == 4
    assert sum(second["teacher"]) + second["tail_teacher"] == pytest.approx(1, rel=1e-4)


def test_a_run_that_cannot_look_says_why_once(tmp_path):
    for sharded, deepspeed, lmbda, gather, reason in (
        (True, False, 0.5, True, ""),
        (False, False, 0.0, True, ""),
        (True, False, 0.0, False, ""),
        (True, False, 0.0, True, "does not put them together"),
        (False, True, 0.5, True, "Under DeepSpeed"),
    ):
        log = RunLog(tmp_path / f"{sharded}-{deepspeed}-{lmbda}-{gather}")
        run = SimpleNamespace(
            is_fsdp_enabled=sharded, is_deepspeed_enabled=deepspeed, run_log=log, progress=lambda: 0.5,
            config=SimpleNamespace(rollout=SimpleNamespace(lmbda=lmbda, gather=gather)), after_step=lambda: None,
            spending=SimpleNamespace(bounded=False),
        )  # fmt: skip
        hooks = Hooks(run)
        assert reason in hooks._cannot_look() and bool(reason) == bool(hooks._cannot_look())
        if reason:
            for step in (1, 2):
                hooks.on_step_end(None, SimpleNamespace(global_step=step), None)
                hooks._begun_at = 0.4
            (record,) = read(log.folder / "views.jsonl")
            assert record == {"step": 1, "missing": hooks._cannot_look()}
            assert reason in " ".join(Report([log.folder]).data()["runs"][0]["missing"])
