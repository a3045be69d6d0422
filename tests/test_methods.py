"""The table of methods: every row is a recipe that loads, and says what its name promises."""

import pytest

from redistill.config import ConfigError, load_config
from redistill.methods import find_method, read_methods

METHODS = read_methods()
RECIPE = """
student: {model_name_or_path: s}
teacher: {model_name_or_path: t}
data: {path: d, eval_split: dev}
rollout: {lmbda: 0.9, max_completion_length: 32}
training: {max_steps: 3, learning_rate: 1.0e-3, eval_strategy: steps}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", [name for name in METHODS if name != "plain"])
def test_every_method_is_a_recipe(name, recipe):
    config = load_config(recipe, method=name)
    assert config.method == name and config.rollout.max_completion_length == 32
    for setting, value in METHODS[name].settings.items():
        found = config
        for part in setting.split("."):
            found = getattr(found, part)
        assert found == value, setting
    # An ablation differs from what it builds on; no row is another's copy.
    twins = [other for other, row in METHODS.items() if row.settings == METHODS[name].settings]
    assert twins == [name]
    assert len(METHODS[name].source) > 10


def test_the_issue_names_are_all_there():
    asked = [
        "sft",
        "kd",
        "seqkd",
        "imitkd",
        "gkd",
        "minillm",
        "distillm",
        "akl",
        "tvd",
        "todi",
        "abkd",
        "mgsr",
    ]
    assert set(asked) <= set(METHODS)
    for level in ("sequence", "token", "span"):
        assert {f"mgsr-{level}-only", f"mgsr-without-{level}"} <= set(METHODS)
    assert METHODS["mgsr"].settings["revision.rounds"] == 1
    assert not [
        n for n in ("0", "3", "5") if METHODS[f"mgsr-rounds-{n}"].settings["revision.rounds"] != int(n)
    ]


def test_what_the_recipe_says_holds_against_its_own_method_but_not_against_the_command_line(recipe):
    recipe.write_text(RECIPE + "method: kd\n", encoding="utf-8")
    own = load_config(recipe)
    assert own.rollout.lmbda == 0.9 and own.objective.token_loss == "forward_kl"
    laid = load_config(recipe, method="gkd")
    assert laid.method == "gkd" and laid.rollout.lmbda == 0.5
    assert load_config(recipe, ["rollout.lmbda=0.1"], method="gkd").rollout.lmbda == 0.1


def test_users_rows_build_on_the_packaged_ones():
    own = {"mine": {"from": "mgsr", "settings": {"objective.dac.coverage": 3.0}}}
    mine = find_method("mine", read_methods(own))
    assert mine.settings == {**METHODS["mgsr"].settings, "objective.dac.coverage": 3.0}


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"kd": {"settings": {}}}, "exists already"),
        ({"mine": {"from": "nothing"}}, "builds on 'nothing'"),
        ({"a": {"from": "b"}, "b": {"from": "a"}}, "builds on"),
        ({"mine": {"form": "kd"}}, "form is not known"),
        ({"mine": 3}, "`from`, `source` and `settings`"),
    ],
)
def test_a_wrong_row_is_refused(own, says):
    with pytest.raises(ValueError, match=says):
        read_methods(own)


def test_an_unknown_method_and_a_wrong_setting_are_named(recipe):
    with pytest.raises(ConfigError, match=r"no method 'mgrs'.*mgsr"):
        load_config(recipe, method="mgrs")
    assert load_config(recipe, ["method=gkd"]) == load_config(recipe, method="gkd")
    recipe.write_text(RECIPE + "method: nonsense\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"recipe.yaml:\d+: there is no method"):
        load_config(recipe)


def test_the_policy_gradient_needs_answers_as_they_were_drawn(recipe):
    with pytest.raises(ConfigError, match="probability under which each token was written"):
        load_config(recipe, ["revision.rounds=1"], method="minillm")


def test_settings_survive_the_round_trip(recipe, tmp_path):
    config = load_config(recipe, method="minillm-lm")
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(again) == config
