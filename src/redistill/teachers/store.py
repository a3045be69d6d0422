"""A truncated signal on the disk: shards of rows in safetensors, 4 bytes for a kept id with its log-probability.

A row is a prompt with its response, found again by a digest of the ids. A shard is there as a whole or not at all:

    keys     [R]     uint64, the rows' digests
    starts   [R + 1] int64, where a row's positions begin; the last one is P
    entries  [P, k]  uint32, the id in the low bits and the log-probability in the others
    tails    [P]     float32, the log of all mass that was not kept
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from redistill.sample import Sample
from redistill.teachers.signal import TopK

# Nats: a kept log-probability below it is stored as it. Above, the error is at most `quantum / 2`.
LEAST = -32.0
MOST_IDS = 2**20
Arrays = dict[str, np.ndarray[Any, Any]]


def id_bits(vocabulary: int) -> int:
    """How many of an entry's 32 bits its id takes."""
    if vocabulary > MOST_IDS:
        raise ValueError(
            f"a teacher with {vocabulary} ids cannot be cached: an entry of 4 bytes has room for {MOST_IDS}."
        )
    return max(1, (vocabulary - 1).bit_length())


def quantum(vocabulary: int) -> float:
    """The step of the stored log-probabilities in nats: 0.0005 for up to 65,536 ids, 0.002 for up to 262,144."""
    return -LEAST / (2 ** (32 - id_bits(vocabulary)) - 1)


def pack(kept: TopK, vocabulary: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Entries [N, k] and tails [N]."""
    steps = (kept.log_p[:, :-1].double().clamp(LEAST, 0.0) / -quantum(vocabulary)).round().long()
    entries = (steps << id_bits(vocabulary)) | kept.ids
    return entries.cpu().numpy().astype(np.uint32), kept.log_p[:, -1].float().cpu().numpy()


def unpack(entries: np.ndarray[Any, Any], tails: np.ndarray[Any, Any], vocabulary: int) -> TopK:
    """What `pack` stored, normalised: rounded log-probabilities do not quite add up to one."""
    bits = id_bits(vocabulary)
    words = torch.from_numpy(entries.astype(np.int64))
    log_p = (words >> bits).float() * -quantum(vocabulary)
    log_p = torch.cat((log_p, torch.from_numpy(tails)[:, None]), dim=1)
    return TopK(words & (2**bits - 1), log_p.log_softmax(-1))


def key_of(sample: Sample) -> int:
    """64 bits that tell one prompt and response, as the teacher reads them, from any other."""
    sample = sample.for_teacher()
    ids = np.array([len(sample.prompt), *sample.prompt, *sample.response], dtype="<i4")
    return int.from_bytes(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Row:
    """What is to be stored of one sample: `entries` [T, k] and `tails` [T]."""

    key: int
    entries: np.ndarray[Any, Any]
    tails: np.ndarray[Any, Any]


def write_shard(path: Path, rows: Iterable[Row]) -> None:
    """A shard, whole on the disk before it has its name."""
    rows = list(rows)
    arrays: Arrays = {
        "keys": np.array([row.key for row in rows], dtype=np.uint64),
        "starts": np.cumsum([0, *(len(row.tails) for row in rows)], dtype=np.int64),
        "entries": np.concatenate([row.entries for row in rows]),
        "tails": np.concatenate([row.tails for row in rows]),
    }
    partial = path.with_name(path.name + ".partial")
    save_file(arrays, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


class Shards:
    """The rows of all shards of a folder, memory-mapped: only what is asked for is read."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("shard-*.safetensors"))
        self._files = [_opened(path) for path in self.paths]
        keys, self._starts = [np.empty(0, np.uint64)], list[np.ndarray[Any, Any]]()
        for file in self._files:
            keys.append(file.get_tensor("keys"))
            self._starts.append(file.get_tensor("starts"))
        self._keys = np.concatenate(keys)
        self._order = np.argsort(self._keys, kind="stable")
        # Of a row's number: which shard, and which of its rows.
        self._ends = np.cumsum([len(starts) - 1 for starts in self._starts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def positions(self) -> int:
        """Of all rows together."""
        return sum(int(starts[-1]) for starts in self._starts)

    @property
    def next_number(self) -> int:
        """Of a new shard."""
        return 1 + int(self.paths[-1].stem.removeprefix("shard-")) if self.paths else 0

    def __contains__(self, key: int) -> bool:
        return self._find(key) is not None

    def _find(self, key: int) -> int | None:
        wanted = np.uint64(key)
        place = int(np.searchsorted(self._keys, wanted, sorter=self._order))
        if place == len(self._order) or self._keys[self._order[place]] != wanted:
            return None
        return int(self._order[place])

    def row(self, key: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Entries [T, k] and tails [T] of a row that is there."""
        number = self._find(key)
        assert number is not None
        shard = int(np.searchsorted(self._ends, number, side="right"))
        starts = self._starts[shard]
        inside = number - int(self._ends[shard]) + len(starts) - 1
        cut = slice(int(starts[inside]), int(starts[inside + 1]))
        file = self._files[shard]
        return file.get_slice("entries")[cut], file.get_slice("tails")[cut]


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="np")
    except SafetensorError as problem:
        raise ValueError(
            f"{path} is damaged ({problem}): delete it and run `redistill cache-teacher` again, which writes what is "
            "missing."
        ) from None


def unique(samples: Iterable[Sample]) -> Iterator[tuple[int, Sample]]:
    """Samples that have a response, each content once, with their keys."""
    seen: set[int] = set()
    for sample in samples:
        if sample.response and (key := key_of(sample)) not in seen:
            seen.add(key)
            yield key, sample
