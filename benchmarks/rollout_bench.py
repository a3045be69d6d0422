"""Writing answers, beside transformers: `python benchmarks/rollout_bench.py STUDENT TEACHER PROMPTS.jsonl`.

`redistill.generate.generate` and the student's own `generate` on the same prompts, batch, sampling, dtype and
limit of new tokens, in turn and in one process; a first round is not counted. Compared are response tokens per
second, up to and with the end of text, as sampled answers differ in length. "To the limit": nothing ends a
text, so both write equally much; else rows end when they do, and ours then leave the batch.

SCRG's second writing: each answer is corrected where the teacher says, and the student writes on from the keys
and values that scoring has kept, beside reading prompt and prefix anew; same random numbers, so the same texts
but for rounding. Bringing the cache into shape is part of the first.

How time grows, by doubling, everything to the limit. Theory expects:
- batch: 1 to 2. A token reads every weight once for the whole batch, and does 2 operations a weight and row.
  While reading dominates more rows are free; once arithmetic does they cost their share. Where the two meet is
  the machine's operations per byte.
- response length: 2. Each token costs the same, but for reading a longer cache (a little above) and the prompt,
  which is read once (a little below).
- rounds of SCRG: at most 2. A round after the first reads what has changed with both models, and writes on from a
  later place than the round before.

PROMPTS: lines with `prompt`, read as they are. The last line is JSON with the ratios. `--append FILE` adds the
tables to a Markdown file; `--device cuda` runs the same on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from setting import setting
from transformers import PreTrainedModel

from redistill.generate import answering, draw_uniforms, generate, go_on, select_rows
from redistill.models import end_of_text_ids, load_model, load_tokenizer, shared_vocabulary
from redistill.packing import packs
from redistill.prepacked import prepacked
from redistill.revision import find_error, revise_samples
from redistill.sample import Sample
from redistill.sampling import Sampling
from redistill.scoring import Score, Scorer, position_uniforms

HOW = {
    "temperature 1": Sampling(1.0),
    "temperature 1, top-p 0.9": Sampling(1.0, top_p=0.9),
    "greedy": Sampling(0.0),
}
Writer = Callable[["Case", Sampling, int], list[tuple[int, ...]]]


@dataclass(frozen=True)
class Case:
    """prompts: ids. eos: empty where answers go to the limit."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    prompts: list[tuple[int, ...]]
    eos: frozenset[int]
    vocabulary: int
    new_tokens: int


def ours(case: Case, sampling: Sampling, seed: int) -> list[tuple[int, ...]]:
    return generate(
        case.student, case.prompts, limits=[case.new_tokens] * len(case.prompts), sampling=sampling, eos=case.eos,
        generator=torch.Generator().manual_seed(seed), batch_size=len(case.prompts), vocabulary=case.vocabulary,
    )  # fmt: skip


def theirs(case: Case, sampling: Sampling, seed: int) -> list[tuple[int, ...]]:
    model, width = case.student, max(map(len, case.prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in case.prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in case.prompts]
    torch.manual_seed(seed)
    written = model.generate(
        input_ids=torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
        generation_config=_their_settings(case, sampling),
    )[:, width:].tolist()  # fmt: skip
    return [_ended(answer, case.eos) for answer in written]


def _their_settings(case: Case, sampling: Sampling):
    """A copy of the model's own, as what is None in a fresh one would be filled in from there."""
    settings = copy.deepcopy(case.student.generation_config)
    settings.max_length, settings.max_new_tokens = None, case.new_tokens
    settings.eos_token_id, settings.pad_token_id = sorted(case.eos) or None, 0
    settings.do_sample = sampling.temperature > 0
    # Unset where greedy: they would warn of each. Their own top-k is 50.
    settings.temperature, settings.top_p, settings.top_k = (
        (sampling.temperature, sampling.top_p, 0) if settings.do_sample else (None, None, None)
    )
    return settings


def _ended(answer: list[int], eos: frozenset[int]) -> tuple[int, ...]:
    end = next((place + 1 for place, token in enumerate(answer) if token in eos), len(answer))
    return tuple(answer[:end])


def timed(work: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def rates(case: Case, sampling: Sampling, repeat: int) -> tuple[list[float], list[float]]:
    """Tokens per second, ours and theirs, in turn; one round before is not counted."""
    found: dict[Writer, list[float]] = {ours: [], theirs: []}
    for turn in range(repeat + 1):
        for writer, each in found.items():
            answers: list[tuple[int, ...]] = []
            seconds = timed(lambda w=writer, a=answers, t=turn: a.extend(w(case, sampling, t)))
            if turn:
                each.append(sum(map(len, answers)) / seconds)
    return found[ours], found[theirs]


def writing_table(case: Case, repeat: int) -> tuple[list[str], dict[str, float]]:
    lines = ["", "| answers | of transformers | tokens/s | lowest to highest | transformers | lowest to highest |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    ratios = {}
    for name, sampling in HOW.items():
        for ending, eos in (("", case.eos), (", to the limit", frozenset[int]())):
            own, other = rates(replace(case, eos=eos), sampling, repeat)
            ratio = statistics.median(own) / statistics.median(other)
            ratios[name + ending] = round(ratio, 2)
            cells = " | ".join(f"{statistics.median(each):.1f} | {_spread(each)}" for each in (own, other))
            lines.append(f"| {name}{ending} | {ratio:.2f} | {cells} |")
    return lines, ratios


def _spread(values: list[float], digits: int = 1) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"


@dataclass(frozen=True)
class Corrected:
    """Answers up to and with the teacher's token, and the random numbers of what is to follow."""

    rows: list[int]
    prefixes: list[tuple[int, ...]]
    limits: list[int]
    uniforms: torch.Tensor


def corrected(case: Case, samples: list[Sample], scores: list[Score]) -> Corrected:
    """Those of the samples that are written on."""
    kept, prefixes, limits = [], [], []
    for place, (sample, score) in enumerate(zip(samples, scores, strict=True)):
        error = find_error(score, sample.response, 0)
        if error is None or error + 1 >= case.new_tokens:
            continue
        kept.append(place)
        prefixes.append((*sample.prompt, *sample.response[:error], int(score.teacher_token[error])))
        limits.append(case.new_tokens - error - 1)
    return Corrected(kept, prefixes, limits, draw_uniforms(len(kept), case.new_tokens, HOW["temperature 1"],
                                                           torch.Generator().manual_seed(1)))  # fmt: skip


def second_writing(case: Case, samples: list[Sample]) -> dict[str, float]:
    """Seconds of writing, of scoring, and of both ways to write on behind the corrections."""
    how, generator = HOW["temperature 1"], torch.Generator().manual_seed(0)
    packed = packs(case.student, case.vocabulary) and packs(case.teacher, case.vocabulary)
    scorer = Scorer(case.student, case.teacher, case.vocabulary, how, packed=packed, keep=True)
    rows, start, uniforms = (
        range(len(samples)),
        [0] * len(samples),
        position_uniforms(samples, how, generator),
    )
    scores: list[Score] = []
    found = {"first writing": timed(lambda: ours(case, how, 0))}
    found["scoring with both models"] = timed(
        lambda: scores.extend(scorer.score(samples, rows, start, uniforms))
    )
    state = scorer.own.lend(last=True)
    if state is None:
        raise ValueError(
            f"{type(case.student).__name__}'s cache cannot be cut: SCRG reads prefixes anew with it."
        )
    fixed, device = corrected(case, samples, scores), state.position.device
    if not fixed.rows:
        raise ValueError("the teacher corrects none of the answers: take other prompts or models.")
    writing = {"sampling": how, "eos": case.eos, "vocabulary": case.vocabulary}

    def from_the_cache() -> None:
        read = torch.tensor([len(prefix) - 1 for prefix in fixed.prefixes], device=device)
        tokens = torch.tensor([prefix[-1] for prefix in fixed.prefixes], device=device)
        kept = select_rows(state, torch.tensor(fixed.rows, device=device)).cut(read)
        with answering(case.student):
            go_on(case.student, tokens, kept, limits=fixed.limits, uniforms=fixed.uniforms, **writing)

    def anew() -> None:
        generate(
            case.student, fixed.prefixes, limits=fixed.limits, uniforms=fixed.uniforms, generator=None,
            batch_size=len(fixed.prefixes), **writing,
        )  # fmt: skip

    found["second writing, anew"] = timed(anew)
    found["second writing, from the cache"] = timed(from_the_cache)
    return found


def scrg_table(case: Case, samples: list[Sample], repeat: int) -> tuple[list[str], dict[str, float]]:
    rounds = [second_writing(case, samples) for _ in range(repeat + 1)][1:]
    base = statistics.median(each["first writing"] for each in rounds)
    lines = ["", f"SCRG on {len(samples)} answers, {sum(len(each.response) for each in samples)} tokens:", "",
             "| | of the first writing | seconds | lowest to highest |", "| --- | ---: | ---: | ---: |"]  # fmt: skip
    middle = {}
    for name in rounds[0]:
        seconds = [each[name] for each in rounds]
        middle[name] = statistics.median(seconds)
        lines.append(f"| {name} | {middle[name] / base:.2f} | {middle[name]:.3f} | {_spread(seconds, 3)} |")
    anew, kept = middle["second writing, anew"], middle["second writing, from the cache"]
    return lines, {"second writing, anew by cache": round(anew / kept, 2)}


def scaling_table(case: Case, samples: list[Sample], repeat: int) -> tuple[list[str], dict[str, list[float]]]:
    """Three sizes of each, one twice the other, up to the sizes of the run; SCRG with 1, 2 and 4 rounds."""
    how, count, length = HOW["temperature 1"], len(case.prompts), case.new_tokens
    parts, packed = [1, 2, 4], packs(case.student, case.vocabulary) and packs(case.teacher, case.vocabulary)
    batches, lengths = [[max(1, whole * part // 4) for part in parts] for whole in (count, length)]

    def write(rows: int, tokens: int) -> Callable[[], object]:
        smaller = replace(case, prompts=case.prompts[:rows], new_tokens=tokens)
        return lambda: ours(smaller, how, 0)

    def revise(rounds: int) -> Callable[[], object]:
        return lambda: revise_samples(
            case.student, case.teacher, samples, rounds=rounds, teacher_token="sample", sampling=how, eos=case.eos,
            generator=torch.Generator().manual_seed(0), vocabulary=case.vocabulary, batch_size=count,
            max_completion_length=length, packed=packed,
        )  # fmt: skip

    works = {
        ("batch", "1 to 2"): (batches, [write(rows, length) for rows in batches]),
        ("response length", "2"): (lengths, [write(count, tokens) for tokens in lengths]),
        ("rounds of SCRG", "at most 2"): (parts, [revise(rounds) for rounds in parts]),
    }
    lines = ["", "| doubled | sizes | seconds | grows by | theory |", "| --- | ---: | ---: | ---: | ---: |"]
    growth = {}
    for (name, theory), (sizes, calls) in works.items():
        turns = [[timed(call) for call in calls] for _ in range(repeat + 1)][1:]
        middle = [statistics.median(each) for each in zip(*turns, strict=True)]
        growth[name] = [round(b / a, 2) for a, b in zip(middle, middle[1:], strict=False)]
        cells = (", ".join(map(str, sizes)), ", ".join(f"{each:.3f}" for each in middle),
                 ", ".join(f"{each:.2f}" for each in growth[name]))  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} | {theory} |")
    return lines, growth


def load(args: argparse.Namespace) -> Case:
    tokenizer = load_tokenizer(args.student)
    student, teacher = (
        load_model(name, dtype=args.dtype, device=args.device).eval() for name in (args.student, args.teacher)
    )
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[: args.batch]
    if len(lines) < args.batch:
        raise ValueError(f"{args.prompts} has {len(lines)} lines: give {args.batch} or a smaller --batch.")
    prompts = [tuple(tokenizer.encode(json.loads(line)["prompt"])) for line in lines]
    vocabulary = shared_vocabulary(tokenizer, load_tokenizer(args.teacher), student, teacher)
    return Case(student, teacher, prompts, end_of_text_ids(tokenizer, student), vocabulary, args.new_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--append", type=Path, help="Markdown file that gets the tables")
    args = parser.parse_args()
    case = load(args)
    lines = setting(args.device, repeat=args.repeat, packages=("transformers",))
    more, ratios = writing_table(case, args.repeat)
    lines += more
    case = replace(case, eos=frozenset())
    answers = ours(case, HOW["temperature 1"], 0)
    samples = [Sample(prompt, answer) for prompt, answer in zip(case.prompts, answers, strict=True)]
    with prepacked(case.student):  # as in a training step
        more, scrg = scrg_table(case, samples, args.repeat)
        lines += more
        more, growth = scaling_table(case, samples, args.repeat)
        lines += more
    print("\n".join(lines))
    if args.append:
        with args.append.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    print(json.dumps({**ratios, **scrg, "growth": growth}))


if __name__ == "__main__":
    main()
