"""What is lost by keeping k classes of the teacher: `python benchmarks/truncation_error.py TEACHER DATA.jsonl`.

The student is a copy of the teacher without a third of its layers (by block influence), not trained. Both read
the responses of DATA; at each of their tokens a loss is taken of the teacher's k most probable classes with the
tail, as a cache stores them (rounded to 4 bytes an entry), and of the whole vocabulary. A row has the loss by the
dense loss, and the length of the difference of the gradients (for the student's logits, all tokens together) by
that of the dense one.
"""

from __future__ import annotations

import argparse
from datetime import date

import torch
from torch import Tensor

from redistill.batch import Counts
from redistill.chat import to_sample
from redistill.config import ObjectiveSettings
from redistill.data import load_examples
from redistill.models import head_of, load_model, load_tokenizer
from redistill.objective import Objective
from redistill.sample import Sample
from redistill.student import prune_layers, select_layers
from redistill.teachers.local import read_responses
from redistill.teachers.signal import TopK, most_probable
from redistill.teachers.store import pack, unpack

LOSSES = {
    "forward KL": {"token_loss": "forward_kl"},
    "Jensen-Shannon": {"token_loss": "jensen_shannon"},
    "DAC-KL": {"token_loss": "dac_kl"},
}
BLOCK = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("data", help="a data set with responses")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--keep", type=int, default=20, help="layers of the student")
    parser.add_argument("--k", default="1,8,32,128,512", help="besides all")
    args = parser.parse_args()
    tokenizer, teacher = load_tokenizer(args.teacher), load_model(args.teacher)
    samples = []
    for example in load_examples(args.data, limit=args.samples).examples:
        sample = to_sample(example, tokenizer, template="chat", system=None, max_prompt_length=256,
                           max_completion_length=256, on_long_prompt="truncate")  # fmt: skip
        if isinstance(sample, Sample):
            samples.append(sample)
    texts = [sample.prompt + sample.response for sample in samples]
    student = prune_layers(teacher, select_layers(teacher, args.keep, texts[:16]))
    size = len(head_of(teacher, 1).module.weight)
    with torch.no_grad():
        hidden = [read_responses(model, samples)[0] for model in (student, teacher)]
    heads = [head_of(model, size) for model in (student, teacher)]
    ks = [*(int(k) for k in args.k.split(",")), size]
    rows = [measured(Objective(ObjectiveSettings(sft_weight=0.0, span_weight=0.0, **chosen),
                               torch.Generator().manual_seed(0)), hidden, heads, ks)
            for chosen in LOSSES.values()]  # fmt: skip
    tails = rows[0][1]
    print(
        f"{len(hidden[0])} tokens of {len(samples)} responses, V = {size}, {date.today()}, torch {torch.__version__}"
    )
    print()
    print(
        "| k | " + " | ".join(f"{name}: loss | gradient off by" for name in LOSSES) + " | mass of the tail |"
    )
    print("| ---: |" + " ---: |" * (2 * len(LOSSES) + 1))
    for place, k in enumerate(ks):
        cells = [f"{found[0][place]:.4f} | {found[2][place]:.4f}" for found in rows]
        print(f"| {'V' if k == size else k} | {' | '.join(cells)} | {tails[place]:.2e} |")


def measured(
    objective: Objective, hidden, heads, ks: list[int]
) -> tuple[list[float], list[float], list[float]]:
    """For each k: loss by dense loss, mean mass of the tail, and error of the gradient by the dense gradient."""
    size, n = heads[0].vocabulary, len(hidden[0])
    losses, tails, errors, whole, norm = [0.0] * len(ks), [0.0] * len(ks), [0.0] * len(ks), 0.0, 0.0

    def part(student: Tensor, teacher: Tensor | TopK) -> tuple[float, Tensor]:
        none = torch.zeros(len(student), dtype=torch.long)
        found = objective(student.clone(), teacher, none, none - 1, False, Counts(1.0, 1.0, 1.0))
        return float(found.loss), found.by_logits

    for start in range(0, n, BLOCK):
        cut = slice(start, start + BLOCK)
        with torch.no_grad():
            student, teacher = (head.logits(states[cut]) for head, states in zip(heads, hidden, strict=True))
        loss, gradient = part(student, teacher)
        whole, norm = whole + loss, norm + float(gradient.double().square().sum())
        for place, k in enumerate(ks):
            kept = unpack(*pack(most_probable(teacher, k), size), size)
            loss, other = part(student, kept)
            losses[place] += loss
            errors[place] += float((other - gradient).double().square().sum())
            tails[place] += float(kept.log_p[:, -1].exp().sum()) / n
    return [each / whole for each in losses], tails, [(each / norm) ** 0.5 for each in errors]


if __name__ == "__main__":
    main()
