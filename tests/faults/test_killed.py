"""Processes that are killed and stopped at random moments: every one after them goes on as if nothing had been."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
from runs import STEPS, UNDER_WAY, check_whole, lines, often, outcome

from redistill.checkpoint import latest, step_of


def wait_for_save(life, run: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not life.ended(0.001):
        if (run / ".unfinished").exists():
            return


def test_sigkill_at_random_moments(place, lives, undisturbed, tell, chance):
    wanted, kills, saving, lives_run, finished = often(4, 50), 0, 0, 0, 0
    expected = outcome(undisturbed)
    assert expected["optimizer steps"] == {STEPS}
    length = float((place / "seconds").read_text())
    run = place / "killed"
    while kills < wanted or run.exists():
        life = lives.train("killed", place)
        lives_run += 1
        if kills < wanted:
            if kills % 2:
                wait_for_save(life, run, length)
                time.sleep(chance.uniform(0, 0.04))
            else:
                time.sleep(chance.uniform(0, length))
            life.send(signal.SIGKILL)
        code = life.wait()
        assert code in (0, -signal.SIGKILL), life.said()
        check_whole(run)
        if code:
            kills += 1
            saving += any((run / name).exists() for name in UNDER_WAY)
        else:
            finished += 1
            assert outcome(run) == expected
            shutil.rmtree(run)
    assert finished
    tell(
        f"SIGKILL: {kills} kills ({saving} in the middle of a save) in {lives_run} processes, {finished} runs of "
        f"{STEPS} steps brought to their end: each equal to the undisturbed one to the bit, nothing lost"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_stopped_at_a_random_moment(place, lives, undisturbed, tell, chance, number):
    wanted, stopped, outside, most, expected = often(1, 12), 0, 0, 0.0, outcome(undisturbed)
    run = place / f"stopped-{number}"
    for _ in range(wanted):
        while True:
            life = lives.train(run.name, place)
            log, last = run / "steps.jsonl", latest(run)
            done = 0 if last is None else step_of(last)
            early = chance.random() < 0.2
            while (
                not early and len(lines(log)) < min(done + chance.randint(1, 3), STEPS) and not life.ended()
            ):
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.1))
            before, asked = len(lines(log)), time.monotonic()
            if done < STEPS - 1:
                life.send(number)
            code = life.wait()
            check_whole(run)
            if code == 0:
                break
            if code == -signal.SIGTERM or "redistill: stopped" in life.said():
                outside += 1  # while it was loading, or done with training: there is nothing to save
                continue
            assert code == 130 and "Saved at step" in life.said(), life.said()
            done = len(lines(log))
            assert done <= before + 2, "the step under way, and one that may have begun since it was counted"
            assert (run / f"checkpoint-{done}").is_dir(), "saved where it stopped"
            stopped, most = stopped + 1, max(most, time.monotonic() - asked)
        # A stop saves where no save was due: the older of the two checkpoints may be another one.
        assert {**outcome(run), "files": expected["files"]} == expected
        shutil.rmtree(run)
    tell(
        f"{signal.Signals(number).name}: {stopped} stops in a step ({outside} before or behind training) in {wanted} "
        f"runs, all saved at the step under way (the slowest {most:.1f} s later) and went on to the same end"
    )
