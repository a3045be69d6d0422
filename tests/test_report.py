"""The page about a run: what it holds, that nothing in it is markup, and that it lives while a run goes on."""

import http.client
import json
import math
import random
import re
import subprocess
import sys
import threading
import time

import pytest
from made_runs import HOSTILE, lines, make_comparison, make_run, step_record
from test_docs import keys_under

from redistill.evaluation.answers import prompt_scores
from redistill.evaluation.readings import reference_divergences
from redistill.evaluation.significance import holm, paired_bootstrap
from redistill.report.curves import PANELS, Columns, curves
from redistill.report.page import Report, render
from redistill.report.plain import cut
from redistill.report.server import serve
from redistill.runlog import RunLog, Tail, read, write_whole


def page_of(*folders):
    data = Report(list(folders)).data()
    return data, render(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one")


def test_thinning_keeps_every_peak_and_the_mean():
    chance, columns = random.Random(1), Columns()
    values = [chance.gauss(0, 1) for _ in range(5003)]
    values[1234], values[4001] = 99.0, -99.0
    for step, value in enumerate(values, 1):
        columns.add(
            {"step": step, "loss": value, "rare": value} if step % 7 == 0 else {"step": step, "loss": value}
        )
    found = curves([columns], 200)
    loss, rare = found["y"]["loss"], found["y"]["rare"]
    assert len(found["x"]) == len(loss["mean"]) == 200 and found["x"] == sorted(found["x"])
    assert max(loss["high"]) == 99 and min(loss["low"]) == -99
    assert all(a <= b <= c for a, b, c in zip(loss["low"], loss["mean"], loss["high"], strict=True))
    assert sum(loss["mean"]) / 200 == pytest.approx(sum(values) / len(values), abs=0.01)
    assert all(value is not None for value in rare["mean"])
    short = Columns()
    for step in (3, 4, 9):
        short.add({"step": step, "loss": math.nan if step == 4 else step, "on": True, "name": "x"})
    assert curves([short], 200) == {
        "x": [3, 4, 9],
        "y": {"loss": {"mean": [3, None, 9]}},
        "lost": {"loss": 1},
        "steps": 3,
    }


def test_seeds_are_drawn_as_one_mean_with_a_band():
    chance, runs = random.Random(2), [Columns(), Columns(), Columns()]
    # The second ended earlier, the third logged every other step and lacks the key at one of them.
    logged = [range(1, 1001), range(1, 601), range(1, 1001, 2)]
    values = [{step: chance.gauss(n, 1) for step in steps} for n, steps in enumerate(logged)]
    del values[2][5]
    for run, steps, known in zip(runs, logged, values, strict=True):
        for step in steps:
            run.add({"step": step, **({"loss": known[step]} if step in known else {})})
    every = curves(runs, 1000)
    assert every["x"] == [*range(1, 1001)] and every["steps"] == 1000
    for place, step in enumerate(every["x"]):
        at = [known[step] for known in values if step in known]
        found = [every["y"]["loss"][name][place] for name in ("mean", "low", "high")]
        assert found == pytest.approx([sum(at) / len(at), min(at), max(at)], rel=1e-3)
    thin = curves(runs, 10)
    assert thin["x"] == [*range(51, 1000, 100)]
    early = [value for known in values for step, value in known.items() if step <= 100]
    loss = thin["y"]["loss"]
    assert [loss["low"][0], loss["high"][0]] == pytest.approx([min(early), max(early)], rel=1e-3)
    assert loss["mean"][0] == pytest.approx(sum(early) / len(early), rel=1e-3)
    late = [value for known in (values[0], values[2]) for step, value in known.items() if step > 900]
    assert loss["mean"][9] == pytest.approx(sum(late) / len(late), rel=1e-3)


def test_a_growing_file_is_read_once_and_line_by_line(tmp_path):
    log, tail = RunLog(tmp_path), Tail(tmp_path / "steps.jsonl")
    assert tail.more()[0] is False and list(tail.more()[1]) == []
    log.append("steps", {"step": 1})
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write('[1]\nno json\n{"step": 2')
    assert list(tail.more()[1]) == [{"step": 1}] and tail.broken == 2 and list(tail.more()[1]) == []
    with (tmp_path / "steps.jsonl").open("a") as file:
        file.write("0}\n")
    assert list(tail.more()[1]) == [{"step": 20}]
    write_whole(tail.path, '{"step": 1}\n')
    anew, records = tail.more()
    assert anew and list(records) == [{"step": 1}]


def test_tokens_are_cut_out_of_a_text_or_not_at_all():
    assert cut("a bc", [1, 1, 4]) == ["a", "", " bc"]
    assert cut("", []) == []
    for ends in (None, [1, 2], [3, 1, 4], ["1"], [9]):
        assert cut("a bc", ends) is None


def test_what_a_model_wrote_is_no_markup(run):
    data, page = page_of(run)
    head, block = page.split('<script type="application/json" id="data">')
    block, rest = block.split("</script>", 1)
    assert "<" not in block
    whole = json.dumps(data["answers"], ensure_ascii=False).replace("\ud800", "\ufffd")
    assert json.loads(block)["answers"] == json.loads(whole)
    assert "pwned" not in head + rest
    assert page.count("<script") == page.count("</script>") == 2
    # Nothing is asked of any network, and no other script runs.
    assert (
        not re.search(r"(src|href)=\"(?!#|data:,)", page) and "@import" not in page and "url(http" not in page
    )
    assert "default-src 'none'" in page and re.search(r"script-src 'sha256-[\w+/=]+';", page)


def test_the_sentence_and_the_table_say_what_results_json_says(run):
    data, _ = page_of(run)
    sentence = data["verdict"]["sentence"]
    after = data["table"][2]
    assert f"{after['rougeL_mean']:.2f} ± 1.40 against 3.20" in sentence and "p < 0.001" in sentence
    assert "74 % of its parameters and 1.26 times its speed" in sentence
    assert [row["role"] for row in data["table"]] == ["teacher", "before", "after"]
    assert after["tests"]["kl_to_teacher"]["difference"] == -1.05
    assert data["runs"][0]["names"] == ("Teacher-135M", "20 of its layers")
    assert data["runs"][0]["state"]["finished"] and data["runs"][0]["missing"] == []


def test_a_difference_that_is_not_significant_is_not_called_better(tmp_path):
    made = make_run(tmp_path / "run")
    results = json.loads((made / "results.json").read_text())
    results["differences"][0] |= {"p": 0.3, "low": -1.0}
    (made / "results.json").write_text(json.dumps(results))
    assert "not clearly better or worse" in page_of(made)[0]["verdict"]["sentence"]
    del results["differences"]
    (made / "results.json").write_text(json.dumps(results))
    verdict = page_of(made)[0]["verdict"]
    assert "rose" in verdict["sentence"] and "not tested" in verdict["more"][0]


def test_revisions_are_cut_at_the_error(run):
    data, _ = page_of(run)
    shown = data["runs"][0]["revisions"]
    assert shown["total"] == 24 and len(shown["shown"]) == 24
    for row in shown["shown"]:
        assert (
            row["tokens"] and row["rejected"] == " wrong" and row["replacement"] in (" right", "<|im_end|>")
        )
        assert all(kl is not None for part in ("kept", "old", "new") for _, kl in row[part])
        assert len(row["kept"]) == row["position"]
    hostile = [row for row in shown["shown"] if "script" in "".join(text for text, _ in row["new"])]
    assert hostile and "".join(text for text, _ in hostile[0]["new"]).strip() in [
        " ".join(text.split(" ")) for text in HOSTILE
    ]


def test_many_revisions_leave_the_newest_and_the_telling_ones(tmp_path):
    made = make_run(tmp_path / "run", revisions=2000, measured=False)
    shown = page_of(made)[0]["runs"][0]["revisions"]
    assert shown["total"] == 2000 and 200 <= len(shown["shown"]) <= 240
    records = [json.loads(line) for line in (made / "revisions.jsonl").read_text().splitlines()]
    gains = [r["log_likelihood_after"] - r["log_likelihood_before"] for r in records]
    numbers = {row["number"] for row in shown["shown"]}
    assert {2000, gains.index(max(gains)) + 1, gains.index(min(gains)) + 1} <= numbers
    assert shown["helped"] == sum(gain > 0 for gain in gains)


def test_old_partial_and_strange_folders_give_a_page(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    data, _ = page_of(empty)
    assert "not begun" in data["verdict"]["sentence"] and len(data["runs"][0]["missing"]) >= 5
    old = make_run(tmp_path / "old", measured=False)
    records = [json.loads(line) for line in (old / "revisions.jsonl").read_text().splitlines()]
    lines(
        old / "revisions.jsonl",
        ({k: v for k, v in r.items() if "ends" not in k and "tokens" not in k} for r in records),
    )
    (old / "views.jsonl").unlink()
    data, _ = page_of(old)
    assert not any(row["tokens"] for row in data["runs"][0]["revisions"]["shown"])
    assert any("views.jsonl" in each for each in data["runs"][0]["missing"])
    assert "60 steps are done" in data["verdict"]["sentence"]
    strange = tmp_path / "strange"
    strange.mkdir()
    for name in ("steps", "revisions", "views", "evaluations"):
        (strange / f"{name}.jsonl").write_text(
            '{"step": "x", "loss": "y", "kl": [1], "after": 3, "before": 0}\n{"step": 2, "loss": NaN, "after": "a", '
            '"after_ends": [9], "response": "a", "ends": [1], "positions": [{"position": 5}], "gain": Infinity}\nhalf'
        )
    (strange / "results.json").write_text(
        '{"rows": [{"name": 3}, 7, {"name": "student after", "rougeL_mean": "x"}], "differences": {"a": 1}}'
    )
    (strange / "recipe.yaml").write_text("a: [1")
    page_of(strange)
    (strange / "results.json").write_text("[]")
    page_of(strange)


def test_a_comparison_and_an_evaluation(tmp_path):
    compared = make_comparison(tmp_path / "compared")
    data, _ = page_of(compared)
    assert (
        "gkd has the highest ROUGE-L, 12.00 ± 0.40, above the baseline kd (10.00, p 0.002 after Holm)"
        in data["verdict"]["sentence"]
    )
    assert [(run["name"], run["seeds"]) for run in data["runs"]] == [("kd", 2), ("gkd", 2)]
    of_seeds = [list(read(compared / "runs" / "gkd" / f"seed-{seed}" / "steps.jsonl")) for seed in (1, 2)]
    means = [(one["kl"] + two["kl"]) / 2 for one, two in zip(*of_seeds, strict=True)]
    gkd = data["runs"][1]
    assert gkd["curves"]["y"]["kl"]["mean"] == pytest.approx(means, rel=1e-3)
    assert gkd["spent"]["whole"] == pytest.approx(
        sum(each["seconds"] for run in of_seeds for each in run) / 2, rel=1e-3
    )
    assert gkd["recipe"]["training.seed"] == "3" and gkd["revisions"]["total"] == 24
    assert [row["tests"].keys() for row in data["table"]][3] == {
        "rougeL_mean",
        "exact_match",
        "kl_to_teacher",
    }
    assert [column["name"] for column in data["answers"]["columns"]] == ["teacher", "start", "kd", "gkd"]
    assert all(cell is not None for row in data["answers"]["rows"] for cell in row[4])
    evaluation = compared / "runs" / "kd" / "seed-1" / "evaluation"
    assert "kd reaches" in page_of(evaluation)[0]["verdict"]["sentence"]


def test_runs_side_by_side_name_a_winner_and_one_teacher(run, tmp_path):
    other = make_run(tmp_path / "other", seed=1)
    data, _ = page_of(run, other)
    assert [row["role"] for row in data["table"]] == ["teacher", "before", "after", "after"]
    assert "has the highest ROUGE-L" in data["verdict"]["sentence"]
    assert len(data["answers"]["columns"]) == 4
    assert [run["name"] for run in page_of(run, run.parent / ".." / run.parent.name / "one")[0]["runs"]]


def test_every_number_of_a_step_has_a_place_on_the_page():
    drawn = {key for panel in PANELS for key in (*panel.keys, *panel.points)}
    logged = {
        key
        for key in keys_under("## `steps.jsonl`") | keys_under("## `evaluations.jsonl`")
        if not key.startswith("seconds")
    }
    assert logged - {"step", "progress"} == drawn - {"policy"}


def test_fifty_thousand_steps_stay_small(tmp_path):
    made = make_run(tmp_path / "long", steps=50_000, revisions=5000)
    started = time.process_time()
    _, page = page_of(made)
    assert len(page.encode()) < 6e6
    assert time.process_time() - started < 20


def ask(server, path, host=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    port = server.server_address[1]
    connection.putrequest("GET", path, skip_host=True)
    for name, value in {"Host": host or f"127.0.0.1:{port}", **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read(), answer.headers


@pytest.fixture
def live(tmp_path):
    folder = tmp_path / "not-yet"
    with serve([folder], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server, folder
        server.shutdown()
        thread.join()


def test_the_live_page_waits_follows_and_answers_itself_only(live):
    server, folder = live
    status, page, headers = ask(server, "/")
    assert status == 200 and b"data-live" in page and b"connect-src 'self'" in page
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    status, before, headers = ask(server, "/data.json")
    assert "not begun" in json.loads(before)["verdict"]["sentence"]
    assert ask(server, "/data.json", If_None_Match=headers["ETag"])[0] == 304
    log, chance = RunLog(folder), random.Random(0)
    for step in (1, 2):
        log.append("steps", step_record(step, 10, chance))
    deadline = time.monotonic() + 20
    while (answer := ask(server, "/data.json", If_None_Match=headers["ETag"]))[
        0
    ] == 304 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answer[0] == 200 and json.loads(answer[1])["runs"][0]["curves"]["x"] == [1, 2]
    assert ask(server, "/", host=f"evil.example:{server.server_address[1]}")[0] == 403
    assert ask(server, "/", host="127.0.0.1:1")[0] == 403
    for path in (
        "/../recipe.yaml",
        "/recipe.yaml",
        "/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/data.json/../../x",
    ):
        assert ask(server, path)[0] == 404
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(ValueError, match=f"port {server.server_address[1]} cannot be had"):
        serve([folder], server.server_address[1])


def test_the_commands(run, tmp_path):
    command = [sys.executable, "-m", "redistill", "report"]
    ended = subprocess.run(
        [*command, str(run), "--output", str(tmp_path / "x" / "page.html")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0 and "page.html (" in ended.stdout
    assert (tmp_path / "x" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    ended = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "is no folder" in ended.stderr and "Traceback" not in ended.stderr


def test_two_runs_are_told_apart_by_their_kept_answers(run, tmp_path):
    other = make_run(tmp_path / "two", seed=1)
    data, _ = page_of(run, other)
    (first, second) = [row for row in data["table"] if row["role"] == "after"]
    assert first["between"] == {} and set(second["between"]) == {"rougeL_mean", "kl_to_teacher"}
    expected = []
    for scores_of, kind in ((prompt_scores, "answers"), (reference_divergences, "references")):
        files = [folder / kind / "student-after.jsonl" for folder in (other, run)]
        expected.append(paired_bootstrap(*map(scores_of, files)))
    adjusted = holm([each.p_value for each in expected])
    for found, wanted, p in zip(second["between"].values(), expected, adjusted, strict=True):
        assert found["against"] == "one" and found["prompts"] == 16
        assert found["difference"] == pytest.approx(wanted.difference, rel=1e-4)
        assert (found["low"], found["p"]) == (pytest.approx(wanted.low, rel=1e-4), pytest.approx(p, rel=1e-4))
    verdict = data["verdict"]
    assert re.search(r"highest ROUGE-L, .* (not clearly|clearly) above (one|two)", verdict["sentence"])
    assert (
        verdict["more"][0].startswith("two against one: ROUGE-L ")
        and "one training seed" in verdict["more"][1]
    )


def test_what_cannot_be_told_apart_is_said(run, tmp_path):
    def against(change) -> tuple[dict, list[str]]:
        folder = make_run(tmp_path / f"run-{len(list(tmp_path.iterdir()))}", seed=1)
        change(folder)
        data, _ = page_of(run, folder)
        return data["table"][-1]["between"], data["verdict"]["more"]

    def cut_short(folder):
        file = folder / "answers" / "student-after.jsonl"
        file.write_text("".join(file.read_text().splitlines(True)[:-1]))

    def asked_else(folder):
        file = folder / "answers" / "student-after.jsonl"
        file.write_text(file.read_text().replace("What is", "Who is"))

    def other_teacher(folder):
        for place, name in ((run, "a"), (folder, "b")):
            settings = {"settings": {"teacher": name}}
            (place / "references" / "student-after.settings.json").write_text(json.dumps(settings))

    for change, tested, reason in (
        (cut_short, set(), "not every answer is kept"),
        (asked_else, set(), "not asked the same in the same way"),
        (other_teacher, {"rougeL_mean"}, "their teachers are not the same"),
    ):
        between, more = against(change)
        assert set(between) == tested and any(reason in each for each in more), change
    (run / "references" / "student-after.settings.json").unlink()
