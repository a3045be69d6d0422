"""Two evaluations before a judge: `redistill judge`, and the same for a comparison of many."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from redistill.console import CountDisplay, judge_table
from redistill.evaluation.judge import Verdicts, compare_answers
from redistill.evaluation.judge_prompt import Layout
from redistill.evaluation.kept import Keep
from redistill.evaluation.pairs import Evaluated, PairedSet, pair_folders
from redistill.evaluation.results import peak_memory_bytes
from redistill.loading import best_device
from redistill.models import load_model, load_tokenizer
from redistill.runlog import alone, write_whole
from redistill.versions import made_with


@dataclass(frozen=True)
class JudgeRequest:
    """What is judged, and how; the fields are the command line's options, see `pair_folders` and `compare_answers`.

    references: whether the judge is shown the first reference of each prompt.
    """

    sets: tuple[str, ...] = ()
    references: bool = True
    template: Layout | None = None
    batch_size: int = 8
    margin: float = 0.5
    max_answer_tokens: int = 256
    max_question_tokens: int = 512
    limit: int | None = None
    dtype: str = "auto"


@dataclass(frozen=True)
class Judge:
    """A model that compares answers. name: its hub id or folder."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Judged:
    """What the judge said of a set."""

    paired: PairedSet
    verdicts: Verdicts

    def record(self) -> dict[str, Any]:
        """The row in judge.json."""
        paired, said = self.paired, asdict(self.verdicts)
        for each in ("verdicts", "leads", "by_prompt"):  # of the lines of judgements.jsonl
            del said[each]
        return {
            "set": paired.name or None,
            "version": paired.version,
            "seeds": paired.seeds,
            "pairs": len(paired.pairs),
            "prompts": len(self.verdicts.by_prompt),
            **said,
            "empty_first": sum(not pair.first.strip() for pair in paired.pairs),
            "empty_second": sum(not pair.second.strip() for pair in paired.pairs),
        }


def load_judge(name: str, dtype: str = "auto") -> Judge:
    """The model of a hub id or folder as a judge. Errors: those of `load_model` and `load_tokenizer`."""
    return Judge(name, load_model(name, dtype=dtype, device=best_device()), load_tokenizer(name))


def judge_sets(
    judge: Judge,
    paired: Sequence[PairedSet],
    output: Path,
    console: Console,
    request: JudgeRequest | None = None,
    *,
    anew: bool = False,
) -> list[Judged]:
    """Let the judge compare the answers to each set; every judgement is kept in OUTPUT/SET/judgements.jsonl, and
    what lies there already is not made again. Nothing is printed but how far it is.

    paired: of `pair_folders`. anew: delete what lies there from other settings instead of refusing to go on.
    Errors: those of `compare_answers`.
    """
    request = request or JudgeRequest()
    judged = []
    for each in paired:
        shown = [pair if request.references else replace(pair, reference="") for pair in each.pairs]
        with CountDisplay(console, f"Judging {each.label}") as progress:
            verdicts = compare_answers(
                judge.model,
                judge.tokenizer,
                shown,
                template=request.template,
                batch_size=request.batch_size,
                margin=request.margin,
                max_answer_tokens=request.max_answer_tokens,
                max_question_tokens=request.max_question_tokens,
                keep=Keep(
                    set=each.name or None,
                    version=each.version,
                    template=each.template,
                    judgements=output / each.name / "judgements.jsonl",
                    on_other="anew" if anew else "refuse",
                ),
                progress=progress,
            )
        judged.append(Judged(each, verdicts))
    return judged


def judge_folders(
    judge_name: str,
    first: Evaluated,
    second: Evaluated,
    request: JudgeRequest,
    output: Path,
    console: Console,
    *,
    anew: bool = False,
) -> list[Judged]:
    """What `redistill judge` does: pairs the answers, judges them, writes judge.json and prints a table.

    The folders are looked at before the judge is loaded. Errors: those of `pair_folders` and `judge_sets`.
    """
    started = time.perf_counter()
    paired = pair_folders(first, second, sets=request.sets, limit=request.limit)
    for each in paired:
        _say_empty(each, first, second, console)
    busy = f"another judge is at work in {output}: wait for it, stop it, or choose another --output."
    with alone(output / ".lock", busy=busy):
        judged = judge_sets(
            load_judge(judge_name, request.dtype), paired, output, console, request, anew=anew
        )
        record = {
            "rows": [each.record() for each in judged],
            "judge": judge_name,
            "first": _side(first),
            "second": _side(second),
            "template": paired[0].template,
            **made_with(),
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory_bytes(),
            "settings": asdict(request),
        }
        write_whole(output / "judge.json", json.dumps(record, ensure_ascii=False, indent=2) + "\n")
        console.print()
        console.print(Text(f"Wins are those of {first} over {second}."), soft_wrap=True)
        console.print(judge_table([(each.paired.label, each.verdicts) for each in judged]))
        console.print(f"Judgements and judge.json lie in {output}.", soft_wrap=True, highlight=False)
        return judged


def _side(side: Evaluated) -> dict[str, str]:
    return {"folder": str(side.folder), "row": side.who}


def _say_empty(paired: PairedSet, first: Evaluated, second: Evaluated, console: Console) -> None:
    """An empty answer is an answer, a bad one as a rule; but many of them mean that something went wrong before."""
    sides = ((first, [pair.first for pair in paired.pairs]), (second, [pair.second for pair in paired.pairs]))
    for side, answers in sides:
        empty = [pair.key for pair, text in zip(paired.pairs, answers, strict=True) if not text.strip()]
        if empty:
            seed, index = empty[0]
            console.print(
                Text(
                    f"{len(empty)} of {len(answers)} answers of {side} to {paired.label} are empty, such as that "
                    f"of seed {seed} to prompt {index}: the judge is shown them as they are."
                ),
                soft_wrap=True,
            )
