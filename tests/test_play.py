"""`redistill play`: the same answers as `redistill revise`, pairs that train, and a page that shows text as text.

Needs gradio (the extra `play`); the page itself also Debian's chromium.
"""

import errno
import json
import shutil
import socket
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_runs import HOSTILE
from tiny import save_tiny

from redistill.chat import decode_response, response_ids
from redistill.data import load_examples
from redistill.marking import Answered, Models, Question, load_models
from redistill.measure import Request
from redistill.play.command import play
from redistill.play.page import Table
from redistill.play.pairs import check_place, keep_pair
from redistill.play.server import HOST, Serving, bind
from redistill.play.turn import take_turn
from redistill.sample import Sample

CHROMIUM = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
CONTRAST = Path(__file__).with_name("contrast.js").read_text(encoding="utf-8")
REQUEST = Request(max_new_tokens=12, temperature=0.9)
QUESTION = Question("Name a colour.", REQUEST, seed=3)
ENGINES = "${document.title='pwned'} {{value}} {{#if 1}}x{{/if}} `\\u0041`"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("models"))
    return load_models(str(folder.student), str(folder.teacher), "float32")


# A turn


def test_clicks_correct_as_often_as_rounds_of_revise(models):
    turn = take_turn(models, QUESTION)
    shown = turn.shown()
    assert shown["state"] == "marked" and list(turn.texts()) == ["student", "teacher"]
    place = shown["row"]["position"]
    assert len(shown["row"]["kept"]) == place and shown["row"]["rejected"] and shown["row"]["replacement"]
    for rounds in (1, 2):
        turn = turn.again()
        expected, _ = models.revise(turn.answered, rounds)
        assert turn.revised == expected and len(expected.edits) == turn.rounds == rounds
        assert next(iter(turn.texts())) == "revised"
    first = turn.revised.edits[0]
    # What was marked is what the first click corrected.
    assert (first.position, round(first.kl, 3)) == (place, round(shown["row"]["kl"], 3))
    assert turn.shown()["state"] == "revised" and turn.shown()["row"]["gain"] is not None
    said = decode_response(turn.revised.response, models.tokenizer)
    row = turn.shown()["row"]
    now = "".join(piece for piece, _ in row["kept"]) + row["replacement"] * (row["replacement"] in said)
    assert (now + "".join(piece for piece, _ in row["new"])) == said


def test_a_student_that_is_its_teacher_has_nothing_to_correct(models):
    same = replace(models, student=models.teacher)
    turn = take_turn(
        same, replace(QUESTION, teacher_token="argmax", request=Request(max_new_tokens=8, temperature=0))
    )
    shown = turn.shown()
    assert shown["state"] == "agreed" and not shown["row"]["old"] and len(shown["row"]["kept"]) > 0
    assert max(kl for _, kl in shown["row"]["kept"]) < 1e-4 and turn.again().done
    with pytest.raises(ValueError, match="prompt is empty"):
        take_turn(models, replace(QUESTION, prompt=" \n"))


# Pairs


def test_pairs_are_lines_that_train_and_leave_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "new" / "pairs.jsonl"
    assert keep_pair(file, "Who?\nYou.", "Me \u202e\u001b[31m</script>", "revised") == 1
    file.write_bytes(file.read_bytes().rstrip(b"\n"))  # an editor that ends no last line
    assert keep_pair(file, "Where?", "Here.", "edited") == 2
    (first, second) = load_examples(file).examples
    assert (first.prompt, first.references) == ("Who?\nYou.", ("Me \u202e\u001b[31m</script>",))
    assert (second.prompt, second.references) == ("Where?", ("Here.",))
    before = file.read_bytes()
    for answer in ("", " \n", "half \ud800", "NUL \0"):
        with pytest.raises(ValueError, match="it was not saved"):
            keep_pair(file, "Who?", answer, "student")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ValueError, match="could not be written: No space left"):
        keep_pair(file, "Who?", "Me.", "student")
    assert file.read_bytes() == before


def test_what_is_wrong_is_one_sentence(tmp_path, monkeypatch):
    for path, reason in ((tmp_path / "a.txt", "ends with .jsonl"), (tmp_path / "b.jsonl", "is a folder")):
        (tmp_path / "b.jsonl").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=reason):
            check_place(path)
    how = {"teacher_token": "sample", "seed": 0, "pairs": tmp_path / "p.jsonl", "host": HOST, "console": None}
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r'pip install "redistill\[play\]"'):
        play(("student", "teacher"), REQUEST, port=0, **how)
    monkeypatch.undo()
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(ValueError, match="choose another with --port"):
            play(("student", "teacher"), REQUEST, port=taken.getsockname()[1], **how)
    with pytest.raises(ValueError, match="no address of this machine"):
        bind("192.0.2.1", 0)
    for name in (str(tmp_path / "none"), "./none"):
        with pytest.raises(ValueError, match="none"):
            play((name, name), REQUEST, port=0, **how)


# The page


class Hostile(Models):
    """Models that write what a model should not."""

    def answer(self, question: Question) -> Answered:
        found = super().answer(question)
        text = " ".join(HOSTILE).replace("\ud800", "").replace("\0", "") + ENGINES
        ids = response_ids(text, self.tokenizer, template=question.request.template)
        sample = Sample(found.sample.prompt, tuple(ids), "rollout", "prompt")
        generator = torch.Generator()
        generator.set_state(found.state)
        return replace(found, sample=sample, score=self._scored(question, sample, generator))

    def teachers_answer(self, question: Question) -> tuple[int, ...]:
        return tuple(response_ids(HOSTILE[0] + ENGINES, self.tokenizer, template=question.request.template))


@pytest.fixture
def serving(models, tmp_path):
    pytest.importorskip("gradio", reason='gradio is not installed: pip install "redistill[play]"')
    hostile = Hostile(models.student, models.teacher, models.tokenizer, models.vocabulary)
    request = replace(REQUEST, max_new_tokens=400)
    table = Table(hostile, ("a/student", "a/teacher"), request, 3, "sample", tmp_path / "pairs.jsonl")
    with bind(HOST, 0) as bound:
        served = Serving(table, HOST, bound)
        thread = threading.Thread(target=served.run, daemon=True)
        thread.start()
        yield served, table
        served.stop()
        thread.join(20)
        assert not thread.is_alive()


def asked(address: str, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code


def test_one_asks_revises_and_keeps_and_all_stays_text(serving):
    served, table = serving
    assert asked(served.address) == 200
    assert (
        asked(served.address, Host="evil.example")
        == asked(served.address, Origin="http://evil.example")
        == 403
    )
    if CHROMIUM is None:
        pytest.skip("no chromium is installed: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with playwright() as opener:
        browser = opener.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        wrong, addresses = [], []
        page.on(
            "console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(served.address)
        prompt = f"<b>bold?</b> {ENGINES}"
        page.get_by_label("Prompt").fill(prompt)
        page.get_by_role("button", name="Ask").click()
        page.locator(".turn").wait_for()
        student, teacher = (page.get_by_role("region", name=name) for name in ("Student", "Teacher"))
        assert page.locator(".turn .asked").inner_text() == prompt
        assert "<img src=x onerror=alert(1)>" in teacher.inner_text() and ENGINES in teacher.inner_text()
        for mark in ("U+202E", "U+200B", "U+001B"):
            assert mark in student.inner_text()
        assert student.locator(".tk").count() > 20 and student.locator(".fix del").count() == 1
        assert page.locator(".turn img, .turn b, .turn script").count() == 0
        page.get_by_role("button", name="Revise").click()
        student.get_by_text("revised").wait_for()
        assert student.locator(".before").count() == 1
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(500)  # gradio's parts change their colours slowly
            assert page.evaluate(CONTRAST) == []
        page.get_by_label("Teacher’s", exact=True).check()
        box = page.get_by_label("Answer as it is saved")
        page.wait_for_function("box => box.value.includes('onerror')", arg=box.element_handle())
        page.get_by_role("button", name="Save the pair").click()
        page.get_by_text("holds 1 line now").wait_for()
        box.fill(" ")
        page.get_by_role("button", name="Save the pair").click()
        page.get_by_role("alert").get_by_text("it was not saved").wait_for()
        page.get_by_label("Prompt").fill("")
        page.get_by_role("button", name="Ask").click()
        page.get_by_role("alert").get_by_text("the prompt is empty").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.title() == "redistill play" and wrong == []
        assert [url for url in addresses if not url.startswith((served.address, "data:", "blob:"))] == []
        browser.close()
    (kept,) = load_examples(table.pairs).examples
    assert kept.prompt == prompt and kept.references == (HOSTILE[0] + ENGINES,)
    assert json.loads(table.pairs.read_text())["from"] == "teacher"
