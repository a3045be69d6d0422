"""The benchmarks run: what they measure is for a quiet machine."""

import json
import sys
from pathlib import Path

from tiny import save_tiny

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_writing_beside_transformers(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import rollout_bench

    save_tiny(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"{word} is"}) + "\n" for word in ("one", "two", "three", "four"))
    )
    asked = [
        "student",
        "teacher",
        "prompts.jsonl",
        "--batch=4",
        "--new-tokens=8",
        "--repeat=1",
        "--append=found.md",
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rollout_bench.py", *asked])
    rollout_bench.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["greedy"] > 0 and set(found["growth"]) == {"batch", "response length", "rounds of SCRG"}
    assert "| second writing, from the cache |" in (tmp_path / "found.md").read_text()
