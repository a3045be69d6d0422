"""Writes docs/report-*.png, a run's page as Debian's chromium draws it: python docs/make_screens.py RUN_FOLDER"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from redistill.report.page import Report, render

DOCS = Path(__file__).parent


def main(run: Path) -> None:
    """The first screen in light, a revision and a close view in dark."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "page.html"
        page.write_text(render(Report([run]).data()), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, scheme, height, shown in (("scores", "light", 860, scores), ("pen", "dark", 800, red_pen)):
            opened = browser.new_page(viewport={"width": 1240, "height": height}, color_scheme=scheme)
            opened.goto(page.as_uri())
            shown(opened)
            opened.wait_for_timeout(300)
            target = DOCS / f"report-{name}.png"
            opened.screenshot(path=target)
            print(f"{target}, {target.stat().st_size / 1e3:.0f} kB")
        browser.close()


def scores(page: Page) -> None:
    """The page as it opens."""
    page.wait_for_selector(".facts")


def red_pen(page: Page) -> None:
    """The revision that helped most."""
    page.get_by_label("Order").first.select_option("best")
    page.locator("#revisions").evaluate(
        "section => scrollTo({ top: section.offsetTop - 20, behavior: 'instant' })"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
