"""Run folders made up on the spot, of any length, with whatever a model may write: for tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

HOSTILE = (
    "<script>document.title='pwned'</script> & <img src=x onerror=alert(1)>",
    "</script><!--<b>bold?</b> \u202egnirts desrever\u202c and \u200bzero\u200dwidth\ufeff marks",
    "a lone \ud800 half, a NUL \u0000, an escape \u001b[31m, a family \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd 12 + 3 = 15",
)
WORDS = [
    "the",
    "old",
    "river",
    "runs",
    "past",
    "a",
    "quiet",
    "mill",
    "where",
    "small",
    "boats",
    "wait",
    "and",
    "people",
    "talk",
    "about",
    "rain",
    "bread",
    "or",
    "the",
    "long",
    "road",
    "to",
    "town",
    "because",
    "every",
    "spring",
    "brings",
    "water",
    "light",
    "work",
    "and",
    "some",
    "time",
    "for",
    "an",
    "answer",
]


def make_run(
    folder: Path,
    *,
    steps: int = 60,
    seed: int = 0,
    revisions: int = 24,
    measured: bool = True,
    plain: bool = False,
) -> Path:
    """A finished run. plain: no hostile texts."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(
        "student: {prune: {keep: 20}, dtype: float32}\nteacher: {model_name_or_path: made/Teacher-135M}\n"
        f"rollout: {{lmbda: 0.25, replay_ratio: 0.5}}\nobjective: {{token_weight: {5.0 - seed}}}\n"
        f"training: {{max_steps: {steps}, learning_rate: 4.0e-4, seed: {seed}}}\n"
    )
    lines(folder / "steps.jsonl", (step_record(n + 1, steps, chance) for n in range(steps)))
    every = max(1, steps // 6)
    lines(
        folder / "evaluations.jsonl",
        (
            {
                "step": n,
                "eval_loss": 3.2 - n / steps,
                "eval_kl": 2 - n / steps,
                "eval_perplexity": 70 - 40 * n / steps,
            }
            for n in range(every, steps + 1, every)
        ),
    )
    texts = [words(chance, 12) for _ in HOSTILE] if plain else list(HOSTILE)
    lines(
        folder / "revisions.jsonl",
        (revision_record(n, revisions, steps, chance, texts) for n in range(revisions)),
    )
    every = max(1, steps // 8)
    lines(folder / "views.jsonl", (view_record(n, 1 + n * every, chance, texts) for n in range(8)))
    (folder / "student").mkdir(exist_ok=True)
    (folder / "student" / "config.json").write_text("{}")
    if measured:
        measure(folder, chance, texts)
    return folder


def lines(path: Path, records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def step_record(step: int, steps: int, chance: random.Random) -> dict:
    done, noise = step / steps, chance.gauss(0, 0.1)
    fall = math.exp(-3 * done)
    record = {
        "sft": 2.1 + fall + noise,
        "token": 0.4 + fall / 2 + noise / 3,
        "span": 0.05 + 0.1 * fall,
        "kl": 0.9 + 1.2 * fall + noise,
        "teacher_log_likelihood": -2.0 + 0.5 * done + noise / 2,
        "lower": 0.02 + 0.01 * done,
        "upper": 0.97 - 0.02 * done,
        "retained_mass": 0.94 - 0.02 * done,
        "retained_classes": 180 - 90 * done + 20 * noise,
        "student_tokens": 420 + 40 * noise,
        "sft_tokens": 300,
        "distilled_tokens": 320,
        "spans": 70,
        "student_samples": 2 if step % 3 == 0 else 0,
        "replayed": 1 if step % 3 == 0 else 0,
        "step": step,
        "loss": 4 + 3 * fall + noise,
        "skipped": 0,
        "lmbda": 0.25,
        "buffer": min(200, step // 3),
        "seconds": 4 + noise,
        "seconds_waiting": 0.02,
        "seconds_rollout": 0.5 if step % 3 == 0 else 0.0,
        "seconds_loss": 2.9,
        "seconds_spans": 0.2,
        "seconds_optimizer": 0.3,
        "progress": done,
        "tokens_per_second": 150 + 20 * noise,
    }
    if step % 3 == 0:
        record |= {
            "share_revised": 0.5 + noise,
            "share_agreed": 0.1,
            "share_cut": 0.2,
            "error_position": 0.3 + noise,
            "kl_at_error_before": 4.0,
            "kl_at_error_after": 4.0,
            "teacher_gain": 0.2 + 3 * noise,
            "seconds_scoring": 0.3,
            "seconds_revision": 0.25,
            "distinct_2_before": 0.8,
            "distinct_2_after": 0.86,
        }
    if step == steps // 2:
        record["loss"] = math.nan
    return record


def words(chance: random.Random, count: int) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(count))


def pieces(text: str) -> tuple[list[int], list[int]]:
    """A text's made-up tokens: ids, and where each ends."""
    ends = [at for at, c in enumerate(text) if c == " " and at] + [len(text)]
    return [10 + n for n in range(len(ends))], ends


def revision_record(n: int, count: int, steps: int, chance: random.Random, texts: list[str]) -> dict:
    kept = words(chance, 4 + n % 5)
    tail = texts[n % len(texts)] if n % 4 == 0 else words(chance, 9)
    before, after = f"{kept} wrong {words(chance, 8)}", f"{kept} right {tail}"
    (before_ids, before_ends), (after_ids, after_ends) = pieces(before), pieces(after)
    position = before[: before.index(" wrong")].count(" ") + 1
    kl = [round(abs(chance.gauss(0.3, 0.6)), 4) for _ in (*before_ids, *after_ids)]
    ended = n % 6 == 5
    if ended:  # the teacher ends the answer here: a token without text
        after, after_ids, after_ends = kept, [*after_ids[:position], 2], [*after_ends[:position], len(kept)]
    was = -2.5 + chance.gauss(0, 0.3)
    asked = texts[n % len(texts)] if n % 7 == 3 else f"What about {words(chance, 5)}?"
    return {
        "step": 1 + n * steps // count,
        "source": f"train.jsonl:{n + 1}",
        "prompt": f"system\nYou are kind.\nuser\n{asked}\nassistant\n",
        "prompt_ids": [1, 2, 3],
        "before": before,
        "after": after,
        "before_ends": before_ends,
        "after_ends": after_ends,
        "position": position,
        "rejected": before_ids[position],
        "replacement": after_ids[position],
        "rejected_text": " wrong",
        "replacement_text": "<|im_end|>" if ended else " right",
        "before_ids": before_ids,
        "after_ids": after_ids,
        "kl_before": 4.2,
        "kl_before_tokens": kl[: len(before_ids)],
        "kl_after": kl[-len(after_ids) :],
        "log_likelihood_before": was,
        "log_likelihood_after": was + chance.gauss(0.1, 0.4),
    }


ROWS = (
    ("teacher", 134_515_008, 21.0, 11.7, 0.7, 0.0, 12.9, 190),
    ("student before", 99_112_896, 3.8, 3.2, 0.7, 2.04, 72.8, 221),
    ("student after", 99_112_896, 19.3, 11.0, 1.4, 0.99, 21.3, 239),
)
COLUMNS = (
    "name",
    "parameters",
    "rougeL_greedy",
    "rougeL_mean",
    "rougeL_std",
    "kl_to_teacher",
    "perplexity",
    "tokens_per_second",
)


def measure(folder: Path, chance: random.Random, texts: list[str], prompts: int = 16) -> None:
    rows = [
        dict(zip(COLUMNS, row, strict=True)) | {"set": None, "mean_tokens": 40.5, "distinct_4": 0.9}
        for row in ROWS
    ]
    rows[2]["rougeL_mean"] += chance.gauss(0, 0.5)
    gain = {"of": "student after", "against": "student before", "prompts": prompts}
    differences = [
        gain | {"metric": "rougeL_mean", "difference": 7.8, "low": 6.6, "high": 9.1, "p": 0.0002},
        gain | {"metric": "kl_to_teacher", "difference": -1.05, "low": -1.1, "high": -0.98, "p": 0.0002},
    ]
    (folder / "results.json").write_text(
        json.dumps({"rows": rows, "differences": differences, "seeds": [10, 20]})
    )
    for name, *figures in ROWS:
        lines(
            folder / "references" / f"{name.replace(' ', '-')}.jsonl",
            (
                {"index": n, "tokens": 10, "kl": 10 * figures[4] * chance.uniform(0.8, 1.2), "nll": 30.0}
                for n in range(prompts)
            ),
        )
        lines(
            folder / "answers" / f"{name.replace(' ', '-')}.jsonl",
            (
                {
                    "name": name,
                    "set": None,
                    "seed": seed,
                    "index": index,
                    "prompt": f"<|im_start|>user\nWhat is {WORDS[index]}?<|im_end|>\n<|im_start|>assistant\n",
                    "ids": [1],
                    "answer": texts[index % len(texts)] if index % 5 == 0 else words(chance, 24),
                    "references": [words(chance, 12)],
                    "rougeL": chance.uniform(0, 40),
                    "exact_match": False,
                    "seconds": 0.1,
                }
                for seed in ("greedy", 10, 20)
                for index in range(prompts)
            ),
        )


# Of a teacher that tells its most probable ids only.
TAIL = {"tail": 49128, "tail_teacher": 0.03, "tail_student": 0.05, "tail_kept": 0.0}


def view_record(n: int, step: int, chance: random.Random, texts: list[str]) -> dict:
    text = f"{words(chance, 10)} {texts[n % len(texts)] if n % 3 == 1 else words(chance, 6)}"
    ids, ends = pieces(text)
    ids, ends = [*ids, 2], [*ends, ends[-1]]
    spans = [(place // 3 if place % 3 < 2 else -1) for place in range(len(ids) - 1)] + [-1]
    gaps = [
        round(chance.uniform(0, 0.6), 4) if a == b >= 0 else None
        for a, b in zip(spans, [*spans[1:], -1], strict=True)
    ]
    kl = [round(abs(chance.gauss(0.3, 0.8)), 4) for _ in ids]
    return {
        "step": step,
        "source": f"train.jsonl:{n}",
        "origin": ("rollout", "replay", "reference")[n % 3],
        "prompt": f"user\nAsk {words(chance, 4)}\nassistant\n",
        "response": text,
        "ends": ends,
        "kl": kl,
        "spans": spans,
        "gaps": gaps,
        "vocabulary": 49152,
        "seconds": 0.2,
        "positions": [
            position_record(place, text, ends, kl, chance) | (TAIL if n % 4 == 3 else {})
            for place in sorted({1, 4, 7, len(ids) - 1})
        ],
    }


def position_record(place: int, text: str, ends: list[int], kl: list[float], chance: random.Random) -> dict:
    weights = sorted((math.exp(chance.gauss(0, 2.2)) for _ in range(24)), reverse=True)
    p = [0.97 * w / sum(weights) for w in weights]
    q = [value * math.exp(chance.gauss(-0.3, 1)) for value in p]
    q = [0.95 * value / sum(q) for value in q]
    m = [1.0 if n < 9 else 0.4 if n == 9 else 0.0 for n in range(24)]
    kept = sum(a * b for a, b in zip(p, m, strict=True))
    own = text[ends[place - 1] : ends[place]] or "<|im_end|>"
    names = [
        own,
        "\n",
        " ",
        "",
        "<|im_end|>",
        " \u202eabc",
        " <b>bold</b>",
        *(f" {word}" for word in WORDS[:17]),
    ]
    return {
        "position": place,
        "token": own,
        "kl": kl[place],
        "lower": 1 - kept,
        "upper": 0.999,
        "divergence": 0.8 * kl[place],
        "retained_mass": kept,
        "retained_classes": 9.4,
        "bucket_teacher": 1 - kept,
        "bucket_student": 1 - sum(a * b for a, b in zip(q, m, strict=True)),
        "classes": names,
        "teacher": p,
        "student": q,
        "kept": m,
    }


def make_comparison(folder: Path, further: int = 0) -> Path:
    """Two methods of two seeds, measured on one set. further: methods that are not in its table."""
    chance = random.Random(3)
    for at in range(further):
        make_run(folder / "runs" / f"more-{at}" / "seed-1", steps=12, measured=False)
    for at, method in enumerate(("kd", "gkd")):
        for seed in (1, 2):
            run = make_run(folder / "runs" / method / f"seed-{seed}", seed=2 * at + seed, measured=False)
            evaluated(run / "evaluation", method, chance, teacher=False)
    evaluated(folder / "before", "start", chance, teacher=True)
    line = {
        "set": "dolly",
        "runs": 2,
        "failed": 0,
        "rougeL_std": 0.4,
        "tokens_per_second": 200.0,
        "steps": 60.0,
        "train_seconds": 240.0,
        "peak_memory_bytes": 3_100_000_000,
    }
    table = [
        line | {"method": "teacher", "rougeL_mean": 14.0, "kl_to_teacher": 0.0},
        line | {"method": "start", "rougeL_mean": 8.9, "kl_to_teacher": 1.75},
        line | {"method": "kd", "rougeL_mean": 10.0, "kl_to_teacher": 1.46},
        line
        | {
            "method": "gkd",
            "rougeL_mean": 12.0,
            "kl_to_teacher": 1.54,
            "rougeL_difference": 2.0,
            "rougeL_low": 1.1,
            "rougeL_high": 2.9,
            "rougeL_p": 0.002,
            "exact_difference": 1.2,
            "exact_low": -0.4,
            "exact_high": 2.8,
            "exact_p": 0.2,
            "kl_difference": 0.08,
            "kl_low": 0.02,
            "kl_high": 0.14,
            "kl_p": 0.004,
        },
    ]
    (folder / "table.json").write_text(json.dumps({"lines": table, "baseline": "kd", "level": 0.05}))
    return folder


def evaluated(folder: Path, name: str, chance: random.Random, *, teacher: bool) -> None:
    """What `redistill evaluate` leaves, on one set with a name."""
    both = [("student", name)] + [("teacher", "big (teacher)")] * teacher
    for who, _ in both:
        lines(
            folder / "dolly" / f"answers-{who}.jsonl",
            (
                {
                    "name": who,
                    "set": "dolly",
                    "seed": 10,
                    "index": index,
                    "prompt": f"What is {WORDS[index]}?",
                    "answer": words(chance, 15),
                    "references": [words(chance, 8)],
                    "rougeL": chance.uniform(0, 40),
                    "exact_match": index == 2,
                }
                for index in range(8)
            ),
        )
    rows = [
        dict.fromkeys(COLUMNS) | {"name": label, "set": "dolly", "rougeL_mean": 9.5 + at, "parameters": 10**8}
        for at, (_, label) in enumerate(both)
    ]
    (folder / "results.json").write_text(json.dumps({"rows": rows}))
