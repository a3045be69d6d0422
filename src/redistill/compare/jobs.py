"""The processes of a comparison, one or several at once: what fails fails alone, and Ctrl-C lets all of them save."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

STOPPED = 130
FULL = 74
"""With what a process of ours ends that found the disk full: EX_IOERR."""
LOOK_EVERY = 0.05
"""Seconds."""


@dataclass(frozen=True)
class Job:
    """A folder whose asked.json is to be done, and how it is called in what is printed."""

    name: str
    folder: Path


@dataclass(frozen=True)
class _Child:
    job: Job
    share: Mapping[str, str]
    process: subprocess.Popen[bytes]
    started: float
    log_begins: int


def run_jobs(
    jobs: Sequence[Job], console: Console, ended: Callable[[Job, str], None], *, at_once: int = 1
) -> None:
    """Do all `jobs`, `at_once` of them at a time; each speaks into FOLDER/log.txt.

    ended: called after each with why it failed, "" if it did not. Several share the machine, see `shares`.
    Ctrl-C, here or in one of the processes, lets all save and end, and is raised as KeyboardInterrupt; a second
    one ends them where they are. A full disk ends all in the same way, since it would fail what comes after too, and
    is raised as OSError.
    """
    waiting, running = deque(jobs), list[_Child]()
    free = shares(at_once, os.environ, _cores(), torch.cuda.device_count())
    try:
        while waiting or running:
            while waiting and free:
                console.print(f"{waiting[0].name}: begins", highlight=False)
                running.append(_start(waiting.popleft(), free.pop(0)))
            time.sleep(LOOK_EVERY)
            for child in [each for each in running if each.process.poll() is not None]:
                running.remove(child)
                free.append(child.share)
                ended(child.job, _outcome(child, console))
    finally:
        if running:
            console.print("Stopping; what is under way saves first.", highlight=False)
            _stop(running)


def shares(at_once: int, environment: Mapping[str, str], cores: int, devices: int) -> list[Mapping[str, str]]:
    """What of the machine each of `at_once` jobs is given, as its environment: threads, and one device in turn.

    What `environment` says already holds: its OMP_NUM_THREADS, and of the devices those in CUDA_VISIBLE_DEVICES.
    One job alone has all of the machine.
    """
    if at_once == 1:
        return [environment]
    named = environment.get("CUDA_VISIBLE_DEVICES")
    seen = [str(n) for n in range(devices)] if named is None else [n for n in named.split(",") if n.strip()]
    given = {"OMP_NUM_THREADS": str(max(1, cores // at_once)), **environment}
    return [
        {**given, "CUDA_VISIBLE_DEVICES": seen[place % len(seen)]} if seen else given
        for place in range(at_once)
    ]


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _start(job: Job, share: Mapping[str, str]) -> _Child:
    with (job.folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "redistill", "compare-run", str(job.folder)],
            # The child ends when this pipe closes, and with us if we are killed. The terminal's Ctrl-C is ours
            # alone: a child that got it too would take ours for the second one, and not save.
            stdin=subprocess.PIPE,
            start_new_session=True,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=share,
        )
        return _Child(job, share, process, time.perf_counter(), log.tell())


def _outcome(child: _Child, console: Console) -> str:
    """Why it failed, also printed; KeyboardInterrupt where it was stopped, OSError where the disk is full."""
    code, seconds = child.process.returncode, time.perf_counter() - child.started
    if code == STOPPED:
        raise KeyboardInterrupt
    if code == FULL:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(child.job.folder))
    if not code:
        console.print(f"{child.job.name}: done in {_duration(seconds)}", highlight=False)
        return ""
    said = (child.job.folder / "log.txt").read_bytes()[child.log_begins :].decode(errors="replace")
    why = _last_words(said) or "it said nothing"
    if code < 0:
        name = signal.Signals(-code).name
        often = ", as a system does that has no memory left" if name == "SIGKILL" else ""
        why = f"killed by {name}{often}; its last words: {why}"
    console.print(f"{child.job.name}: failed after {_duration(seconds)}: {why}", style="red", highlight=False)
    return why


def _stop(children: Sequence[_Child]) -> None:
    for child in children:
        assert child.process.stdin is not None
        child.process.stdin.close()
    try:
        for child in children:
            child.process.wait()
    except KeyboardInterrupt:
        for child in children:
            child.process.kill()
        raise


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _last_words(text: str) -> str:
    """Our own sentence, or the last line of whatever else was said."""
    text = text.strip()
    own = text.rpartition("redistill: ")[2] if "redistill: " in text else text.rpartition("\n")[2]
    return " ".join(own.split())
