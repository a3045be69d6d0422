"""`redistill cache-teacher`: the teacher reads a recipe's responses once, and what it says of them is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from redistill.checkpoint import saving
from redistill.config import Config
from redistill.console import CountDisplay
from redistill.evaluation.kept import fingerprint
from redistill.evaluation.results import made_with
from redistill.loading import best_device, load_tokenizer, output_rows
from redistill.models import check_forward, ends_of, shared_vocabulary
from redistill.prepare import bits_of, load_teacher
from redistill.projection import source_of
from redistill.runlog import alone, write_whole
from redistill.sample import Sample
from redistill.splits import load_heldout, load_training
from redistill.stream import Stream
from redistill.teacher_answers import with_teacher_answers
from redistill.teachers.cached import LIMITS, MANIFEST, Manifest, text_settings
from redistill.teachers.local import frozen
from redistill.teachers.signal import Teacher, TopK, most_probable
from redistill.teachers.store import Row, Shards, id_bits, pack, unique, write_shard

# Bytes of a shard's entries: what a kill may cost, and what is held in memory.
SHARD = 2**26
# Positions whose logits exist at once.
CHUNK = 256
Keyed = tuple[int, Sample]


@dataclass(frozen=True)
class Cached:
    """What the folder holds now, and how many of the rows are new."""

    rows: int
    positions: int
    bytes: int
    new: int


def cache_teacher(
    config: Config, folder: Path, console: Console, *, k: int, batch_size: int, shard: int = SHARD
) -> Cached:
    """Write the signal of the recipe's training and held-out responses to `folder`, as far as it lacks it.

    k: entries a position. batch_size: responses read at once. shard: most bytes of entries in a file.
    Raises ValueError where `folder` holds the cache of another teacher, text or k, or another process writes it; and
    what `load_training`, `load_model` and `with_teacher_answers` raise.
    """
    busy = f"another process writes {folder}: wait for it, or name another folder."
    with alone(folder / ".lock", busy=busy):
        samples, teacher, manifest = _loaded(config, k)
        _begin(folder, manifest)
        shards = Shards(folder)
        missing: Iterable[Keyed] = (row for row in unique(samples) if row[0] not in shards)
        if not config.data.streaming:
            missing = list(missing)
        total = len(missing) if isinstance(missing, list) else None
        with CountDisplay(console, "Caching the teacher") as progress, saving(folder):
            done = 0
            for number, part in enumerate(_parts(missing, 4 * manifest.k, shard), shards.next_number):

                def tell(rows: int, before: int = done) -> None:
                    progress("responses", before + rows, total)

                rows = _read(teacher, part, manifest, batch_size, tell)
                write_shard(folder / f"shard-{number:05}.safetensors", rows)
                done += len(part)
        shards = Shards(folder)
        size = sum(path.stat().st_size for path in shards.paths)
        found = Cached(len(shards), shards.positions, size, done)
        _write_manifest(folder, manifest, found)
        return found


def _loaded(config: Config, k: int) -> tuple[Iterable[Sample], Teacher, Manifest]:
    settings, data = config.teacher, config.data
    if settings.align is not None:
        raise ValueError(
            "the signal of a teacher of another tokenizer is not cached: leave out teacher.align."
        )
    tokenizer = load_tokenizer(settings.model_name_or_path, settings.model_revision)
    train = load_training(config, tokenizer).samples
    if isinstance(train, Stream):
        train.at_hand()  # a broken file should not cost the loading of the teacher
    heldout = load_heldout(config, tokenizer).samples
    device = "cpu" if config.training.get("use_cpu") else best_device()
    model = load_teacher(config, device)
    # The student's rows, of which its weights are not needed.
    own = config.student.model_name_or_path
    vocabulary = shared_vocabulary(
        tokenizer, tokenizer, model if own is None else output_rows(own, config.student.model_revision), model
    )
    check_forward(model, vocabulary)
    id_bits(vocabulary)
    if data.responses == "teacher":
        eos = ends_of(tokenizer, model, data.template)
        train = with_teacher_answers(train, model, config, eos=eos, vocabulary=vocabulary)
    bits = bits_of(settings)
    manifest = Manifest(
        teacher=settings.model_name_or_path,
        weights=fingerprint(model),
        vocabulary=vocabulary,
        k=min(k, vocabulary),
        dtype=settings.dtype if bits is None else f"{settings.dtype}, {bits} bits",
        **text_settings(config, tokenizer),
    )
    samples = chain(train.one_epoch() if isinstance(train, Stream) else train, heldout)
    return samples, frozen(model, vocabulary, torch.device(device), settings), manifest


def _begin(folder: Path, manifest: Manifest) -> None:
    """The manifest in its place; refuses a folder that holds the cache of something else."""
    if (folder / MANIFEST).is_file():
        before, now = asdict(Manifest.read(folder)), asdict(manifest)
        # A folder may have another name, and other limits give other rows: both go together.
        other = [key for key in now if now[key] != before[key] and key not in (*LIMITS, "teacher")]
        if other:
            words = ", ".join(f"{key} {before[key]}, not {now[key]}" for key in other)
            raise ValueError(f"{folder} holds a cache with {words}: name another folder, or delete it.")
    else:
        _write_manifest(folder, manifest, Cached(0, 0, 0, 0))


def _write_manifest(folder: Path, manifest: Manifest, found: Cached) -> None:
    counts = {"rows": found.rows, "positions": found.positions, "bytes": found.bytes}
    record = {**asdict(manifest), **counts, **made_with()}
    write_whole(folder / MANIFEST, json.dumps(record, ensure_ascii=False, indent=2) + "\n")


def _parts(rows: Iterable[Keyed], bytes_each: int, most: int) -> Iterator[list[Keyed]]:
    """Runs of rows whose entries have at most `most` bytes, or one row that has more."""
    part, size = list[Keyed](), 0
    for row in rows:
        more = bytes_each * len(row[1].response)
        if part and size + more > most:
            yield part
            part, size = [], 0
        part.append(row)
        size += more
    if part:
        yield part


def _read(
    teacher: Teacher, rows: Sequence[Keyed], manifest: Manifest, batch_size: int, tell: Callable[[int], None]
) -> list[Row]:
    """What the teacher says of the rows, in batches of like length."""
    device = torch.device("cpu") if teacher.model is None else teacher.model.device
    ordered = sorted(rows, key=lambda row: -len(row[1].prompt) - len(row[1].response))
    found = list[Row]()
    for start in range(0, len(ordered), batch_size):
        tell(start)
        batch = ordered[start : start + batch_size]
        source = source_of(teacher.signal([sample for _, sample in batch]), device)
        lengths = [len(sample.response) for _, sample in batch]
        parts = []
        for first in range(0, sum(lengths), CHUNK):
            cut = slice(first, min(first + CHUNK, sum(lengths)))
            with torch.no_grad():
                said = source.block(source.slab(cut), slice(None))
                kept = said if isinstance(said, TopK) else most_probable(said, manifest.k)
            parts.append(pack(kept, manifest.vocabulary))
        entries, tails = (np.concatenate(column) for column in zip(*parts, strict=True))
        ends = np.cumsum(lengths)[:-1]
        found += map(Row, [key for key, _ in batch], np.split(entries, ends), np.split(tails, ends))
    tell(len(ordered))
    return found
