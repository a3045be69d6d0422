"""Data, tokenizer and untrained models of the testbed, and the recipes' commands to train them.

    python benchmarks/testbed/make_testbed.py FOLDER

FOLDER/data/{teach,train,dev,test}.jsonl: what the teacher learns from, what the students learn from, and two that
neither sees. As in data written by people there are mistakes in what the students get; the teacher knows better.
FOLDER/teacher, FOLDER/student: models with random weights, and the tokenizer. README.md goes on.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import Task, spoilt, tasks, words

SPECIAL = ("<pad>", "<end>", "<unknown>")
TEST, DEV, TEACH, TRAIN = 500, 200, 60_000, 4_000
MISTAKEN = 0.7
TEACHER = {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 4, "num_attention_heads": 6}
STUDENT = {"hidden_size": 144, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word with the space before it, and one for each mark of punctuation."""
    known = [*SPECIAL, *",.?:", *(f"▁{word}" for word in words())]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("[,.?:]"), "isolated")]
    )
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>"
    )


def make_model(sizes: dict[str, int], tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """An untrained model that reads up to 128 tokens."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=128,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
                **sizes,
            )
        )


def write(path: Path, part: Iterable[Task]) -> None:
    """One record a line, in the form that `redistill` reads."""
    with path.open("w", encoding="utf-8") as file:
        for task in part:
            record = {"instruction": task.instruction, "output": task.answer, "kind": task.kind}
            file.write(json.dumps(record) + "\n")


def unlike(stream: Iterable[Task], seen: set[str]) -> Iterator[Task]:
    """The tasks whose instruction did not come before."""
    for task in stream:
        if task.instruction not in seen:
            seen.add(task.instruction)
            yield task


def main(arguments: Sequence[str]) -> None:
    folder = Path(arguments[0])
    (folder / "data").mkdir(parents=True, exist_ok=True)
    stream = tasks(random.Random(0))
    held = list(islice(unlike(stream, set()), TEST + DEV))
    test, dev = held[:TEST], held[TEST:]
    unseen = {task.instruction for task in held}
    teach = list(islice((task for task in stream if task.instruction not in unseen), TEACH))
    rng = random.Random(1)
    train = [spoilt(task, rng) if rng.random() < MISTAKEN else task for task in teach[:TRAIN]]
    for name, part in (("test", test), ("dev", dev), ("teach", teach), ("train", train)):
        write(folder / "data" / f"{name}.jsonl", part)
    tokenizer = make_tokenizer()
    for seed, (name, sizes) in enumerate({"teacher": TEACHER, "student": STUDENT}.items()):
        model = make_model(sizes, tokenizer, seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{name}: {model.num_parameters() / 1e6:.2f}M parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main(sys.argv[1:])
