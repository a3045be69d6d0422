"""What the trackers get: TensorBoard for real, the others by stand-ins that keep what they are given."""

import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import recipe, trainer

from redistill.runlog import read
from redistill.trackers import COLUMNS, to_markdown

ENGINE = {"loss", "grad_norm", "learning_rate", "epoch"}
PACKAGES = ("wandb", "trackio", "mlflow")


# What the engine asks of each package besides, and what we do, as the packages document it.
STAND_IN = """
from types import SimpleNamespace
from unittest.mock import MagicMock
__version__ = "9.9.9"
said = []
run, config, context_vars, pyfunc = MagicMock(), MagicMock(), MagicMock(), MagicMock()
context_vars.current_space_id.get.return_value = None
utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))

class Table:
    def __init__(self, columns=None, data=None, dataframe=None):
        self.rows = data if dataframe is None else dataframe.to_numpy().tolist()
        self.columns = columns if dataframe is None else list(dataframe.columns)

def log(figures, step=None):
    said.append(figures)

def log_metrics(metrics, step=None, synchronous=None):
    said.append({**metrics, "train/global_step": step})

def log_table(data, artifact_file):
    table = Table(list(data), [list(row) for row in zip(*data.values(), strict=True)])
    said.append({"revisions": table, "artifact_file": artifact_file})

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One training with every tracker: its folder, its steps and revisions, and what each stand-in was given."""
    place, modules = tmp_path_factory.mktemp("trackers"), set(sys.modules)
    for package in PACKAGES:
        (place / package).mkdir()
        (place / package / "__init__.py").write_text(STAND_IN)
    lib = place / "wandb" / "sdk" / "lib"
    lib.mkdir(parents=True)
    (lib / "config_util.py").write_text("class ConfigError(Exception):\n    pass\n")
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(place / "run" / "board"))
        patch.syspath_prepend(str(place))
        report_to = ["tensorboard", *PACKAGES]
        trainer(recipe(place / "run", steps=4, training={**settings, "report_to": report_to})).train()
        heard = {package: sys.modules[package].said for package in PACKAGES}
    for name in set(sys.modules) - modules:
        if name.split(".")[0] in PACKAGES:
            del sys.modules[name]
    steps, revisions = (list(read(place / "run" / f"{kind}.jsonl")) for kind in ("steps", "revisions"))
    assert revisions
    return place / "run", steps, revisions, heard


def test_tensorboard_reads_back_every_figure_and_every_revision(run):
    folder, steps, revisions, _ = run
    board = EventAccumulator(str(folder / "board"), size_guidance={"tensors": 0})
    board.Reload()
    found = {
        name: {event.step: event.value for event in board.Scalars(name)} for name in board.Tags()["scalars"]
    }
    for record in steps:
        for key, value in record.items():
            if key not in ("step", *ENGINE):
                assert found[f"train/{key}"][record["step"]] == pytest.approx(value, rel=1e-6, abs=1e-30), key
        assert found["train/loss"][record["step"]] == pytest.approx(record["loss"], rel=1e-3)
    for record in read(folder / "evaluations.jsonl"):
        assert found["eval/kl"][record["step"]] == pytest.approx(record["eval_kl"], rel=1e-6)
    pages = {event.step: event.tensor_proto.string_val[0].decode() for event in
             board.Tensors("revisions/text_summary")}  # fmt: skip
    assert set(pages) == {record["step"] for record in revisions}
    for step, page in pages.items():
        lines = page.splitlines()
        assert len(lines) == 2 + sum(record["step"] == step for record in revisions)
        assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)


def test_model_text_is_only_text_in_a_table_of_markdown():
    row = [1, "a|b", "<script>", "**x**\n\n# y", "[a](javascript:x)", 0, "`", "\x1b[31m", 0.5, -0.25]
    line = to_markdown([row]).splitlines()[2]
    assert line.count("|") == len(COLUMNS) + 1 and line.endswith("| 0.500 | -0.250 |")
    assert not any(mark in line for mark in ("<", "**", "[", "`", "\x1b", "\n"))


@pytest.mark.parametrize("package", PACKAGES)
def test_trackers_with_tables_get_all_metrics_and_a_table_of_revisions(package, run):
    _, steps, revisions, heard = run
    said = heard[package]
    prefix = "" if package == "mlflow" else "train/"
    figures = {each["train/global_step"]: each for each in said if f"{prefix}loss" in each}
    for record in steps:
        for key in set(record) - {"step", *ENGINE}:
            assert figures[record["step"]][f"{prefix}{key}"] == pytest.approx(record[key], nan_ok=True)
    tables = [each["revisions"] for each in said if "revisions" in each]
    rows = [dict(zip(table.columns, row, strict=True)) for table in tables for row in table.rows]
    assert [(row["step"], row["position"]) for row in rows] == [(r["step"], r["position"]) for r in revisions]
    assert all(row["gain"] == pytest.approx(r["log_likelihood_after"] - r["log_likelihood_before"])
               for row, r in zip(rows, revisions, strict=True))  # fmt: skip
    if package != "trackio":  # which is given Markdown
        assert [row["before"] for row in rows] == [r["before"] for r in revisions]
