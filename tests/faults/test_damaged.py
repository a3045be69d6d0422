"""Disks that are full and disks that lie: a clear word, and nothing built on what is broken."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from runs import STEPS, check_whole, often, outcome

from redistill.checkpoint import latest, refuse_damaged, saving, set_damaged_aside
from redistill.manifest import NAME, damaged_files


def hurt(path: Path, how: str, chance) -> None:
    """One fault of a disk, or of a copy."""
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
        return
    if how == "flipped":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del data[chance.randrange(len(data)) :]
    elif how == "zeroed":
        data[chance.randrange(len(data)) :] = bytes(len(data))
    path.write_bytes(data)


def copied(run: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return shutil.copytree(run, to)


def test_any_damage_is_found_and_named(undisturbed, tmp_path, tell, chance):
    wanted, missed = often(60, 2000), []
    saved = undisturbed / f"checkpoint-{STEPS}"
    names = sorted(path.name for path in saved.iterdir())
    assert {"optimizer.pt", "model.safetensors", "redistill.json", "rng_state.pth", NAME} <= set(names)
    work = tmp_path / "run" / saved.name
    shutil.copytree(saved, work)
    for turn in range(wanted):
        name, how = names[turn % len(names)], chance.choice(["flipped", "cut", "zeroed", "gone"])
        before = (work / name).read_bytes()
        hurt(work / name, how, chance)
        after = (work / name).read_bytes() if (work / name).exists() else None
        # Of a flipped hash the file that it belongs to is named; a manifest cut between lines names fewer files.
        if not damaged_files(work) and after != before and name != NAME:
            missed.append((name, how))
        if name != NAME and after != before:
            with pytest.raises(ValueError, match=rf"{work.name} is not as it was saved.*{name}"):
                refuse_damaged(work)
        (work / name).write_bytes(before)
    assert missed == [] and damaged_files(work) == []
    tell(f"damaged checkpoints: {wanted} faults in one of {len(names)} files, every one found and named")


def test_a_run_goes_on_from_the_newest_whole_checkpoint(place, lives, undisturbed, tell, chance):
    expected, run = outcome(undisturbed), place / "damaged"
    wanted = often(1, 12)
    for turn in range(wanted):
        copied(undisturbed, run)
        shutil.rmtree(run / "student")
        name = chance.choice(
            ["optimizer.pt", "model.safetensors", "redistill.json", "trainer_state.json", NAME]
        )
        hurt(run / f"checkpoint-{STEPS}" / name, "cut", chance)
        life = lives.train(run.name, place, {}, "--resume")
        assert life.wait() == 0, life.said()
        if damaged_files(run / f"damaged-checkpoint-{STEPS}") or name != NAME:
            assert f"checkpoint-{STEPS} is not as it was saved" in life.said() and name in life.said()
            assert f"Going on from damaged/checkpoint-{STEPS - 2}" in life.said(), life.said()
            shutil.rmtree(run / f"damaged-checkpoint-{STEPS}")
        assert outcome(run) == expected, turn
    tell(f"damaged newest checkpoint: {wanted} runs went on from the one before, to the same end to the bit")


def test_no_whole_checkpoint_is_a_sentence_and_nothing_is_touched(place, lives, undisturbed, chance):
    run = copied(undisturbed, place / "lost")
    for folder in run.glob("checkpoint-*"):
        hurt(folder / "optimizer.pt", "flipped", chance)
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    life = lives.train(run.name, place, {}, "--resume")
    assert life.wait() == 2
    assert life.said().startswith("redistill: no checkpoint in lost is as it was saved"), life.said()
    assert f"checkpoint-{STEPS}: optimizer.pt; checkpoint-{STEPS - 2}: optimizer.pt" in life.said()
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_what_sha256sum_writes_is_a_manifest(undisturbed, tmp_path):
    work = copied(undisturbed / f"checkpoint-{STEPS}", tmp_path / "run" / f"checkpoint-{STEPS}")
    checked = subprocess.run(["sha256sum", "-c", "--quiet", NAME], cwd=work, check=False)
    assert checked.returncode == 0
    (work / NAME).unlink()
    with pytest.raises(ValueError, match=f"damaged or missing: .*{NAME}.*sha256sum"):
        set_damaged_aside(work.parent)
    subprocess.run("sha256sum * > SHA256SUMS", shell=True, cwd=work, check=True)
    assert damaged_files(work) == [] and set_damaged_aside(work.parent) == [] and latest(work.parent) == work


def test_a_log_with_broken_lines_loses_only_those(place, lives, undisturbed):
    run = copied(undisturbed, place / "spotted")
    shutil.rmtree(run / "student")
    shutil.rmtree(run / f"checkpoint-{STEPS}")
    text = (run / "steps.jsonl").read_text().splitlines(keepends=True)
    text[2] = text[2].replace('"step"', '"step', 1)
    (run / "steps.jsonl").write_text("".join(text))
    life = lives.train(run.name, place, {}, "--resume")
    assert life.wait() == 0, life.said()
    steps = [json.loads(line)["step"] for line in (run / "steps.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 4, 5, 6, 7, 8]


def mounted(folder: Path, size: int, *, again: bool = False) -> None:
    how = ["-o", f"{'remount,' if again else ''}size={size}k"]
    done = subprocess.run(
        ["mount", "-t", "tmpfs", *how, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("no file system can be mounted here")


def test_torchs_own_word_for_a_write_that_came_out_short(tmp_path):
    """Beside other runs there may be room again before anybody looks at the disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(OSError, match="No space left on device"), saving(tmp_path):
            torch.save(torch.zeros(2**16), tmp_path / "optimizer.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with pytest.raises(RuntimeError, match="something else"), saving(tmp_path):
        raise RuntimeError("something else")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_and_room_again(place, lives, undisturbed, tell, chance):
    expected, full, wanted = outcome(undisturbed), 0, often(1, 20)
    needed = sum(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file()) // 1024
    disk = place / "disk"
    disk.mkdir()
    for _ in range(wanted):
        mounted(disk, chance.randint(needed // 8, needed * 9 // 10))
        try:
            life = lives.train("disk/run", place)
            code = life.wait()
            if code:
                full += 1
                assert code == 74 and "the disk is full" in life.said(), life.said()
                assert "Traceback" not in life.said()
            check_whole(disk / "run")
            mounted(disk, 8 * needed, again=True)
            life = lives.train("disk/run", place)
            assert life.wait() == 0, life.said()
            assert outcome(disk / "run") == expected
        finally:
            subprocess.run(["umount", str(disk)], check=False)
    tell(
        f"full disk: {full} runs on a disk too small, said so, and went on to the same end when there was room"
    )
