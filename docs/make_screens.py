"""Writes docs/report-*.png and docs/play.png, the pages about a run as Debian's chromium draws them:
python docs/make_screens.py RUN_FOLDER"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from redistill.marking import load_models
from redistill.measure import Request
from redistill.play.page import Table
from redistill.play.server import HOST, Serving, bind
from redistill.report.page import Report, render

DOCS = Path(__file__).parent
ASKED = "Why do leaves fall in autumn?"


def main(run: Path) -> None:
    """The first screen in light, a revision in dark, and its student at play in light."""
    with tempfile.TemporaryDirectory() as folder, served(run) as play, sync_playwright() as playwright:
        page = Path(folder) / "page.html"
        page.write_text(render(Report([run]).data()), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, address, scheme, height, shown in (
            ("report-scores", page.as_uri(), "light", 860, scores),
            ("report-pen", page.as_uri(), "dark", 800, red_pen),
            ("play", play, "light", 960, revised),
        ):
            opened = browser.new_page(viewport={"width": 1240, "height": height}, color_scheme=scheme)
            opened.goto(address)
            shown(opened)
            opened.wait_for_timeout(500)
            target = DOCS / f"{name}.png"
            opened.screenshot(path=target)
            print(f"{target}, {target.stat().st_size / 1e3:.0f} kB")
        browser.close()


def scores(page: Page) -> None:
    """The page as it opens."""
    page.wait_for_selector(".facts")


def red_pen(page: Page) -> None:
    """The revision that helped most of those that keep some of what the student wrote."""
    page.get_by_label("Order").first.select_option("best")
    for place in range(page.locator(".list button").count()):
        page.locator(".list button").nth(place).click()
        if page.locator(".sheet .marked > .tk:not(.rewritten)").count() >= 4:
            break
    page.locator("#revisions").evaluate(
        "section => scrollTo({ top: section.offsetTop - 20, behavior: 'instant' })"
    )


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of `redistill play` for the run's student and its teacher."""
    teacher = Report([run]).data()["runs"][0]["recipe"]["teacher.model_name_or_path"]
    request = Request(max_new_tokens=48, temperature=0.7)
    names, pairs = (str(run / "student"), teacher), Path("pairs.jsonl")
    with bind(HOST, 0) as bound:
        serving = Serving(
            Table(load_models(*names, "float32"), names, request, 3, "sample", pairs), HOST, bound
        )
        thread = threading.Thread(target=serving.run, daemon=True)
        thread.start()
        yield serving.address
        serving.stop()
        thread.join()


def revised(page: Page) -> None:
    """An answer after one click."""
    page.get_by_label("Prompt").fill(ASKED)
    page.get_by_role("button", name="Ask").click()
    page.get_by_role("button", name="Revise").click(timeout=300_000)
    page.locator(".turn .before").wait_for(timeout=300_000)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
