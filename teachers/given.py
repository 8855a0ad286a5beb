"""A response that is to be scored: its tokens as the teacher reads it, how its scores are kept, and the evidence of them.

Scores are kept as draws of the rung `score`, one row `[id, log-prob, [[id, log-prob], ...], end, openings]` per token; a
log-prob is null where there is no value, openings where none are known. Whole distributions are kept nowhere: who needs them
again has them computed again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from omniopd.boundary import openings_of
from omniopd.chat import ChatTemplate
from omniopd.store import Draw
from omniopd.types import ScoreQuery, TokenScores, Usage
from omniopd.vocabulary import Vocabulary
from teachers.asks import SCORE, ScoreAsk
from teachers.scoring import Scores

EMPTY, UNKNOWN = "empty", "unknown_token"  # why there is nothing to send

RULED_OUT = "-inf"  # as a word, since JSON has no such number


@dataclass(frozen=True, slots=True)
class Passage:
    """A prompt, and the n tokens of a response to it in the teacher's vocabulary, with their byte `ends` in its text.

    `cut` says that the teacher's tokenizer cut that text; otherwise the ids are the student's own.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    ends: tuple[int | None, ...]
    cut: bool


def passage(ask: ScoreAsk, chat: ChatTemplate) -> Passage:
    """The prompt by the teacher's template, and the response: its ids as they are, or its text as the teacher cuts it.

    Raises:
        ValueError: the template refuses the messages.
        ConfigError: the text has to be cut, and the tokenizer is lossy.
    """
    prompt, vocabulary = chat.ids(ask.messages[:-1]), chat.vocabulary
    if ask.ids is not None:
        ends = (None,) * len(ask.ids) if vocabulary.lossy else vocabulary.spell(ask.ids).ends
        return Passage((*prompt, *ask.after), ask.ids, ends, cut=False)
    spelling = vocabulary.cut(ask.text)
    if not ask.closes:
        return Passage(prompt, spelling.ids, spelling.ends, cut=True)
    last = len(ask.text.encode())  # the end of the turn spells nothing
    return Passage(prompt, (*spelling.ids, chat.end_of_turn), (*spelling.ends, last), cut=True)


def hole(ask: ScoreAsk, vocabulary: Vocabulary | None = None) -> str:
    """Why a response can't be sent; "" if it can.

    One that stands `after` further tokens can't be cut anew: where a character ends among those is not known.

    `vocabulary` is the teacher's: padding of an output layer has ids that mean nothing to any model (trap R12).
    """
    if not (ask.text or ask.closes if ask.ids is None else ask.ids):
        return EMPTY
    if ask.ids is None and ask.after:
        return UNKNOWN
    beyond = vocabulary is not None and ask.ids is not None and max(*ask.ids, *ask.after, 0) >= vocabulary.size
    return UNKNOWN if beyond else ""


def draw_of(given: Passage, scores: Scores, vocabulary: Vocabulary) -> Draw:
    """Scores as the store keeps them. Of the likeliest tokens those that are padding are left out.

    Openings are of no use to a student of the same vocabulary, and unknown where nothing but log-probs was asked.
    """
    rows = list(zip(given.ids, scores.logprobs, map(_real(vocabulary), scores.top), given.ends, strict=True))
    opened: list[Any] = [None] * len(rows)
    if given.cut and any(scores.top):
        bytes_of = vocabulary.bytes_of
        opened = [
            None if p is None else [_kept(value) for value in openings_of(token, p, top, bytes_of)]
            for token, p, top, _ in rows
        ]
    return Draw(
        text="",
        finish="stop",
        rung=SCORE,
        model=scores.model,
        prompt_tokens=scores.usage.prompt_tokens,
        completion_tokens=scores.usage.completion_tokens,
        time=round(time.time(), 3),
        tokens=[
            [token, _kept(value), [[other, p] for other, p in top.items()], end, opens]
            for (token, value, top, end), opens in zip(rows, opened, strict=True)
        ],
    )


def token_scores(query: ScoreQuery, kept: Draw | str, usage: Usage, vocabulary: Vocabulary | None) -> TokenScores:
    """The evidence of a query, from what the store keeps or the reason why there is nothing."""
    if isinstance(kept, str):
        return TokenScores(query, vocabulary=vocabulary, rejected={kept: 1}, usage=usage)
    opened = [opens for *_, opens in kept.tokens]
    return TokenScores(
        query,
        ids=tuple(token for token, *_ in kept.tokens),
        ends=tuple(end for _, _, _, end, _ in kept.tokens),
        logprobs=tuple(_number(value) for _, value, *_ in kept.tokens),
        top=tuple(dict(top) for _, _, top, *_ in kept.tokens) if query.top else (),
        openings=tuple(tuple(map(_number, row or [None])) for row in opened) if any(opened) else (),
        vocabulary=vocabulary,
        usage=usage,
    )


def _real(vocabulary: Vocabulary) -> Callable[[Mapping[int, float]], dict[int, float]]:
    return lambda top: {token: value for token, value in top.items() if token < vocabulary.size}


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _kept(value: float | None) -> Any:
    if value is None or math.isnan(value):
        return None
    return value if math.isfinite(value) else RULED_OUT
