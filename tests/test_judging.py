"""`redistill judge` as a user runs it: two evaluations, a tiny judge, a kill in between, folders that do not fit."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_docs import keys_under
from tiny import save_tiny, tiny_llama, tiny_tokenizer

from redistill.commands import Request, evaluate
from redistill.evaluation.pairs import Evaluated, pair_folders
from redistill.evaluation.replies import ReplyReader
from redistill.judging import JudgeRequest, judge_folders

WORDS = ("river", "park", "fox", "dog", "apple")


def redistill(*args, cwd, code=0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "redistill", *map(str, args)],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and two evaluations, a and b; those of b have a seed more."""
    folder = tmp_path_factory.mktemp("judge")
    save_tiny(folder)
    tokenizer = tiny_tokenizer()
    # This judge finds wins and losses; most random ones look at the place only, and find ties.
    for name, layers, seed in (("other", 1, 7), ("judge", 3, 5)):
        tiny_llama(len(tokenizer), layers=layers, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    records = [{"prompt": f"What is the {word}?", "completion": f"The {word} is near."} for word in WORDS]
    (folder / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {
        "data": str(folder / "data.jsonl"),
        "template": "plain",
        "max_new_tokens": 8,
        "exposure_prompts": 0,
    }
    for model, teacher, seeds, name in (("student", "teacher", (10,), "a"), ("other", None, (10, 20), "b")):
        evaluate(
            str(folder / model),
            teacher and str(folder / teacher),
            Request(seeds=seeds, **options),
            folder / name,
            Console(file=io.StringIO()),
        )
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_folders_are_judged_and_every_judgement_is_kept(place):
    asked = {"margin": 0.0, "batch_size": 4, "max_answer_tokens": 99, "max_question_tokens": 98, "limit": 5,
             "dtype": "float32", "template": "chat"}  # fmt: skip
    options = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
    said = redistill("judge", "judge", "a", "b", *options, "--output", "out", cwd=place)
    assert "Judging data.jsonl: reading both orders  4/10" in said and "Wins are those of a over b." in said
    record = json.loads((place / "out" / "judge.json").read_text())
    (row,) = record["rows"]
    kept = lines(place / "out" / "judgements.jsonl")
    assert [(line["seed"], line["index"]) for line in kept] == [
        (s, n) for s in ("greedy", 10) for n in range(5)
    ]
    ours, theirs = (
        {(r["seed"], r["index"]): r for r in lines(place / f / "answers-student.jsonl")} for f in "ab"
    )
    for line in kept:
        key = line["seed"], line["index"]
        assert (line["first"], line["second"]) == (ours[key]["answer"], theirs[key]["answer"])
        assert (line["question"], line["reference"]) == (ours[key]["prompt"], ours[key]["references"][0])
    verdicts = [line["verdict"] for line in kept]
    assert (row["wins"], row["ties"], row["losses"]) == tuple(map(verdicts.count, (1, 0, -1)))
    assert (row["pairs"], row["prompts"], row["seeds"]) == (10, 5, ["greedy", 10])
    assert (
        row["difference"] == pytest.approx(sum(verdicts) / 10)
        and row["low"] <= row["difference"] <= row["high"]
    )
    assert record["judge"] == "judge" and record["first"] == {"folder": "a", "row": "student"}
    assert record["versions"]["torch"]
    assert record["settings"] == {**asked, "sets": [], "references": True}
    assert keys_under("## `judge.json`") == {*record, *row}
    assert keys_under("## `judgements.jsonl`") == set(kept[0])
    # Turned round, every judgement is the opposite.
    judge(place, place / "back", sides=(Evaluated(place / "b"), Evaluated(place / "a")), margin=0.0)
    back = {(line["seed"], line["index"]): line for line in lines(place / "back" / "judgements.jsonl")}
    assert any(verdicts)
    for line in kept:
        turned = back[line["seed"], line["index"]]
        assert turned["verdict"] == -line["verdict"]
        assert turned["lead"] == pytest.approx(-line["lead"], abs=1e-4)  # read in batches of another size


def test_a_student_against_the_teacher_of_the_same_folder(place):
    sides = Evaluated(place / "a"), Evaluated(place / "a", "teacher")
    (judged,), said = judge(place, place / "teacher-row", sides=sides, limit=2)
    assert f"Wins are those of {place / 'a'} over {place / 'a'} (teacher)." in said
    theirs = {(r["seed"], r["index"]): r["answer"] for r in lines(place / "a" / "answers-teacher.jsonl")}
    assert len(judged.paired.pairs) == 4
    assert all(pair.second == theirs[pair.key] != pair.first for pair in judged.paired.pairs)


def judge(place: Path, output: Path, *, sides=(), anew=False, **options):
    """What the judge says of `sides` (a and b, if left out), and what is printed."""
    sides = sides or [Evaluated(place / name) for name in "ab"]
    console = Console(file=io.StringIO(), width=100)
    request = JudgeRequest(batch_size=2, **options)
    judged = judge_folders(str(place / "judge"), *sides, request, output, console, anew=anew)
    return judged, console.file.getvalue()


def test_a_judge_that_was_killed_reads_only_what_is_missing(place, tmp_path, monkeypatch):
    (whole,), _ = judge(place, tmp_path / "whole")
    reads, read = [], ReplyReader.read

    class Killed(Exception):
        pass

    def dies_at_the_third(self, prompts):
        if len(reads) == 2:
            raise Killed
        reads.append(len(prompts))
        return read(self, prompts)

    monkeypatch.setattr(ReplyReader, "read", dies_at_the_third)
    with pytest.raises(Killed):
        judge(place, tmp_path / "cut")
    path = tmp_path / "cut" / "judgements.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)
    assert len(kept) == 4 and reads == [4, 4]
    path.write_bytes(b"".join(kept[:3]) + kept[3][:50])  # the kill fell into a line
    monkeypatch.setattr(ReplyReader, "read", lambda self, prompts: reads.append(1) or read(self, prompts))
    (again,), _ = judge(place, tmp_path / "cut")
    assert len(reads) == 2 + 4  # the unfinished batch as a whole, then those never read
    assert again.verdicts == whole.verdicts
    assert path.read_bytes() == (tmp_path / "whole" / "judgements.jsonl").read_bytes()
    rows = [json.loads((tmp_path / run / "judge.json").read_text())["rows"] for run in ("cut", "whole")]
    assert rows[0] == rows[1]
    judge(place, tmp_path / "cut")
    assert len(reads) == 6
    # Nothing of other settings is mixed in.
    with pytest.raises(ValueError, match=r"judgements\.jsonl .*\(margin\).*--anew"):
        judge(place, tmp_path / "cut", margin=2.0)
    with pytest.raises(ValueError, match=r"\(reference, prompts\)"):
        judge(place, tmp_path / "cut", references=False)
    judge(place, tmp_path / "cut", references=False, anew=True)
    assert {line["reference"] for line in lines(path)} == {""}


def change(path: Path, edit) -> None:
    """`edit` changes the object of a .json file, or every line of a .jsonl file in place."""
    if path.suffix == ".json":
        record = json.loads(path.read_text())
        edit(record)
        path.write_text(json.dumps(record))
    else:
        records = lines(path)
        for record in records:
            edit(record)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


RESULTS, ANSWERS = "results.json", "answers-student.jsonl"
APART = {
    "version": (RESULTS, lambda r: r["sets"][0].update(version="1-0"), r"a answers version 1-.* version 1-0"),
    "template": (RESULTS, lambda r: r.update(template="chat"), "template plain and .* with chat"),
    "set": (RESULTS, lambda r: [row.update(set=r["sets"][0]["name"]) for row in r["rows"]],
            r"no set that they have in common: .*a answers .*data.jsonl \(--data\), .*b .*data.jsonl\."),
    "prompts": (ANSWERS, lambda r: r.update(prompt=r["prompt"] + "?"), "answer different prompts"),
    "seeds": (ANSWERS, lambda r: r.update(seed=f"{r['seed']}x"), "no answers in common: .*seeds greedy, 10, .*10x"),
    "unfinished": (RESULTS, Path.unlink, "b is no output folder of `redistill evaluate`, or"),
    "demo": (RESULTS, lambda r: r.update(sets=[]), "b is no output folder of `redistill evaluate`, or"),
    "no answers": (ANSWERS, Path.unlink, "there is no file .*answers-student.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("what", APART)
def test_folders_that_do_not_belong_together(place, tmp_path, what):
    file, edit, says = APART[what]
    other = Path(shutil.copytree(place / "b", tmp_path / "b"))
    edit(other / file) if edit is Path.unlink else change(other / file, edit)
    with pytest.raises(ValueError, match=says) as problem:
        pair_folders(Evaluated(place / "a"), Evaluated(other))
    assert "\n" not in str(problem.value)


def test_what_the_command_refuses_and_what_it_only_says(place, tmp_path):
    said = redistill("judge", "judge", "a", "student", "--output", "never", cwd=place, code=2)
    assert said.startswith("redistill: student is no output folder of `redistill evaluate`")
    assert not (place / "never").exists()
    with pytest.raises(ValueError, match="compared with itself"):
        pair_folders(Evaluated(place / "a"), Evaluated(tmp_path / ".." / place / "a"))
    with pytest.raises(ValueError, match=r"no set that both have answered dolly: .*a answers .*data.jsonl"):
        pair_folders(Evaluated(place / "a"), Evaluated(place / "b"), sets=["dolly"])
    # An empty answer is judged, and said.
    for name in "ab":
        shutil.copytree(place / name, tmp_path / name)
    change(tmp_path / "b" / ANSWERS, lambda r: r.update(answer=" ") if r["index"] == 3 else None)
    (judged,), said = judge(place, tmp_path / "out", sides=[Evaluated(tmp_path / name) for name in "ab"])
    assert "2 of 10 answers of" in said and "such as that of seed greedy to prompt 3" in said
    assert judged.record()["empty_first"] == 0 and judged.record()["empty_second"] == 2


def test_sets_are_judged_one_by_one(place, tmp_path):
    for name in "ab":
        for each in ("dolly", "vicuna"):
            shutil.copytree(place / name, tmp_path / name / each)
        results = json.loads((place / name / RESULTS).read_text())
        results["rows"] = [{**results["rows"][-1], "set": each} for each in ("dolly", "vicuna")]
        results["sets"] = [{**results["sets"][0], "name": each} for each in ("dolly", "vicuna")]
        (tmp_path / name / RESULTS).write_text(json.dumps(results))
    judged, said = judge(
        place, tmp_path / "out", sides=[Evaluated(tmp_path / name) for name in "ab"], limit=2
    )
    assert [(each.paired.name, len(each.paired.pairs)) for each in judged] == [("dolly", 4), ("vicuna", 4)]
    assert "Judging vicuna" in said
    kept = lines(tmp_path / "out" / "vicuna" / "judgements.jsonl")
    assert {(line["set"], line["index"]) for line in kept} == {("vicuna", 0), ("vicuna", 1)}
    rows = json.loads((tmp_path / "out" / "judge.json").read_text())["rows"]
    assert [row["set"] for row in rows] == ["dolly", "vicuna"]
    only, _ = judge(
        place, tmp_path / "one", sides=[Evaluated(tmp_path / name) for name in "ab"], sets=("vicuna",)
    )
    assert [each.paired.name for each in only] == ["vicuna"] and len(only[0].verdicts.by_prompt) == 5
