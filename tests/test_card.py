"""The student's model card, and what of a run goes to the hub: by the real client, to a hub on this machine."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from hub_stand_in import hub_stand_in
from huggingface_hub import ModelCard
from tiny import save_tiny

from redistill.card import Made, license_of, model_card
from redistill.config import Config
from redistill.markdown import fenced, plain_markdown
from redistill.public import base_of

RECORDS = [
    {"instruction": f"Name {n} things.", "output": f"Here are {n} things, secret-{n}."} for n in range(8)
]


def config(**sections):
    values = {"student": {"model_name_or_path": "me/small"}, "teacher": {"model_name_or_path": "them/large"},
              "data": {"path": "them/questions"}}  # fmt: skip
    return Config.model_validate({**values, **sections})


def made(conf, name="me/small-distilled"):
    return Made(name, conf, steps=40, student=99_100_000, teacher=134_515_008)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_front_matter_is_what_the_hub_reads():
    card = ModelCard(model_card(made(config(student={"model_name_or_path": "me/small", "lora": {"r": 8}}))))
    assert card.data.to_dict() == {
        "base_model": "me/small", "base_model_relation": "adapter", "datasets": ["them/questions"],
        "library_name": "peft", "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "redistill", "arxiv:2407.10068"],
    }  # fmt: skip
    row = {
        "name": "student after",
        "parameters": 1,
        "rougeL_mean": 11.04,
        "rougeL_std": 1.41,
        "perplexity": 21.3,
    }
    data = ModelCard(model_card(made(config()), [row], 64)).data.to_dict()
    assert data["base_model_relation"] == "finetune"
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["type"] == "them/questions"
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        "rouge": 11.04,
        "perplexity": 21.3,
    }


def test_the_licence_is_the_bases_and_else_none(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    conf = config(student={"prune": {"keep": 2}}, teacher={"model_name_or_path": str(base)})
    assert license_of(base_of(conf)) is None
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    card = ModelCard(model_card(replace(made(conf), license=license_of(base_of(conf)))))
    assert card.data.license == "apache-2.0" and card.data.base_model is None
    (base / "README.md").write_text("---\nlicense: [a\n---\n")
    assert license_of(str(base)) is license_of("not/there") is None  # the tests are offline
    assert "license" not in ModelCard(model_card(made(conf))).data.to_dict()


def test_the_method_is_told_by_its_settings():
    whole = model_card(made(config(rollout={"lmbda": 0.25, "per": "sample", "replay_ratio": 0.5})))
    for words in (
        "in 25% of the samples",
        "50% of these are replayed",
        "SCRG",
        "DAC-KL, forward kl",
        "Phrase level",
    ):
        assert words in whole
    plain = model_card(made(config(
        rollout={"lmbda": 0.0}, revision={"rounds": 0}, method="gkd",
        objective={"token_loss": "jensen_shannon", "span_weight": 0.0, "sft_weight": 0.0},
    )))  # fmt: skip
    assert "jensen shannon between teacher and student, weight 1" in plain and "gkd: " in plain
    assert not any(words in plain for words in ("SCRG", "Phrase level", "Cross-entropy", "On-policy"))
    assert "Not measured" in plain


def test_nothing_of_this_machine_is_told(tmp_path):
    private = tmp_path / "private" / "me"
    private.mkdir(parents=True)
    conf = config(
        student={"model_name_or_path": str(private)},
        data={"path": str(private / "mine.jsonl"), "responses_path": str(private), "eval_path": str(private)},
        rollout={"vllm": {"url": "http://inside:8000", "weights_dir": "/private/w"}},
        evaluation={"path": str(private / "asked.jsonl")},
        training={"output_dir": "/private/out", "hub_token": "hf_secret", "learning_rate": 1e-4, "optim": "sgd",
                  "deepspeed": "/private/ds.json", "run_name": "secret", "hub_model_id": "me/secret"},
    )  # fmt: skip
    row = {"name": "student after", "parameters": 1}
    card = model_card(made(conf), [row], 3)
    assert (
        "private" not in card and "secret" not in card and "inside:" not in card and str(tmp_path) not in card
    )
    assert "mine.jsonl" in card and "asked.jsonl" in card
    assert "learning_rate: 0.0001" in card and "optim: sgd" in card


HOSTILE = "a|b `c` **d** [e](f) <img src=x> &amp; https://g www.h.i $j$ ~~k~~\n# l\x1b[31m\u202em - n _o_ p_q"


def test_text_of_others_is_only_text():
    shown = plain_markdown(HOSTILE)
    assert not re.search(r"[|`*\[\]<>$~\n\x1b\u202e]|&(?!#\d+;)|://|www\.|(?<!\w)_", shown)
    assert "p_q" in shown  # a plain name stays readable
    name = f"them/{HOSTILE}"
    conf = config(teacher={"model_name_or_path": name}, data={"path": name, "system": "```\n</details>\n# x"})
    card = model_card(made(conf), [{"name": HOSTILE, "parameters": 1}], 1)
    outside = re.sub(r"^(`{3,})[a-z]*\n.*?^\1$", "", card.partition("\n---\n")[2], flags=re.S | re.M)
    assert "<img" not in outside and "# l" not in outside and outside.count("</details>") == 1
    rows = [line for line in outside.splitlines() if line.startswith("| ")]
    assert [line.count("|") for line in rows] == [3, 3, 3, 3, 3, 7, 7, 7]
    assert fenced("a ```` b").startswith("`````\n")


# Several commands in one process: most of the time of each would go to its imports.
SEVERAL = """
import contextlib, io, json, sys
from redistill.cli import main
said = []
for argv in json.loads(sys.argv[1]):
    sys.argv = ["redistill", *argv]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    said.append([code or 0, out.getvalue(), err.getvalue()])
print(json.dumps(said))
"""
REFUSED = ("cannot be had", "hf upload me/no1 runs/no1/student", "hub_strategy is checkpoint")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs with `push_to_hub`, as a user types them: one that comes to its end, and three that are refused."""
    folder = tmp_path_factory.mktemp("pushed")
    save_tiny(folder)
    (folder / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    recipe = {
        "student": {"model_name_or_path": "student"}, "teacher": {"model_name_or_path": "teacher"},
        "data": {"path": "mine.jsonl", "eval_path": "mine.jsonl"},
        "rollout": {"lmbda": 1.0, "max_completion_length": 8}, "objective": {"span": {"chunker": "windows"}},
        "training": {"max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "save_total_limit": 1,
                     "use_cpu": True, "push_to_hub": True, "hub_always_push": True},
        "evaluation": {"seeds": [1], "max_new_tokens": 4, "limit": 3},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train = ["train", "recipe.yaml", "--output"]
    short = ["--set", "training.max_steps=1", "--set", "training.hub_strategy=end"]
    commands = [[*train, "runs/mine"], *([*train, f"runs/no{n}", *short] for n in range(2)),
                [*train, "runs/no2", "--set", "training.hub_strategy=checkpoint"],
                [*train, "runs/no1", *short]]  # fmt: skip
    with hub_stand_in() as hub:
        hub.refuse = {"no0": "/api/repos/create", "no1": "/commit/"}
        ours = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret",
                "HF_HOME": str(folder / "hf")}  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", SEVERAL, json.dumps(commands)], cwd=folder, capture_output=True, text=True,
            check=False, timeout=600, env={**os.environ, **ours},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, hub, json.loads(done.stdout)


def test_what_is_pushed_is_the_student_and_its_card_and_nothing_else(run):
    folder, hub, said = run
    code, out, err = said[0]
    assert code == 0, out + err
    assert [request["name"] for request in hub.created] == ["mine", "no1", "no1"]
    messages = [message for message, _ in hub.commits]
    assert any("step 2" in message for message in messages) and any(
        "step 4" in message for message in messages
    )
    assert "End of training" in messages[-1] and "The student is at http" in out
    student = folder / "runs" / "mine" / "student"
    pushed = hub.files()
    assert set(pushed) == {path.name for path in student.iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(
        pushed
    )
    assert all(pushed[path.name] == path.read_bytes() for path in student.iterdir())
    assert not any(name.endswith((".bin", ".pt", ".pth", ".jsonl", ".yaml")) for name in pushed)
    everything = b"".join(content for _, files in hub.commits for content in files.values())
    assert (
        str(folder).encode() not in everything
        and b"secret-" not in everything
        and b"hf_secret" not in everything
    )
    assert not list((folder / "runs" / "mine").glob(".push/*"))
    first = next(files for message, files in hub.commits if "step 2" in message)
    assert b"Not measured" in first["README.md"] and b"2 steps" in first["README.md"]


def test_the_card_of_a_run_tells_its_figures_and_its_lines_run(run, monkeypatch, capsys):
    folder, _, _ = run
    card = ModelCard.load(folder / "runs" / "mine" / "student" / "README.md")
    rows = json.loads((folder / "runs" / "mine" / "results.json").read_text())["rows"]
    table = [line for line in card.text.splitlines() if line.startswith("| student after")]
    assert f"{rows[-1]['rougeL_mean']:.2f}" in table[0] and f"{rows[-1]['kl_to_teacher']:.3f}" in table[0]
    assert "On 3 prompts of mine.jsonl" in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    assert '"me/mine"' in code and len(code.strip().splitlines()) == 3
    monkeypatch.chdir(folder / "runs" / "mine")
    capsys.readouterr()
    exec(code.replace("me/mine", "student"))
    assert capsys.readouterr().out.strip()


def test_a_hub_that_says_no_is_one_sentence(run):
    folder, _, said = run
    for (code, _, err), words in zip(said[1:], (*REFUSED, REFUSED[1]), strict=True):
        assert code == 2 and words in err and "Traceback" not in err, err
        assert err.count("\n") == 1
    assert (folder / "runs" / "no1" / "student" / "model.safetensors").is_file()
    # The last command found the training finished, and its card knows of how many steps.
    assert "Training was finished" in said[4][1]
    assert "in 1 step by redistill" in (folder / "runs" / "no1" / "student" / "README.md").read_text()
    assert (
        not (folder / "runs" / "no0" / "steps.jsonl").exists()
        and not (folder / "runs" / "no2" / "steps.jsonl").exists()
    )
