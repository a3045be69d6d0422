"""Two tokenizers over real responses: `python benchmarks/alignment_share.py STUDENT TEACHER DATA.jsonl`.

STUDENT, TEACHER: folders or hub ids with tokenizers. Says which share of the student's tokens a teacher of the other
tokenizer can speak to (docs/teacher.md), and how many of the teacher's ids have ids of the student's. With --model
(TEACHER then holds weights too) also how much of what the teacher says is in the tail, by the ids that are kept.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch

from redistill.chat import to_sample
from redistill.data import load_examples
from redistill.models import load_model, load_tokenizer, shared_vocabulary
from redistill.pieces import Pieces
from redistill.sample import Sample
from redistill.teachers.aligned import AlignedTeacher
from redistill.teachers.alignment import align, codes_of
from redistill.teachers.local import LocalTeacher
from redistill.versions import made_with


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", help="folder or hub id, of which the tokenizer is read")
    parser.add_argument("teacher", help="folder or hub id")
    parser.add_argument("data", help="a data set with responses")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=512, help="of a response, at most")
    parser.add_argument("--model", action="store_true", help="let the teacher read, too")
    parser.add_argument("--k", default="1,8,32,128,512")
    asked = parser.parse_args()
    tokenizers = [load_tokenizer(name) for name in (asked.student, asked.teacher)]
    ours, theirs = (Pieces(each, "chat") for each in tokenizers)
    examples = load_examples(asked.data, limit=asked.samples).examples
    how = {"template": "chat", "system": None, "max_prompt_length": 512, "on_long_prompt": "truncate"}
    found = [
        to_sample(
            each, tokenizers[0], max_completion_length=asked.tokens, teacher_tokenizer=tokenizers[1], **how
        )
        for each in examples
    ]
    samples = [each for each in found if isinstance(each, Sample) and each.response]
    vocabularies(ours, theirs)
    shares(samples, ours, theirs)
    if asked.model:
        model = load_model(asked.teacher)
        reader = LocalTeacher(model, shared_vocabulary(tokenizers[1], tokenizers[1], model, model))
        text(samples, reader, ours, theirs)
        for k in map(int, asked.k.split(",")):
            tails(samples, AlignedTeacher(reader, ours, theirs, len(ours.written), k), k)
    print(made_with())


def vocabularies(ours: Pieces, theirs: Pieces) -> None:
    """How many ids are the same bytes, begin with an id of the student's, or are nothing to it."""
    started, size = time.perf_counter(), len(ours.written)
    codes = codes_of(ours, theirs, size, len(theirs.written), first=False)
    seconds = time.perf_counter() - started
    single = [code[0] for code in codes.tolist() if code[0] < size == code[1]]
    known = int((codes[:, 0] < size).sum())
    print(
        f"ids: student {size}, teacher {len(codes)}; of the teacher's {len(single)} are one of the student's,"
    )
    print(f"{known - len(single)} several, {len(codes) - known} nothing to it; {seconds:.1f} s")


def shares(samples: Sequence[Sample], ours: Pieces, theirs: Pieces) -> None:
    """Which share of the student's tokens begins a group, stands inside of one, or in none."""
    counted: Counter[str] = Counter()
    started = time.perf_counter()
    for sample in samples:
        groups = align(sample.response, ours, theirs).groups
        lengths = [(g.ours[1] - g.ours[0], g.theirs[1] - g.theirs[0]) for g in groups]
        counted["all"] += len(sample.response)
        counted["first"] += len(lengths)
        counted["one for one"] += lengths.count((1, 1))
        counted["inside"] += sum(mine - 1 for mine, _ in lengths)
    seconds, total = time.perf_counter() - started, counted.pop("all")
    print(f"{len(samples)} responses, {total} tokens of the student's, aligned in {seconds:.1f} s")
    for name, count in counted.items():
        print(f"  {name}: {count / total:.4f}")
    print(f"  in no group: {1 - (counted['first'] + counted['inside']) / total:.4f}")


def text(samples: Sequence[Sample], reader: LocalTeacher, ours: Pieces, theirs: Pieces) -> None:
    """The log-likelihood that the teacher gives the text in its own ids, by the student's tokens of the groups."""
    likelihood = tokens = 0.0
    for sample in samples:
        found = align(sample.response, ours, theirs)
        said = reader.signal([replace(sample, response=found.theirs)])
        logs = said.head.logits(said.hidden).log_softmax(-1)
        likelihood += float(logs.gather(1, torch.tensor(found.theirs)[:, None]).double().sum())
        tokens += sum(group.ours[1] - group.ours[0] for group in found.groups)
    print(
        f"the text in the teacher's ids: log-likelihood {likelihood / tokens:.4f} nats a token of the student's"
    )


def tails(samples: Sequence[Sample], teacher: AlignedTeacher, k: int) -> None:
    """The mean mass of the tail, and the mean log-likelihood of what was written."""
    tail = likelihood = tokens = 0.0
    for sample in samples:
        said = teacher.signal([sample])
        tail += float(said.log_p[said.told, -1].double().exp().sum())
        likelihood += float(said.log_p[said.told, 0].double().sum())
        tokens += int(said.told.sum())
    print(
        f"k {k}: mass of the tail {tail / tokens:.4f}, log-likelihood {likelihood / tokens:.4f} nats a token"
    )


if __name__ == "__main__":
    main()
