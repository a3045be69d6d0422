"""The docs say what is: links lead somewhere, names exist, every key a run writes is described, examples work."""

import ast
import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest
import yaml
from tiny import tiny_llama, tiny_tokenizer

from redistill import DistillTrainer, Sample
from redistill.config import Config, load_config
from redistill.config_faults import setting_names
from redistill.data import Place
from redistill.evaluation.gains import Gain
from redistill.evaluation.results import write_results
from redistill.evaluation.score import EvaluationRow
from redistill.records import to_example
from redistill.runlog import read
from redistill.sample import Example
from redistill.stream import Mark

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in (*ROOT.glob("*.md"), *DOCS.glob("*.md")))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FUNCTION = re.compile(r"`([a-z_]+(?:/[a-z_]+)*\.py):([A-Za-z_]+)`")
SETTING = re.compile(
    r"`((?:student|teacher|data|rollout|revision|objective|training|evaluation)(?:\.[a-z_]+)+)[`:=]"
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def keys_under(heading: str, page: Path = DOCS / "run-folder.md") -> set[str]:
    """The names in the first column of the tables between `heading` and the next of the same depth or less."""
    depth = heading.index(" ")
    section = page.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    assert section, f"no {heading}"
    section = re.split(rf"^#{{1,{depth}}} ", section, maxsplit=1, flags=re.M)[0]
    cells = re.findall(r"^\| (`[^|]*) \|", section, re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def train_two_steps(folder: Path) -> None:
    """A run in which every term, a revision, a validation and a checkpoint occur."""
    tokenizer = tiny_tokenizer()
    prompt = tuple(tokenizer.encode("What runs past the mill?"))
    response = tuple(tokenizer.encode(" The old river has run past the quiet mill.<|im_end|>"))
    samples = [Sample(prompt, response, source=f"made:{place}") for place in range(8)]
    training = {"max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 2, "eval_strategy": "steps",
                "eval_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 3}  # fmt: skip
    config = Config.model_validate(
        {
            "student": {"model_name_or_path": "tiny"},
            "teacher": {"model_name_or_path": "tiny"},
            "data": {"path": "none"},
            "rollout": {"lmbda": 0.5, "max_completion_length": 12, "replay_ratio": 0.5},
            "training": {"output_dir": str(folder), **training},
        }
    )
    student, teacher = (tiny_llama(len(tokenizer), seed=seed) for seed in (1, 2))
    DistillTrainer(student, teacher, config, tokenizer, samples, samples[:2]).train()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_functions_and_settings_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        target, _, anchor = link.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {link}"
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page.name}: {link}"
    for file, name in FUNCTION.findall(text):
        tree = ast.parse((ROOT / "src" / "redistill" / file).read_text(encoding="utf-8"))
        defined = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        methods = {n.name for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body
                   if isinstance(n, ast.FunctionDef)}  # fmt: skip
        assert name in defined | methods, f"{page.name}: {file}:{name}"
    known = {".".join(name) for name in setting_names(Config)}
    for name in SETTING.findall(text):
        if not name.endswith((".py", ".yaml", ".jsonl")) and not name.startswith("training."):
            assert name in known, f"{page.name}: {name}"


def test_the_settings_page_is_what_the_code_gives():
    rendered = runpy.run_path(str(DOCS / "make_settings.py"))["render"]()
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == rendered, "run python docs/make_settings.py"
    for name in setting_names(Config):
        assert f"`{'.'.join(name)}`" in rendered or f"\n## {'.'.join(name)}\n" in rendered


def test_every_key_of_a_run_folder_is_described_and_no_other(tmp_path):
    train_two_steps(tmp_path)
    for name in ("steps", "revisions", "evaluations", "views"):
        records = list(read(tmp_path / f"{name}.jsonl"))
        assert records
        inner = [position for record in records for position in record.get("positions", ())]
        assert keys_under(f"## `{name}.jsonl`") == set().union(*records, *inner)
    state = json.loads((tmp_path / "checkpoint-2" / "redistill.json").read_text())
    written = {*state, *state["schedule"], *state["buffer"][0]}
    assert keys_under("### `redistill.json`") == written | {"stream"}
    edit = next(edit for kept in state["buffer"] for edit in kept["edits"])
    page = (DOCS / "run-folder.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in edit)
    assert all(f"`{field.name}`" in page for each in (Mark, Place) for field in dataclasses.fields(each))
    for file in (tmp_path / "checkpoint-2").iterdir():
        assert f"`{file.name}`" in page


def test_every_key_of_the_results_is_described_and_no_other(tmp_path):
    row = EvaluationRow("a", 1, *[None] * 6)
    write_results(tmp_path / "results.json", [row], seeds=[1], seconds=1.0, peak_memory_bytes=1, seed=0)
    written = set(json.loads((tmp_path / "results.json").read_text()))
    columns = {field.name for each in (EvaluationRow, Gain) for field in dataclasses.fields(each)}
    assert keys_under("## `results.json`") == written | columns


def test_examples_in_the_recipes_page_work(tmp_path):
    page = DOCS / "recipes.md"
    smallest, *fragments = blocks(page, "yaml")
    assert len(fragments) >= 8
    path = tmp_path / "recipe.yaml"
    for text in (smallest, *fragments):
        whole = yaml.safe_load(smallest)
        for section, values in yaml.safe_load(text).items():
            whole[section] = {**whole.get(section, {}), **values}
        path.write_text(yaml.safe_dump(whole), encoding="utf-8")
        assert load_config(path).warnings() == [], text
    records = [json.loads(line) for block in blocks(page, "json") for line in block.splitlines()]
    assert len(records) >= 7
    assert all(isinstance(to_example(record, "here"), Example) for record in records)
    assert {str(file.relative_to(ROOT)) for file in (ROOT / "recipes").rglob("*.yaml")} == {
        link.removeprefix("../") for link in LINK.findall(page.read_text()) if link.startswith("../recipes/")
    }
