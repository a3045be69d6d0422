"""Streamed data: the same sample at each place however one comes there, bad records counted, memory bounded."""

import json
import logging
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_trainer import TOKENIZER, assert_same_curve, curve, samples, train_and_die_at
from test_trainer import recipe as trainer_recipe
from tiny import save_tiny, tiny_llama

from redistill import DistillTrainer
from redistill.checkpoint import latest
from redistill.config import ConfigError, load_config
from redistill.data import DataError, Place, rows_from
from redistill.sample import Sample, SampleTable
from redistill.stream import Stream


def records(count):
    return [{"prompt": f"Name the number {n}.", "completion": f"It is {n}."} for n in range(count)]


def write_lines(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def numbered(example):
    """A sample that has the record's number for its prompt; numbers that end in 99 are too long."""
    number = int(example.prompt.split()[-1].rstrip("."))
    return "too long" if number % 100 == 99 else Sample((number,), (1,), source=example.source)


def stream(path, **options):
    how = {"buffer": 16, "seed": 3, **options}
    return Stream("made", lambda place: rows_from(path, place=place, streaming=True), numbered, **how)


def numbers(taken):
    return [sample.prompt[0] for sample in taken]


def containers(folder):
    rows = records(50)
    lines = write_lines(folder / "a.jsonl", rows)
    (folder / "shards").mkdir()
    for shard, part in enumerate((rows[:20], rows[20:])):
        table = pa.Table.from_pylist(part)
        pq.write_table(table, folder / "shards" / f"train-{shard}.parquet", row_group_size=7)
    return {"lines": lines, "shards": folder / "shards", "hub": "owner/set"}


@pytest.fixture
def hub(monkeypatch):
    def load_dataset(*asked, split, streaming):
        assert (*asked, split, streaming) == ("owner/set", None, "train", True)
        return datasets.Dataset.from_list(records(50)).to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("kind", ["lines", "shards", "hub"])
def test_rows_go_on_from_any_place(tmp_path, kind):
    path, place = containers(tmp_path)[kind], Place()
    whole = list(rows_from(path, streaming=True))
    assert [row["prompt"] for _, row in whole] == [row["prompt"] for row in records(50)]
    for done, row in enumerate(rows_from(path, place=place, streaming=True)):
        assert row == whole[done]
        if done % 9 == 0 or done > 46:
            mark = json.loads(json.dumps(vars(place)))
            assert list(rows_from(path, place=Place(**mark), streaming=True)) == whole[done + 1 :], done


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("kind", ["lines", "shards", "hub"])
def test_every_epoch_has_every_sample_in_another_order_and_any_place_is_found_again(tmp_path, kind):
    path = containers(tmp_path)[kind]
    found = numbers(stream(path)[:150])
    epochs = [found[:50], found[50:100], found[100:]]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and epochs[0] != sorted(epochs[0])
    assert sorted(epochs[0][:16]) == list(range(16)), "no further than the buffer"
    assert numbers(stream(path, seed=4)[:50]) != epochs[0]
    assert numbers(stream(path, buffer=1)[:50]) == list(range(50))
    assert sorted(numbers(stream(path, buffer=1000)[:50])) == list(range(50))
    assert numbers(stream(path, limit=20)[:40]) != numbers(stream(path, limit=20)[20:60])
    assert all(sorted(numbers(stream(path, limit=20)[at : at + 20])) == list(range(20)) for at in (0, 20))
    again = stream(path)
    assert numbers(again[i] for i in (149, 3, 64, 63, 120)) == [found[i] for i in (149, 3, 64, 63, 120)]
    for place in (0, 15, 16, 77, 149):
        mark = json.loads(json.dumps(again.mark(place)))
        other = stream(path)
        other.at_hand()
        other.go_on(mark)
        assert other[place].prompt[0] == found[place]
        blocks = [each["first"] for each in map(other.mark, range(place + 1))]
        assert set(blocks) <= {0, mark["first"]}, "nothing in between was read"
    assert numbers(again.one_epoch()) == list(range(50))


def test_bad_records_and_those_over_the_limits_are_counted(tmp_path, caplog):
    rows = records(1200)
    rows[5:5], rows[700:700] = ["{broken"], ['{"prompt": ""}']
    path = write_lines(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.INFO, logger="redistill.stream"):
        made = stream(path, buffer=100)
        assert sorted(numbers(made[:1188])) == [n for n in range(1200) if n % 100 != 99]
    said = [record.message for record in caplog.records]
    assert (
        f"{path}:6: is not JSON" in said[0]
        and len(said) == 6
        and "1202 records, 14 of them left out" in said[-1]
    )
    made[1188]
    assert (
        made.mark(1188)["counted"] == 1202
        and made.mark(1188)["bad"] == 2
        and made.mark(1188)["left_out"] == 12
    )

    # Two of the first six are too many in a file of six, and say nothing of one that goes on.
    few = write_lines(tmp_path / "few.jsonl", ["{broken", "{broken", *records(4)])
    with pytest.raises(
        DataError, match=r"2 of the 6 records read so far .*data\.max_bad_share = 0\.01(.|\n)*:1: is"
    ):
        stream(few, buffer=4)[7]
    more = write_lines(tmp_path / "more.jsonl", ["{broken", "{broken", *records(1100), *["{broken"] * 20])
    made = stream(more, buffer=4)
    assert made[900]
    with pytest.raises(DataError, match="records read so far"):
        made[1089]
    for rows, words in (
        ([], "holds no records"),
        ([{"prompt": "Name 99."}] * 3, "no record is left.*on_long_prompt"),
    ):
        with pytest.raises(DataError, match=words):
            stream(write_lines(tmp_path / "none.jsonl", rows))[0]
    (tmp_path / "array.json").write_text(json.dumps(records(2)))
    with pytest.raises(DataError, match=r"one JSON array.*one object on each line"):
        stream(tmp_path / "array.json")[0]


def test_a_line_that_was_mended_does_not_move_the_others(tmp_path):
    rows = [*records(3), "{broken", *records(40)[4:]]
    path = write_lines(tmp_path / "a.jsonl", rows)
    before = stream(path, max_bad_share=0.5)
    found, mark = numbers(before[:39]), before.mark(30)
    write_lines(path, records(40))
    after = stream(path, max_bad_share=0.5)
    after.go_on(mark)
    assert numbers(after[30:39]) == found[30:]


def test_a_table_holds_samples_and_little_else():
    made = [
        Sample((1, 2), (), source="a:1", teacher_prompt=(7,)),
        Sample((70_000,), (3, 4, 5), source="é\udcff:2"),
        *samples(3),
    ]
    table = SampleTable(made)
    assert (
        list(table) == made and table[-1] == made[-1] and table[1:3] == tuple(made[1:3]) and len(table) == 5
    )
    with pytest.raises(IndexError):
        table[5]
    with pytest.raises(AssertionError):
        table.append(Sample((1,), (2,), "rollout"))


def streamed(data):
    """The samples of a list as a stream."""
    data = list(data)

    def rows(place):
        for number in range(place.row, len(data)):
            place.row = number + 1
            yield f"made:{number}", {"prompt": str(number)}

    return Stream("made", rows, lambda example: data[int(example.prompt)], buffer=7, seed=1)


def trainer_of(folder, path, **changes):
    rows = records(10)
    write_lines(path, rows)

    def to_sample(example):
        ids = [TOKENIZER.encode(text) for text in (example.prompt, example.references[0])]
        return Sample(tuple(ids[0]), (*ids[1], TOKENIZER.eos_token_id), source=example.source)

    made = Stream("made", lambda place: rows_from(path, place=place), to_sample, buffer=4, seed=3)
    teacher = tiny_llama(len(TOKENIZER), hidden=48, seed=2)
    config = trainer_recipe(folder, **changes)
    return DistillTrainer(
        tiny_llama(len(TOKENIZER), seed=1), teacher, config, TOKENIZER, made, samples(6, seed=9)
    )


def test_a_killed_run_goes_on_at_the_same_record(tmp_path):
    """Four steps of eight of ten records in blocks of four: killed in the second epoch, within a block."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trainer_of(whole, tmp_path / "a.jsonl", steps=4).train()
    train_and_die_at(trainer_of(stopped, tmp_path / "a.jsonl", steps=4), 3)
    last = latest(stopped)
    assert last is not None and last.name == "checkpoint-2"
    mark = json.loads((last / "redistill.json").read_text())["stream"]
    assert (mark["first"], mark["epoch"], mark["place"]["row"]) == (14, 1, 4)
    went_on = trainer_of(stopped, tmp_path / "a.jsonl", batch=4, accumulate=2, steps=4)
    went_on.train(resume_from_checkpoint=str(last))
    assert_same_curve(curve(stopped), curve(whole))


def test_what_a_stream_needs_is_said(tmp_path):
    save_tiny(tmp_path)
    places = [f"{who}.model_name_or_path={tmp_path / who}" for who in ("student", "teacher")]
    (tmp_path / "recipe.yaml").write_text("data: {path: a.jsonl, streaming: true}")
    for more, words in (
        ([], "set training.max_steps or a budget"),
        (["training.max_steps=0"], "set training.max_steps"),
        (["training.max_steps=5", "data.responses=teacher"], "leave out data.streaming"),
        (
            ["training.max_steps=5", "training.dataloader_num_workers=1"],
            "leave training.dataloader_num_workers at 0",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            load_config(tmp_path / "recipe.yaml", [*places, *more])
    assert load_config(tmp_path / "recipe.yaml", [*places, "budget.seconds=5"]).data.streaming


READER = """
import resource, sys
from redistill.data import rows_from
from redistill.sample import Sample
from redistill.stream import Stream

def to_sample(example):
    return Sample(tuple(range(500)), (1,), source=example.source)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

rows = lambda place: rows_from(sys.argv[1], place=place, streaming=True)
stream = Stream("made", rows, to_sample, buffer=1000, seed=0)
stream[0]
before = peak()
assert stream[20_000 - 1].source and stream.mark(20_000)["epoch"] == 0 and stream[20_000]
assert stream.mark(20_000)["counted"] == 20_000
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the peak in kilobytes, as Linux does")
def test_a_file_of_200_megabytes_adds_a_few(tmp_path):
    line = json.dumps({"prompt": "Why?", "completion": "So. " * 2500}) + "\n"
    with (tmp_path / "large.jsonl").open("w") as file:
        for _ in range(20):
            file.write(line * 1000)
    assert (tmp_path / "large.jsonl").stat().st_size > 200e6
    done = subprocess.run(
        [sys.executable, "-c", READER, tmp_path / "large.jsonl"], capture_output=True, text=True, check=False
    )
    (tmp_path / "large.jsonl").unlink()
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 16
