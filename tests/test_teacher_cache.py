"""A cached teacher: what is stored comes back, training from it is training with the model, nothing else passes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from test_cli import RECORDS, redistill
from tiny import save_tiny

from redistill import cli
from redistill.caching import cache_teacher
from redistill.config import load_config
from redistill.models import load_model, load_tokenizer
from redistill.prepare import prepare
from redistill.run import train
from redistill.runlog import read
from redistill.sample import Sample
from redistill.splits import load_split
from redistill.teachers.cached import CachedTeacher
from redistill.teachers.local import LocalTeacher
from redistill.teachers.signal import TopK, most_probable
from redistill.teachers.store import LEAST, Row, Shards, key_of, pack, quantum, unpack, write_shard

QUIET = Console(quiet=True)


@pytest.mark.parametrize("size", [2, 384, 49152, 65536, 151936, 262144, 2**20])
def test_an_entry_is_four_bytes_and_off_by_half_a_quantum(size):
    generator = torch.Generator().manual_seed(size)
    k = min(size, 50)
    ids = torch.stack([torch.randperm(size, generator=generator)[:k] for _ in range(20)])
    logits = 4 * torch.randn(20, k + 1, generator=generator)
    logits[0, 0], logits[1, -1] = -80.0, -3e4
    log_p = logits.log_softmax(-1)
    entries, tails = pack(TopK(ids, log_p), size)
    assert entries.dtype == np.uint32 and entries.shape == ids.shape and tails.dtype == np.float32
    found = unpack(entries, tails, size)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.log_p.exp().sum(-1), torch.ones(20))
    # Normalising moves all of a row by as much as the rounding did at most.
    error = (found.log_p - log_p)[:, :-1].abs()[log_p[:, :-1] > LEAST].max()
    assert error <= quantum(size) + 1e-5
    assert abs(float(found.log_p[0, 0]) - LEAST) < 2 * quantum(size)
    assert float(found.log_p[1, -1]) == pytest.approx(float(log_p[1, -1]), abs=0.01), (
        "a tail of any size stays what it is"
    )
    assert quantum(size) <= {2**20: 0.008}.get(size, 0.002)


def test_rows_are_found_by_their_content(tmp_path):
    samples = [
        Sample((1, 2), (3, 4, 5)),
        Sample((1,), (2, 3, 4, 5)),
        Sample((1, 2, 3), (4, 5)),
        Sample((9,), (7,)),
    ]
    assert len({key_of(each) for each in samples}) == 4
    assert key_of(replace(samples[0], source="elsewhere", origin="replay")) == key_of(samples[0])
    stored = {
        key_of(each): (
            np.full((len(each.response), 2), place, np.uint32),
            np.arange(len(each.response), dtype=np.float32),
        )
        for place, each in enumerate(samples)
    }
    rows = [Row(key, *arrays) for key, arrays in stored.items()]
    write_shard(tmp_path / "shard-00000.safetensors", rows[:3])
    write_shard(tmp_path / "shard-00007.safetensors", rows[3:])
    shards = Shards(tmp_path)
    assert len(shards) == 4 and shards.positions == 10 and shards.next_number == 8
    for key, arrays in stored.items():
        assert key in shards and all(
            np.array_equal(one, other) for one, other in zip(shards.row(key), arrays, strict=True)
        )
    assert key_of(Sample((1, 2), (3, 4))) not in shards


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    save_tiny(folder)
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    (folder / "data" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS[8:]))
    recipe = {
        "student": {"model_name_or_path": "student"},
        "teacher": {"model_name_or_path": "teacher"},
        "data": {"path": "data", "eval_split": "test"},
        "rollout": {"lmbda": 0.0, "max_completion_length": 24},
        "training": {"max_steps": 3, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 3,
                     "learning_rate": 1e-3, "use_cpu": True},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def config_of(place, *overrides):
    places = [f"{name}.model_name_or_path={json.dumps(str(place / name))}" for name in ("student", "teacher")]
    return load_config(
        place / "recipe.yaml", [*places, f"data.path={json.dumps(str(place / 'data'))}", *overrides]
    )


@pytest.fixture(scope="module")
def whole(place):
    """Every class kept."""
    said = redistill("cache-teacher", "recipe.yaml", "whole", "--top-k", "5000", cwd=place)
    assert (
        "16 responses" not in said.stdout
        and "12 responses" in said.stdout
        and "12 of them are new" in said.stdout
    )
    return place / "whole"


def test_the_manifest_says_what_was_written(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert {"teacher": "teacher", "template": "chat", "system": None, "k": 384, "vocabulary": 384, "dtype": "float32",
            "rows": 12}.items() <= manifest.items()  # fmt: skip
    assert len(manifest["tokenizer"]) == len(manifest["weights"]) == len(manifest["chat_template"]) == 12
    assert {"versions", "git", "positions", "bytes"} <= manifest.keys()
    page = (Path(__file__).parents[1] / "docs" / "teacher.md").read_text()
    assert all(f"`{key}`" in page for key in manifest)
    entries = 4 * manifest["k"] * manifest["positions"]
    assert entries < manifest["bytes"] < entries + 4 * manifest["positions"] + 2000


@pytest.mark.usefixtures("whole")
def test_training_from_a_whole_cache_is_training_with_the_model(place):
    train(config_of(place), place / "live", QUIET)
    teacher = place / "teacher" / "model.safetensors"
    teacher.rename(place / "away")  # it is not loaded
    try:
        train(
            config_of(place, f"teacher.cache={json.dumps(str(place / 'whole'))}"), place / "from-cache", QUIET
        )
    finally:
        (place / "away").rename(teacher)
    for name, keys in (("steps", ("loss", "sft", "token", "span", "kl", "teacher_log_likelihood")),
                       ("evaluations", ("eval_loss", "eval_kl"))):  # fmt: skip
        live, cached = (list(read(place / run / f"{name}.jsonl")) for run in ("live", "from-cache"))
        assert len(live) == len(cached) > 0
        for one, other in zip(live, cached, strict=True):
            assert one.keys() == other.keys()
            for key in keys:
                assert one[key] == pytest.approx(other[key], rel=2e-3, abs=2e-4), key


def test_what_is_read_is_what_the_teacher_said(place):
    folder, config = place / "few", config_of(place)
    found = cache_teacher(config, folder, QUIET, k=7, batch_size=5, shard=7 * 4 * 40)
    assert found.new == found.rows == 12 and len(list(folder.glob("shard-*.safetensors"))) > 3
    tokenizer, model = load_tokenizer(place / "teacher"), load_model(place / "teacher")
    samples = load_split(config, tokenizer, str(place / "data"), "train", None).samples
    cached = CachedTeacher(folder)
    cached.check(config, tokenizer, cached.vocabulary, samples)
    chosen = [samples[place] for place in (7, 2, 2, 11)]
    said = cached.signal(chosen)
    live = LocalTeacher(model, 384).signal(chosen)
    wanted = most_probable(live.head.logits(live.hidden).detach(), 7)
    assert torch.equal(said.ids, wanted.ids)
    torch.testing.assert_close(said.log_p, wanted.log_p, atol=1e-3, rtol=1e-4)
    again = cache_teacher(config, folder, QUIET, k=7, batch_size=5)
    assert again.new == 0 and again.rows == 12
    streamed = config_of(place, "data.streaming=true", "data.shuffle_buffer_size=5")
    found = cache_teacher(streamed, place / "streamed", QUIET, k=7, batch_size=5, shard=7 * 4 * 40)
    assert (
        found.new == found.rows == 12 and cache_teacher(streamed, folder, QUIET, k=7, batch_size=5).new == 0
    )
    other = CachedTeacher(place / "streamed").signal(chosen)
    assert torch.equal(other.ids, said.ids) and torch.equal(other.log_p, said.log_p)


def test_killed_it_goes_on_at_the_shard_and_ends_as_if_it_had_not_been(place, tmp_path):
    """Killed with SIGKILL after some shards; a shard under way leaves nothing that counts."""
    many = tmp_path / "many.jsonl"
    many.write_text(
        "".join(
            json.dumps({"prompt": f"Count to {n}.", "completion": "One, two, three. " * 3}) + "\n"
            for n in range(300)
        )
    )
    script = (
        "import sys; import redistill.caching as c; from rich.console import Console; from pathlib import Path;"
        "from redistill.config import load_config;"
        "config = load_config('recipe.yaml', ['data.path=' + sys.argv[1], 'data.eval_path=data']);"
        "c.cache_teacher(config, Path(sys.argv[2]), Console(quiet=True), k=16, batch_size=4, shard=16 * 4 * 24 * 20)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(many), str(tmp_path / "stopped")], cwd=place
    )
    deadline = time.time() + 200
    while len(list((tmp_path / "stopped").glob("shard-*.safetensors"))) < 3 and time.time() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").glob("shard-*.safetensors")}
    assert 3 <= len(before) < 12
    (tmp_path / "stopped" / "shard-00099.safetensors.partial").write_bytes(b"half")
    config = config_of(
        place, f"data.path={json.dumps(str(many))}", f"data.eval_path={json.dumps(str(place / 'data'))}"
    )
    for folder in ("stopped", "whole"):
        cache_teacher(config, tmp_path / folder, QUIET, k=16, batch_size=4, shard=16 * 4 * 24 * 20)
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    ours, theirs = (Shards(tmp_path / folder) for folder in ("stopped", "whole"))
    assert len(ours) == len(theirs) == 304 and ours.positions == theirs.positions
    samples = load_split(config, load_tokenizer(place / "teacher"), str(many), "train", None).samples
    for each in samples:
        for one, other in zip(ours.row(key_of(each)), theirs.row(key_of(each)), strict=True):
            np.testing.assert_allclose(one.astype(np.float64), other.astype(np.float64), rtol=1e-4)


def test_more_data_is_added_to_what_is_there(place, tmp_path):
    config, folder = config_of(place, "data.limit=5", "data.eval_split=null"), tmp_path / "grows"
    assert cache_teacher(config, folder, QUIET, k=4, batch_size=8).new == 5
    found = cache_teacher(config_of(place), folder, QUIET, k=4, batch_size=8)
    assert (found.new, found.rows) == (7, 12) and len(list(folder.glob("shard-*"))) == 2


REFUSED = {
    "rollouts": (["rollout.lmbda=0.5"], r"rollout\.lmbda to 0"),
    "temperature": (["objective.temperature=2.0"], r"objective\.temperature"),
    "another template": (["data.template=alpaca"], r"another data\.template \(chat, not alpaca\)"),
    "another system": (["data.system=Be brief."], r"another data\.system"),
    "other limits": (
        ["rollout.max_completion_length=6"],
        r"lacks \d+ of the .* another rollout\.max_completion_length",
    ),
    "nothing there": (["teacher.cache=nowhere"], r"nowhere holds no teacher's cache .* cache-teacher"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_cache_cannot_answer_is_refused_with_the_reason(place, whole, name):
    overrides, said = REFUSED[name]
    with pytest.raises(ValueError, match=said):
        prepare(config_of(place, f"teacher.cache={json.dumps(str(whole))}", *overrides))


def test_a_missing_row_and_a_prompt_without_response_are_named(place, whole, tmp_path):
    cache = f"teacher.cache={json.dumps(str(whole))}"
    data = tmp_path / "more.jsonl"
    data.write_text(
        "".join(json.dumps(r) + "\n" for r in [*RECORDS, {"prompt": "New?", "completion": "Yes."}])
    )
    place_of = [cache, f"data.path={json.dumps(str(data))}", "data.eval_split=null"]
    for more in ([], ["data.streaming=true"]):
        with pytest.raises(
            ValueError, match=r"lacks 1 of the 13 samples, the first from .*more\.jsonl:13: run"
        ):
            prepare(config_of(place, *place_of, *more))
    data.write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps({"prompt": "No answer?"}) + "\n")
    with pytest.raises(ValueError, match=r"1 samples have no response, the first from .*more\.jsonl:2"):
        prepare(config_of(place, cache, f"data.path={json.dumps(str(data))}", "data.eval_split=null"))


def test_another_teacher_tokenizer_or_k_is_refused(place, whole, tmp_path):
    other = tmp_path / "other"
    save_tiny(other)
    (other / "teacher").rename(other / "larger")
    with pytest.raises(ValueError, match=r"is the cache of teacher, not of .*larger"):
        prepare(config_of(place, f"teacher.cache={whole}", f"teacher.model_name_or_path={other / 'larger'}"))
    for name in ("student", "larger"):
        path = other / name / "tokenizer.json"
        spec = json.loads(path.read_text())
        words = spec["model"]["vocab"]
        one, two = list(words)[300:302]
        words[one], words[two] = words[two], words[one]
        path.write_text(json.dumps(spec))
    (other / "larger").rename(other / "teacher")
    foreign = [f"{name}.model_name_or_path={other / name}" for name in ("student", "teacher")]
    with pytest.raises(ValueError, match="another tokenizer"):
        prepare(config_of(place, f"teacher.cache={whole}", *foreign))
    with pytest.raises(ValueError, match="holds a cache with k 384, not 3"):
        cache_teacher(config_of(place), whole, QUIET, k=3, batch_size=4)
    with pytest.raises(ValueError, match=r"holds a cache with (weights|tokenizer)"):
        cache_teacher(config_of(place, *foreign), whole, QUIET, k=384, batch_size=4)


def test_a_damaged_shard_is_one_sentence(place, whole, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in whole.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    shard = next(damaged.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors is damaged .* delete it and run"):
        prepare(config_of(place, f"teacher.cache={damaged}"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_said_and_leaves_no_half_shard(place, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(OSError, match="No space left"):
            cache_teacher(config_of(place), small / "cache", QUIET, k=384, batch_size=4)
        assert not list((small / "cache").glob("shard-*.safetensors"))
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_the_folder_belongs_to_one_process(place, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "from redistill.runlog import alone; from pathlib import Path; import sys\n"
         "with alone(Path(sys.argv[1]) / '.lock'): print('held', flush=True); sys.stdin.read()", str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another process writes"):
        cache_teacher(config_of(place), tmp_path, QUIET, k=3, batch_size=4)
    holder.communicate("")


def test_without_a_folder_the_command_says_what_to_type(place):
    with pytest.raises(ValueError, match=r"cache-teacher .*recipe\.yaml FOLDER"):
        cli.training.cache_teacher(place / "recipe.yaml")
