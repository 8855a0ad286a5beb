"""Are student and teacher shown the same? Both render the same messages with their own chat templates (trap R3).

Markup differs between model families and is no difference: control tokens, role names, punctuation. What counts is text
that a template adds (a default system prompt, a date, an empty thought), messages that it drops or changes, and a
beginning-of-text token that comes twice.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from omniopd.errors import ConfigError
from omniopd.types import Message, Prompt, Teacher
from students.policy import Policy

_ROLES = re.compile(
    r"\b(?:system|user|assistant|model|human|ai|bot|inst|sys|im_start|im_end|turn|role)\b", re.IGNORECASE
)
_WORDS = re.compile(r"\w\w+")


@dataclass(frozen=True, slots=True)
class Shown:
    """What a model is shown of some messages: text that its template added, messages that it lost, control tokens."""

    text: str
    added: tuple[str, ...]
    lost: tuple[int, ...]
    bos: int | None  # None where the tokenizer is not at hand
    eos: int | None


async def compare_prompts(
    policy: Policy, teacher: Teacher, prompt: Prompt
) -> tuple[list[tuple[str, str, str]], list[str]] | None:
    """Student's and teacher's rendering of one prompt: rows to show, and the differences.

    Returns:
        None where the teacher does not tell what its model is shown.
    """
    tell = getattr(teacher, "shown", None)
    rendered = await tell(prompt) if tell else None
    if rendered is None:
        return None
    own = shown(policy.chat.text(prompt.messages), prompt.messages, policy.tokenizer)
    other = shown(rendered[0], prompt.messages, rendered[1])
    return table(own, other), differences(own, other)


async def check_prompts(policy: Policy, teacher: Teacher, prompt: Prompt, allowed: bool) -> str | None:
    """Refuse a run whose student and teacher are shown different text; a word where it is allowed.

    Raises:
        ConfigError: they differ, and the config does not allow it.
    """
    compared = await compare_prompts(policy, teacher, prompt)
    if compared is None or not compared[1]:
        return None
    said = "; ".join(compared[1])
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
        tokenizer: the model's own, or None: then angle brackets with a bar or a slash are taken for control tokens.
    """
    lost, markup, rest = [], [], text
    for number, message in enumerate(messages):
        content = message.content.strip()
        before, found, after = rest.partition(content)
        if content and not found:
            lost.append(number)
            continue
        markup.append(before)
        rest = after
    pieces = [*markup, rest]
    return Shown(
        text,
        tuple(piece for piece in (_plain(piece, _controls(tokenizer)) for piece in pieces) if piece),
        tuple(lost),
        _count(text, tokenizer, "bos_token"),
        _count(text, tokenizer, "eos_token"),
    )


def differences(student: Shown, teacher: Shown) -> list[str]:
    """What the two are shown differently, a sentence each; empty where it is the same."""
    found = []
    for who, one, other in (("student", student, teacher), ("teacher", teacher, student)):
        for text in one.added:
            if text not in other.added:
                found.append(f"the {who}'s template adds {text[:80]!r}")
        found += [f"the {who}'s template drops or changes message {i + 1}" for i in one.lost if i not in other.lost]
        if one.bos is not None and one.bos > 1:
            found.append(f"the {who}'s prompt begins with {one.bos} beginning-of-text tokens")
    return found


def table(student: Shown, teacher: Shown) -> list[tuple[str, str, str]]:
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
    return list(zip(names, say(student), say(teacher), strict=True))


def _plain(markup: str, controls: Collection[str]) -> str:
    """The words that stand between messages and are neither control tokens nor role names."""
    for control in sorted(controls, key=len, reverse=True):
        markup = markup.replace(control, "\n")
    if not controls:
        markup = re.sub(r"<\|[^<>|]*\|>|</?s>|\[/?INST\]", "\n", markup)
    lines = [_ROLES.sub(" ", line) for line in markup.splitlines()]
    return " ".join(" ".join(line.split()) for line in lines if _WORDS.search(line))


def _controls(tokenizer: PreTrainedTokenizerBase | None) -> set[str]:
    if tokenizer is None:
        return set()
    return {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}


def _count(text: str, tokenizer: PreTrainedTokenizerBase | None, name: str) -> int | None:
    if tokenizer is None:
        return None
    token = getattr(tokenizer, name)
    return text.count(token) if token else 0
