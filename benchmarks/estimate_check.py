"""What `redistill estimate` says beside what training then holds, phase by phase.

    python benchmarks/estimate_check.py [NAME ...] [--json FILE]

For each setting two models are made of their configs with random weights, and data at the limits of length. What is
estimated for them stands beside what a process that trains two steps has resident in each phase, less what it had
before it loaded anything. Freed memory goes back to the system at once there (MALLOC_ variables), so that phases can
be told apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    "everything": {},
    "checkpointing": {"training.gradient_checkpointing": True, "training.per_device_train_batch_size": 8},
    "lora": {"student.lora.r": 16, "training.per_device_train_batch_size": 8},
    "accumulation": {"training.per_device_train_batch_size": 2, "training.gradient_accumulation_steps": 2},
    "references-only": {"rollout.lmbda": 0.0, "objective.token_loss": "forward_kl"},
    "sft": {"rollout.lmbda": 0.0, "objective.token_weight": 0.0, "objective.span_weight": 0.0},
    "long": {"data.max_prompt_length": 384, "training.per_device_train_batch_size": 1},
    "many-answers": {"rollout.batch_size": 64, "training.per_device_train_batch_size": 1,
                     "training.gradient_accumulation_steps": 32, "rollout.lmbda": 1.0, "objective.sft_weight": 0.0},
    "eager": {"student.attn_implementation": "eager", "teacher.attn_implementation": "eager"},
    "bf16-weights": {"student.dtype": "bfloat16", "teacher.dtype": "bfloat16"},
    "bf16-autocast": {"training.bf16": True},
    "adafactor": {"training.optim": "adafactor"},
    "adamw-foreach": {"training.optim": "adamw_torch"},
    "minillm": {"method": "minillm"},
    "gpt2": {"models": "gpt2"},
    "qwen2": {"models": "qwen2"},
    "large-vocabulary": {"models": "wide"},
    "pruned": {"student.model_name_or_path": None, "student.prune.keep": "first:6"},
}  # fmt: skip

# Where the loss' phases are one for the clock.
LOSS = ("student reads", "teacher reads", "loss", "backward")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    arguments.add_argument("names", nargs="*", help=f"of {', '.join(SETTINGS)}; all if left out")
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.train:
        train(asked.train)
        return
    found = {}
    print("setting            phase          estimated MB  measured MB  ratio")
    for name in asked.names or SETTINGS:
        found[name] = check(SETTINGS[name])
        for phase, (estimated, measured) in found[name].items():
            numbers = f"{estimated / 1e6:13.0f} {measured / 1e6:12.0f} {estimated / measured:6.2f}"
            print(f"{name:18s} {phase:13s} {numbers}")
        sys.stdout.flush()
    if asked.json:
        asked.json.write_text(json.dumps(found))


def check(setting: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Estimated and measured bytes of each phase that both know, and of the peak of all."""
    from redistill.config import load_config
    from redistill.estimate import estimate
    from redistill.estimate.machine import machine_for

    setting = dict(setting)
    kind, method = setting.pop("models", "llama"), setting.pop("method", None)
    with tempfile.TemporaryDirectory() as name:
        recipe = make(Path(name), kind, setting)
        config = load_config(recipe, (), method)
        recipe.write_text(config.to_yaml(), encoding="utf-8")
        said = estimate(config, machine_for(config))
        run([sys.executable, __file__, "--train", str(recipe)])
        held = json.loads((Path(name) / "held.json").read_text(encoding="utf-8"))
    estimated: dict[str, int] = {}
    for phase in said.phases:
        clock = "loss" if phase.name in LOSS else phase.name
        estimated[clock] = max(estimated.get(clock, 0), phase.peak - phase.parts["process"])
    both = {phase: (estimated[phase], held[phase]) for phase in held if phase in estimated}
    return {**both, "peak": (max(estimated.values()), max(held.values()))}


def run(command: list[str]) -> None:
    """In an environment where freed memory is not kept."""
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | returned, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def make(folder: Path, kind: str, setting: dict[str, Any]) -> Path:
    """Models, data and recipe."""
    import torch
    import yaml
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    prompt, answer = (
        setting.get("data.max_prompt_length", 64),
        setting.get("rollout.max_completion_length", 16),
    )
    for who, config in zip(("student", "teacher"), configs(kind), strict=True):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / who)
        tokenizer(config.vocab_size).save_pretrained(folder / who)
    words = [f"w{number}" for number in range(10, 10 + prompt + answer)]
    record = {"prompt": " ".join(words[:prompt]), "completion": " ".join(words[prompt : prompt + answer - 1])}
    (folder / "train.jsonl").write_text((json.dumps(record) + "\n") * 200, encoding="utf-8")
    recipe: dict[str, Any] = {
        "student": {"model_name_or_path": str(folder / "student")},
        "teacher": {"model_name_or_path": str(folder / "teacher")},
        "data": {"path": str(folder / "train.jsonl"), "template": "plain", "max_prompt_length": prompt},
        "rollout": {"lmbda": 1.0, "max_completion_length": answer},
        "objective": {"span": {"chunker": "windows"}, "chunk_size": 512},
        "training": {
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "save_strategy": "no",
        },
    }
    for key, value in setting.items():
        *sections, last = key.split(".")
        inner = recipe
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def configs(kind: str) -> tuple[Any, Any]:
    """Of a student with 30 to 50 million parameters, and of a teacher twice as deep."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    pair = []
    for layers in (6, 12):
        if kind == "gpt2":
            pair.append(GPT2Config(vocab_size=16384, n_embd=512, n_layer=layers, n_head=8, n_positions=512,
                                   bos_token_id=1, eos_token_id=1))  # fmt: skip
            continue
        make_one = Qwen2Config if kind == "qwen2" else LlamaConfig
        pair.append(make_one(
            vocab_size=49152 if kind == "wide" else 16384, hidden_size=512, intermediate_size=1408,
            num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
            tie_word_embeddings=kind != "llama", bos_token_id=1, eos_token_id=1, pad_token_id=0,
        ))  # fmt: skip
    return pair[0], pair[1]


def tokenizer(size: int) -> Any:
    """Words w2, w3, .. are the ids 2, 3, .."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {f"w{number}": number for number in range(2, size)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(prefix="")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", bos_token="<eos>", pad_token="<pad>"
    )


def train(recipe: Path) -> None:
    """Two steps, in a process of their own; the most that each phase held, in `held.json`."""
    from redistill.clock import Clock
    from redistill.config import load_config
    from redistill.meters import PeakMemory, finished
    from redistill.prepare import in_folder, prepare, trainer_of

    config = in_folder(load_config(recipe), recipe.parent / "run")
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    before = 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])
    prepared, meters = prepare(config), []

    def new_clock() -> Clock:
        meters.append(PeakMemory(prepared.teacher.device))
        return Clock(meters[-1], finished)

    trainer_of(config, prepared, new_clock=new_clock).train()
    held: dict[str, int] = {}
    for meter in meters:
        for phase, most in meter.found.items():
            held[phase] = max(held.get(phase, 0), most - before)
    (recipe.parent / "held.json").write_text(json.dumps(held), encoding="utf-8")


if __name__ == "__main__":
    main()
