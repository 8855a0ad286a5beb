"""Does a rung of the ladder go on literally, or does the teacher start over? The look behind `continuation: auto`.

Two questions, live. The first is the same for every teacher: after "1, 2, 3, 4," comes 5. A model that can't count (a
small one, a specialist) is asked the second: it answers a prompt of the run's own, and is then given the first half of
that answer to go on from. One that goes on literally writes the second half again; one that starts over does not.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rapidfuzz.distance import Levenshtein

from omniopd.errors import TeacherError
from omniopd.types import Message, Prompt
from teachers import ladder
from teachers.asks import Ask, Manner
from teachers.ladder import Rung
from teachers.wire import Backend, Completion, Outcome, RefusedRequest

Draw = Callable[[Ask, int, int | None], Awaitable[Outcome[Completion]]]

log = logging.getLogger(__name__)

COUNT = Prompt("continuation-check", (Message("user", "Count from 1 to 10 in digits, separated by commas."),))
COUNTED, NEXT = "1, 2, 3, 4,", "5"
COUNT_TOKENS, ANSWER_TOKENS = 16, 96
LOOK_CALLS = 3  # of one rung, at most
LEAST_ANSWER = 16  # characters: a shorter answer has no halves to tell apart
ALIKE = 0.8


class Unanswered(TeacherError):
    """A call outside a gather that brought nothing; `reason` as in the ledger."""

    def __init__(self, outcome: Outcome[Any], mend: str) -> None:
        super().__init__(f"the teacher did not answer ({outcome.detail or outcome.reason}); {mend}")
        self.reason, self.detail = outcome.reason, outcome.detail


@dataclass
class Look:
    """What was seen of one rung: whether it goes on literally (None: the teacher gave no way to tell), and why."""

    rung: Rung
    literal: bool | None = None
    why: str = ""


async def look(draw: Draw, manner: Manner, rung: Rung, prompt: Prompt | None) -> Look:
    """Whether this rung goes on literally.

    Args:
        draw: asks the teacher (request, draws, seed).
        prompt: one of the run's own, for a teacher that can't count.

    Raises:
        RefusedRequest: the teacher refuses a setting, whatever the rung.
        TeacherError: the teacher can't be reached or does not answer.
    """
    seen = Look(rung)
    try:
        said = await _draw(draw, manner.render(rung, COUNT, COUNTED, COUNT_TOKENS, seed=0))
        said = continuation(said, COUNTED, rung)
        seen.why = f"after '{COUNTED}' the teacher wrote {said[:40]!r}"
        if said.lstrip().startswith(NEXT):
            seen.literal = True
        elif prompt is None or said.lstrip().startswith(COUNTED):
            seen.literal = False
        else:
            await _half_answer(draw, seen, manner, prompt)
    except RefusedRequest as refusal:
        if refusal.param not in ("", "prefill"):  # a setting that no rung can do without
            raise
        seen.literal, seen.why = False, f"refused: {refusal}"
    except Unanswered as silent:
        if silent.reason == "error":
            raise
        seen.why = f"no answer ({silent.reason})"
    return seen


async def choose(draw: Draw, backend: Backend, manner: Manner, prompt: Prompt | None) -> tuple[Rung, list[Look]]:
    """The best rung that a look proves; the last of the back end's needs no proof."""
    looks: list[Look] = []
    for rung in backend.rungs[:-1]:
        seen = await look(draw, manner, rung, prompt)
        looks.append(seen)
        log.info("continuation %s: %s (%s)", rung, "goes on" if seen.literal else "not proved", seen.why)
        if seen.literal:
            return rung, looks
    return backend.rungs[-1], looks


async def _half_answer(draw: Draw, seen: Look, manner: Manner, prompt: Prompt) -> None:
    asked = replace(manner, temperature=None if manner.temperature is None else 0.0)
    try:
        answer = await _draw(draw, asked.render("answer", prompt, "", ANSWER_TOKENS, seed=0))
    except RefusedRequest as refusal:
        if refusal.param != "temperature":
            raise
        seen.why += "; temperature 0 is refused, so no answer of its own can be had twice"
        return
    # Between words: half a word has another tokenization than the whole, and asks another question.
    prefix = (answer[: len(answer) // 2].rsplit(maxsplit=1) or [""])[0]
    rest = answer[len(prefix) :].strip()
    if not prefix or len(answer) < LEAST_ANSWER or alike(rest, answer):
        seen.why = f"its answer {answer[:40]!r} has no halves to tell apart"
        return
    said = await _draw(draw, asked.render(seen.rung, prompt, prefix, ANSWER_TOKENS, seed=0))
    said = continuation(said, prefix, seen.rung)
    seen.literal = alike(said.strip(), rest)
    seen.why = f"after half of its own answer, {prefix[-20:]!r}, it wrote {said[:30]!r} (before: {rest[:30]!r})"
    if not seen.literal and alike(said.strip(), answer):
        seen.why += ": it started over"


async def _draw(draw: Draw, ask: Ask) -> str:
    outcome = await draw(ask, 1, ask.seed)
    if outcome.value is None:
        raise Unanswered(outcome, "check the server, or name the rung in teacher.continuation")
    return outcome.value.choices[0].text


def continuation(said: str, prefix: str, rung: Rung) -> str:
    """A reply without the echo that the rung asks for; empty if it is not there."""
    if rung != "instruct":
        return said
    return ladder.strip_echo(ladder.split_thought(said)[0], prefix) or ""


def alike(one: str, other: str) -> bool:
    """Whether two texts agree at equal length."""
    size = min(len(one), len(other), 40)
    return size > 0 and bool(Levenshtein.normalized_similarity(one[:size], other[:size]) >= ALIKE)


def why_not(looks: Sequence[Look]) -> str:
    """What the looks that failed saw, in one line."""
    return "; ".join(f"{seen.rung}: {seen.why}" for seen in looks if not seen.literal)
