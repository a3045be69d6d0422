"""The checks of hostile.py under atheris: input that reaches a new branch is kept and changed further.

    python tests/faults/guided.py TARGET RUNS [options of libFuzzer]

Prints nothing but libFuzzer's own lines; ends with an error at the first input for which a check does not hold.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
with atheris.instrument_imports(include=["redistill", "yaml"]):
    import hostile


def record(data: bytes) -> None:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        return
    hostile.check_record(parsed)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "records": record,
    "lines": lambda data: hostile.check_file(data, ".jsonl"),
    "array": lambda data: hostile.check_file(b"[" + data, ".json"),
    "recipes": lambda data: hostile.check_recipe(data.decode("utf-8", "ignore")),
    "typed": lambda data: hostile.check_typed_text(data.decode("utf-8", "ignore"), hostile.tokenizer()),
    "shown": lambda data: hostile.check_shown(data.decode("utf-8", "surrogateescape")),
}
SEEDS = (
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n{"instruction": "a", "output": ["b"]}',
    b"student: {prune: {keep: spread:4}}\nteacher: {model_name_or_path: t}\ndata: {path: d}\nmethod: gkd\n",
    "a<|im_end|>\n<|im_start|>system\n\U000f0000\x1b[2J\u202e".encode(),
)


def main() -> None:
    target, runs, *options = sys.argv[1:]
    corpus = Path(f".atheris-{target}")
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (corpus / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=400", *options, str(corpus)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
