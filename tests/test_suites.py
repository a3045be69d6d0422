"""The sets as data: found where they lie, refused in one line where not, and their text in the version."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny import save_tiny, tiny_tokenizer

from redistill.chat import prompt_ids
from redistill.commands import Request, evaluate
from redistill.data import DataError
from redistill.evaluation import suites
from redistill.evaluation.suites import PAPER, SUITES, data_root, load_suite, locate, suite_named, version_of

SHARED = Path(__file__).parents[2] / "shared" / "data"


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def records(count, **more):
    return [{"instruction": f"Say {n}.", "input": "", "output": f"{n}", **more} for n in range(count)]


def refused(repository, file):
    raise OSError(f"no way to {repository}: {file}\nsecond line")


@pytest.mark.parametrize("name", SUITES)
def test_the_real_sets_have_their_records(name):
    if locate(name, SHARED) is None:
        pytest.skip(f"{name} is not in ../shared/data beside the checkout")
    asked = load_suite(name, SHARED, download=refused)
    assert len(asked.examples) == SUITES[name].records
    assert all(example.references and example.prompt for example in asked.examples)
    if name == "sinst":
        assert max(len(example.references) for example in asked.examples) > 1
    assert load_suite(name, SHARED, limit=7).examples == asked.examples[:7]


def test_our_layout_comes_first_then_that_of_a_copy_of_the_hub(tmp_path):
    write(tmp_path / "vicuna" / "valid.jsonl", records(80, prompt="rendered already"))
    theirs = load_suite("vicuna", tmp_path, download=refused)
    assert theirs.source.endswith("valid.jsonl") and theirs.examples[3].prompt == "Say 3."
    write(tmp_path / "vicuna" / "test.jsonl", records(80))
    ours = load_suite("vicuna", tmp_path, download=refused)
    assert ours.source.endswith("test.jsonl") and ours.version == theirs.version
    write(tmp_path / "sinst" / "11_" / "valid.jsonl", records(1694))
    assert len(load_suite("sinst", tmp_path, download=refused).examples) == 1694


def test_the_hub_is_the_second_place(tmp_path):
    asked_for = []

    def download(repository, file):
        asked_for.append((repository, file))
        write(tmp_path / "cache" / "valid.jsonl", records(10_003))
        return tmp_path / "cache" / "valid.jsonl"

    asked = load_suite("uinst", tmp_path / "nothing", download=download)
    assert asked_for == [("MiniLLM/uinst", "11_/valid.jsonl")]
    assert (
        len(asked.examples) == 10_000 and asked.examples[-1].prompt == "Say 9999."
    )  # the script's first 10,000


def test_a_missing_set_is_one_line_that_says_how_to_get_it(tmp_path):
    for name, words in (
        (
            "self_instruct",
            ["self_instruct/test.jsonl", "hf download MiniLLM/self-inst", "--data-root", "no way to"],
        ),
        ("uinst_short", ["uinst_short/test.jsonl", "no hub has it", "REDISTILL_DATA"]),
    ):
        with pytest.raises(DataError) as problem:
            load_suite(name, tmp_path, download=refused)
        assert "\n" not in str(problem.value)
        assert all(word in str(problem.value) for word in [*words, str(tmp_path)])
    with pytest.raises(ValueError, match=r"did you mean dolly\? Known are dolly, "):
        suite_named("dolli")


def test_a_set_that_is_not_whole_is_refused(tmp_path):
    path = tmp_path / "vicuna" / "test.jsonl"
    for count in (79, 81):
        write(path, records(count))
        with pytest.raises(DataError, match=f"{count} records, and vicuna has 80"):
            load_suite("vicuna", tmp_path, download=refused)
    assert len(load_suite("vicuna", tmp_path, limit=8, download=refused).examples) == 8
    good = path.read_text().splitlines()
    for line, word in (
        ('{"instruction": ', "is not JSON"),
        ('{"instruction": "x", "output": ""}', "empty"),
        ("3", "no object"),
    ):
        path.write_text("\n".join([*good[:4], line, *good[5:]]))
        with pytest.raises(DataError, match=rf"test\.jsonl:5 .*{word}"):
            load_suite("vicuna", tmp_path, download=refused)


def test_the_version_is_that_of_the_text(tmp_path):
    write(tmp_path / "vicuna" / "test.jsonl", records(80, category="a"))
    asked = load_suite("vicuna", tmp_path)
    version = asked.version
    assert version.startswith("1-") and len(version) == 10
    assert version_of(asked.examples[:8]) == load_suite("vicuna", tmp_path, limit=8).version != version
    for key in ("instruction", "input", "output"):
        changed = records(80)
        changed[40][key] += "."
        write(tmp_path / "vicuna" / "test.jsonl", changed)
        assert load_suite("vicuna", tmp_path).version != version
    write(tmp_path / "vicuna" / "test.jsonl", records(80, category="b", id="x"))
    assert load_suite("vicuna", tmp_path).version == version


def test_the_root_is_the_option_the_environment_or_here(monkeypatch):
    monkeypatch.setenv(suites.ROOT_VARIABLE, "/somewhere")
    assert data_root(Path("/here")) == Path("/here")
    assert data_root() == Path("/somewhere")
    monkeypatch.delenv(suites.ROOT_VARIABLE)
    assert data_root() == Path("data")


def test_both_templates_write_every_set(tmp_path):
    tokenizer = tiny_tokenizer()
    write(tmp_path / "vicuna" / "test.jsonl", records(80))
    example = load_suite("vicuna", tmp_path).examples[0]
    alpaca, chat = (prompt_ids(example, tokenizer, template=name, system=None) for name in ("alpaca", "chat"))
    assert tokenizer.decode(alpaca).endswith("### Instruction:\nSay 0.\n\n### Response:\n")
    assert tokenizer.decode(chat).endswith("<|im_start|>assistant\n")


def test_a_command_over_two_sets_and_its_student_alone_later(tmp_path):
    models = save_tiny(tmp_path)
    for name in ("vicuna", "dolly"):
        write(tmp_path / "data" / name / "test.jsonl", records(SUITES[name].records, set=name))
    console = Console(file=io.StringIO(), width=100)
    request = Request(
        sets=("dolly", "vicuna"), data_root=str(tmp_path / "data"), seeds=(10,), greedy=False, template="alpaca",
        max_new_tokens=17, limit=3, exposure_prompts=2,
    )  # fmt: skip
    student, teacher, out = str(models.student), str(models.teacher), tmp_path / "out"
    evaluate(student, teacher, request, out, console)
    said = console.file.getvalue()
    assert "dolly: 3 prompts, version 1-" in said and "Measuring student on vicuna: exposure bias" in said
    results = json.loads((out / "results.json").read_text())
    assert [(row["set"], row["name"]) for row in results["rows"]] == [
        (name, who) for name in request.sets for who in ("teacher (teacher)", "student")
    ]
    assert [(each["name"], each["records"]) for each in results["sets"]] == [("dolly", 3), ("vicuna", 3)]
    assert results["template"] == "alpaca" and results["settings"]["request"]["max_length"] is None
    # The student by itself, against what the teacher wrote then: the same row.
    alone = evaluate(
        student, teacher, request, tmp_path / "alone", console, teacher_row=False, teacher_answers=out
    )
    assert not (tmp_path / "alone" / "dolly" / "answers-teacher.jsonl").exists()
    for measured in alone:
        (row,) = measured.rows
        before = next(r for r in results["rows"] if (r["set"], r["name"]) == (row.set, "student"))
        assert row.kl_to_teacher == before["kl_to_teacher"] > 0
        assert row.excess_error == before["excess_error"]
    lines = (out / "vicuna" / "exposure-student.jsonl").read_text().splitlines()
    assert [(r["prefixes"], r["index"]) for r in map(json.loads, lines)] == [
        ("student", 0), ("student", 1), ("teacher", 0), ("teacher", 1)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"--sets .*--data"):
        evaluate(student, None, Request(), out, console)


def test_the_papers_five():
    assert len(PAPER) == 5 and set(PAPER) == SUITES.keys() - {"uinst_short"}
    assert "not the [11, inf) split" in SUITES["uinst_short"].note
