"""A model of yours as a judge: which of two answers to one question is better, asked blind and in both orders.

Nothing is generated and nothing leaves the machine: the judge reads question and answers, and the likelihood of
the words "1", "2" and "tie" as its reply decides. It sees no names of models. A small model is a poor judge:
try yours on pairs whose outcome you know (references against answers to other questions) before you believe it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

from redistill.evaluation.answers import Progress, answer_key, answer_place, counting
from redistill.evaluation.judge_prompt import Layout, Order, PromptWriter
from redistill.evaluation.kept import Keep, KeptLines, Record, digest, fingerprint
from redistill.evaluation.pairs import Pair
from redistill.evaluation.replies import Ids, ReplyReader
from redistill.evaluation.significance import paired_bootstrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Likelihoods(NamedTuple):
    """Log-likelihoods in nats of the three replies to one prompt: place 1 is better, place 2 is, neither is."""

    one: float
    two: float
    tie: float


class _Judgement(NamedTuple):
    """One pair. agreed: both orders favoured one answer. place: 1 (-1) where both favoured place 1 (2)."""

    verdict: int
    lead: float
    agreed: bool
    place: int


@dataclass(frozen=True)
class Verdicts:
    """What the judge said of N pairs, in their order.

    verdicts: +1 the first answer is better, 0 tie, -1 the second is better.
    leads: in nats, by how much the first answer is more likely to be called better, both orders added: of
        opposite sign when the answers are swapped, 0 for equal answers.
    wins, ties, losses: of the first answers; they add up to N.
    agreement: share of pairs in which both orders favoured the same answer; the others are ties.
    position_bias: share of pairs in which place 1 was favoured in both orders less that for place 2: 0 without
        bias, 1 (-1) when place 1 (2) was favoured whatever stood there.
    by_prompt: the mean verdict of each prompt, -1 to 1, in the order of the prompts' numbers.
    difference, low, high: the mean of these, and its 95 % interval by `paired_bootstrap` over prompts.
    p_value: `sign_test` of the prompts won and lost, each by the sign of its mean verdict.
    shortened: texts that were cut to their limit.
    """

    verdicts: tuple[int, ...]
    leads: tuple[float, ...]
    wins: int
    ties: int
    losses: int
    agreement: float
    position_bias: float
    by_prompt: tuple[float, ...]
    difference: float
    low: float
    high: float
    p_value: float
    shortened: int


def compare_answers(
    judge_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    template: Layout | None = None,
    batch_size: int = 8,
    margin: float = 0.5,
    max_answer_tokens: int = 256,
    max_question_tokens: int = 512,
    keep: Keep | None = None,
    progress: Progress | None = None,
) -> Verdicts:
    """Let the judge compare the two answers of every pair.

    Each pair is asked in both orders. With s(x) = log p("x is better") - log p("the other is better") in one
    order, `first` wins when both orders have s > 0, their sum is over `margin` (nats) and it is also likelier
    than "tie", both orders added; anything else that is no win of `second` is a tie. Swapping `first` and
    `second` negates every verdict exactly.
    A pair's reference is shown to the judge as a good answer, where there is one. Pairs of one prompt (the answers
    of several seeds) are one observation of test and interval.
    template: how the prompt is laid out (see `chat.prompt_ids`); None is the tokenizer's chat template, or
        `alpaca` where there is none. Control tokens that are typed into a text stay text, and every line of a
        text is quoted with "> ", so that none can pass for a part of the prompt.
    batch_size: pairs at once, each read twice, batched by length; logits are computed where a verdict stands only.
    max_answer_tokens, max_question_tokens: texts over them are cut at their end; a reference is an answer.
    keep: where the judgements are kept; what lies there already is not made again.
    progress: called with (what is done now, pairs done, pairs in all).
    No gradients; modes are left as found. Errors: ValueError for no pairs, two of one seed and prompt, settings
    out of range, prompts that the judge has no positions for, a tokenizer that cannot tell the replies apart;
    those of `KeptLines`.
    """
    limits = {"max_question_tokens": max_question_tokens, "max_answer_tokens": max_answer_tokens}
    _check(pairs, margin, batch_size=batch_size, **limits)
    writer = PromptWriter(tokenizer, template, **limits)
    orders = [writer.orders(pair) for pair in pairs]
    reader = ReplyReader(judge_model, writer.replies())
    reader.check_lengths(ids for order in orders for ids in order)
    made = {"judge": fingerprint(judge_model), **_digests(pairs), "prompts": digest(orders), "margin": margin}
    keep, tell = keep or Keep(), counting(progress, len(pairs))
    kept = keep.lines(keep.judgements, answer_key, made)
    for places in _batches(orders, batch_size):
        tell("reading both orders", 0)
        if not kept.holds(pairs[place].key for place in places):
            found = _read(reader, [orders[place] for place in places])
            kept.append(
                _record(keep.set, pairs[place], each, margin)
                for place, each in zip(places, found, strict=True)
            )
        tell("reading both orders", len(places))
    kept.sort(answer_place)
    return _summed_up(kept, pairs, margin, writer.shortened)


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided sign test, ties left out: how probable a split at least this uneven is by chance.

    2 * P(X <= min(wins, losses)) for X ~ Binomial(wins + losses, 1/2), at most 1; 1 where all are ties.
    """
    trials = wins + losses
    tail = sum(math.comb(trials, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**trials)


def _check(pairs: Sequence[Pair], margin: float, **at_least_one: int) -> None:
    if not pairs:
        raise ValueError("there is nothing to judge: give at least one question with two answers.")
    if len({pair.key for pair in pairs}) < len(pairs):
        raise ValueError("two pairs have the same seed and index: give each its own.")
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin}: give 0 or more nats.")
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more.")


def _digests(pairs: Sequence[Pair]) -> dict[str, str]:
    """A digest of each part of the pairs: judgements of other texts are not these."""
    return {field.name: digest(getattr(pair, field.name) for pair in pairs) for field in fields(Pair)}


def _batches(orders: Sequence[Order], size: int) -> Iterator[list[int]]:
    """Places of `orders` in batches of like length, the longest first; equal pairs are read once.

    The same prompts in the same batches, however the pairs are turned: verdicts are the same to the last bit.
    """
    places: dict[tuple[Ids, ...], list[int]] = {}
    for place, order in enumerate(orders):
        places.setdefault(tuple(sorted(order)), []).append(place)
    ordered = sorted(places, key=lambda order: (-max(map(len, order)), order))
    for start in range(0, len(ordered), size):
        yield [place for order in ordered[start : start + size] for place in places[order]]


def _read(reader: ReplyReader, orders: Sequence[Order]) -> list[tuple[Likelihoods, Likelihoods]]:
    prompts = sorted({ids for order in orders for ids in order}, key=lambda ids: (len(ids), ids))
    found = dict(zip(prompts, reader.read(prompts), strict=True))
    return [(Likelihoods(*found[ahead]), Likelihoods(*found[behind])) for ahead, behind in orders]


def _record(set_name: str | None, pair: Pair, read: tuple[Likelihoods, Likelihoods], margin: float) -> Record:
    judgement = _judgement(*read, margin)
    return {
        "set": set_name,
        **asdict(pair),
        "verdict": judgement.verdict,
        "lead": judgement.lead,
        "first_in_place_1": read[0]._asdict(),
        "first_in_place_2": read[1]._asdict(),
    }


def _read_from(record: Record) -> tuple[Likelihoods, Likelihoods]:
    return Likelihoods(**record["first_in_place_1"]), Likelihoods(**record["first_in_place_2"])


def _judgement(ahead: Likelihoods, behind: Likelihoods, margin: float) -> _Judgement:
    """ahead: the first answer in place 1; behind: in place 2."""
    for_first, for_second = ahead.one + behind.two, ahead.two + behind.one
    one, two = _sign(ahead.one - ahead.two), _sign(behind.two - behind.one)
    sure = abs(for_first - for_second) > margin and max(for_first, for_second) > ahead.tie + behind.tie
    return _Judgement(
        verdict=one if sure and one == two else 0,
        lead=for_first - for_second,
        agreed=one == two != 0,
        place=one if one == -two else 0,
    )


def _summed_up(kept: KeptLines, pairs: Sequence[Pair], margin: float, shortened: int) -> Verdicts:
    records = {kept.key(record): record for record in kept.records}
    judged = [_judgement(*_read_from(records[pair.key]), margin) for pair in pairs]
    verdicts = tuple(each.verdict for each in judged)
    wins, losses = verdicts.count(1), verdicts.count(-1)
    prompts: dict[int, list[int]] = {}
    for pair, verdict in zip(pairs, verdicts, strict=True):
        prompts.setdefault(pair.index, []).append(verdict)
    by_prompt = tuple(statistics.fmean(prompts[index]) for index in sorted(prompts))
    found = paired_bootstrap(by_prompt, [0.0] * len(by_prompt))
    return Verdicts(
        verdicts=verdicts,
        leads=tuple(each.lead for each in judged),
        wins=wins,
        ties=len(verdicts) - wins - losses,
        losses=losses,
        agreement=statistics.fmean(each.agreed for each in judged),
        position_bias=statistics.fmean(each.place for each in judged),
        by_prompt=by_prompt,
        difference=found.difference,
        low=found.low,
        high=found.high,
        p_value=sign_test(sum(each > 0 for each in by_prompt), sum(each < 0 for each in by_prompt)),
        shortened=shortened,
    )


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
