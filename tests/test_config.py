"""Settings: each one reachable, each refusal with file, line, name and the nearest valid name."""

import json
import typing
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from redistill.compare.plan import read_plan
from redistill.config import Config, ConfigError, load_config
from redistill.run import refuse_other_recipe

ROOT = Path(__file__).parents[1]
COMPARISON = ROOT / "recipes" / "paper" / "compare.yaml"
FOR_ACCELERATE = set((ROOT / "recipes" / "accelerate").glob("*.yaml"))
RECIPES = sorted(set((ROOT / "recipes").rglob("*.yaml")) - {COMPARISON} - FOR_ACCELERATE)
SMALLEST = """\
student:
  model_name_or_path: small
teacher:
  model_name_or_path: large
data:
  path: train.jsonl
"""
# What a setting needs from others to be allowed, and a value where none can be made from its type.
NEEDS = {
    "teacher.cache": ["rollout.lmbda=0.0"],
    "student.prune": ["student.model_name_or_path=null"],
    "rollout.schedule": ["data.eval_path=dev.jsonl"],
    "data.eval_split": ["data.path=folder"],
    "objective.policy.weight": ["revision.rounds=0"],
    "data.streaming": ["budget.seconds=9.0"],
}
VALUES = {
    "student.prune": {"keep": [0, 2]},
    "student.prune.keep": 3,
    "student.lora": {"r": 4},
    "training": {"learning_rate": 2e-5},
    "rollout.vllm.url": "https://far:1",
    "teacher.server": {"top_k": 5},
    "teacher.server.url": "https://far:2",
    "evaluation.seeds": [1, 2],
    "method": "sft",
    "objective.dac.lower": 0.25,
    "objective.dac.upper": 0.75,
}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text), overrides)
    return str(caught.value)


def leaves(model: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, typing.Any, typing.Any]]:
    """(dotted name, type, default) of every setting that is not a required section."""
    found = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        kinds = [k for k in (field.annotation, *typing.get_args(field.annotation)) if isinstance(k, type)]
        section = next((k for k in kinds if issubclass(k, BaseModel)), None)
        if section is None or section is not field.annotation:
            found.append((key, field.annotation, field.default))
        if section is not None:
            found += leaves(section, f"{key}.")
    return found


def another(key: str, kind: typing.Any, default: typing.Any) -> typing.Any:
    """A valid value that is not the default."""
    if key in VALUES:
        return VALUES[key]
    kinds = [kind, *typing.get_args(kind)]
    kinds += [inner for k in kinds for inner in typing.get_args(k)]
    literals = [k for k in kinds if isinstance(k, str) and k != default]
    if literals and typing.Literal in {typing.get_origin(k) for k in kinds}:
        return literals[0]
    if kind is bool:
        return not default
    if int in kinds or isinstance(default, int):
        return 7
    if float in kinds or isinstance(default, float):
        return 0.5 if default != 0.5 else 0.25
    return "some/text"


def at(config: Config, key: str) -> typing.Any:
    value: typing.Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(("key", "kind", "default"), leaves(), ids=[leaf[0] for leaf in leaves()])
def test_every_setting_is_reached_by_yaml_and_by_override(tmp_path, key, kind, default):
    value = another(key, kind, default)
    needs = NEEDS.get(key, []) + (NEEDS["student.prune"] if key.startswith("student.prune.") else [])
    if key == "student.prune.prompts":
        needs = [*needs, "student.prune.keep=2"]
    overridden = load_config(written(tmp_path, SMALLEST), [*needs, f"{key}={json.dumps(value)}"])
    tree = yaml.safe_load(SMALLEST)
    for pair in needs:
        name, _, needed = pair.partition("=")
        _put(tree, name, yaml.safe_load(needed))
    _put(tree, key, value)
    from_file = load_config(written(tmp_path, yaml.safe_dump(tree)))
    assert overridden == from_file
    got = at(from_file, key)
    if isinstance(value, dict):
        got = got.model_dump(exclude_unset=True) if isinstance(got, BaseModel) else got
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in got.items()} == value
    else:
        assert got == (tuple(value) if isinstance(value, list) else value)
    assert value != default
    assert load_config(written(tmp_path, from_file.to_yaml())) == from_file


def _put(tree: dict, key: str, value: typing.Any) -> None:
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
    tree[last] = value


def test_every_setting_says_what_it_means():
    def undescribed(model, prefix=""):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from undescribed(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield prefix + name

    assert list(undescribed(Config)) == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_every_value_names_its_source(recipe):
    config = load_config(recipe)
    assert config.warnings() == []
    assert load_config(recipe, ["rollout.lmbda=1.0"]).rollout.lmbda == 1.0
    for line in recipe.read_text(encoding="utf-8").splitlines():
        setting = line.partition("#")[0].strip()
        if setting and not setting.endswith(":"):
            assert any(s in line for s in ("ours", "MGSR paper", "DistiLLM", "MiniLLM", "TRL")), line


def test_recipes_are_there():
    assert len([path for path in RECIPES if path.parent.name == "paper"]) == 4
    assert len(RECIPES) >= 6


def test_the_papers_comparison_names_methods_and_sets_that_there_are():
    plan = read_plan(COMPARISON)
    assert len(plan.methods) == 12 and set(plan.request.sets) == {
        "dolly",
        "self_instruct",
        "vicuna",
        "sinst",
        "uinst",
    }
    assert plan.request.seeds == (10, 20, 30, 40, 50) and plan.request.template == "alpaca"


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("rollout:\n  lambda: 0.5", "rollout.lambda", "rollout.lmbda"),
        ("rollout:\n  temprature: 1.0", "rollout.temprature", "rollout.temperature"),
        ("rollout:\n  sft_weight: 1", "rollout.sft_weight", "objective.sft_weight"),
        ("objectiv:\n  x: 1", "objectiv", "objective"),
        ("objective:\n  dac:\n    coverge: 1", "objective.dac.coverge", "objective.dac.coverage"),
        ("training:\n  lerning_rate: 1e-4", "training.lerning_rate", "training.learning_rate"),
    ],
)
def test_unknown_key_names_file_line_key_and_nearest(tmp_path, section, key, nearest):
    message = refusal(tmp_path, SMALLEST + section)
    line = 6 + (1 + section.count("\n") if key != "objectiv" else 1)
    assert message.startswith(f"{tmp_path / 'run.yaml'}:{line}: {key} is not "), message
    assert message.endswith(f"Nearest valid name: {nearest}.")


@pytest.mark.parametrize(
    ("section", "key", "said"),
    [
        ("rollout:\n  lmbda: 1.5", "rollout.lmbda", "1.5 but should be less than or equal to 1"),
        ("rollout:\n  lmbda: true", "rollout.lmbda", "True but should be a valid number"),
        ("rollout:\n  lmbda: .nan", "rollout.lmbda", "should be a finite number"),
        ("rollout:\n  batch_size: '8'", "rollout.batch_size", "'8' but should be a valid integer"),
        ("rollout:\n  batch_size: 0", "rollout.batch_size", "0 but should be greater than or equal to 1"),
        ("evaluation:\n  seeds: [1, a]", "evaluation.seeds", "[1] is 'a' but should be a valid integer"),
        ("objective:\n  token_loss: dac", "objective.token_loss", "Nearest valid name: dac_kl"),
        ("revision:\n  rounds:", "revision.rounds", "None but should be a valid integer"),
    ],
)
def test_wrong_value_names_file_line_key_and_reason(tmp_path, section, key, said):
    message = refusal(tmp_path, SMALLEST + section)
    assert message.startswith(f"{tmp_path / 'run.yaml'}:8: {key} "), message
    assert said in message
    assert "\n" not in message


def test_override_names_itself_and_the_last_one_wins(tmp_path):
    path = written(tmp_path, SMALLEST)
    assert load_config(path, ["rollout.lmbda=0.1", "rollout.lmbda=2e-1"]).rollout.lmbda == 0.2
    assert refusal(tmp_path, SMALLEST, "rollout.lmda=1").startswith(
        "--set rollout.lmda=1: rollout.lmda is not a setting. Nearest valid name: rollout.lmbda."
    )
    assert refusal(tmp_path, SMALLEST, "rollout={lmbda: 3}").startswith(
        "--set rollout={lmbda: 3}: rollout.lmbda is 3"
    )
    for wrong in ("rollout.lmbda", "=1", "rollout..lmbda=1"):
        assert refusal(tmp_path, SMALLEST, wrong).startswith(f"--set {wrong}: an override has the form")
    assert "not valid YAML" in refusal(tmp_path, SMALLEST, "data.path=[a")


def test_exponents_are_numbers_and_training_stays_untouched(tmp_path):
    config = load_config(written(tmp_path, SMALLEST), ["training.learning_rate=1e-4", "training.optim=sgd"])
    assert config.training == {"learning_rate": 1e-4, "optim": "sgd"}


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: &x 1\nb: 1", 1, "anchor"),
        ("a: 1\nb: [*x]", 2, "alias"),
        ("a: !!python/object/apply:os.getcwd []", 1, "a tag"),
        ("data: {path: a}\ndata: {path: b}", 2, "data is set twice"),
        ("a: 1\n? [b]\n: 1", 2, "not text"),
        ("a: 1\nb: 'open", 2, "not valid YAML"),
        ("a: 1\nb: \x07", None, "not valid YAML"),
        ("a: " + "[" * 700, 1, "nested too deeply"),
        ("- a", None, "should be a mapping"),
        ("", None, "should be a mapping"),
        ("data: 3\nstudent: {}\nteacher: {}", 1, "data is 3 but should be a section"),
        ("student: {}\ndata: {path: a}", None, "teacher is missing. It needs teacher.model_name_or_path."),
    ],
)
def test_only_plain_yaml_is_read(tmp_path, text, line, said):
    message = refusal(tmp_path, text)
    assert f"{tmp_path / 'run.yaml'}{'' if line is None else f':{line}'}: " in message
    assert said in message


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: is not UTF-8"):
        load_config(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student.prune.keep=4"], "student has both prune and model_name_or_path"),
        (["student.model_name_or_path=null"], "no student: set student.model_name_or_path, or student.prune"),
        (
            ["student.model_name_or_path=null", "student.prune.keep=every_2nd"],
            "student.prune.keep is 'every_2nd'",
        ),
        (["rollout.schedule=adaptive"], "set data.eval_path or data.eval_split"),
        (["data.eval_split=dev"], "train.jsonl is one file, which has no splits"),
        (
            ["rollout.schedule=adaptive", "data.eval_path=x", "rollout.schedule_start=0.9"],
            "schedule_start must not be above",
        ),
        (["objective.dac.lower=0.5", "objective.dac.upper=0.5"], "must be below objective.dac.upper"),
        (
            ["objective.sft_weight=0", "objective.token_weight=0", "objective.span_weight=0"],
            "nothing to train",
        ),
        (["data.system=Be brief.", "data.template=plain"], "only the chat template has a system message"),
    ],
)
def test_sections_that_contradict_each_other(tmp_path, overrides, said):
    assert said in refusal(tmp_path, SMALLEST, *overrides)


def test_warnings_name_what_is_likely_not_meant(tmp_path):
    def said(*overrides):
        return load_config(written(tmp_path, SMALLEST), overrides).warnings()

    assert said() == []
    revises, replays = said("rollout.lmbda=0", "rollout.replay_ratio=0.5")
    assert revises.startswith("revision.rounds") and replays.startswith("rollout.replay_ratio")
    assert said("rollout.lmbda=0", "revision.rounds=0") == []
    adaptive = ["rollout.schedule=adaptive", "data.eval_path=x"]
    assert "never grows" in said(*adaptive)[0]
    assert said(*adaptive, "training.eval_strategy=steps") == []
    assert "span loss is always 0" in said("objective.span.chunker=none")[0]
    assert "are ignored" in said("objective.dac.upper=0.9")[0]
    assert said("objective.dac.upper=0.9", "objective.dac.learnable=false") == []


def test_a_bare_no_is_a_word_where_the_engine_wants_one(tmp_path):
    text = SMALLEST + "training: {save_strategy: no, bf16: no}\n"
    config = load_config(written(tmp_path, text), ["training.eval_strategy=no"])
    assert config.training == {"save_strategy": "no", "bf16": False, "eval_strategy": "no"}


def test_settings_are_frozen(tmp_path):
    config = load_config(written(tmp_path, SMALLEST))
    with pytest.raises(ValueError, match="frozen"):
        config.rollout.lmbda = 0.1


def test_a_run_of_before_a_setting_existed_goes_on_with_its_default(tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALLEST)
    made, folder = load_config(recipe), tmp_path / "run"
    folder.mkdir()
    assert "  accept: always\n" in made.to_yaml()
    (folder / "recipe.yaml").write_text(made.to_yaml().replace("  accept: always\n", ""))
    refuse_other_recipe(made, folder)
    for other in ("revision.accept=better", "revision.rounds=3"):
        with pytest.raises(ValueError, match=rf"other settings \({other.partition('=')[0]} changed"):
            refuse_other_recipe(load_config(recipe, [other]), folder)
    (folder / "recipe.yaml").write_text(made.to_yaml() + "gone: 1\n")
    with pytest.raises(ValueError, match=r"\(gone changed"):
        refuse_other_recipe(made, folder)
