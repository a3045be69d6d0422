"""Phrases of a text and the token spans they become, with tokenizers of two kinds and a real one."""

import os
import random
import sys
from pathlib import Path

import pytest
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from redistill import offsets
from redistill.chat import decode_response
from redistill.phrases import Phrase, find_phrases, load_chunker, span_ids, token_offsets

FOX = "The quick brown fox has quickly jumped over the lazy dog in the park near the old river."
FOX_PHRASES = [
    ("The quick brown fox", "NP"),
    ("has quickly jumped", "VP"),
    ("over the lazy dog", "PP"),
    ("in the park", "PP"),
    ("near the old river", "PP"),
]
TEXTS = [
    FOX,
    "  The big dog’s bone — naïve café 😀👩‍👩‍👧 over the naïve 😀 dog, isn't it?\n\n- the U.S. army",
    "我们今天去公园看见了一只很可爱的小狗。使用Python编程，ภาษาไทยไม่มีช่องว่าง हिन्दी में लिखा गया वाक्य है",
    "def add(first, second):\n\treturn first / second  # the sum of &slash; things\n",
    "    leading spaces,\r\ntrailing spaces   \n\n\n",
    'He said "the old river (!) is/was 3/4 full" :-) ... the lazy dog',
]


def metaspace_tokenizer():
    """SentencePiece-like: word borders as ▁, unknown characters as UTF-8 byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    words = [*"▁abcdefghijklmnopqrstuvwxyz.", "▁the", "▁lazy", "▁dog", "qu", "▁in", "ick", "é", "狗", "er"]
    vocabulary = [*((piece, 0.0) for piece in pieces), *((word, -float(len(words))) for word in words)]
    inner = Tokenizer(Unigram(vocabulary, unk_id=0, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def real_tokenizer():
    cache = Path(os.environ.get("REDISTILL_CACHE") or Path.home() / ".cache" / "redistill").expanduser()
    folder = cache / "smollm2-135m-instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"no converted SmolLM2 in {cache}: run `redistill demo` once, or set REDISTILL_CACHE")
    return AutoTokenizer.from_pretrained(folder)


MAKERS = [
    pytest.param(tiny_tokenizer, id="byte-level"),
    pytest.param(metaspace_tokenizer, id="metaspace"),
    pytest.param(real_tokenizer, id="smollm2", marks=pytest.mark.real),
]


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return request.param()


@pytest.fixture(scope="module", params=["textblob", "windows"])
def chunker(request):
    return load_chunker(request.param)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def read(text, phrases):
    return [(text[p.start : p.end], p.label) for p in phrases]


def words_of_spans(ids, spans, tokenizer):
    """The decoded tokens of each span; fails where a span is broken up, too short or out of order."""
    assert len(spans) == len(ids)
    words = []
    for number in range(max(spans, default=-1) + 1):
        places = [i for i, span in enumerate(spans) if span == number]
        assert len(places) >= 2 and places == list(range(places[0], places[-1] + 1))
        words.append(decode_response([ids[i] for i in places], tokenizer).strip())
    numbers = [span for span in spans if span >= 0]
    assert numbers == sorted(numbers)
    return words


def check_offsets(ids, tokenizer):
    """Against decoding every prefix: the slow way, and another way."""
    text, found = decode_response(ids, tokenizer), token_offsets(ids, tokenizer)
    assert len(found) == len(ids)
    reached = 0
    for place, (start, end) in enumerate(found):
        assert start in (reached, max(reached - 1, 0)) and start <= end
        before = decode_response(ids[:place], tokenizer)
        if start == reached:
            assert before == text[:start]
        else:  # inside a character: what came before does not write it yet, unless it never gets whole
            assert before != text[:reached] or text[start] == "\ufffd"
        reached = end
    assert reached == len(text)


def test_the_fox(tokenizer):
    assert read(FOX, find_phrases(FOX, "textblob")) == FOX_PHRASES
    ids = [*encode(tokenizer, FOX), tokenizer.eos_token_id]
    spans = span_ids(ids, tokenizer, "textblob")
    assert words_of_spans(ids, spans, tokenizer) == [words for words, _ in FOX_PHRASES]
    assert spans[-2:] == [-1, -1]  # the full stop and the end of text


def test_the_fox_with_spacy():
    assert read(FOX, find_phrases(FOX, "spacy")) == FOX_PHRASES


def test_a_missing_spacy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match=r"redistill\[spacy\]"):
        find_phrases(FOX, "spacy")


def test_unknown_chunker_and_none():
    with pytest.raises(ValueError, match="textblob, spacy, windows or none"):
        find_phrases(FOX, "nltk")
    assert find_phrases(FOX, "none") == []


def test_the_longer_phrase_wins_and_the_result_is_clean():
    text = "in the park\nby me "
    found = [
        Phrase(3, 11, "NP"),
        Phrase(0, 11, "PP"),
        Phrase(12, 18, "PP"),
        Phrase(8, 14, "NP"),
        Phrase(11, 12, "NP"),
    ]
    assert find_phrases(text, lambda _: found) == [Phrase(0, 11, "PP"), Phrase(12, 17, "PP")]


def test_textblob_words_are_found_again():
    text = "A dog and/or the big cat ran.\r\n\r\nThe “old river” (!) has the lazy dog’s bone, :-) on 3/4 mats"
    assert ("The", "NP") not in read(text, find_phrases(text, "textblob"))
    found = dict(read(text, find_phrases(text, "textblob")))
    assert found.get("the lazy dog’s bone") == "NP"
    assert all("\n" not in words for words in found)
    slashed = "He saw the big yes/no."
    assert ("the big yes/no", "NP") in read(slashed, find_phrases(slashed, "textblob"))
    again = "the dog saw the dog near the dog"
    assert [(p.start, p.end) for p in find_phrases(again, "textblob")] == [
        (0, 7),
        (8, 11),
        (12, 19),
        (20, 32),
    ]


def test_windows_need_no_language():
    def windows(text):
        return [words for words, _ in read(text, find_phrases(text, "windows"))]

    assert windows("One two three four five, six. Don't well-known") == [
        "One two",
        "three four five",
        "six",
        "Don't well-known",
    ]
    assert windows("我们去公园，看狗") == ["我们", "去公园", "看狗"]
    assert windows("हिन्दी में लिखा") == ["हिन्दी में लिखा"]  # vowel signs are marks, not borders
    assert windows("😀\ufffd\n--") == []


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_of_every_span_decode_to_the_phrase_wherever_the_response_is_cut(tokenizer, chunker, text):
    ids = encode(tokenizer, text)
    most = 0
    for length in range(len(ids) + 1):  # in the middle of words, and of characters
        response = ids[:length]
        words = words_of_spans(response, span_ids(response, tokenizer, chunker), tokenizer)
        decoded, _ = offsets.decoded_with_offsets(response, tokenizer)
        expected = iter([found for found, _ in read(decoded, find_phrases(decoded, chunker))])
        assert all(word in expected for word in words)  # the same phrases in the same order
        most = max(most, len(words))
    assert most > 0


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_are_those_of_prefix_decoding(tokenizer, text):
    check_offsets([*encode(tokenizer, text), tokenizer.eos_token_id], tokenizer)


def test_offsets_and_spans_of_random_text(tokenizer, chunker):
    dice = random.Random(0)
    blocks = [(0x20, 0x7E), (0x9, 0xD), (0xA0, 0x24F), (0x900, 0x97F), (0x4E00, 0x4EFF), (0x1F600, 0x1F64F)]
    for _ in range(40):
        pieces = [chr(dice.randint(*dice.choice(blocks))) for _ in range(dice.randint(0, 30))]
        words = dice.choices(["the lazy dog ", "in ", " ", "an old ", "river"], k=dice.randint(0, 6))
        text = "".join(dice.sample([*pieces, *words], k=len(pieces) + len(words)))
        ids = encode(tokenizer, text)
        check_offsets(ids, tokenizer)
        decoded = decode_response(ids, tokenizer)
        phrases = {found for found, _ in read(decoded, find_phrases(decoded, chunker))}
        assert set(words_of_spans(ids, span_ids(ids, tokenizer, chunker), tokenizer)) <= phrases


def test_byte_level_offsets_of_ids_no_text_would_give(chunker):
    """A student early in training: broken bytes, control tokens, ids of padded rows that no token has."""
    tokenizer = tiny_tokenizer()
    dice = random.Random(1)
    for _ in range(60):
        ids = [dice.randrange(0, 390) for _ in range(dice.randint(0, 24))]
        check_offsets(ids, tokenizer)
        words_of_spans(ids, span_ids(ids, tokenizer, chunker), tokenizer)


def test_characters_shared_by_ids():
    tokenizer = tiny_tokenizer()
    ids = encode(tokenizer, "a😀b")
    assert token_offsets(ids, tokenizer) == [(0, 1), *[(1, 2)] * 4, (2, 3)]
    ids = encode(metaspace_tokenizer(), "a😀b")
    assert token_offsets(ids, metaspace_tokenizer())[-5:] == [*[(1, 2)] * 4, (2, 3)]


def test_a_control_token_inside_ends_the_text_before_it(tokenizer):
    left, right = encode(tokenizer, "in the old river by the lazy"), encode(tokenizer, " dog near the park")
    ids = [*left, tokenizer.eos_token_id, *right]
    spans = span_ids(ids, tokenizer, "textblob")
    assert spans[len(left)] == -1
    assert words_of_spans(ids, spans, tokenizer) == [
        *words_of_spans(left, span_ids(left, tokenizer, "textblob"), tokenizer),
        *words_of_spans(right, span_ids(right, tokenizer, "textblob"), tokenizer),
    ]
    assert max(spans) >= 1


def test_empty_responses(tokenizer, chunker):
    assert span_ids([], tokenizer, chunker) == [] == token_offsets([], tokenizer)
    assert span_ids([tokenizer.eos_token_id] * 2, tokenizer, chunker) == [-1, -1]


def test_a_phrase_that_cuts_a_token_has_no_span():
    tokenizer = tiny_tokenizer()
    text = "the lazy dog in the park"
    ids = encode(tokenizer, text)
    for start, end in token_offsets(ids, tokenizer):
        for inside in range(start + 1 + text[start].isspace(), end):
            cut = span_ids(ids, tokenizer, lambda _, at=inside: [Phrase(at, len(text), "NP")])
            assert set(cut) == {-1}
            cut = span_ids(ids, tokenizer, lambda _, at=inside: [Phrase(0, at, "NP")])
            assert set(cut) == {-1}


def test_time_is_linear(monkeypatch):
    """Any decoder but a byte-level one is called step by step; each call must stay short."""
    tokenizer, decoded, real = metaspace_tokenizer(), [], offsets._decode
    monkeypatch.setattr(offsets, "_decode", lambda ids, t: decoded.append(len(ids)) or real(ids, t))
    ids = encode(tokenizer, "the lazy dog 😀 é " * 50) + [tokenizer.convert_tokens_to_ids("<0xF0>")] * 50
    token_offsets(ids, tokenizer)
    assert max(decoded) <= 16 and len(decoded) <= 2 * len(ids)
