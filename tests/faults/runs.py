"""What a finished run says and holds, and what of any run must be whole whatever happened to it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from redistill.manifest import damaged_files

# full, or a share of it: REDISTILL_FAULTS=0.1
_ASKED = os.environ.get("REDISTILL_FAULTS", "0")
SHARE = 1.0 if _ASKED == "full" else float(_ASKED)
STEPS = 8
VOLATILE = ("seconds", "tokens_per_second")
WHOLE = {"recipe.yaml", "student", ".lock"} | {
    f"{name}.jsonl" for name in ("steps", "revisions", "evaluations", "views")
}
UNDER_WAY = {".unfinished", ".student.partial"}


def often(few: int, many: int) -> int:
    """How many times: the first in every test run, the second in the full one."""
    return max(few, round(many * SHARE))


def lines(path: Path) -> list[dict]:
    """The whole records of a file, without what no two runs have in common; a last line may be half there."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    records = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{k: v for k, v in record.items() if not k.startswith(VOLATILE)} for record in records]


def outcome(run: Path) -> dict:
    """All that a finished run says and holds, to the bit."""
    state = load_file(run / f"checkpoint-{STEPS}" / "redistill.safetensors")
    optimizer = torch.load(run / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["state"]
    return {
        "lines": {
            name: lines(run / f"{name}.jsonl") for name in ("steps", "revisions", "evaluations", "views")
        },
        "student": hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest(),
        "clip network and generator": {name: value.tolist() for name, value in state.items()},
        "buffer and schedule": (run / f"checkpoint-{STEPS}" / "redistill.json").read_text(),
        "optimizer steps": {int(each["step"]) for each in optimizer.values()},
        "files": {path.name for path in run.iterdir()},
    }


def check_whole(run: Path) -> None:
    """Nothing that a reader may trust is half there."""
    if not run.exists():
        return
    for path in run.iterdir():
        if path.name.startswith("checkpoint-"):
            assert damaged_files(path) == [], path
        elif not path.name.endswith(".partial"):
            assert path.name in WHOLE | UNDER_WAY, path
    if (run / "recipe.yaml").exists():
        assert yaml.safe_load((run / "recipe.yaml").read_text())["training"]["max_steps"] == STEPS
    if (run / "student").exists():
        assert load_file(run / "student" / "model.safetensors")
        assert (run / "student" / "tokenizer.json").is_file()
    steps = [record["step"] for record in lines(run / "steps.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
