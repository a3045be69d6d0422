"""`Example` (text) to `Sample` (ids) and back: prompt templates, control tokens, end of text, length limits.

What a user or a data set wrote never becomes a control token: "<|im_end|>" inside a question reaches the
model as the characters a person typed. Only the template writes control tokens. The exception is stated:
with the `plain` template and for pure `text` records the text is the user's own rendering and is parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from redistill.control import (
    MARK,
    TemplateRefusal,
    control_ids,
    control_pattern,
    hide,
    ids_with_hidden,
    plain_ids,
)
from redistill.sample import Example, Message, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["chat", "alpaca", "plain"]

ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def end_id(tokenizer: PreTrainedTokenizerBase, template: Template) -> int:
    """The id that ends a response: with `chat` the control token the template writes after an assistant turn.

    For Gemma ("<end_of_turn>") and Phi-3 ("<|end|>") that is not the tokenizer's eos. Otherwise, and for a
    template that closes a turn with plain text, `eos_token_id`; ValueError for a tokenizer without one.
    """
    if template == "chat":
        probe = chr(MARK)
        turns = [Message("user", "?"), Message("assistant", probe)]
        after = _rendered(turns, tokenizer, prompt=False).rpartition(probe)[2].lstrip()
        ids = plain_ids(after, tokenizer)
        if ids and ids[0] in control_ids(tokenizer):
            return ids[0]
    if not isinstance(tokenizer.eos_token_id, int):
        raise ValueError("the tokenizer has no end of text: set `eos_token` in its tokenizer_config.json")
    return tokenizer.eos_token_id


def prompt_ids(
    example: Example, tokenizer: PreTrainedTokenizerBase, *, template: Template, system: str | None
) -> tuple[int, ...]:
    """The prompt of `example` as ids, up to and with everything that comes before the first response token.

    chat: the tokenizer's own template, the context as "{instruction}\\n\\n{context}" in the last user turn,
      `system` as a first turn where the record has none. Ids equal `apply_chat_template`'s, except that
      control tokens typed into a turn stay text.
    alpaca: the prompt of MiniLLM (arXiv 2306.08543) and DistiLLM (arXiv 2402.03898), to the byte.
    plain: the text as it is, control tokens parsed.
    alpaca and plain open with bos where the tokenizer itself opens a text so (OPT's "</s>", none for GPT-2);
    the cited scripts leave it out. A pure `text` record (empty prompt) has the prompt bos, or eos if none.
    Errors: ValueError for settings that cannot work, TemplateRefusal for a record the template rejects.
    """
    if _is_text_record(example):
        return (_opening_id(tokenizer),)
    if template == "chat":
        hidden: dict[str, int] = {}
        pattern = control_pattern(tokenizer)
        turns = [replace(m, content=hide(m.content, pattern, hidden)) for m in _turns(example, system)]
        return tuple(ids_with_hidden(_rendered(turns, tokenizer, prompt=True), hidden, tokenizer))
    if system is not None:
        raise ValueError(f"`data.system` has no place in `data.template: {template}`: remove it, or use chat")
    instruction = _only_text(example, template)
    if template == "plain":
        text = "\n\n".join(filter(None, (instruction, example.context)))
        return tuple(plain_ids(text, tokenizer, bos=True))
    form = ALPACA_WITH_INPUT if example.context else ALPACA
    hidden = {}
    text = form.format(instruction=instruction, input=example.context)
    text = hide(text, control_pattern(tokenizer), hidden)
    return tuple(ids_with_hidden(text, hidden, tokenizer, bos=True))


def response_ids(
    text: str, tokenizer: PreTrainedTokenizerBase, *, template: Template, parse: bool = False
) -> tuple[int, ...]:
    """`text` as response ids, closed by `end_id`.

    It is encoded as the prompt's continuation: at the start of a document SentencePiece would add a word
    border. Where it would merge with the prompt's end it is encoded apart, since generation cannot merge.
    parse: control tokens in the text are parsed (plain text); a closing one is not doubled.
    """
    hidden: dict[str, int] = {}
    body = text if parse else hide(text, control_pattern(tokenizer), hidden)
    before = _generation_tail(tokenizer) if template == "chat" else "\n" if template == "alpaca" else ""
    anchor = plain_ids(before, tokenizer)
    joined = ids_with_hidden(before + body, hidden, tokenizer)
    merged = joined[: len(anchor)] != anchor
    ids = ids_with_hidden(body, hidden, tokenizer) if merged else joined[len(anchor) :]
    end = end_id(tokenizer, template)
    if not (parse and ids and ids[-1] == end):
        ids.append(end)
    return tuple(ids)


def to_sample(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template,
    system: str | None,
    max_prompt_length: int,
    max_completion_length: int,
    on_long_prompt: Literal["drop", "truncate"],
    max_teacher_prompt_length: int | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Sample | str:
    """The sample of `example` with its first reference, or the reason why there is none (to be counted).

    Limits are in tokens, the closing one included. A response over the limit is cut and has no closing token,
    since its writer did not stop there. No reference: an empty response, for rollouts.
    A prompt over the limit is dropped (MiniLLM) or shortened. DistiLLM cuts the ids, and the template's end
    with them; here the template stays whole and one text gets shorter: the context, or, where that would have to go
    whole, the longest turn, at its end (an instruction stands first); with `plain` at its beginning. Not enough:
    dropped.
    A prompt of the teacher's own is written in the same way, before a pure `text` as plain text; its limit is
    `max_teacher_prompt_length` (None: none). teacher_tokenizer: where it is another, there always is such a prompt,
    in its ids and by its chat template.
    """
    record = _is_text_record(example)
    layout: Template = "plain" if record else template
    text = example.references[0] if example.references else None
    truncate, own = on_long_prompt == "truncate", ()
    try:
        prompt = _within(example, tokenizer, template, system, max_prompt_length, truncate)
        if len(prompt) > max_prompt_length:
            return f"the prompt has {len(prompt)} tokens, over data.max_prompt_length = {max_prompt_length}"
        if example.teacher_prompt is not None or teacher_tokenizer is not None:
            shown, limit = example, max_teacher_prompt_length
            if example.teacher_prompt is not None:
                shown = replace(example, prompt=example.teacher_prompt, context="")
            reader = teacher_tokenizer or tokenizer
            own = _within(shown, reader, layout, None if record else system, limit, truncate)
            if limit is not None and len(own) > limit:
                return f"the teacher's prompt has {len(own)} tokens, over data.max_teacher_prompt_length = {limit}"
        if text is None:
            return Sample(prompt, (), source=example.source, teacher_prompt=own)
        if not text.strip():
            return "the response is empty"
        response = response_ids(text, tokenizer, template=layout, parse=layout == "plain")
    except TemplateRefusal as refusal:
        return str(refusal)
    if record and len(response) > 1 and response[0] == prompt[0]:
        response = response[1:]  # a text that already opens with the token the prompt consists of
    return Sample(prompt, response[:max_completion_length], source=example.source, teacher_prompt=own)


def decode_response(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a response: control tokens left out, nothing cleaned up."""
    control = control_ids(tokenizer)
    kept = [index for index in ids if index not in control]
    return str(tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _is_text_record(example: Example) -> bool:
    return example.prompt == "" and not example.context


def _opening_id(tokenizer: PreTrainedTokenizerBase) -> int:
    opening = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if isinstance(opening, int):
        return opening
    raise ValueError("the tokenizer has neither bos nor eos: a `text` record has nothing to start from")


def _turns(example: Example, system: str | None) -> list[Message]:
    turns = [Message("user", example.prompt)] if isinstance(example.prompt, str) else list(example.prompt)
    if example.context:
        last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
        if last is None:
            raise TemplateRefusal("the record has a context and no user turn to put it in")
        turns[last] = replace(turns[last], content=f"{turns[last].content}\n\n{example.context}")
    if system is not None and not any(turn.role == "system" for turn in turns):
        turns.insert(0, Message("system", system))
    return turns


def _only_text(example: Example, template: Template) -> str:
    if isinstance(example.prompt, str):
        return example.prompt
    if len(example.prompt) != 1 or example.prompt[0].role != "user":
        raise ValueError(
            f"{example.source or 'a record'} is not one user turn, and `data.template: {template}` can show "
            "nothing else: use `data.template: chat`"
        )
    return example.prompt[0].content


def _rendered(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, prompt: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: set `data.template` to `alpaca` or `plain`")
    conversation = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:  # a template is a program, of whoever made the tokenizer
        raise TemplateRefusal(f"the chat template refuses the record: {error}") from error


def _generation_tail(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes between the last turn and the response."""
    turns = [Message("user", "?")]
    opened, closed = (_rendered(turns, tokenizer, prompt=prompt) for prompt in (True, False))
    return opened[len(closed) :] if opened.startswith(closed) else ""


def _within(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    system: str | None,
    limit: int | None,
    truncate: bool,
) -> tuple[int, ...]:
    """The prompt, shortened to `limit` if it is to be and can be."""
    prompt = prompt_ids(example, tokenizer, template=template, system=system)
    if not truncate or limit is None or len(prompt) <= limit:
        return prompt
    return _shortened(example, tokenizer, template, system, limit)


def _shortened(
    example: Example, tokenizer: PreTrainedTokenizerBase, template: Template, system: str | None, limit: int
) -> tuple[int, ...]:
    """The prompt with one text cut so that it fits, or one that does not where no cut of that text is enough."""
    least = None
    bare = replace(example, context="")
    if example.context and not _is_text_record(bare):
        least = prompt_ids(bare, tokenizer, template=template, system=system)
        if len(least) > limit:
            return _shortened(bare, tokenizer, template, system, limit)
    text, rebuilt = _cuttable(example)

    def ids_at(length: int) -> tuple[int, ...]:
        kept = text[len(text) - length :] if template == "plain" else text[:length]
        return prompt_ids(rebuilt(kept), tokenizer, template=template, system=system)

    low, high = 0, len(text)  # ids_at(high) is too long
    best = least or ids_at(high)
    while high - low > 1:
        middle = (low + high) // 2
        ids = ids_at(middle)
        if len(ids) <= limit:
            low, best = middle, ids
        else:
            high = middle
    return best


def _cuttable(example: Example) -> tuple[str, Callable[[str], Example]]:
    if example.context:
        return example.context, lambda text: replace(example, context=text)
    if isinstance(example.prompt, str):
        return example.prompt, lambda text: replace(example, prompt=text)
    turns = example.prompt
    longest = max(turns, key=lambda turn: len(turn.content))
    return longest.content, lambda text: replace(
        example, prompt=tuple(replace(m, content=text) if m is longest else m for m in turns)
    )
