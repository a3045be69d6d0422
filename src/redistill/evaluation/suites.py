"""The instruction sets of MiniLLM and DistiLLM, as data: where each lies, how many records, under which licence.

Nothing is shipped: a set is read from a folder of yours, or else from the hub.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from redistill.data import DataError
from redistill.records import Problem, to_example
from redistill.sample import Example

COLUMNS = ("instruction", "input", "output")
ROOT_VARIABLE = "REDISTILL_DATA"
DEFAULT_ROOT = Path("data")


@dataclass(frozen=True)
class Suite:
    """One set of prompts with references.

    files: where it may lie below the data root, the first found being read: our layout, then that of a copy of
        the hub's repository. records: how many there are. first: only so many of the file's, None for all.
    hub: the repository of data sets that holds it, and `hub_file` in it; "" where there is none.
    """

    name: str
    title: str
    files: tuple[str, ...]
    records: int
    licence: str
    hub: str = ""
    hub_file: str = ""
    first: int | None = None
    note: str = ""

    @property
    def folder(self) -> str:
        """Its folder below the data root."""
        return self.files[0].partition("/")[0]


SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite(
            "dolly",
            "Dolly, MiniLLM's test split",
            ("dolly/test.jsonl", "dolly/valid.jsonl"),
            500,
            "CC BY-SA 3.0",
            "MiniLLM/dolly",
            "valid.jsonl",
        ),
        Suite(
            "self_instruct",
            "Self-Instruct, user-oriented, MiniLLM's 242 of 252",
            ("self_instruct/test.jsonl", "self_instruct/valid.jsonl"),
            242,
            "Apache-2.0",
            "MiniLLM/self-inst",
            "valid.jsonl",
        ),
        Suite(
            "vicuna",
            "Vicuna questions, MiniLLM's references",
            ("vicuna/test.jsonl", "vicuna/valid.jsonl"),
            80,
            "Apache-2.0 (questions; of the model-written references none is stated)",
            "MiniLLM/Vicuna",
            "valid.jsonl",
        ),
        Suite(
            "sinst",
            "Super-NaturalInstructions, references of 11 tokens and more",
            ("sinst/test.jsonl", "sinst/11_/valid.jsonl"),
            1694,
            "Apache-2.0",
            "MiniLLM/sinst",
            "11_/valid.jsonl",
        ),
        Suite(
            "uinst",
            "Unnatural Instructions, references of 11 tokens and more",
            ("uinst/test.jsonl", "uinst/11_/valid.jsonl"),
            10_000,
            "MIT",
            "MiniLLM/uinst",
            "11_/valid.jsonl",
            first=10_000,
            note="the first 10,000 of the file, as MiniLLM's script takes them",
        ),
        Suite(
            "uinst_short",
            "Unnatural Instructions, references of 1 or 2 words",
            ("uinst_short/test.jsonl",),
            1050,
            "MIT",
            note="not the [11, inf) split of the papers: its scores cannot be set beside theirs",
        ),
    )
}
PAPER = ("dolly", "self_instruct", "vicuna", "sinst", "uinst")
"""The five sets of the papers' tables."""

Download = Callable[[str, str], Path]


@dataclass(frozen=True)
class Asked:
    """A set as it was read. version: see `version_of`. source: the file."""

    name: str
    version: str
    source: str
    examples: tuple[Example, ...]


def suite_named(name: str) -> Suite:
    """The suite of that name. Raises ValueError with the nearest name and all of them."""
    if name in SUITES:
        return SUITES[name]
    near = difflib.get_close_matches(name, SUITES, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"--sets: there is no set {name!r}: {guess}Known are {', '.join(SUITES)}.")


def data_root(option: Path | None = None) -> Path:
    """Where the sets lie: the option, else the environment variable REDISTILL_DATA, else ./data."""
    if option is not None:
        return option.expanduser()
    named = os.environ.get(ROOT_VARIABLE)
    return Path(named).expanduser() if named else DEFAULT_ROOT


def locate(name: str, root: Path) -> Path | None:
    """The file of the suite below `root`, or None where it is not there. Errors: those of `suite_named`."""
    return next((file for each in suite_named(name).files if (file := root / each).is_file()), None)


def load_suite(name: str, root: Path, *, limit: int | None = None, download: Download | None = None) -> Asked:
    """The records of the set: from `root`, else from the hub.

    limit: only the first so many. download: gets a file (repository, path in it) from the hub; ours if None.
    Errors: ValueError for a name unknown; DataError for a set that is nowhere (what, where it was looked for,
    how to get it), for a record that cannot be used, and for another number of records than the set has.
    """
    suite = suite_named(name)
    file = locate(name, root) or _from_hub(suite, root, download or hub_file)
    wanted = suite.records if limit is None else min(limit, suite.records)
    examples = list(itertools.islice(_examples(file), suite.first if limit is None else wanted))
    if len(examples) != wanted:
        raise DataError(
            f"{file} has {len(examples)} records, and {name} has {suite.records}: get the set anew, or measure "
            f"on this file by its own name with --data {file}."
        )
    return Asked(name, version_of(examples), str(file), tuple(examples))


def version_of(examples: Sequence[Example]) -> str:
    """ "1-" and eight digits of the SHA-256 of what is asked and accepted: a score says which text it is of.

    The number is that of the reading (which columns, which order); the digits change with any character of a
    prompt, context or reference, and with the number of records.
    """
    digest = hashlib.sha256()
    for example in examples:
        prompt = (
            example.prompt
            if isinstance(example.prompt, str)
            else [[turn.role, turn.content] for turn in example.prompt]
        )
        record = [prompt, example.context, list(example.references)]
        record += [] if example.teacher_prompt is None else [repr(example.teacher_prompt)]
        digest.update(json.dumps(record, ensure_ascii=True).encode() + b"\n")
    return f"1-{digest.hexdigest()[:8]}"


def hub_file(repository: str, file: str) -> Path:
    """One file of a repository of data sets, from the hub or its cache here. Errors: those of the hub's client."""
    from huggingface_hub import hf_hub_download

    # Its client prints each try; what failed is said once, by whoever called.
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.CRITICAL)
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    finally:
        client.setLevel(level)


def _from_hub(suite: Suite, root: Path, download: Download) -> Path:
    looked = " or ".join(str(root / each) for each in suite.files)
    missing = f"the set {suite.name} ({suite.title}) is not at {looked}"
    if not suite.hub:
        raise DataError(
            f"{missing}, and no hub has it: point --data-root (or {ROOT_VARIABLE}) at a folder with it."
        )
    try:
        return download(suite.hub, suite.hub_file)
    except (OSError, ValueError, RuntimeError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0].rstrip(".")
        raise DataError(
            f"{missing}, and the hub did not give {suite.hub} ({reason}): point --data-root (or "
            f"{ROOT_VARIABLE}) at a folder with it, or get it with `hf download {suite.hub} --repo-type dataset "
            f"--local-dir {root / suite.folder}`."
        ) from problem


def _examples(file: Path) -> Iterator[Example]:
    """The records, their three columns alone: the hub's files hold a rendered prompt beside them."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            source = f"{file}:{number}"
            try:
                record = json.loads(line)
            except ValueError as problem:
                raise DataError(f"{source} is not JSON ({problem}): get the set anew.") from None
            if not isinstance(record, dict):
                raise DataError(f"{source} is no object with columns: get the set anew.")
            example = to_example({name: record[name] for name in COLUMNS if name in record}, source)
            if isinstance(example, Problem):
                raise DataError(f"{source} {example.what}: get the set anew.")
            yield example
