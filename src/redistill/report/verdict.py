"""What the numbers come to: one sentence, and four figures beside it. No number is written that was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from redistill.report.between import in_words
from redistill.report.curves import Columns
from redistill.report.figures import count, duration, p_text, percent, size
from redistill.report.scores import LEVEL, Row, better

ONE_SEED = "Each run is one training seed: whether a method is better, `redistill compare` tells."


class Fact(NamedTuple):
    """A figure of the first screen."""

    label: str
    value: str
    note: str


class Verdict(NamedTuple):
    """sentence: the one that counts; more: what else must be known; facts: at most four."""

    sentence: str
    more: list[str]
    facts: list[Fact]


def of_run(rows: Sequence[Row], steps: Columns, state: Mapping[str, Any], weights: int) -> Verdict:
    """One run. weights: bytes of the finished student on the disk, 0 if it is not there."""
    teacher, before, after = (_first(rows, role) for role in ("teacher", "before", "after"))
    if after is None:
        return _on_the_way(steps, state)
    column = _rouge(after)
    parts, more = [f"After {state['done']:,} steps"], []
    if column is None or before is None or before[column] is None:
        parts.append("the student was measured, but there is no score before training to compare with.")
    else:
        parts.append(_change(column, before, after))
        if column not in after["tests"]:
            more.append("Whether that is more than chance was not tested in this run folder.")
    sentence = " ".join(parts)
    if teacher is not None and after["parameters"] and teacher["parameters"]:
        sentence += " " + _beside(teacher, after, column)
    return Verdict(sentence, more, _facts(teacher, before, after, weights))


def of_evaluation(rows: Sequence[Row]) -> Verdict:
    """The output of `redistill evaluate`."""
    teacher, student = _first(rows, "teacher"), _first(rows, "after")
    if student is None:
        return Verdict("Nothing was measured in this folder.", [], [])
    column = _rouge(student)
    where = f" on {student['set']}" if student["set"] else ""
    if teacher is None or column is None or not teacher[column]:
        score = f"ROUGE-L {student[column]:.2f}" if column else "no ROUGE-L"
        return Verdict(f"{student['name']} reaches {score}{where}.", [], _facts(None, None, student, 0))
    share = student[column] / teacher[column]
    scores = f"{student[column]:.2f} against {teacher[column]:.2f}"
    sentence = f"{student['name']} reaches {percent(share)} of the teacher's ROUGE-L{where}, {scores}."
    return Verdict(sentence + " " + _size(teacher, student), [], _facts(teacher, None, student, 0))


def of_comparison(rows: Sequence[Row]) -> Verdict:
    """The table of `redistill compare`, set by set."""
    said = [
        _best_method([row for row in rows if row["set"] == name])
        for name in dict.fromkeys(r["set"] for r in rows)
    ]
    said = [each for each in said if each]
    if not said:
        return Verdict("The comparison has no table yet; its runs are below.", [], [])
    methods = [row for row in rows if row["role"] == "method" and row["set"] == rows[0]["set"]]
    facts = []
    for label, column, digits, least in (
        ("Highest ROUGE-L", "rougeL_mean", 2, False),
        ("Lowest KL to the teacher", "kl_to_teacher", 3, True),
        ("Fastest training", "train_seconds", 0, True),
        ("Least memory", "peak_memory_bytes", 0, True),
    ):
        if best := _best(methods, column, least=least):
            value = best[column]
            shown = (
                duration(value)
                if column == "train_seconds"
                else size(value)
                if "bytes" in column
                else f"{value:.{digits}f}"
            )
            facts.append(Fact(label, shown, best["name"]))
    return Verdict(said[0], said[1:], facts)


def of_runs(rows: Sequence[Row], runs: Sequence[tuple[str, Columns]], untested: Sequence[str]) -> Verdict:
    """Several runs beside each other. untested: between which of them no test was possible, and why."""
    after = [row for row in rows if row["role"] == "after"]
    parts, facts = [], []
    if nearest := _best(after, "kl_to_teacher", least=True):
        parts.append(
            f"{nearest['of']} ends nearest to the teacher, KL {nearest['kl_to_teacher']:.3f} nats per token"
        )
        facts.append(Fact("Lowest KL to the teacher", f"{nearest['kl_to_teacher']:.3f}", nearest["of"]))
    for column, how in (("rougeL_mean", ""), ("rougeL_greedy", ", greedy")):
        if not any("ROUGE" in fact.label for fact in facts) and (best := _best(after, column)):
            parts.append(
                f"{best['of']} has the highest ROUGE-L, {best[column]:.2f}{_spread(best, column)}{how}"
                f"{_lead(best, after, column)}"
            )
            facts.append(Fact("Highest ROUGE-L", f"{best[column]:.2f}", best["of"]))
    if parts:
        more = [each for row in after if (each := in_words(row))]
        more += [ONE_SEED] * bool(more) + list(untested)
        return Verdict(f"Of {len(runs)} runs, {'; '.join(parts)}.", more, facts)
    known = {name: value for name, steps in runs if (value := steps.mean("kl", -50)) is not None}
    if not known:
        return Verdict(f"{len(runs)} runs, none of them measured yet.", [], [])
    least = min(known, key=known.__getitem__)
    nearest = f"{least} is nearest to the teacher over its last steps, KL {known[least]:.3f} nats per token"
    sentence = f"Of {len(runs)} runs, {nearest}."
    return Verdict(
        sentence,
        ["None of the runs was measured: this is of training batches only, and nothing is tested."],
        [],
    )


def _lead(best: Row, after: Sequence[Row], column: str) -> str:
    """Whether a run is above those it was tested with: the first one, or, if it is that, all others."""
    others = [best] if best["between"] else [row for row in after if row is not best]
    tests = [row["between"].get(column) for row in others]
    if not tests or None in tests:
        return ""
    whom = (
        best["between"][column]["against"]
        if best["between"]
        else "the others"
        if others[1:]
        else others[0]["of"]
    )
    return f", {'clearly' if all(test['p'] <= LEVEL for test in tests) else 'not clearly'} above {whom}"


def _change(column: str, before: Row, after: Row) -> str:
    test, gain = after["tests"].get(column), after[column] - before[column]
    scores = f"ROUGE-L {after[column]:.2f}{_spread(after, column)} against {before[column]:.2f}"
    if test is None or test["p"] is None:
        return f"the student's ROUGE-L {'rose' if gain > 0 else 'fell' if gain < 0 else 'stayed'}: {scores} before."
    interval = f"{gain:+.2f}, 95 % interval {test['low']:+.2f} to {test['high']:+.2f}, p {p_text(test['p'])}"
    if test["p"] > LEVEL:
        return f"the student's answers are not clearly better or worse than before: {scores} ({interval})."
    return f"the student answers {'better' if gain > 0 else 'worse'} than before: {scores} ({interval})."


def _beside(teacher: Row, after: Row, column: str | None) -> str:
    reach = ""
    if column and teacher[column]:
        reach = f"That is {percent(after[column] / teacher[column])} of the teacher's {teacher[column]:.2f}, "
    return (reach + _size(teacher, after)) if reach else _size(teacher, after).capitalize()


def _size(teacher: Row, student: Row) -> str:
    said = (
        f"with {percent(student['parameters'] / teacher['parameters'])} of its parameters"
        if student["parameters"] and teacher["parameters"]
        else ""
    )
    fast, slow = student["tokens_per_second"], teacher["tokens_per_second"]
    return f"{said} and {fast / slow:.2f} times its speed." if said and fast and slow else f"{said}."


def _on_the_way(steps: Columns, state: Mapping[str, Any]) -> Verdict:
    if not steps.steps:
        return Verdict("The run has not begun: no step was logged yet.", [], [])
    whole = f" of {state['steps']:,}" if state["steps"] else ""
    where = f"{state['done']:,} steps are done" if state["finished"] else f"Step {state['done']:,}{whole}"
    left = f", about {duration(state['left'])} left" if state["left"] else ""
    tenth = max(1, min(50, len(steps.steps) // 10))
    first, now = steps.mean("kl", 0, tenth), steps.mean("kl", -tenth)
    kl = ""
    if first is not None and now is not None and len(steps.steps) > 1:
        how = "fell" if now < first else "rose" if now > first else "stayed"
        kl = f" KL to the teacher {how} from {first:.3f} to {now:.3f} nats per token in training."
    more = ["The student was not measured; `redistill evaluate` does that."] if state["finished"] else []
    facts = [Fact("Steps", f"{state['done']:,}", "done" if state["finished"] else whole.strip() or "so far")]
    if now is not None:
        facts.append(
            Fact(
                "KL to the teacher",
                f"{now:.3f}",
                "nats per token, " + (f"mean of the last {tenth} steps" if tenth > 1 else "in the last step"),
            )
        )
    if speed := steps.mean("tokens_per_second", -tenth):
        facts.append(Fact("Training speed", f"{speed:,.0f}", "tokens per second"))
    facts.append(
        Fact("Time in steps", duration(state["seconds"]), "so far" if left else "all steps together")
    )
    return Verdict(f"{where}{left}.{kl}", more, facts)


def _best_method(rows: Sequence[Row]) -> str:
    methods = [row for row in rows if row["role"] == "method"]
    best, nearest = _best(methods, "rougeL_mean"), _best(methods, "kl_to_teacher", least=True)
    base = next((row for row in methods if row.get("baseline")), None)
    if best is None:
        return ""
    where = f" on {best['set']}" if best["set"] else ""
    score = f"{best['rougeL_mean']:.2f}{_spread(best, 'rougeL_mean')}"
    said = f"Of {len(methods)} methods{where}, {best['name']} has the highest ROUGE-L, {score}"
    test = best["tests"].get("rougeL_mean")
    if base is not None and best is not base and test is not None and base["rougeL_mean"] is not None:
        clear = test["p"] <= LEVEL and better("rougeL_mean", test["difference"])
        against = f"{base['rougeL_mean']:.2f}, p {p_text(test['p'])} after Holm"
        said += f", {'above' if clear else 'not clearly above'} the baseline {base['name']} ({against})"
    if nearest is not None:
        said += f"; {nearest['name']} is nearest to the teacher, KL {nearest['kl_to_teacher']:.3f}"
    return said + "."


def _facts(teacher: Row | None, before: Row | None, after: Row, weights: int) -> list[Fact]:
    facts, column = [], _rouge(after)
    if column:
        how = "sampled answers" if column == "rougeL_mean" else "greedy answers"
        share = (
            f"{percent(after[column] / teacher[column])} of the teacher; {how}"
            if teacher and teacher[column]
            else how
        )
        facts.append(Fact("ROUGE-L", f"{after[column]:.2f}", share))
    if (kl := after["kl_to_teacher"]) is not None:
        was = before["kl_to_teacher"] if before else None
        facts.append(
            Fact(
                "KL to the teacher",
                f"{kl:.3f}",
                f"nats per token, {was:.3f} before" if was is not None else "nats per token",
            )
        )
    if after["parameters"]:
        share = (
            f"{percent(after['parameters'] / teacher['parameters'])} of the teacher"
            if teacher and teacher["parameters"]
            else "parameters"
        )
        facts.append(
            Fact(
                "Size", count(after["parameters"]), share + (f"; weights {size(weights)}" if weights else "")
            )
        )
    if speed := after["tokens_per_second"]:
        times = (
            f"{speed / teacher['tokens_per_second']:.2f} × the teacher"
            if teacher and teacher["tokens_per_second"]
            else "tokens per second"
        )
        facts.append(Fact("Writing speed", f"{speed:,.0f} tokens/s", times))
    return facts


def _first(rows: Sequence[Row], role: str) -> Row | None:
    return next((row for row in rows if row["role"] == role), None)


def _best(rows: Sequence[Row], column: str, *, least: bool = False) -> Row | None:
    """The row that leads; None where nobody is known, or all are alike."""
    known = [row for row in rows if row[column] is not None]
    if not known or (len(known) > 1 and len({row[column] for row in known}) == 1):
        return None
    return (min if least else max)(known, key=lambda row: row[column])


def _rouge(row: Row) -> str | None:
    return next((column for column in ("rougeL_mean", "rougeL_greedy") if row[column] is not None), None)


def _spread(row: Row, column: str) -> str:
    return f" ± {row['rougeL_std']:.2f}" if column == "rougeL_mean" and row["rougeL_std"] is not None else ""
