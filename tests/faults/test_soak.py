"""A long run of a tiny model: memory, handles and threads stay what they were, and files grow by lines only."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from runs import often


def used(pid: int) -> tuple[int, int, int]:
    """Resident bytes, open files and threads of a process."""
    process = Path("/proc") / str(pid)
    pages = int((process / "statm").read_text().split()[1])
    return pages * 4096, len(list((process / "fd").iterdir())), len(list((process / "task").iterdir()))


def test_a_long_run_stays_as_it_was(place, lives, tell):
    steps, run = often(60, 2_000), place / "soak"
    settings = {"training.max_steps": steps, "training.save_steps": steps // 20, "training.eval_steps": steps // 20,
                "rollout.replay_capacity": 50, "training.learning_rate": 1.0e-3}  # fmt: skip
    life = lives.train(run.name, place, settings)
    log, seen, sizes, step = run / "steps.jsonl", [], [], 0
    while not life.ended():
        time.sleep(0.05)
        try:
            now, usage = log.read_bytes().count(b"\n") if log.exists() else 0, used(life.pid)
            if now == step:
                continue
            files = [path for path in run.rglob("*") if path.is_file() and path.suffix != ".jsonl"]
            size = sum(path.stat().st_size for path in files)
        except (
            FileNotFoundError,
            ProcessLookupError,
        ):  # it ends, or moves a checkpoint while it is looked at
            continue
        step = now
        seen.append((step, *usage))
        sizes.append((len(files), size))
    assert life.wait() == 0, life.said()
    training = [each for each in seen if steps * 0.1 < each[0] < steps]
    early = [each for each in training if each[0] <= steps * 0.3]
    late = [each for each in training if each[0] > steps * 0.9]
    before, after = (statistics.median(each[1] for each in part) for part in (early, late))
    assert after <= before * (1.02 if steps >= 1_000 else 1.1), (before, after)
    threads = {each[3] for each in training}
    assert len(threads) == 1, threads
    # A file is open while a line or a checkpoint is written: the fewest are those that stay.
    assert min(each[2] for each in late) <= min(each[2] for each in early)
    checkpoints = list(run.glob("checkpoint-*"))
    assert len(checkpoints) <= 3
    # One half of the run may have been looked at while a checkpoint was written, and the other not.
    one = len(list(checkpoints[0].iterdir()))
    half = len(sizes) // 2
    assert max(count for count, _ in sizes[half:]) <= max(count for count, _ in sizes[:half]) + one
    lines = {path.name: path.stat().st_size / steps for path in sorted(run.glob("*.jsonl"))}
    assert lines["steps.jsonl"] < 2_000
    tell(
        f"soak: {steps} steps, memory {before / 2**20:.1f} -> {after / 2**20:.1f} MB ({after / before - 1:+.2%}), "
        f"{min(each[2] for each in late)} open files and {threads.pop()} threads throughout; a step adds "
        + ", ".join(f"{size:,.0f} bytes to {name}" for name, size in lines.items())
    )
