"""Input from anybody, made up by hypothesis: how it is read, refused and shown. What must hold is in hostile.py."""

from __future__ import annotations

import json
import subprocess
import sys

import hostile
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import often
from tiny import CHAT_TEMPLATE, IM_END, SPECIALS, VOCAB
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from redistill.config import Config
from redistill.config_faults import setting_names

COLUMNS = (
    "messages",
    "prompt",
    "completion",
    "response",
    "output",
    "instruction",
    "input",
    "context",
    "text",
)
ODD = (
    "\0",
    "\x1b[2J",
    "\u202e",
    "\u2028",
    "\r",
    "\ufeff",
    "\U000f0000",
    "\U000ffffd",
    "{{ 7 * 7 }}",
    "[bold]",
    "</s>",
)
ANY_TEXT = st.text(st.characters(), max_size=12) | st.sampled_from((*ODD, *SPECIALS, "a", "user", " "))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.integers(10**300, 10**310),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=8,
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(("system", "user", "assistant")) | VALUES, "content": ANY_TEXT | VALUES}
)
TURNS = st.lists(TURN | VALUES, max_size=4)
RECORD = st.dictionaries(st.sampled_from(COLUMNS), ANY_TEXT | TURNS | VALUES, max_size=4)
TYPED = st.lists(
    st.sampled_from((*SPECIALS, "<|im_", "end|>", "<|", "\n", " ", *ODD[1:])) | st.text(max_size=6),
    max_size=12,
).map("".join)


def counted(few: int, many: int):
    return settings(max_examples=often(few, many))


@pytest.fixture(scope="module", autouse=True)
def said(tell):
    yield
    done = {name: count for name, count in sorted(hostile.DONE.items())}
    shown = ", ".join(f"{count:,} {name}" for name, count in done.items())
    tell(f"made-up input: {sum(done.values()):,} cases ({shown})")


# Data


@counted(150, 50_000)
@given(RECORD | VALUES, st.sampled_from(("chat", "alpaca", "plain")), st.sampled_from(("drop", "truncate")))
def test_records(record, template, long):
    hostile.check_record(record, template, long)


@st.composite
def files(draw):
    """Lines of JSON, some of them cut, doubled, spliced with bytes or replaced by something else."""
    made = []
    for record in draw(st.lists(RECORD | VALUES, max_size=5)):
        line = json.dumps(record, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
        at = draw(st.integers(0, len(line)))
        spliced = draw(
            st.sampled_from((b"", b"\xff", b"\0", b"\n", b"\xef\xbb\xbf", b'"', b"\\ud800", b"[" * 3000))
        )
        made.append(
            line[:at] + spliced + line[at:] if draw(st.booleans()) else line[: draw(st.integers(0, 999))]
        )
    data = b"\n".join(made)
    return data.decode("utf-8", "ignore").encode(draw(st.sampled_from(("utf-8", "utf-16", "utf-8-sig"))))


@counted(100, 30_000)
@given(files() | st.binary(max_size=200), st.sampled_from((".jsonl", ".ndjson", ".json")))
def test_files(data, ending):
    hostile.check_file(data, ending)


@counted(40, 5_000)
@given(st.binary(max_size=200).map(lambda data: b"PAR1" + data + b"PAR1") | st.binary(max_size=80))
def test_parquet(data):
    hostile.check_file(data, ".parquet")


BOMBS = {
    "lists": b"[" * 2_000_000,
    "objects": b'{"prompt":' * 200_000,
    "in a column": b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    "a role": b'{"messages": [{"role": ' + b"[" * 900 + b"]" * 900 + b', "content": "x"}]}',
    "digits": b'{"prompt": ' + b"9" * 100_000 + b"}",
    "a key": b'{"' + b"k" * 1_000_000 + b'": 1}',
    "a role of text": b'{"messages": [{"role": "' + b"r" * 1_000_000 + b'", "content": "x"}]}',
    "many keys": b"{" + b",".join(b'"k%d": 1' % i for i in range(100_000)) + b"}",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_bombs(name, ending):
    data = BOMBS[name]
    hostile.check_file(data + b"\n" if ending == ".jsonl" else b"[" + data + b"]", ending)


LONG_LINE = """
import json, resource, sys
from redistill.data import load_examples
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = load_examples(sys.argv[1], max_bad_share=1.0)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([len(found.examples), len(found.problems), len(found.summary()), (after - before) // 1024]))
"""


def test_a_line_of_100_mb(tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a", "completion": "b"}\n{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 2**20)
        file.write(
            b'", "completion": "y"}\n' + b"x" * 100 * 2**20 + b'\n{"prompt": "c", "completion": "d"}\n'
        )
    done = subprocess.run([sys.executable, "-c", LONG_LINE, path], capture_output=True, text=True, check=True)
    examples, problems, summary, megabytes = json.loads(done.stdout)
    assert (examples, problems) == (3, 1) and summary < 1000
    assert megabytes < 1000


# Recipes

NAMES = sorted(".".join(name) for name in setting_names(Config))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | ANY_TEXT
    | st.sampled_from((10**400, "1e5", "no"))
)
SETTINGS = st.dictionaries(
    st.sampled_from(NAMES) | st.text(max_size=8), LEAVES | st.lists(LEAVES, max_size=3), max_size=5
)


def nested(flat):
    tree = {
        "student": {"model_name_or_path": "s"},
        "teacher": {"model_name_or_path": "t"},
        "data": {"path": "d"},
    }
    for name, value in flat.items():
        *sections, last = name.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {}) if isinstance(inner.setdefault(section, {}), dict) else {}
        inner[last] = value
    return yaml.safe_dump(tree, allow_unicode=True)


@counted(100, 20_000)
@given(SETTINGS.map(nested))
def test_recipes_of_settings(text):
    hostile.check_recipe(text)


PIECES = (
    *(
        "student:",
        " ",
        "\n",
        "\n  ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        ", ",
        "&a ",
        "*a",
        "!!python/object:os.system ",
        "<<: ",
    ),
    *(
        "'",
        '"',
        "|",
        ">",
        "%YAML 1.1\n",
        "---\n",
        "...\n",
        "? ",
        "#",
        "\t",
        "0x",
        "1:1:1",
        "2001-02-30",
        ".inf",
    ),
    *(
        "=",
        "~",
        "\ufeff",
        "\x85",
        "1_0",
        "1e400",
        "rollout: {lmbda: ",
        "data: ",
        "true",
        "null",
        "!",
        "@",
        "`",
    ),
)


@counted(100, 30_000)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join))
def test_recipes_of_text(text):
    hostile.check_recipe(text)


@counted(60, 10_000)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(NAMES) | st.text(max_size=9), st.sampled_from(PIECES) | st.text(max_size=9)
        ),
        max_size=3,
    )
)
def test_overrides(pairs):
    hostile.check_recipe(nested({}), tuple(f"{name}={value}" for name, value in pairs))


RECIPE_BOMBS = {
    "laughs": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "lists": "a: " + "[" * 100_000,
    "blocks": "\n".join(" " * i + "a:" for i in range(2_000)),
    "digits": "training: {seed: " + "9" * 100_000 + "}",
    "base 60": "training: {seed: " + "1:" * 20_000 + "1}",
    "hexadecimal": "training: {seed: 0x" + "f" * 200_000 + "}",
    "a key": "training: {" + "k" * 200_000 + ": 1}",
    "a setting": "k" * 200_000 + ": 1",
    "a value": "rollout: {engine: " + "v" * 200_000 + "}",
    "a method": "method: " + "m" * 100_000,
    "many keys": "training: {" + ", ".join(f"key{i}: 1" for i in range(1_000)) + "}",
}


@pytest.mark.parametrize("name", RECIPE_BOMBS)
def test_recipe_bombs(name):
    hostile.check_recipe(
        RECIPE_BOMBS[name]
        + "\nstudent: {model_name_or_path: s}\nteacher: {model_name_or_path: t}\ndata: {path: d}\n"
    )


# Prompts and tokenizers


@counted(100, 30_000)
@given(TYPED, st.sampled_from(("chat", "alpaca")))
def test_what_is_typed_stays_text(typed, template):
    hostile.check_typed_text(typed, hostile.tokenizer(), template)


def byte_tokenizer(specials: list[str]) -> PreTrainedTokenizerFast:
    """Every byte a token, and `specials` behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    inner.add_special_tokens(
        [AddedToken(each, special=True, normalized=False) for each in (*SPECIALS, *specials)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=IM_END, clean_up_tokenization_spaces=False
    )
    made.chat_template = CHAT_TEMPLATE
    return made


SPECIAL = st.sampled_from(
    (
        "<|",
        "|>",
        "<|im_end|><|im_end|>",
        "\n\n",
        "é",
        "日",
        ".*",
        "[INST]",
        "\\d",
        "  ",
        "</s>",
        "\U000f0001",
        "user\n",
        "🙂",
    )
) | st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=2, max_size=5)


@counted(30, 5_000)
@given(st.lists(SPECIAL, min_size=1, max_size=4, unique=True), st.data())
def test_tokenizers_with_odd_special_tokens(specials, data):
    typed = data.draw(
        st.lists(st.sampled_from((*specials, "a", " ")) | st.text(max_size=4), max_size=6).map("".join)
    )
    hostile.check_typed_text(typed, byte_tokenizer(specials), "chat")


def test_many_hidden_texts_are_soon_hidden():
    private = "".join(map(chr, range(0xF0000, 0xF0000 + 4_000)))
    hostile.check_typed_text(private, hostile.tokenizer())
    hostile.check_typed_text(IM_END * 500, hostile.tokenizer())


# Models' words on a terminal


@counted(200, 20_000)
@given(st.text(st.characters(), max_size=40) | st.lists(st.sampled_from(ODD), max_size=6).map("".join))
def test_models_text_is_only_text(text):
    hostile.check_shown(text)


IDS = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


@counted(40, 10_000)
@given(ANY_TEXT, IDS, IDS, st.integers(0, 11))
def test_revisions_of_any_ids_are_shown_safely(prompt, before, after, position):
    hostile.check_revision_shown(prompt, before, after, position)
