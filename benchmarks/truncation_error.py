"""What is lost by keeping k classes of the teacher: `python benchmarks/truncation_error.py TEACHER DATA.jsonl`.

The student is a copy of the teacher without a third of its layers (by block influence), not trained. Both read
the responses of DATA; at each of their tokens a loss is taken of the teacher's k most probable classes with the
tail, as a cache stores them (rounded to 4 bytes an entry), and of the whole vocabulary. A row has the loss by the
dense loss, and the length of the difference of the gradients (for the student's logits, all tokens together) by
that of the dense one.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date

import torch
from torch import Tensor

from redistill.batch import Counts
from redistill.chat import to_sample
from redistill.config import ObjectiveSettings
from redistill.data import load_examples
from redistill.models import Head, head_of, load_model, load_tokenizer
from redistill.objective import Objective
from redistill.sample import Sample
from redistill.student import prune_layers, select_layers
from redistill.teachers.reading import read_responses
from redistill.teachers.signal import TopK, most_probable
from redistill.teachers.store import pack, unpack

LOSSES = {
    "forward KL": {"token_loss": "forward_kl"},
    "Jensen-Shannon": {"token_loss": "jensen_shannon"},
    "DAC-KL": {"token_loss": "dac_kl"},
}
BLOCK = 16


@dataclass
class Sums:
    """Over all tokens, of one loss: dense, and by place of k."""

    dense: float = 0.0
    norm: float = 0.0
    loss: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    gap: dict[int, float] = field(default_factory=lambda: defaultdict(float))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("data", help="a data set with responses")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256, help="of a response, at most")
    parser.add_argument("--keep", type=int, default=20, help="layers of the student")
    parser.add_argument("--k", default="1,8,32,128,512", help="besides all")
    args = parser.parse_args()
    tokenizer, teacher = load_tokenizer(args.teacher), load_model(args.teacher)
    samples = []
    for example in load_examples(args.data, limit=args.samples).examples:
        sample = to_sample(example, tokenizer, template="chat", system=None, max_prompt_length=256,
                           max_completion_length=args.tokens, on_long_prompt="truncate")  # fmt: skip
        if isinstance(sample, Sample):
            samples.append(sample)
    texts = [sample.prompt + sample.response for sample in samples]
    student = prune_layers(teacher, select_layers(teacher, args.keep, texts[:16]))
    size = teacher.get_output_embeddings().weight.shape[0]
    ks = [*(int(k) for k in args.k.split(",")), size]
    with torch.no_grad():
        hidden = [read_responses(model, samples)[0] for model in (student, teacher)]
        sums, tails = measured(hidden, [head_of(model, size) for model in (student, teacher)], ks)
    n = len(hidden[0])
    print(f"{n} tokens of {len(samples)} responses, V = {size}, {date.today()}, torch {torch.__version__}\n")
    print(
        "| k | mass of the tail | " + " | ".join(f"{name}: loss | gradient off by" for name in LOSSES) + " |"
    )
    print("| ---: |" + " ---: |" * (2 * len(LOSSES) + 1))
    for k in ks:
        cells = [f"{of.loss[k] / of.dense:.4f} | {(of.gap[k] / of.norm) ** 0.5:.4f}" for of in sums]
        print(f"| {'V' if k == size else k} | {tails[k] / n:.5f} | {' | '.join(cells)} |")


def measured(
    hidden: Sequence[Tensor], heads: Sequence[Head], ks: Sequence[int]
) -> tuple[list[Sums], dict[int, float]]:
    """The sums of each loss, and by k the masses of the tails."""
    size, sums, tails = heads[0].vocabulary, [Sums() for _ in LOSSES], defaultdict[int, float](float)
    objectives = [Objective(ObjectiveSettings(sft_weight=0.0, span_weight=0.0, **chosen),
                            torch.Generator().manual_seed(0)) for chosen in LOSSES.values()]  # fmt: skip

    def part(objective: Objective, student: Tensor, teacher: Tensor | TopK) -> tuple[float, Tensor]:
        none = torch.zeros(len(student), dtype=torch.long)
        found = objective(student, teacher, none, none - 1, False, Counts(1.0, 1.0, 1.0))
        return float(found.loss), found.by_logits

    for start in range(0, len(hidden[0]), BLOCK):
        cut = slice(start, start + BLOCK)
        student, teacher = (head.logits(states[cut]) for head, states in zip(heads, hidden, strict=True))
        kept = {k: unpack(*pack(most_probable(teacher, k), size), size) for k in ks}
        for k, each in kept.items():
            tails[k] += float(each.log_p[:, -1].exp().sum())
        for objective, of in zip(objectives, sums, strict=True):
            loss, gradient = part(objective, student, teacher)
            of.dense, of.norm = of.dense + loss, of.norm + float(gradient.double().square().sum())
            for k, each in kept.items():
                loss, other = part(objective, student, each)
                of.loss[k] += loss
                of.gap[k] += float((other - gradient).double().square().sum())
    return sums, tails


if __name__ == "__main__":
    main()
