"""A training step against TRL's: `python benchmarks/step_bench.py STUDENT TEACHER DATA.jsonl`.

TRL's DistillationTrainer (on-policy, forward KL, transformers' generate) and ours on the same prompts, batch,
lengths, sampling, optimizer and dtype: on-policy with forward KL as TRL; the whole method (SCRG with one round,
DAC-KL with its network, span loss, fit to the references) on the student's answers; the same without SCRG; and
the same on answers from the replay buffer. Each is a process of its own, several times in turn, and its first
step is not counted. Compared are response tokens of the student per second, as answers differ in length. The
last line is JSON with the ratios.

DATA: lines with `prompt` and `completion`, as they are read and written, without a template.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from setting import setting

OURS = {
    "on-policy, forward KL": {"method": "imitkd"},
    "whole method": {"method": "mgsr-on-policy"},
    "whole method, no SCRG": {"method": "mgsr-on-policy", "revision.rounds": 0},
    # The first step, which is not counted, fills the buffer.
    "whole method, replay": {"method": "mgsr-on-policy", "rollout.replay_ratio": 1.0},
}
TRL = "TRL, on-policy, forward KL"


def run_trl(args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Tokens and seconds."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    lines = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    dtype = getattr(torch, args.dtype)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(each, dtype=dtype) for each in (args.student, args.teacher)
    )
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.started)

    config = DistillationConfig(
        output_dir=str(folder), max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=1e-5,
        max_completion_length=args.new_tokens, temperature=1.0, beta=0.0, use_cpu=args.cpu, bf16=False,
        save_strategy="no", logging_steps=1, report_to="none", gradient_checkpointing=False, seed=0,
        disable_tqdm=True, shuffle_dataset=False,
    )  # fmt: skip
    trainer = DistillationTrainer(
        model=student, teacher_model=teacher, args=config, callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": line["prompt"]} for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(args.student),
    )  # fmt: skip
    trainer.train()
    lengths = [
        each["completions/mean_length"]
        for each in trainer.state.log_history
        if "completions/mean_length" in each
    ]
    return args.batch * sum(lengths[1:]), sum(seconds[1:])


def run_ours(args: argparse.Namespace, name: str, folder: Path) -> tuple[float, float]:
    recipe = {
        "student": {"model_name_or_path": args.student, "dtype": args.dtype},
        "teacher": {"model_name_or_path": args.teacher, "dtype": args.dtype},
        "data": {"path": str(args.data), "template": "plain", "max_prompt_length": 1024},
        "rollout": {"max_completion_length": args.new_tokens, "batch_size": args.batch},
        "training": {
            "output_dir": str(folder), "max_steps": args.steps, "per_device_train_batch_size": args.batch,
            "learning_rate": 1e-5, "eval_strategy": "no", "save_strategy": "no", "use_cpu": args.cpu, "seed": 0,
        },
    }  # fmt: skip
    file = folder.parent / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    settings = dict(OURS[name])
    command = [sys.executable, "-m", "redistill", "train", str(file), "--method", settings.pop("method")]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()][1:]
    # Tokens of the student's answers; the references that are fitted beside them do not count.
    return sum(step["distilled_tokens"] for step in steps), sum(step["seconds"] for step in steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("data", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--append", type=Path, help="Markdown file that gets the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.cpu = args.device == "cpu"
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder) / "run"
            tokens, seconds = run_trl(args, at) if args.one == TRL else run_ours(args, args.one, at)
        print(json.dumps([tokens, seconds]))
        return
    rates: dict[str, list[float]] = {name: [] for name in (TRL, *OURS)}
    for _ in range(args.repeat):
        for name, found in rates.items():
            again = subprocess.run(
                [sys.executable, *sys.argv, "--one", name], stdout=subprocess.PIPE, text=True, check=True
            )
            tokens, seconds = json.loads(again.stdout.splitlines()[-1])
            found.append(tokens / seconds)
            print(f"{name}: {tokens / seconds:.1f} tokens/s", file=sys.stderr)
    base = statistics.median(rates[TRL])
    lines = [*setting(args.device, repeat=args.repeat, packages=("transformers", "trl")), "",
             "| step | response tokens/s | lowest to highest | of TRL |", "| --- | ---: | ---: | ---: |"]  # fmt: skip
    ratios = {}
    for name, found in rates.items():
        ratios[name] = round(statistics.median(found) / base, 2)
        spread = f"{min(found):.1f} to {max(found):.1f}"
        lines.append(f"| {name} | {statistics.median(found):.1f} | {spread} | {ratios[name]:.2f} |")
    print("\n".join(lines))
    if args.append:
        with args.append.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
