"""How often each fault is done: a few times in every test run, as docs/faults.md says with REDISTILL_FAULTS=full."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import pytest
import yaml
from forks import Lives
from runs import SHARE, STEPS
from test_cli import RECORDS
from tiny import save_tiny

SEED = int(os.environ.get("REDISTILL_FAULTS_SEED", "1"))
TOLD: list[str] = []

try:
    import hypothesis

    hypothesis.settings.register_profile("faults", deadline=None, derandomize=not SHARE, database=None)
    hypothesis.settings.load_profile("faults")
except ImportError:
    pass


@pytest.fixture(scope="session")
def tell():
    """Says a line at the end of the run: what was done, and what was lost."""
    return TOLD.append


@pytest.fixture
def chance(request):
    """Random numbers of this test's own."""
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="session")
def lives():
    with Lives() as found:
        yield found


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """Models, data and a recipe with all that has to survive: replay, a schedule, a clip network."""
    folder = tmp_path_factory.mktemp("faults")
    save_tiny(folder)
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (folder / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:3]))
    recipe = {
        "student": {"model_name_or_path": "student"},
        "teacher": {"model_name_or_path": "teacher"},
        "data": {"path": "train.jsonl", "eval_path": "test.jsonl"},
        "rollout": {"lmbda": 0.7, "per": "sample", "replay_ratio": 0.4, "max_completion_length": 8,
                    "schedule": "adaptive", "schedule_start": 0.5, "schedule_epsilon": 0.0},
        "objective": {"span": {"chunker": "windows"}},
        "training": {"max_steps": STEPS, "per_device_train_batch_size": 4, "save_steps": 2, "save_total_limit": 2,
                     "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.01, "use_cpu": True},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="session")
def undisturbed(place, lives) -> Path:
    """The run that nothing happened to."""
    started = time.monotonic()
    life = lives.train("undisturbed", place)
    assert life.wait() == 0, life.said()
    (place / "seconds").write_text(str(time.monotonic() - started))
    return place / "undisturbed"


def pytest_terminal_summary(terminalreporter):
    for line in TOLD:
        terminalreporter.write_line(line)
