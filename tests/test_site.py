"""The site: no link on it is dead, nothing comes from another host, and what it shows and tells to type works."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import typer
import yaml
from made_runs import make_comparison, make_run
from test_docs import DOCS, ROOT, blocks
from tiny import save_tiny

from redistill.cli import app
from redistill.compare.plan import read_plan
from redistill.config import ConfigError, load_config
from redistill.data import DataError, load_examples
from redistill.demo.teacher import is_prepared

PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


class Links(HTMLParser):
    """What a page refers to: `links` to follow, what is `loaded` with it, `ids` of its anchors."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loaded, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        elif tag in {"img", "script", "source", "iframe"} and found.get("src"):
            self.loaded.append(found["src"])
        elif tag == "link" and found.get("rel") not in {"canonical", "prev", "next"}:
            self.loaded.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "site"
    subprocess.run([sys.executable, str(DOCS / "make_site.py"), str(folder)], check=True, capture_output=True)
    return folder


def test_no_link_is_dead_and_nothing_comes_from_another_host(site):
    pages = {path: Links(path.read_text("utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    for path, page in pages.items():
        assert not [url for url in page.loaded if urlsplit(url).netloc], path
        for url in (*page.links, *page.loaded):
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            # Only 404.html has links from the root, as it may be shown anywhere.
            start = site if parts.path.startswith("/") else path.parent
            target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {url}"
            if parts.fragment and target in pages and parts.fragment != "__skip":
                assert unquote(parts.fragment) in pages[target].ids, f"{path.relative_to(site)}: {url}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text("utf-8")), style


def test_every_page_is_in_the_navigation():
    nav = json.dumps(tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]["nav"])
    for page in DOCS.glob("*.md"):
        assert f'"{page.name}"' in nav, f"give docs/{page.name} a line under nav in zensical.toml"
    for results in (ROOT / "benchmarks" / "results").glob("*.md"):
        assert f"../benchmarks/results/{results.name}" in (DOCS / "results.md").read_text("utf-8")


# What is generated, and every message


@pytest.mark.parametrize("name", ["errors", "commands"])
def test_a_generated_page_is_what_the_code_gives(name):
    rendered = runpy.run_path(str(DOCS / f"make_{name}.py"))["render"]()
    assert (DOCS / f"{name}.md").read_text("utf-8") == rendered, f"run python docs/make_{name}.py"


def said(tmp_path):
    """Messages as users get them, from wrong recipes, data and options."""
    recipe = tmp_path / "recipe.yaml"
    for text in ("student: 3\nstudent: 4", "teacher: [", "rollout: {lmbda: 0.5}\n", "a: &b 1"):
        recipe.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(recipe)
        yield from str(caught.value).splitlines()
    recipe.write_text("student: {model_name_or_path: a}\nteacher: {model_name_or_path: b}\ndata: {path: c}\n")
    for override in ("rollout.lambda=1", "rollout", "rollout.schedule=adaptive"):
        with pytest.raises(ConfigError) as caught:
            load_config(recipe, [override])
        yield str(caught.value)
    for name, text in (
        ("empty.jsonl", ""),
        ("bad.jsonl", '{"prompt": ""}\n{"a": 1}\n["b"]\n{'),
        ("a.txt", "a"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError) as caught:
            load_examples(str(tmp_path / name))
        whole, *records = str(caught.value).splitlines()
        yield from (" ".join([whole, *records]), *records)


def test_a_message_that_a_user_gets_is_on_the_page(tmp_path, site):
    listed = [
        line[2:] for line in (DOCS / "errors.md").read_text("utf-8").splitlines() if line.startswith("- ")
    ]
    plain = [re.sub(r"\\([*\[])", r"\1", line).replace("&lt;", "<") for line in listed]
    forms = [re.sub(r"<[^<>]*>", "\0", re.sub(r"`(<[^`]*>)`", r"\1", line)) for line in plain]
    patterns = [re.compile(".*".join(map(re.escape, form.split("\0")))) for form in forms]
    for message in said(tmp_path):
        assert any(pattern.search(message) for pattern in patterns if pattern.pattern != ".*"), message
    index = "".join(path.read_text("utf-8") for path in site.glob("search*"))
    assert "cannot be used, more than data.max_bad_share" in re.sub(r"<[^>]*>|\\u003c[^>]*>", "", index)


# What a reader types

# Commands that are only parsed, by how they begin: why they are not run as they stand, or which test runs them.
NOT_RUN = {
    "make demo": "ten minutes; test_demo.py runs it with two steps",
    "make test": "runs this",
    "source .venv/bin/activate": "changes the reader's shell",
    "VLLM_SERVER_DEV_MODE=1 vllm serve": "needs vLLM and a GPU; test_vllm.py runs a stand-in",
    "vllm serve": "needs vLLM and a GPU; test_served_teacher.py runs a stand-in",
    "redistill compare": "starts processes; test_compare.py",
    "redistill evaluate STUDENT": "STUDENT is the reader's; test_suites.py and test_tasks.py",
    "redistill play": "waits until it is stopped; test_play.py",
    "redistill watch": "waits until it is stopped; test_report_browser.py",
    "torchrun": "several processes; test_ranks.py",
    "accelerate": "several processes; test_ranks.py",
    "REDISTILL_FAULTS": "tests/faults themselves",
    "redistill estimate": "for a GPU, and the recipe here is for the CPU; test_estimate.py",
    "redistill export": "reads and writes a model several times; test_export.py",
    "redistill judge JUDGE": "JUDGE is the reader's; test_judging.py",
}


def commands(page: Path) -> list[str]:
    """Every fenced or indented shell line of a page."""
    fenced = [block for kind in ("bash", "console", "sh") for block in blocks(page, kind)]
    indented = re.findall(r"^    redistill .*$", page.read_text("utf-8"), re.M)
    lines = [line for block in (*fenced, *indented) for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(line.split(" #")[0].strip() for line in lines if line.strip()))


def check(words: list[str]) -> None:
    """A command is there, with its options; its values are of the right kinds."""
    if words[0] == "redistill":
        typer.main.get_command(app).commands[words[1]].make_context(words[1], words[2:])
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text("utf-8")
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] in {"torchrun", "accelerate"}:
        check(words[words.index("-m") + 1 :])
    else:
        assert any(" ".join(words).startswith(known) for known in NOT_RUN), (
            f"{words}: give NOT_RUN its reason"
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder, teacher_layers=20)
    return folder


@pytest.fixture
def place(models, tmp_path, monkeypatch):
    """A folder with everything that the pages name: tiny models under the names of large ones, data, recipes."""
    for name in ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "path/or/hub-id-of-the-large-model"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(models / "teacher")
    for name in (
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        "path/or/hub-id-of-the-small-model",
        "runs/mine/student",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(models / "student")
    for name in ("train.jsonl", "my-data.jsonl", "my-test.jsonl"):
        record = {"prompt": "What runs past the mill?", "completion": "The old river runs past it."}
        (tmp_path / name).write_text((json.dumps(record) + "\n") * 4)
    quick = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False}
    for page, name in ((DOCS / "index.md", "my.yaml"), (DOCS / "recipes.md", "recipe.yaml")):
        recipe = yaml.safe_load(blocks(page, "yaml")[0])
        recipe["training"] = {**recipe.get("training", {}), **quick}
        recipe["rollout"] = {**recipe.get("rollout", {}), "max_completion_length": 8}
        (tmp_path / name).write_text(yaml.safe_dump(recipe))
    for name in ("one", "two"):
        make_run(tmp_path / "runs" / name)
    make_comparison(tmp_path / "runs" / "my-comparison")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_of_a_page_work(page, place):
    (place / "runs" / "mine" / "student").unlink()  # where the page trains it
    if not any("--output runs/mine" in command for command in commands(page)):
        (place / "runs" / "mine" / "student").symlink_to(
            (place / "HuggingFaceTB/SmolLM2-360M-Instruct").resolve()
        )
    for command in commands(page):
        words = shlex.split(command)
        check(words)
        if words[0] == "redistill" and not command.startswith(tuple(NOT_RUN)):
            limit = ["--max-new-tokens", "8"] if words[1] in {"evaluate", "revise"} else []
            assert not app([*words[1:], *limit], standalone_mode=False), command


def test_the_comparison_with_a_method_of_ones_own_can_be_read(place):
    (place / "my-comparison.yaml").write_text(blocks(DOCS / "extend.md", "yaml")[0])
    plan = read_plan(place / "my-comparison.yaml")
    assert plan.comparison.baseline == "kd" and len(plan.comparison.methods) == 2


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name
)
def test_python_on_a_page_runs(page):
    torch.manual_seed(0)
    for block in blocks(page, "python"):
        known = {"student_logits": torch.randn(3, 50), "teacher_logits": torch.randn(3, 50)}
        exec(compile(block, page.name, "exec"), known)
        made = [each for each in known.values() if isinstance(each, torch.Tensor)]
        assert all(bool(each.isfinite().all()) for each in made), block


def test_the_example_of_a_new_loss_trains(tmp_path, models):
    package = tmp_path / "redistill"
    shutil.copytree(ROOT / "src" / "redistill", package)
    page = DOCS / "extend.md"
    for block in blocks(page, "diff"):
        name, *lines = block.splitlines()
        path = package / name.removeprefix("--- ")
        before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        text = path.read_text("utf-8")
        assert text.count(before) == 1, f"docs/extend.md no longer fits {path.name}: {before}"
        path.write_text(text.replace(before, after), "utf-8")
    twin = blocks(page, "python")[-1]
    code = f"""{twin}
import torch
from redistill import DistillTrainer, Sample
from redistill.config import Config
from redistill.loading import load_model, load_tokenizer
from redistill.losses import DIVERGENCES

student, teacher = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0))
ours = DIVERGENCES["squared_hellinger"](student.requires_grad_(), teacher)
q, p = (logits.double().softmax(-1) for logits in (student, teacher))
twin = torch.stack([squared_hellinger(q[row], p[row]) for row in range(3)])
torch.testing.assert_close(ours.double(), twin, rtol=1e-4, atol=1e-6)
tokenizer, sample = load_tokenizer("student"), Sample((5, 6), (7, 8, 2), source="made")
config = Config.model_validate({{
    "student": {{"model_name_or_path": "student"}}, "teacher": {{"model_name_or_path": "teacher"}},
    "data": {{"path": "none"}}, "rollout": {{"lmbda": 0}},
    "objective": {{"token_loss": "squared_hellinger", "span_weight": 0, "sft_weight": 0}},
    "training": {{"output_dir": {str(tmp_path / "run")!r}, "max_steps": 2, "use_cpu": True, "report_to": "none"}},
}})
DistillTrainer(load_model("student"), load_model("teacher"), config, tokenizer, [sample] * 8).train()
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=models, env=environment, check=True, capture_output=True)
    steps = [json.loads(line) for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert 0 < steps[1]["token"] < steps[0]["token"] < 1


@pytest.mark.parametrize("name", ["dac-kl", "spans", pytest.param("scrg", marks=pytest.mark.real)])
def test_figures_have_the_numbers_of_the_code(name):
    if name == "scrg" and not is_prepared():
        pytest.skip("the demo's teacher is not in the cache: run `redistill demo` once")
    number = r"\d+(?:\.\d+)?"
    kept = (DOCS / "figures" / f"{name}.svg").read_text("utf-8")
    drawn = runpy.run_path(str(DOCS / "make_figures.py"))["FIGURES"][name]()
    assert re.sub(number, "0", drawn) == re.sub(number, "0", kept), f"run python docs/make_figures.py {name}"
    for ours, theirs in zip(re.findall(number, drawn), re.findall(number, kept), strict=True):
        assert float(ours) == pytest.approx(float(theirs), rel=0.01, abs=0.02)
