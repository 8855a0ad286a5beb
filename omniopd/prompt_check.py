"""Are student and teacher shown the same? Both render the same messages with their own chat templates (trap R3).

Markup differs between model families and is no difference: control tokens, role names, punctuation. What counts is text
that a template adds (a default system prompt, a date, an empty thought), messages that it drops or changes, and a
beginning-of-text token that comes twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from omniopd.errors import ConfigError
from omniopd.types import Message, Prompt, Role, Teacher
from students.policy import Policy

# Sequences of roles that are compared: templates treat a system message, or a second turn, in ways of their own.
SHAPES = 4

_ROLE_NAMES = re.compile(
    r"(?<![a-z])(?:system|sys|developer|user|human|prompter|inst|instruction|input|question|tool|assistant|model|gpt|ai|bot"
    r"|output|response|answer|turn|role|start|end|im_start|im_end|header|begin|of|text|prompt)(?![a-z])",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w\w+")
# Of families whose tokenizer is not at hand: <|im_start|>, <start_of_turn>, </s>, [INST], <<SYS>>.
_MARKUP = re.compile(r"<[|\uff5c][^<>]*[|\uff5c]>|<(?:start|end)_of_turn>|</?(?:s|bos|eos)>|\[/?[A-Z_]+\]|<<?/?SYS>>?")
# A token of this name is no mere markup: it opens or closes a thought.
_THOUGHT = re.compile(r"think|reason", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Shown:
    """What a model is shown of some messages: text that its template added, messages that it lost, control tokens."""

    text: str
    added: tuple[str, ...]
    lost: tuple[int, ...]
    bos: int | None  # at the beginning; None where the tokenizer is not at hand
    eos: int | None


@dataclass(frozen=True, slots=True)
class Compared:
    """Both renderings side by side, rows of (what, student, teacher), and what differs, a sentence each."""

    rows: tuple[tuple[str, str, str], ...]
    differences: tuple[str, ...]


async def compare_prompts(policy: Policy, teacher: Teacher, prompts: Iterable[Prompt]) -> Compared | None:
    """Student's and teacher's renderings of one prompt of each shape: of the first that differs, else of the first.

    Returns:
        None where the teacher does not tell what its model is shown.

    Raises:
        TeacherError: the server that would tell can't be reached.
    """
    tell = getattr(teacher, "shown", None)
    if tell is None:
        return None
    found: list[Compared] = []
    for prompt in _one_of_each(prompts):
        own = shown(policy.chat.text(prompt.messages), prompt.messages, policy.tokenizer)
        try:
            rendered = await tell(prompt)
        except ValueError as refusal:
            return Compared((), (f"the teacher's template refuses the messages of prompt {prompt.id}: {refusal}",))
        if rendered is None:
            return None
        other = shown(rendered[0], prompt.messages, rendered[1])
        found.append(Compared(table(own, other), differences(own, other)))
    return next((compared for compared in found if compared.differences), found[0] if found else None)


async def check_prompts(policy: Policy, teacher: Teacher, prompts: Iterable[Prompt], allowed: bool) -> str | None:
    """Refuse a run whose student and teacher are shown different text; a word where it is allowed.

    Raises:
        ConfigError: they differ, and the config does not allow it.
    """
    compared = await compare_prompts(policy, teacher, prompts)
    if compared is None or not compared.differences:
        return None
    said = "; ".join(compared.differences)
    if allowed:
        return f"student and teacher are shown different text: {said}"
    raise ConfigError(
        f"teacher: {said}; mend the templates or the messages (omniopd probe shows both), or set "
        "teacher.allow_prompt_difference: true"
    )


def shown(text: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None) -> Shown:
    """Read a rendering.

    Args:
        text: the whole prompt, control tokens included, as the model gets it.
        tokenizer: the model's own, or None: then what looks like control tokens is taken for them.
    """
    spans, lost, cursor = list[tuple[int, int]](), list[int](), 0
    for number, message in enumerate(messages):
        content = message.content.strip()
        at = text.find(content, cursor)
        if at < 0:  # a template may put the system message into a later turn
            at = text.find(content)
        if at < 0:
            lost.append(number)
        elif content:
            spans.append((at, at + len(content)))
            cursor = at + len(content)
    ends = [0, *(end for _, end in sorted(spans))]
    starts = [*(start for start, _ in sorted(spans)), len(text)]
    markup = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    return Shown(
        text,
        tuple(words for piece in markup if (words := _words(piece, tokenizer))),
        tuple(lost),
        _leading(text, tokenizer.bos_token) if tokenizer else None,
        "".join(markup).count(tokenizer.eos_token or "\0") if tokenizer else None,
    )


def differences(student: Shown, teacher: Shown) -> tuple[str, ...]:
    """What the two are shown differently, a sentence each; empty where it is the same."""
    found = []
    for who, one, other in (("student", student, teacher), ("teacher", teacher, student)):
        found += [f"the {who}'s template adds {text[:80]!r}" for text in one.added if text not in other.added]
        found += [f"the {who}'s template drops or changes message {i + 1}" for i in one.lost if i not in other.lost]
        if one.bos is not None and one.bos > 1:
            found.append(f"the {who}'s prompt begins with {one.bos} beginning-of-text tokens")
    return tuple(found)


def table(student: Shown, teacher: Shown) -> tuple[tuple[str, str, str], ...]:
    """Rows of (what, student, teacher)."""

    def say(one: Shown) -> list[str]:
        return [
            repr(one.text if len(one.text) <= 300 else f"{one.text[:200]} ... {one.text[-80:]}"),
            "not known" if one.bos is None else str(one.bos),
            "not known" if one.eos is None else str(one.eos),
            "; ".join(map(repr, one.added)) or "nothing",
            ", ".join(f"message {i + 1}" for i in one.lost) or "none",
        ]

    names = ("prompt", "BOS tokens", "EOS tokens", "text added by the template", "messages dropped or changed")
    return tuple(zip(names, say(student), say(teacher), strict=True))


def _one_of_each(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The first prompt of each shape, the sequence of its messages' roles."""
    shapes: dict[tuple[Role, ...], Prompt] = {}
    for prompt in prompts:
        shapes.setdefault(tuple(message.role for message in prompt.messages), prompt)
    return list(shapes.values())[:SHAPES]


def _words(markup: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The lines between messages that say more than control tokens and role names."""
    if tokenizer is None:
        markup = _MARKUP.sub("\n", markup)
    else:
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        for control in sorted((one for one in special if not _THOUGHT.search(one)), key=len, reverse=True):
            markup = markup.replace(control, "\n")
    lines = [" ".join(line.split()) for line in markup.splitlines()]
    return " ".join(line for line in lines if _WORD.search(_ROLE_NAMES.sub("", line)))


def _leading(text: str, token: str | None) -> int:
    """How many times a text opens with a token."""
    if not token:
        return 0
    pieces = (text[at : at + len(token)] for at in range(0, len(text), len(token)))
    return sum(1 for _ in takewhile(token.__eq__, pieces))
