"""How a chat model is made to go on from a partial text, and when its reply counts. Pure functions.

Rungs, best first: `raw` renders prompt and partial text here, with the teacher's own template, and sends the whole to a
completion route; `prefill` sends the partial text as an assistant turn that is left open; `instruct` shows it in a user
turn and asks for what follows. A prefix that is empty needs no rung: the plain question is asked.

A reply that breaks a rule is no evidence: it leaves both the sum and the count (never a zero). Every empty text is
rejected, an immediate natural stop too: it can't be told from an endpoint that is silent.
"""

from __future__ import annotations

import re
from typing import Literal

from rapidfuzz.distance import Levenshtein

from omniopd.types import Finish, Message, Prompt

Rung = Literal["answer", "plain", "raw", "prefill", "instruct"]

TEMPLATE_VERSION = 1  # raise it with any change of INSTRUCTION: it is part of the key of every `instruct` draw

# Stable text first and the growing partial solution after it, so that providers' prompt caches hit on nested prefixes.
INSTRUCTION = """{task}

A solution to the task above was begun and then interrupted. Go on with it from exactly the point where it breaks off, \
in the same style, as if you had written it yourself. Write only what follows: no greeting, no comment, no heading, no \
new start. Open your reply by copying, character by character, the last piece of the begun solution (given at the very \
end), and go straight on from there.

<begun>
{prefix}
</begun>
<last_piece>{echo}</last_piece>"""

ECHO_CHARS = 40  # how much of the partial text the reply is asked to open with
ECHO_TOKENS = 24  # added to the token limit of an `instruct` request: what the echo costs
ECHO_LEAST = 12  # a shorter overlap may be chance

RESTART_CHARS = 200
RESTART_LEAST_PREFIX = 40
RESTART_LEAST_REPLY = 20  # shorter replies resemble any opening by chance
RESTART_SIMILARITY = 0.8  # chosen, not tuned

_REFUSAL = re.compile(
    r"""\s*(?:(?:(?:i['\u2019]?m|i\s+am)\s+(?:very\s+|so\s+)?sorry|sorry|i\s+apologi[sz]e|unfortunately)[\s,.!:;\u2013\u2014-]*(?:but\s+)?)?
    (?: i\s+(?:can['\u2019]?t|cannot|can\s+not|won['\u2019]?t|will\s+not|could\s+not|couldn['\u2019]?t)\s+
        (?:help(?!\s+but)|assist|continue|comply|provide|do\s+that|fulfil|answer|support|engage|create|complete|discuss)
      | i(?:['\u2019]m|\s+am)\s+(?:unable|not\s+able)\s+to\s+
        (?:help|assist|continue|comply|provide|do\s+that|fulfil|answer|support|engage|create|complete|discuss)
      | i\s+must\s+(?:respectfully\s+)?decline
      | as\s+an\s+ai(?:\s+language)?\s+(?:model|assistant)\b )""",
    re.IGNORECASE | re.VERBOSE,
)
_META = re.compile(
    r"""\s*(?:(?:sure|certainly|of\s+course|okay|ok|absolutely|got\s+it|great)\b[\s,.!:;\u2013\u2014-]*)?
    (?: here(?:['\u2019]s|\s+is)\s+(?:the|my|a)\s+(?:\w+\s+){0,2}(?:continuation|rest|remainder|completion)\b
      | here\s+(?:i|we)\s+(?:continue|go\s+on)\b
      | continuing\s+(?:from|the\s+(?:begun|partial|solution|text))\b
      | (?:i['\u2019]ll|i\s+will|i['\u2019]m\s+going\s+to|let\s+me)\s+(?:now\s+)?(?:continue|go\s+on|pick\s+up)\s+
        (?:from|with\s+the|the|where)\b
      | (?:the\s+)?continuation\s*(?:is\s*)?: )""",
    re.IGNORECASE | re.VERBOSE,
)
_THOUGHT = re.compile(r"\s*<think(?:ing)?>(.*?)(?:</think(?:ing)?>\s*|\Z)", re.DOTALL)


def render_answer(prompt: Prompt) -> tuple[Message, ...]:
    """The plain question: what an answer, or a continuation of the empty prefix, is asked with."""
    return prompt.messages


def render_prefill(prompt: Prompt, prefix: str) -> tuple[Message, ...]:
    """The prompt with the partial text as an open assistant turn. The prefix must not end in white space."""
    return (*prompt.messages, Message("assistant", prefix)) if prefix else render_answer(prompt)


def render_instruct(prompt: Prompt, prefix: str) -> tuple[Message, ...]:
    """The prompt with its last turn turned into "here is a begun solution, go on"."""
    if not prefix:
        return render_answer(prompt)
    *before, last = prompt.messages
    # Replacement in one pass: braces and marks inside the task or the prefix are text.
    fields = {"{task}": last.content, "{prefix}": prefix, "{echo}": echo_of(prefix)}
    text = re.sub(r"\{(?:task|prefix|echo)\}", lambda match: fields[match.group()], INSTRUCTION)
    return (*before, Message("user", text))


def echo_of(prefix: str) -> str:
    """The last ~40 characters of the partial text, from the beginning of a word where there is one."""
    tail = prefix[-ECHO_CHARS:]
    if len(tail) == len(prefix) or prefix[-ECHO_CHARS - 1].isspace():
        return tail.lstrip()
    words = tail.split(maxsplit=1)
    return words[1] if len(words) == 2 and len(words[1]) >= ECHO_LEAST else tail.lstrip()


def strip_echo(text: str, prefix: str) -> str | None:
    """What follows the echo, white space included, or None if there is no echo.

    The echo that was asked for comes first, then the longest overlap of the reply's opening with the prefix's end: in
    text that repeats itself the longest overlap alone would swallow part of the continuation.
    """
    echo = echo_of(prefix)
    for reply in (text, text.lstrip()):
        if reply.startswith(echo):
            return reply[len(echo) :]
        for size in range(min(len(reply), len(prefix)), min(ECHO_LEAST, len(prefix)) - 1, -1):
            if prefix.endswith(reply[:size]):
                return reply[size:]
    return None


def split_thought(text: str) -> tuple[str, bool]:
    """A reply without the thinking it opens with (some servers leave it in the text), and whether there was any."""
    match = _THOUGHT.match(text)
    return (text[match.end() :], True) if match else (text, False)


def restarts(text: str, prefix: str) -> bool:
    """Whether the reply begins the response anew: it resembles the response's opening at equal length."""
    opening, reply = prefix[:RESTART_CHARS], text.lstrip()
    size = min(len(opening), len(reply))
    if len(prefix) < RESTART_LEAST_PREFIX or size < RESTART_LEAST_REPLY:
        return False
    similarity = Levenshtein.normalized_similarity(opening[:size], reply[:size])
    return similarity >= RESTART_SIMILARITY


def validate(text: str, prefix: str, rung: Rung, hidden_reasoning: bool = False, finish: Finish = "stop") -> str | None:
    """Why a reply is no evidence, or None if it is.

    `empty`, `only_reasoning` (the budget went into hidden thought), `refusal`, `restart`, `meta` (talks about going
    on), `no_echo` (`instruct`), `cut` (a whole answer that the token limit ended; a continuation may end there).
    """
    if not text.strip():
        return "only_reasoning" if hidden_reasoning else "empty"
    if _REFUSAL.match(text):
        return "refusal"
    if rung == "answer":
        return "cut" if finish == "length" else None
    if rung == "instruct":
        rest = strip_echo(text, prefix)
        if rest is None:
            return "restart" if restarts(text, prefix) else "meta" if _META.match(text) else "no_echo"
        if not rest.strip():
            return "empty"
        text = rest
    if restarts(text, prefix):
        return "restart"
    return "meta" if prefix and _META.match(text) else None
