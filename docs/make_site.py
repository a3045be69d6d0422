"""Builds the documentation site from docs/ and what its pages link to: `python docs/make_site.py [FOLDER]`.

The pages are written to be read in the repository too, so a link may lead out of docs/: to a changelog, a table of
results, a recipe. Zensical wants one folder of pages. So the pages are laid out in one first, with what they link to,
and links are turned to where it lies there; a file that is no page becomes a page that shows it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)\s#]+)(?=(?:#[^)\s]*)?\))")
# A file that is no page, by its ending: how its text is coloured.
SHOWN = {".yaml": "yaml", ".py": "python", ".toml": "toml"}


def lay_out(pages: Path) -> None:
    """Writes the pages of docs/ and of the navigation, and what they link to, into the folder `pages`."""
    waiting = [path for path in DOCS.rglob("*") if path.suffix in {".css", ".js", ".md", ".svg"}]
    listed = re.findall(r'= "([^"]+\.md)"', (ROOT / "zensical.toml").read_text("utf-8"))
    waiting += [ROOT / name for name in listed if not (DOCS / name).exists()]
    done = set(waiting)
    while waiting:
        path = waiting.pop()
        place = pages / _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            linked = {path.parent.joinpath(link).resolve() for link in LINK.findall(path.read_text("utf-8"))}
            waiting += [target for target in linked - done if target.is_file()]
            done |= linked
            place.write_text(_turned(path), "utf-8")
        elif path.suffix in SHOWN:
            name = path.relative_to(ROOT).as_posix()
            place.write_text(
                f'# {path.name}\n\n```{SHOWN[path.suffix]} title="{name}"\n{path.read_text("utf-8")}```\n',
                "utf-8",
            )
        else:
            shutil.copyfile(path, place)


def _place(path: Path) -> Path:
    """Where a file of the repository lies among the pages: docs/ is the root."""
    inside = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT)
    return inside.with_name(f"{inside.name}.md") if inside.suffix in SHOWN else inside


def _turned(path: Path) -> str:
    """The text of a page, with its links as they must be where it lies."""

    def turned(found: re.Match[str]) -> str:
        target = path.parent.joinpath(found[1]).resolve()
        return (
            os.path.relpath(_place(target), _place(path).parent) if target.is_relative_to(ROOT) else found[1]
        )

    return LINK.sub(turned, path.read_text("utf-8"))


def build(site: Path) -> None:
    """Builds the site into the folder `site`; a link that leads nowhere ends it with an error."""
    settings = (ROOT / "zensical.toml").read_text("utf-8")
    known = tomllib.loads(settings)["project"]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        lay_out(work / known["docs_dir"])
        (work / "src").symlink_to(ROOT / "src")
        (work / "zensical.toml").write_text(settings, "utf-8")
        subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=work, check=True)
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(work / known["site_dir"], site)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "site")
