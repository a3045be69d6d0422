"""Data sets of any format, as text: a file, a folder or a hub id becomes a tuple of `Example`.

What a record means is in `records.py`. Prompt text is data: no markup or template in it is interpreted.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from redistill.records import TEACHER_PROMPT, Problem, to_example
from redistill.sample import Example

__all__ = ["DataError", "Loaded", "Place", "Problem", "load_examples", "rows_from"]

SHOWN = 5
JSON_LINES = (".jsonl", ".ndjson")
ENDINGS = (*JSON_LINES, ".json", ".parquet")
Row = tuple[str, Any]
"""Where a record stands, and the record, or the Problem of having none."""


class DataError(ValueError):
    """Data that cannot be used; the message names the path, or file and line, and what to do."""


@dataclass
class Place:
    """How far a data set was read.

    file: the number of the file at hand. row: rows of it that were read. byte: where the next line begins, in a file
    of `size` bytes. shard: the same of a streamed data set of the hub, in `datasets`' words.
    """

    file: int = 0
    row: int = 0
    byte: int = 0
    size: int = 0
    shard: dict[str, Any] | None = None


@dataclass(frozen=True)
class Loaded:
    """What was read. counted: records looked at, good and bad."""

    examples: tuple[Example, ...]
    problems: tuple[Problem, ...]
    counted: int

    def summary(self) -> str:
        """How many records were left out, and the first of them with their reasons; "" when none were."""
        if not self.problems:
            return ""
        more = len(self.problems) - SHOWN
        lines = [f"{len(self.problems)} of {self.counted} records cannot be used:"]
        lines += [f"  {problem.source}: {problem.what}" for problem in self.problems[:SHOWN]]
        return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))


def load_examples(
    path: str | Path,
    *,
    name: str | None = None,
    split: str = "train",
    limit: int | None = None,
    max_bad_share: float = 0.01,
    teacher_prompt: str = TEACHER_PROMPT,
) -> Loaded:
    """The examples at `path`, in their order.

    path: a .jsonl, .ndjson, .json or .parquet file; a folder with {split}.jsonl, .json or .parquet, or
    several {split}-*.parquet, in it or in its `data` folder; or a data set on the hub, with its configuration
    `name` and its `split`. A file is one split: `split` says nothing about it.
    limit: most examples read. max_bad_share: in [0, 1]. teacher_prompt: the column with the teacher's own prompts.
    Raises DataError: nothing at `path`, no such split, a file of no known format, an empty file, or more than
    `max_bad_share` of the records unusable.
    """
    examples: list[Example] = []
    problems: list[Problem] = []
    for source, record in rows_from(path, name, split):
        example = record if isinstance(record, Problem) else to_example(record, source, teacher_prompt)
        if isinstance(example, Problem):
            problems.append(example)
        else:
            examples.append(example)
        if limit is not None and len(examples) >= limit:
            break
    loaded = Loaded(tuple(examples), tuple(problems), len(examples) + len(problems))
    if loaded.counted == 0:
        raise DataError(f"{path} (split {split}) holds no records; put one JSON object on each line.")
    if not examples:
        raise DataError(f"{path}: no record can be used.\n{loaded.summary()}")
    if len(problems) > max_bad_share * loaded.counted:
        raise DataError(
            f"{path}: {len(problems) / loaded.counted:.1%} of the records cannot be used, more than "
            f"data.max_bad_share = {max_bad_share:g}. Mend the data, or raise it.\n{loaded.summary()}"
        )
    return loaded


def rows_from(
    path: str | Path,
    name: str | None = None,
    split: str = "train",
    place: Place | None = None,
    *,
    streaming: bool = False,
) -> Iterator[Row]:
    """The rows of a data set from `place` on, which is moved along: after a row, it is where the next one begins.

    streaming: nothing is read as a whole, nor is a data set of the hub downloaded beforehand.
    Raises DataError: see `load_examples`, and for a JSON array, which cannot be streamed.
    """
    found, place = Path(path).expanduser(), place or Place()
    try:
        if found.exists():
            files = _files_of(found, split) if found.is_dir() else [found]
            for file in files[place.file :]:
                yield from _file_rows(file, place, streaming)
                place.file, place.row, place.byte = place.file + 1, 0, 0
        elif _is_hub_id(str(path)):
            yield from _hub_rows(str(path), name, split, place, streaming)
        else:
            raise DataError(
                f"{path} does not exist; set the path to a file, a folder or a data set on the hub."
            )
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _is_hub_id(path: str) -> bool:
    """`owner/name`, or a name alone: no leading dot, slash or tilde, no file ending, one slash at most."""
    return path[:1] not in ("", ".", "/", "~") and path.count("/") <= 1 and not path.endswith(ENDINGS)


def _files_of(folder: Path, split: str) -> list[Path]:
    for inner in (folder, folder / "data"):
        for ending in ENDINGS:
            if (file := inner / f"{split}{ending}").is_file():
                return [file]
        if shards := sorted(inner.glob(f"{glob.escape(split)}-*.parquet")):
            return shards
    has = sorted(file.name for file in folder.iterdir() if file.suffix in ENDINGS)
    raise DataError(
        f"{folder} has no {split}.jsonl, {split}.json or {split}.parquet; "
        + (
            f"it has {', '.join(has[:10])}: set the split to one of these."
            if has
            else "nor any other data file."
        )
    )


def _file_rows(file: Path, place: Place, streaming: bool) -> Iterator[Row]:
    if file.suffix == ".parquet":
        return _parquet(file, place)
    if file.suffix == ".json" and _first_byte(file) == b"[":
        if streaming:
            raise DataError(
                f"{file} is one JSON array, which can only be read as a whole: write one object on each line, or "
                "leave out data.streaming."
            )
        return _json_array(file)
    if file.suffix in (".json", *JSON_LINES):
        return _json_lines(file, place)
    raise DataError(f"{file} is of no known format; known endings are {', '.join(ENDINGS)}.")


def _first_byte(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(65536).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _json_lines(file: Path, place: Place) -> Iterator[Row]:
    """Line by line from bytes, so that every fault has its line and one bad line spoils no other."""
    with file.open("rb") as stream:
        size = file.stat().st_size
        if place.row and place.size == size:
            stream.seek(place.byte)
        else:  # A line that was mended has moved those behind it.
            place.byte = sum(len(line) for line in islice(stream, place.row))
        place.size = size
        for line in stream:
            place.row, place.byte = place.row + 1, place.byte + len(line)
            text = line.removeprefix(b"\xef\xbb\xbf") if place.row == 1 else line
            if text.strip():
                source = f"{file}:{place.row}"
                yield source, _parsed(text, source)


def _parsed(line: bytes, source: str) -> Any:
    if b"\0" in line:
        return Problem(source, "has a NUL byte; the file may be damaged or UTF-16 (UTF-8 is read)")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Problem(source, f"is not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return Problem(source, f"is not JSON: {error.msg} (column {error.colno})")
    except (ValueError, RecursionError) as error:
        return Problem(source, f"is not JSON that can be read: {type(error).__name__}")


def _json_array(file: Path) -> Iterator[Row]:
    try:
        records = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{file}:{line} is not UTF-8; save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno} is not JSON: {error.msg} (column {error.colno}).") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON that can be read: {type(error).__name__}.") from None
    for row, record in enumerate(records):
        yield f"{file}[{row}]", record


def _parquet(file: Path, place: Place) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            counts = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            first, left = 0, place.row
            while first < len(counts) and left >= counts[first]:
                first, left = first + 1, left - counts[first]
            for batch in table.iter_batches(batch_size=1024, row_groups=range(first, len(counts))):
                rows, left = batch.slice(left).to_pylist(), max(left - len(batch), 0)
                for record in rows:
                    place.row += 1
                    yield f"{file}[{place.row - 1}]", record
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{file}[{place.row}] is not parquet that can be read: {str(error).splitlines()[0]}"
        ) from None


def _hub_rows(path: str, name: str | None, split: str, place: Place, streaming: bool) -> Iterator[Row]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        table = datasets.load_dataset(path, name, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, LookupError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path} (name {name}, split {split}): is no folder here, and the hub did not give it: {reason}"
        ) from error
    if not isinstance(table, datasets.IterableDataset):
        for place.row, record in enumerate(table, start=1):
            yield f"{path}[{place.row - 1}]", record
        return
    if place.shard is not None:
        table.load_state_dict(place.shard)
    for record in table:
        place.row, place.shard = place.row + 1, table.state_dict()
        yield f"{path}[{place.row - 1}]", record
