"""Data sets: every format, and every kind of bad input with its file and line."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redistill.data import DataError, load_examples
from redistill.sample import Example, Message

SHARED = Path(__file__).parents[2] / "shared" / "data"
USER, BOT, SYSTEM = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def lines(path: Path, *records) -> Path:
    raw = [r if isinstance(r, bytes) else json.dumps(r, ensure_ascii=False).encode() for r in records]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


CHAT = (Message(SYSTEM, "s"), Message(USER, "hi"))
FORMATS = {
    "text": ({"text": "All of it."}, Example("", ("All of it.",))),
    "prompt": ({"prompt": "Why?"}, Example("Why?")),
    "prompt-completion": ({"prompt": "Why?", "completion": " So."}, Example("Why?", (" So.",))),
    "prompt-response": ({"prompt": "Why?", "response": "So."}, Example("Why?", ("So.",))),
    "chat-prompt": ({"prompt": turns((SYSTEM, "s"), (USER, "hi"))}, Example(CHAT)),
    "chat-completion": (
        {"prompt": turns((SYSTEM, "s"), (USER, "hi")), "completion": turns((BOT, "yo"))},
        Example(CHAT, ("yo",)),
    ),
    "long-completion": (
        {"prompt": "hi", "completion": turns((BOT, "yo"), (USER, "and?"), (BOT, "bye"))},
        Example((Message(USER, "hi"), Message(BOT, "yo"), Message(USER, "and?")), ("bye",)),
    ),
    "messages": (
        {"messages": turns((USER, "a"), (BOT, "b"), (USER, "c"), (BOT, "d"))},
        Example((Message(USER, "a"), Message(BOT, "b"), Message(USER, "c")), ("d",)),
    ),
    "messages-left-open": (
        {"messages": turns((USER, "a"), (BOT, "b"), (USER, "c"))},
        Example((Message(USER, "a"),), ("b",)),
    ),
    "alpaca": ({"instruction": "Do", "input": "x", "output": "y"}, Example("Do", ("y",), "x")),
    "dolly": ({"instruction": "Do", "context": "", "response": "y"}, Example("Do", ("y",))),
    "references": ({"instruction": "Do", "input": "", "output": ["y", "z"]}, Example("Do", ("y", "z"))),
    "nulls": ({"messages": None, "prompt": None, "text": "t"}, Example("", ("t",))),
    "not-interpreted": (
        {"prompt": "{{x}} {0} %s <|im_end|> \\n", "completion": "é\u2028😀"},
        Example("{{x}} {0} %s <|im_end|> \\n", ("é\u2028😀",)),
    ),
}


def same(example: Example, wanted: Example, source: str) -> bool:
    return (example.prompt, example.references, example.context, example.source) == (
        wanted.prompt,
        wanted.references,
        wanted.context,
        source,
    )


@pytest.mark.parametrize(("record", "wanted"), FORMATS.values(), ids=FORMATS)
def test_formats_in_every_container(tmp_path, record, wanted):
    jsonl = lines(tmp_path / "a.jsonl", record, record)
    array = tmp_path / "b.json"
    array.write_text("\ufeff \n" + json.dumps([record, record]), encoding="utf-8")
    parquet = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_pylist([record, record]), parquet)
    json_lines = lines(tmp_path / "d.json", record, record)
    for path, second in ((jsonl, ":2"), (array, "[1]"), (parquet, "[1]"), (json_lines, ":2")):
        loaded = load_examples(path)
        assert (len(loaded.examples), loaded.problems, loaded.counted) == (2, (), 2)
        assert same(loaded.examples[1], wanted, f"{path}{second}"), loaded.examples[1]


FAULTS = {
    "broken": (b'{"text": "a"', "is not JSON"),
    "utf8": (b'{"text": "\xe9t\xe9"}', "is not UTF-8 (byte 11"),
    "nul-byte": (b'{"text": "a\0"}', "NUL byte"),
    "nul-escape": ({"text": "a\0"}, 'NUL character in "text"'),
    "surrogate": (b'{"text": "\\ud83d"}', "half a character"),
    "deep": (b"[" * 100_000, "RecursionError"),
    "digits": (b'{"text": ' + b"1" * 5000 + b"}", "ValueError"),
    "not-object": ([1], "is a list, not an object"),
    "columns": ({"question": "a"}, "it has 'question'"),
    "no-columns": ({}, "it is empty"),
    "no-output": ({"instruction": "a", "input": ""}, 'no "output" or "response"'),
    "type": ({"prompt": 3, "completion": "b"}, 'has a number in "prompt", not a list of turns'),
    "reference-type": ({"instruction": "a", "output": 3}, 'has a number in "output", not text'),
    "context-type": ({"instruction": "a", "input": ["b"], "output": "c"}, 'has a list in "input", not text'),
    "empty-prompt": ({"prompt": " \n", "completion": "b"}, 'an empty "prompt"'),
    "no-turns": ({"prompt": [], "completion": "b"}, 'an empty "prompt"'),
    "empty-response": ({"prompt": "a", "completion": " "}, 'an empty "completion"'),
    "no-reference": ({"instruction": "a", "output": []}, 'an empty "output"'),
    "empty-answer": ({"messages": turns((USER, "a"), (BOT, " "))}, "an empty response"),
    "no-assistant": ({"messages": turns((USER, "a"))}, 'no assistant turn in "messages"'),
    "no-question": ({"messages": turns((SYSTEM, "a"), (BOT, "b"))}, "no user turn"),
    "wrong-completion": ({"prompt": "a", "completion": turns((USER, "b"))}, "no assistant turn"),
    "role": ({"messages": turns((USER, "a"), ("tool", "b"))}, "the role 'tool' in messages[1]"),
    "turn": ({"messages": [{"from": USER, "value": "a"}]}, 'no "role" and "content" in messages[0]'),
    "turn-content": ({"messages": [{"role": USER, "content": None}]}, 'nothing in "messages[0]", not text'),
}


@pytest.mark.parametrize(("record", "what"), FAULTS.values(), ids=FAULTS)
def test_a_bad_record_is_counted_and_spoils_no_other(tmp_path, record, what):
    good = {"text": "fine"}
    path = lines(tmp_path / "a.jsonl", good, b"", record, good)
    loaded = load_examples(path, max_bad_share=0.5)
    assert [example.source for example in loaded.examples] == [f"{path}:1", f"{path}:4"]
    assert loaded.counted == 3
    (problem,) = loaded.problems
    assert problem.source == f"{path}:3"
    assert what in problem.what
    assert loaded.summary().startswith(f"1 of 3 records cannot be used:\n  {path}:3: ")
    with pytest.raises(DataError, match=r"33\.3% .* data\.max_bad_share = 0\.01") as caught:
        load_examples(path)
    assert f"{path}:3: {problem.what}" in str(caught.value)


def test_the_bad_share_is_a_limit_and_the_first_five_are_shown(tmp_path):
    path = lines(tmp_path / "a.jsonl", *[{"text": "a"}] * 693, *[{"text": ""}] * 7)
    loaded = load_examples(path, max_bad_share=0.01)
    assert (len(loaded.examples), len(loaded.problems)) == (693, 7)
    assert loaded.summary().count("an empty") == 5
    assert loaded.summary().endswith("and 2 more")
    assert load_examples(lines(tmp_path / "b.jsonl", {"text": "a"})).summary() == ""
    with pytest.raises(DataError, match="more than"):
        load_examples(path, max_bad_share=0.0099)
    with pytest.raises(DataError, match="no record can be used"):
        load_examples(lines(tmp_path / "c.jsonl", {"text": ""}), max_bad_share=1.0)


def test_limit_stops_reading(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, b"broken")
    loaded = load_examples(path, limit=2)
    assert [e.references for e in loaded.examples] == [("a",), ("b",)]
    assert loaded.counted == 2


def test_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert [e.source for e in load_examples(path).examples] == [f"{path}:1", f"{path}:3"]


def test_folder_takes_the_split(tmp_path):
    lines(tmp_path / "train.jsonl", {"text": "a"})
    (tmp_path / "dev.json").write_text('[{"text": "b"}]', encoding="utf-8")
    (tmp_path / "data").mkdir()
    for shard in (1, 0):
        pq.write_table(
            pa.Table.from_pylist([{"text": str(shard)}]), tmp_path / "data" / f"test-{shard}.parquet"
        )

    def texts(split):
        return [e.references[0] for e in load_examples(tmp_path, split=split).examples]

    assert (texts("train"), texts("dev"), texts("test")) == (["a"], ["b"], ["0", "1"])
    with pytest.raises(
        DataError, match=r"has no valid\.jsonl.*it has dev\.json, train\.jsonl: set the split"
    ):
        texts("valid")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="nor any other data file"):
        load_examples(tmp_path / "none")


def test_what_cannot_be_a_data_set(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n \n")
    broken = tmp_path / "broken.json"
    broken.write_text('[{"text": "a"},\n{"text" "b"}]', encoding="utf-8")
    latin = tmp_path / "latin.json"
    latin.write_bytes(b'[{"text":\n"\xe9"}]')
    parquet = tmp_path / "cut.parquet"
    parquet.write_bytes(b"PAR1 and no more")
    csv = tmp_path / "a.csv"
    csv.write_text("a,b", encoding="utf-8")
    for path, said in (
        (empty, r"empty\.jsonl \(split train\) holds no records"),
        (broken, r"broken\.json:2 is not JSON"),
        (latin, r"latin\.json:2 is not UTF-8"),
        (parquet, r"cut\.parquet\[0\] is not parquet"),
        (csv, r"a\.csv is of no known format"),
        (tmp_path / "gone.jsonl", r"gone\.jsonl does not exist; set the path"),
        ("./gone", r"\./gone does not exist"),
        ("a/b/c", "a/b/c does not exist"),
        ("gone.jsonl", "does not exist"),
    ):
        with pytest.raises(DataError, match=said):
            load_examples(path)


def test_hub_id_goes_through_datasets(monkeypatch):
    asked = []

    def load_dataset(path, name=None, *, split, streaming):
        assert not streaming
        asked.append((path, name, split))
        if split == "dev":
            raise ValueError('Unknown split "dev". Should be one of ["train"].')
        return datasets.Dataset.from_list([{"instruction": "Do", "context": None, "response": "y"}] * 2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_examples("owner/set", name="small", split="train[:2]")
    assert asked == [("owner/set", "small", "train[:2]")]
    assert same(loaded.examples[1], Example("Do", ("y",)), "owner/set[1]")
    with pytest.raises(DataError, match=r"owner/set \(name None, split dev\).*Unknown split"):
        load_examples("owner/set", split="dev")


@pytest.mark.parametrize(
    ("folder", "split", "count", "several"),
    [
        ("dolly", "train", 11_435, False),
        ("dolly", "dev", 1_000, False),
        ("self_instruct", "test", 242, False),
        ("vicuna", "test", 80, False),
        ("sinst", "test", 1_694, True),
    ],
)
def test_the_sets_of_the_protocol(folder, split, count, several):
    if not (SHARED / folder).is_dir():
        pytest.skip(f"needs the protocol's data in {SHARED}")
    loaded = load_examples(SHARED / folder, split=split, max_bad_share=0.0)
    assert len(loaded.examples) == loaded.counted == count
    assert any(len(example.references) > 1 for example in loaded.examples) == several
