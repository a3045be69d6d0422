"""LoRA on a student that was pruned in the run: whoever loads the adapter gets the student that was trained."""

import json
import shutil

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from rich.console import Console
from test_trainer import assert_same_curve, curve
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from redistill import pruned
from redistill.config import load_config
from redistill.estimate.weightless import read_config
from redistill.hub import check_pushing
from redistill.loading import load_model, output_rows
from redistill.prepare import in_folder, prepare
from redistill.run import train

IDS = torch.tensor([[5, 9, 44, 71, 120, 8, 33]])
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned")
    save_tiny(folder, teacher_layers=4)
    lines = [{"prompt": f"Name the number {n}.", "completion": f"It is {n}."} for n in range(16)]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = {
        "student": {"prune": {"keep": "0,2,3"}, "lora": {"r": 4, "lora_alpha": 8}},
        "teacher": {"model_name_or_path": str(folder / "teacher")},
        "data": {"path": str(folder / "train.jsonl")},
        "rollout": {"lmbda": 0.0},
        "training": {"max_steps": 4, "save_steps": 2, "learning_rate": 0.05, "use_cpu": True, "seed": 3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """A run of four steps, and the logits of the student as it left training."""
    folder, config = tmp_path_factory.mktemp("run") / "mine", load_config(recipe)
    prepared = prepare(in_folder(config, folder))
    before = logits(prepared.student)
    train(config, folder, QUIET, prepared=prepared)
    found = logits(prepared.student)
    assert (found - before).abs().max() > 0.1
    return folder, found


def test_peft_and_transformers_load_the_student_that_was_trained(trained, tmp_path, monkeypatch):
    folder, wanted = trained
    monkeypatch.chdir(tmp_path)
    for saved in (folder / "student", folder / "checkpoint-4"):
        for found in (
            AutoPeftModelForCausalLM.from_pretrained(saved),
            AutoModelForCausalLM.from_pretrained(saved),
        ):
            torch.testing.assert_close(logits(found), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits(load_model(saved)), wanted, rtol=1e-4, atol=1e-4)
    assert read_config(str(folder / "student")).num_hidden_layers == 3
    shutil.copytree(folder, tmp_path / "moved")
    folder.rename(folder.with_name("away"))
    try:
        moved = tmp_path / "moved" / "student"
        torch.testing.assert_close(logits(load_model(moved)), wanted, rtol=1e-4, atol=1e-4)
        assert output_rows(moved) == wanted.shape[-1]
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "moved/base"), moved
        )
        torch.testing.assert_close(logits(plain), wanted, rtol=1e-5, atol=1e-5)
    finally:
        folder.with_name("away").rename(folder)


def test_a_run_that_goes_on_has_the_layers_it_began_with(recipe, trained, tmp_path, monkeypatch):
    config, stopped = load_config(recipe), tmp_path / "run"
    shutil.copytree(
        trained[0], stopped, ignore=shutil.ignore_patterns("checkpoint-4", "student", "recipe.yaml")
    )
    # As another machine might see a near tie, or other data.
    monkeypatch.setattr(pruned, "select_layers", lambda *_: (0, 1, 2))
    train(config, stopped, QUIET)
    assert_same_curve(curve(stopped), curve(trained[0]), tolerance=1e-6)
    torch.testing.assert_close(logits(load_model(stopped / "student")), trained[1], rtol=1e-4, atol=1e-4)
    # Without a checkpoint it begins anew, and what is left of another beginning is not taken for its own.
    shutil.copytree(stopped / "base", tmp_path / "new" / "base")
    new = prepare(in_folder(config, tmp_path / "new")).student
    assert (logits(new) - logits(load_model(stopped / "base"))).abs().max() > 0.1


def test_merged_the_student_is_a_plain_model(recipe, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    merge = ["student.lora.merge=true"]
    train(load_config(recipe, merge), tmp_path / "run", QUIET, go_on=True)
    student = tmp_path / "run" / "student"
    assert not list(student.glob("adapter*"))
    card = (student / "README.md").read_text()
    assert "library_name: transformers" in card and "in 4 steps" in card
    shutil.rmtree(tmp_path / "run" / "base")
    plain = AutoModelForCausalLM.from_pretrained(student)
    torch.testing.assert_close(logits(plain), trained[1], rtol=1e-4, atol=1e-4)

    push = ["training.push_to_hub=true"]
    with pytest.raises(ValueError, match=r"or set student\.lora\.merge"):
        check_pushing(load_config(recipe, push))
    with pytest.raises(ValueError, match="set hub_strategy to end"):
        check_pushing(load_config(recipe, push + merge))
    check_pushing(load_config(recipe, [*push, *merge, "training.hub_strategy=end"]))


def test_its_first_weights_are_the_seeds(recipe, tmp_path):
    def drawn(seed: int, before: int) -> torch.Tensor:
        torch.manual_seed(before)
        config = in_folder(load_config(recipe, [f"training.seed={seed}"]), tmp_path)
        student, mark = prepare(config).student, torch.rand(1)
        torch.manual_seed(before)
        assert torch.equal(torch.rand(1), mark), "nothing was taken from others' random numbers"
        return torch.cat([each.flatten() for name, each in student.named_parameters() if "lora_A" in name])

    assert torch.equal(drawn(3, before=0), drawn(3, before=1))
    assert not torch.equal(drawn(3, before=0), drawn(4, before=0))
