"""The page in a real browser: no error, every control used, model text stays text, nothing fetched.

Needs Debian's chromium (apt-get install chromium); without one these tests are skipped.
"""

import json
import random
import shutil
import threading
from pathlib import Path

import pytest
from made_runs import make_comparison, make_run, step_record

from redistill.report.page import Report, render
from redistill.report.server import serve
from redistill.runlog import RunLog

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
if CHROMIUM is None:
    pytest.skip("no chromium is installed: apt-get install chromium", allow_module_level=True)
sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Opened:
    """A page, and what went wrong in it."""

    def __init__(self, browser, address, **options):
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.wrong, self.asked = [], []
        self.page.on(
            "console",
            lambda message: self.wrong.append(message.text) if message.type in ("error", "warning") else None,
        )
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", lambda dialog: (self.wrong.append("a dialog"), dialog.dismiss()))
        self.page.goto(address)


def written(folder: Path, *runs: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "page.html"
    target.write_text(render(Report(list(runs)).data()), encoding="utf-8")
    return target.as_uri()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one")


# Every choice to each of its options, every box on and off, every slider and search, every button and fold.
USE_EVERYTHING = """async () => {
  const seen = (node) => node.isConnected && node.checkVisibility() && !node.disabled;
  const all = (what) => [...document.querySelectorAll(what)].filter(seen);
  const tell = (node, kind) => node.dispatchEvent(new Event(kind, { bubbles: true }));
  for (const list of all('select')) {
    for (const option of [...list.options].map((each) => each.value).concat(list.value)) {
      list.value = option;
      tell(list, 'change');
    }
  }
  for (const box of all('input[type=checkbox]')) { box.click(); box.click(); }
  for (const slider of all('input[type=range]')) {
    for (const value of ['0.9', '0']) { slider.value = value; tell(slider, 'input'); }
  }
  for (const text of ['mill', 'no such text', '']) {
    for (const box of all('input[type=search]')) { box.value = text; tell(box, 'input'); }
    await new Promise((done) => setTimeout(done, 200));
  }
  const buttons = all('button');
  for (const button of buttons) if (seen(button)) button.click();
  for (const fold of all('summary')) fold.click();
  return buttons.length;
}"""


def test_every_control_works_and_nothing_is_fetched(browser, run, tmp_path):
    for runs in (
        [run],
        [run, make_run(tmp_path / "other", seed=1)],
        [make_comparison(tmp_path / "compared")],
    ):
        opened = Opened(browser, written(tmp_path, *runs))
        opened.page.set_viewport_size({"width": 1240, "height": 900})
        assert opened.page.evaluate(
            "[...document.querySelectorAll('#table .wide')].every((box) => box.scrollWidth <= box.clientWidth)"
        )
        assert opened.page.evaluate(USE_EVERYTHING) > 30
        assert opened.wrong == []
        assert [address for address in opened.asked if not address.startswith(("file:", "data:"))] == []
        assert opened.page.locator("script").count() == 2
        opened.page.close()


def test_a_comparison_draws_its_methods_by_colours_that_differ(browser, tmp_path):
    opened = Opened(browser, written(tmp_path, make_comparison(tmp_path / "compared", further=9)))
    chips = opened.page.locator("#curve-tools .chip")
    assert [chips.nth(n).inner_text() for n in (0, 1, 2)] == ["kd", "gkd", "more-0"]
    assert chips.count() == 11 and opened.page.locator("#curve-tools .chip[aria-pressed=true]").count() == 8
    note = opened.page.locator("#curve-tools .note")
    assert "8 of 11 are drawn" in note.inner_text() and "mean over its training seeds" in note.inner_text()
    chips.nth(10).click()
    assert (
        "9 of 11" in note.inner_text()
        and "more-8" in opened.page.locator(".panel .legend").first.inner_text()
    )
    assert "11 methods, 13 runs" in opened.page.locator("#heading").inner_text()
    interval = opened.page.locator("#table tbody tr").nth(3).locator("svg.range")
    assert interval.get_attribute("aria-label") == "ROUGE-L +2.00, from +1.10 to +2.90"
    assert opened.wrong == []
    opened.page.close()


def test_what_models_wrote_is_shown_as_text(browser, run, tmp_path):
    opened = Opened(browser, written(tmp_path, run))
    page = opened.page
    assert "redistill" in page.title() and "pwned" not in page.title()
    page.get_by_label("Search prompts and answers").fill("<script>")
    page.wait_for_timeout(300)
    assert "<script>document.title='pwned'</script>" in page.locator("#answer-list").inner_text()
    assert page.locator("main img, main b:text('bold?'), main script").count() == 0
    for text, mark in (("gnirts", "U+202E"), ("zero", "U+200B"), ("escape", "U+001B")):
        page.get_by_label("Search prompts and answers").fill(text)
        page.wait_for_timeout(300)
        assert mark in page.locator("#answer-list").inner_text()
    # A family of three is one picture, joined by characters without width.
    assert "U+200D" not in page.locator("#answer-list").inner_text()
    assert opened.wrong == []
    page.close()


def test_curves_are_read_zoomed_and_reset_by_mouse_and_keys(browser, run, tmp_path):
    opened = Opened(browser, written(tmp_path, run))
    page, chart = opened.page, opened.page.locator("svg.chart").first
    chart.scroll_into_view_if_needed()
    last = page.locator(".panel .legend b").first.inner_text()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + 80, box["y"] + 60)
    assert page.locator(".panel .legend b").first.inner_text() != last
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 60, steps=5)
    page.mouse.up()
    assert page.locator("#curve-tools .range-text").inner_text().startswith("steps ")
    page.get_by_role("button", name="Whole run").click()
    assert page.locator("#curve-tools .range-text").inner_text() == ""
    chart.focus()
    page.keyboard.press("Home")
    assert "step 1:" in page.locator("#reading").text_content()
    for key in ("ArrowRight", "Shift+ArrowRight", "End", "+", "+", "-"):
        page.keyboard.press(key)
    assert page.locator("#curve-tools .range-text").inner_text().startswith("steps ")
    page.keyboard.press("0")
    assert page.locator("#curve-tools .range-text").inner_text() == "" and opened.wrong == []
    page.close()


def test_revisions_are_stepped_through_by_keys_and_filtered(browser, run, tmp_path):
    opened = Opened(browser, written(tmp_path, run))
    page, place = opened.page, opened.page.locator(".stepper .range-text")
    assert place.inner_text() == "1 of 24"
    page.locator(".list button").first.focus()
    for key, expected in (("ArrowRight", 2), ("j", 3), ("ArrowLeft", 2), ("k", 1), ("k", 1)):
        page.keyboard.press(key)
        assert place.inner_text() == f"{expected} of 24"
    assert page.locator(".fix del").inner_text().endswith("wrong")
    page.get_by_label("Show", exact=True).select_option("helped")
    helped = int(place.inner_text().split()[-1])
    page.get_by_label("Show", exact=True).select_option("hurt")
    assert helped + int(place.inner_text().split()[-1]) == 24
    page.close()


def test_a_phone_has_no_sideways_scroll_and_both_themes_are_readable(browser, run, tmp_path):
    address, contrast = (
        written(tmp_path, run),
        Path(__file__).with_name("contrast.js").read_text(encoding="utf-8"),
    )
    for scheme in ("light", "dark"):
        opened = Opened(
            browser, address, viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True
        )
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert opened.page.evaluate(contrast) == []
        assert opened.wrong == []
        opened.page.close()


def test_fifty_thousand_steps_open_in_under_three_seconds(browser, tmp_path):
    address = written(tmp_path, make_run(tmp_path / "long", steps=50_000, revisions=5000))
    page = browser.new_page()
    devtools = page.context.new_cdp_session(page)
    # The page's own time on a processor: others may be at work on this machine.
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(address)
    page.locator("#curves").scroll_into_view_if_needed()
    page.locator("svg.chart path.line").first.wait_for(state="attached")
    spent = {each["name"]: each["value"] for each in devtools.send("Performance.getMetrics")["metrics"]}
    assert 0 < spent["TaskDuration"] < 3
    assert page.locator(".panel").count() >= 15
    page.close()


def test_the_live_page_follows_and_keeps_what_the_reader_chose(browser, tmp_path):
    folder = make_run(tmp_path / "run", measured=False)
    with serve([folder], 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        opened = Opened(browser, f"http://127.0.0.1:{server.server_address[1]}/")
        page = opened.page
        page.locator(".list button").nth(3).click()
        chosen = page.locator(".sheet .asked").first.inner_text()
        page.get_by_role("button", name="Zoom in").click()
        zoomed, scrolled = page.locator("#curve-tools .range-text").inner_text(), page.evaluate("scrollY")
        log, chance = RunLog(folder), random.Random(0)
        log.append("steps", step_record(61, 61, chance))
        log.append(
            "revisions", json.loads((folder / "revisions.jsonl").read_text().splitlines()[0]) | {"step": 61}
        )
        page.get_by_text("finished after 61 steps").wait_for(timeout=15_000)
        assert page.locator(".stepper .range-text").inner_text() == "5 of 25"
        assert page.locator(".sheet .asked").first.inner_text() == chosen
        assert page.locator("#curve-tools .range-text").inner_text() == zoomed
        assert abs(page.evaluate("scrollY") - scrolled) <= 2
        assert opened.wrong == []
        server.shutdown()
        thread.join()
        page.close()
