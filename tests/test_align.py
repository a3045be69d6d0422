"""A teacher with another tokenizer: where both have a border, whose probability is whose, and what is left out."""

import json
from itertools import accumulate

import naive_objective
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from table_models import table, table_model
from test_chat import metaspace_tokenizer
from test_cli import RECORDS, redistill
from tiny import CHAT_TEMPLATE, PAD, SPECIALS, save_tiny, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from redistill.batch import Counts, Row, collate
from redistill.caching import cache_teacher
from redistill.chat import prompt_ids, response_ids, to_sample
from redistill.config import ObjectiveSettings, load_config
from redistill.losses.divergences import LOG_FLOOR
from redistill.models import shared_vocabulary
from redistill.objective import Objective, batch_loss
from redistill.pieces import END, Pieces
from redistill.prepare import prepare
from redistill.runlog import read
from redistill.sample import Example, Sample
from redistill.scoring import score
from redistill.teachers.aligned import AlignedTeacher
from redistill.teachers.alignment import WIDTH, align, codes_of
from redistill.teachers.local import LocalTeacher
from redistill.teachers.signal import most_probable

STOP = "<stop>"


def wrapped(inner, end):
    inner.decoder = inner.decoder or decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", end).replace("<|im_start|>", "# ")
    return tokenizer


def other_tokenizer(size=330):
    """Byte-level too, of other words, with another end, another template, and ids in another order."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", STOP, "<|im_start|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True),
        show_progress=False,
    )
    text = "often the colour of grass is green and the colour of a fox or an apple is red, the sky blue"
    inner.train_from_iterator(
        [text, "where there are foxes they run over questions, naïve as they are 😀 我们"], trainer
    )
    return wrapped(inner, STOP)


def spelled(end, words, merges):
    vocabulary = {token: index for index, token in enumerate([end, *words])}
    inner = Tokenizer(BPE(vocabulary, merges))
    inner.add_special_tokens([end])
    inner.decoder = decoders.ByteLevel()
    return wrapped(inner, end)


OURS, OTHER, PIECES = tiny_tokenizer(), other_tokenizer(), metaspace_tokenizer()
KINDS = {"ours": (OURS, "chat"), "other": (OTHER, "chat"), "sentencepiece": (PIECES, "plain")}
KNOWN = {name: Pieces(*kind) for name, kind in KINDS.items()}
PAIRS = [(a, b) for a in KINDS for b in KINDS]
TEXTS = st.text(
    st.one_of(
        st.sampled_from("the fox is a red Paris, 1\n<>|_im"),
        st.characters(codec="utf-8", exclude_categories=["Co"]),
    ),
    max_size=40,
)


def test_two_spellings_by_hand():
    ours = spelled("<end>", ["a", "b", "c", "d", "ab"], [("a", "b")])
    words = ["a", "b", "c", "d", "bc", "abc", "bd", "abd"]
    theirs = spelled(STOP, words, [("b", "c"), ("a", "bc"), ("b", "d"), ("a", "bd")])
    stop, a, b, _, d, bc, abc, bd, abd, prompt = range(10)
    rows = {
        prompt: {a: 0.2, b: 0.05, abc: 0.3, abd: 0.1, bd: 0.02, bc: 0.03, stop: 0.1, prompt: 0.08},
        abc: {d: 0.5, a: 0.1}, d: {stop: 0.7}, a: {b: 0.6}, b: {stop: 0.25, a: 0.5},
    }  # fmt: skip
    model = table_model(table(rows, 10))
    rest = (1 - 0.2 - 0.05 - 0.3 - 0.1 - 0.02 - 0.03 - 0.1 - 0.08) / 2  # c and d each
    teacher = AlignedTeacher(
        LocalTeacher(model, 10), *(Pieces(each, "plain") for each in (ours, theirs)), 6, 6
    )
    end, a, b, c, d, ab = range(6)

    def said(response):
        signal = teacher.signal([Sample((1,), response, teacher_prompt=(prompt,))])
        assert signal.log_p.exp().sum(-1).tolist() == pytest.approx([1.0] * len(response), abs=1e-6)
        return [
            {int(i): float(v.exp()) for i, v in zip(ids, row, strict=False) if i < 6}
            | {"tail": float(row[-1].exp())}
            for ids, row in zip(signal.ids, signal.log_p, strict=True)
        ]

    # abc|d|stop for ab.c|d|end: abc and abd begin with ab, bc and bd with b; the id of the prompt writes nothing.
    found = said((ab, c, d, end))
    assert found[0] == pytest.approx(
        {ab: 0.4, a: 0.2, b: 0.1, end: 0.1, c: rest, d: rest, "tail": 0.08}, abs=1e-6
    )
    assert found[1] == pytest.approx({c: 0.75, d: 0.25, "tail": 0.0}, abs=1e-6)
    assert found[2][d] == pytest.approx(0.5, abs=1e-6) and found[3][end] == pytest.approx(0.7, abs=1e-6)
    # a|b for ab: the way on from a to b is taken from a.
    found = said((ab, end))
    assert found[0] == pytest.approx(
        {ab: 0.4 + 0.12, a: 0.08, b: 0.1, end: 0.1, c: rest, d: rest, "tail": 0.08}, abs=1e-6
    )
    assert found[1][end] == pytest.approx(0.25, abs=1e-6)


def samples_of(kind, other, texts):
    """Texts as responses of one tokenizer, with prompts of both."""
    tokenizer, theirs = KINDS[kind][0], KINDS[other][0]
    template = "plain" if "sentencepiece" in (kind, other) else "chat"
    how = {"template": template, "system": None, "max_prompt_length": 99, "on_long_prompt": "drop"}
    return [
        to_sample(
            Example("Why?", (text,)), tokenizer, max_completion_length=200, teacher_tokenizer=theirs, **how
        )
        for text in texts
    ]


WRITTEN = ["the fox is red, often", "Paris is big 😀 naïve", " 10 foxes\n\nwhere", "<|im_end|> is a word"]


def test_the_same_tokenizer_gives_what_there_is_without():
    data, size = samples_of("ours", "ours", WRITTEN), len(OURS)
    assert [each.teacher_prompt for each in data] == [each.prompt for each in data]
    student, model = tiny_llama(size, seed=1), tiny_llama(size, hidden=48, seed=2)
    plain = LocalTeacher(model, size)
    through = [AlignedTeacher(plain, KNOWN["ours"], KNOWN["ours"], size, k) for k in (size, 9)]
    hidden = plain.signal(data)
    dense = hidden.head.logits(hidden.hidden).detach().log_softmax(-1)
    whole, short = (each.signal(data) for each in through)
    back = torch.empty_like(dense).scatter_(1, whole.ids, whole.log_p[:, :-1])
    torch.testing.assert_close(back, dense, rtol=1e-5, atol=1e-5)
    assert bool(whole.told.all()) and float(whole.log_p[:, -1].max()) < -1e4
    said = torch.tensor([token for each in data for token in each.response])
    kept = most_probable(dense, 9)
    inside = (kept.ids == said[:, None]).any(-1)
    torch.testing.assert_close(
        short.log_p[inside].sort().values, kept.log_p[inside].sort().values, rtol=1e-4, atol=1e-5
    )
    assert bool((short.ids[:, 0] == said).all()) and 0 < int(inside.sum()) < len(said)
    rows = [
        Row(each, True, True, lambda each=each: [0, 0, 0, *[-1] * (len(each.response) - 3)]) for each in data
    ]
    counts = Counts(float(len(said)), float(len(said)), 4.0)
    for loss in ("forward_kl", "reverse_kl", "dac_kl", "todi"):
        values, slopes = [], []
        for teacher in (plain, *through):
            student.zero_grad()
            objective = Objective(ObjectiveSettings(token_loss=loss, span_weight=2.0), torch.Generator())
            value, stats = batch_loss(objective, student, teacher, collate(rows, 3), lambda: counts, size)
            value.backward()
            values.append(value.detach())
            slopes.append(student.lm_head.weight.grad.clone())
        torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-6)
        assert stats["aligned"].mean() == 1
    how = {"vocabulary": size, "teacher_token": "argmax", "generator": None, "batch_size": 2}
    for one, other in zip(
        score(student, plain, data, **how), score(student, through[0], data, **how), strict=True
    ):
        assert one.teacher_token.equal(other.teacher_token)
        torch.testing.assert_close(one.kl, other.kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            one.teacher_log_likelihood, other.teacher_log_likelihood, rtol=1e-4, atol=1e-5
        )


def units(pieces):
    return [unit for piece in pieces for unit in (piece if isinstance(piece, bytes) else [piece])]


def check(ids, ours, theirs):
    """The groups write the same in both, cannot be cut further, and follow in order; and how many ids they have."""
    found = align(ids, ours, theirs)
    mine, other = ours.of(ids), theirs.of(found.theirs)
    at = (0, 0)
    for group in found.groups:
        assert group.ours[0] >= at[0] and group.theirs[0] >= at[1]
        parts = [mine[slice(*group.ours)], other[slice(*group.theirs)]]
        assert all(parts) and units(parts[0]) == units(parts[1])
        borders = [{*accumulate(len(units([piece])) for piece in part)} - {0} for part in parts]
        assert len(borders[0] & borders[1]) <= 1
        at = (group.ours[1], group.theirs[1])
    assert len(found.theirs) == at[1]
    return found, sum(stop - start for start, stop in (group.ours for group in found.groups))


@pytest.mark.parametrize(("kind", "other"), PAIRS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=TEXTS)
def test_every_byte_of_a_text_is_in_a_group(kind, other, text):
    tokenizer, template = KINDS[kind]
    ids = response_ids(text, tokenizer, template=template)
    found, inside = check(ids, KNOWN[kind], KNOWN[other])
    pieces = KNOWN[kind].of(ids)
    if units(pieces)[:-1] == [*text.encode()]:
        empty = sum(piece == b"" for piece in pieces)
        assert len(ids) - empty <= inside <= len(ids) and pieces[-1] == END
        assert list(found.theirs)[-1] == KNOWN[other].named[END]
        if kind == other:
            assert found.theirs == ids


@pytest.mark.parametrize(("kind", "other"), [pair for pair in PAIRS if pair[0] != pair[1]])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_a_student_writes_is_aligned_as_far_as_it_can_be(kind, other, data):
    """Any ids: broken characters, control tokens, ids that no tokenizer has."""
    ids = data.draw(st.lists(st.integers(0, len(KINDS[kind][0]) + 3), max_size=20))
    check(ids, KNOWN[kind], KNOWN[other])


def test_what_is_no_text_and_the_last_word_of_a_cut_answer_are_left_out():
    whole = response_ids("a 😀 fox", OURS, template="chat")
    smile = [
        place
        for place, piece in enumerate(KNOWN["ours"].of(whole))
        if isinstance(piece, bytes) and piece[:1] >= b"\x80"
    ]
    broken = [*whole[: smile[-1]], *whole[smile[-1] + 1 :]]  # an emoji without its last byte
    found, inside = check(broken, KNOWN["ours"], KNOWN["other"])
    assert inside == len(broken) - (len(smile) - 1), "behind the broken character it goes on"
    assert found.theirs[-1] == OTHER.eos_token_id
    _, inside = check(whole[: smile[-1]], KNOWN["ours"], KNOWN["other"])
    assert inside == smile[0], "what is broken is left out, and what stands before it is not the last word"
    cut, _ = check(whole[:-1], KNOWN["ours"], KNOWN["other"])
    assert cut.groups == align(whole, KNOWN["ours"], KNOWN["other"]).groups[: len(cut.groups)]
    assert len(cut.groups) == len(align(whole, KNOWN["ours"], KNOWN["other"]).groups) - 2
    # A control token that the other lacks ends it, one of the same name is itself.
    lacks, has = (OURS.convert_tokens_to_ids(name) for name in (PAD, "<|im_start|>"))
    a = response_ids("a fox", OURS, template="chat")
    assert check([*a[:-1], lacks, *a], KNOWN["ours"], KNOWN["other"])[1] == len(a) - 1
    assert check([*a[:-1], has, *a], KNOWN["ours"], KNOWN["other"])[1] == 2 * len(a)


def naive_code(ours, piece, token):
    """A text of theirs in our ids, by bytes, one at a time."""
    index = ours.tokenizer.get_vocab().get(token)
    same = [index for index, mine in enumerate(ours.written) if mine == piece]
    if index in same:
        return [index]
    if piece is None or same or not isinstance(piece, bytes):
        return same[:1]
    try:
        ids = ours.tokenizer.encode(piece.decode(), add_special_tokens=False)
    except UnicodeDecodeError:
        return []
    return ids if b"".join(ours.written[index] for index in ids) == piece else []


def test_codes_go_by_bytes_and_names():
    for kind, other in (("ours", "other"), ("other", "ours"), ("sentencepiece", "ours")):
        ours, theirs = KNOWN[kind], KNOWN[other]
        size, their_size = len(ours.written), len(theirs.written)
        inside = codes_of(ours, theirs, size, their_size + 2, first=False)
        assert inside.shape == (their_size + 2, WIDTH) and bool((inside[-2:] == size).all())
        if kind != "sentencepiece":
            for index, (piece, token) in enumerate(zip(theirs.written, theirs.tokens, strict=True)):
                wanted = naive_code(ours, piece, token)[:WIDTH]
                assert inside[index].tolist() == wanted + [size] * (WIDTH - len(wanted)), token
            assert codes_of(ours, theirs, size, their_size + 2, first=True).equal(inside)
        assert inside[theirs.named[END], 0] == ours.named[END]
    # A border is a blank, but for the one before the first word.
    known, words = KNOWN["sentencepiece"], OURS.convert_tokens_to_ids(["is", "Ġis", "a", "Ã"])
    codes = {
        first: codes_of(known, KNOWN["ours"], 400, 384, first=first)[words, 0] for first in (False, True)
    }
    names = {first: PIECES.convert_ids_to_tokens(each.tolist()) for first, each in codes.items()}
    assert names[False][:3] == ["i", "▁is", "a"] and names[True][:1] == ["▁is"]
    assert names[False][3] == "<0xC3>", "a byte of a character is that byte"


def naive_rows(kind, other, sample, model):
    """All that the teacher may write at the beginning of each group, one after the other, in float64."""
    ours, theirs = KNOWN[kind], KNOWN[other]
    size, their_size = len(ours.written), len(theirs.written)
    found = align(sample.response, ours, theirs)
    ids = torch.tensor([[*sample.teacher_prompt, *found.theirs]])
    p = model(ids).logits[0].double().softmax(-1)[len(sample.teacher_prompt) - 1 : -1].tolist()
    rows = []
    for group in found.groups:
        codes = codes_of(ours, theirs, size, their_size, first=group.ours[0] == 0).tolist()
        written = list(sample.response[slice(*group.ours)])
        whole = 1.0
        for at in range(*group.theirs):
            whole *= p[at][found.theirs[at]]
        events = [(written, whole)]
        for index, mass in enumerate(p[group.theirs[0]]):
            left = mass - whole if index == found.theirs[group.theirs[0]] else mass
            events.append(([each for each in codes[index] if each < size], left))
        for place in range(len(written)):
            events = [(code, mass) for code, mass in events if code[:place] == written[:place]]
            total, row = sum(mass for _, mass in events), {}
            for code, mass in events:
                key = code[place] if len(code) > place else "tail"
                row[key] = row.get(key, 0.0) + mass / total
            rows.append({key: mass for key, mass in row.items() if mass > 0})
    return rows


@pytest.mark.parametrize(
    ("kind", "other"),
    [("ours", "other"), ("other", "ours"), ("ours", "sentencepiece"), ("sentencepiece", "ours")],
)
def test_every_row_is_the_sum_over_what_the_teacher_may_write(kind, other):
    data = samples_of(kind, other, ["the fox is red", "Paris is big", "where 😀 is naïve"])
    size, their_size = (len(KINDS[each][0]) for each in (kind, other))
    model = tiny_llama(their_size, hidden=48, seed=2)
    wanted = [row for each in data for row in naive_rows(kind, other, each, model)]
    said = torch.tensor([token for each in data for token in each.response])
    for k in (1, 7, size):
        signal = AlignedTeacher(LocalTeacher(model, their_size), KNOWN[kind], KNOWN[other], size, k).signal(
            data
        )
        assert signal.ids.shape == (len(said), k) and bool((signal.ids[:, 0] == said).all())
        torch.testing.assert_close(signal.log_p.exp().sum(-1), torch.ones(len(signal.ids)))
        for ids, log_p, row in zip(signal.ids.tolist(), signal.log_p.exp().tolist(), wanted, strict=True):
            kept = {index: mass for index, mass in zip(ids, log_p, strict=False) if index < size}
            assert kept == pytest.approx({index: row[index] for index in kept}, rel=1e-4, abs=1e-7)
            left = sum(mass for index, mass in row.items() if index not in kept)
            assert log_p[-1] == pytest.approx(left, rel=1e-3, abs=1e-6)
            others = sorted(
                (mass for index, mass in row.items() if index not in (ids[0], "tail")), reverse=True
            )
            assert sorted(kept.values(), reverse=True) == pytest.approx(
                sorted([row[ids[0]], *others[: k - 1]], reverse=True), rel=1e-4, abs=1e-7
            )
    several = [
        group.ours[1] - group.ours[0] > 1
        for each in data
        for group in align(each.response, KNOWN[kind], KNOWN[other]).groups
    ]
    assert any(several)


def test_where_nothing_is_said_nothing_is_learnt_nor_corrected():
    ids = response_ids("a fox", OURS, template="chat")
    lacks = OURS.convert_tokens_to_ids(PAD)
    sample = Sample((5, 9), (*ids[:-1], lacks, *ids), teacher_prompt=(7,))
    size = len(OURS)
    student, model = tiny_llama(size, seed=1), tiny_llama(len(OTHER), hidden=48, seed=2)
    teacher = AlignedTeacher(LocalTeacher(model, len(OTHER)), KNOWN["ours"], KNOWN["other"], size, 5)
    counts, last = Counts(1.0, 1.0, 1.0), len(ids) - 1
    for loss in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "alpha_beta", "dac_kl"):
        objective = Objective(
            ObjectiveSettings(token_loss=loss, sft_weight=0.0, span_weight=1.0), torch.Generator()
        )
        said = teacher.signal([sample])
        rows = torch.arange(len(sample.response)) >= last
        spans = torch.zeros(len(rows), dtype=torch.long)
        part = objective(
            torch.randn(len(rows), size), said, torch.tensor(sample.response), spans, False, counts
        )
        assert part.by_logits.isfinite().all() and part.stats["aligned"].tolist() == [1.0] * last + [0.0] * (
            last + 2
        )
        assert float(part.stats["kl"][rows].abs().max()) < 1e-5
        assert float(part.by_logits[last + 1 :].abs().max()) < 1e-6, loss
    assert said.log_p[-1].tolist() == [LOG_FLOOR] * 5 + [0.0]
    scores = score(
        student, teacher, [sample], vocabulary=size, teacher_token="sample",
        generator=torch.Generator().manual_seed(0), batch_size=1,
    )[0]  # fmt: skip
    assert scores.teacher_token[last:].tolist() == list(sample.response[last:])
    assert int(scores.teacher_token.max()) < size
    assert teacher.signal([Sample((5,), (lacks, lacks), teacher_prompt=(7,))]).told.tolist() == [False, False]


def test_every_divergence_of_a_short_row_is_that_of_its_classes():
    """Two classes beside a teacher's and a student's own, dense."""
    size, generator = len(OURS), torch.Generator().manual_seed(0)
    student = 2 * torch.randn(1, size, generator=generator)
    teacher = AlignedTeacher(
        LocalTeacher(tiny_llama(len(OTHER)), len(OTHER)), KNOWN["ours"], KNOWN["other"], size, 4
    )
    said = teacher.signal([Sample((5,), (40,), teacher_prompt=(7,))])
    said.ids[0] = torch.tensor([40, size, size, size])
    said.log_p[0] = torch.tensor([0.3, 0, 0, 0, 0.7]).log().clamp(min=LOG_FLOOR)
    own = student.double().log_softmax(-1)[0, 40].exp()
    p, q = (torch.tensor([[x, 1 - x]], dtype=torch.float64).log() for x in (0.3, float(own)))
    for loss in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "todi", "adaptive_kl"):
        settings_ = ObjectiveSettings(token_loss=loss, sft_weight=0.0, span_weight=0.0)
        part = Objective(settings_)(
            student, said, torch.tensor([40]), torch.tensor([-1]), False, Counts(1, 1, 1)
        )
        wanted = naive_objective.per_class(loss, settings_.alpha, settings_.beta)(p, q).sum()
        assert float(part.loss) == pytest.approx(float(wanted), rel=1e-5), loss


def test_other_kinds_of_tokenizer_are_refused():
    inner = Tokenizer(WordPiece({"[UNK]": 0, "a": 1, "##b": 2, STOP: 3}, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=r"byte-level BPE, SentencePiece.*has the decoder WordPiece"):
        Pieces(wrapped(inner, STOP), "plain")
    with pytest.raises(ValueError, match=r"or train with teacher\.align: bytes"):
        shared_vocabulary(OURS, OTHER, len(OURS), len(OTHER))


def test_a_prompt_is_written_by_the_teachers_template():
    found = samples_of("ours", "other", ["So."])[0]
    assert found.prompt == prompt_ids(Example("Why?"), OURS, template="chat", system=None)
    assert found.teacher_prompt == prompt_ids(Example("Why?"), OTHER, template="chat", system=None)
    assert OTHER.decode(found.teacher_prompt) == "# user\nWhy?<stop>\n# assistant\n"


def test_the_command_line_trains_with_two_tokenizers(tmp_path, monkeypatch):
    """Own answers, corrections, phrases, validation, a measurement without the teacher; and without the option a
    refusal that names it."""
    save_tiny(tmp_path)
    tiny_llama(len(OTHER), hidden=48, seed=2).save_pretrained(tmp_path / "teacher")
    OTHER.save_pretrained(tmp_path / "teacher")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in RECORDS))
    config = {
        "student": {"model_name_or_path": "student"},
        "teacher": {"model_name_or_path": "teacher", "align": "bytes"},
        "data": {"path": "data.jsonl", "eval_path": "data.jsonl"},
        "rollout": {"lmbda": 0.5, "per": "sample", "max_completion_length": 16, "replay_ratio": 0.5},
        "evaluation": {"seeds": [1], "max_new_tokens": 4, "greedy": False, "limit": 4},
        "training": {"max_steps": 3, "per_device_train_batch_size": 6, "use_cpu": True, "learning_rate": 1e-2,
                     "eval_strategy": "steps", "eval_steps": 3},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    redistill("train", "recipe.yaml", "--output", "out", cwd=tmp_path)
    steps = list(read(tmp_path / "out" / "steps.jsonl"))
    assert len(steps) == 3 and all(0.5 < step["aligned"] <= 1 and step["kl"] > 0 for step in steps)
    assert steps[0]["span"] > 0 and any(step.get("share_revised") for step in steps)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["name"], row["kl_to_teacher"]) for row in rows] == [
        ("student before", None),
        ("student after", None),
    ]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"different tokenizers: .* or train with teacher\.align: bytes"):
        prepare(load_config("recipe.yaml", ["teacher.align=null"]))
    with pytest.raises(ValueError, match=r"is not cached: leave out teacher\.align"):
        cache_teacher(load_config("recipe.yaml"), tmp_path / "cache", Console(quiet=True), k=1, batch_size=1)
    for change, what in (
        ("teacher.cache=here", "needs the teacher's model in this process"),
        ("rollout.teacher_mix=0.2", "writes other ids than the student's"),
        ("objective.temperature=2.0", "merged at temperature 1"),
    ):
        with pytest.raises(ValueError, match=what):
            load_config("recipe.yaml", [change, "rollout.lmbda=0.0"])


def test_specials_are_named():
    assert KNOWN["ours"].named == {
        END: 2, "end of text": 2, **{name: place for place, name in enumerate(SPECIALS) if place != 2},
    }  # fmt: skip
