"""What a teacher of another tokenizer gives the next *bytes* of a text, whichever way it cuts them. [ours]

A tokenizer that writes numbers whole gives the token "4" next to nothing where its text goes on with "43". Taken at its word,
such a teacher tells a student that writes digit by digit that the right first digit was wrong, and finds nothing wrong with
the "." that it wrote too early. So bytes are worth the probability of all tokens that start with them, their *opening* M;
that a token ended where it did is worth T / M, and is charged to what comes next. With F(x) the log-probability of the
first x bytes of a response, where byte x lies in token j and is its b-th,

    F(x) = log T_1 + ... + log T_{j-1} + log M_j(b),    M_j(b) = sum of T_j(w) over tokens w that start with those b bytes

a student's token of the bytes a to x has `F(x) - F(a)`, whatever its place in the teacher's tokens. Over a response that
closes these add up to the teacher's log-likelihood. Exact but for two things: of the longer tokens only the likeliest are
known, and the text before token j counts as cut the way the teacher did cut it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from omniopd.types import TokenScores


def openings_of(
    id: int, logprob: float, likeliest: Mapping[int, float], bytes_of: Sequence[bytes]
) -> tuple[float, ...]:
    """`log M(b)` in nats for b = 1 ... of a token's bytes, never rising. A token that spells nothing opens itself alone.

    Args:
        id, logprob: the token that was scored.
        likeliest: log-probs of the likeliest tokens at its place.
        bytes_of: what each id of the teacher spells.
    """
    spelled = bytes_of[id]
    if not spelled:
        return (logprob,)
    others = [(bytes_of[other], value) for other, value in likeliest.items() if other != id]
    found = []
    for size in range(1, len(spelled) + 1):
        alike = [value for other, value in others if other.startswith(spelled[:size])]
        found.append(float(torch.tensor([logprob, *alike], dtype=torch.float64).logsumexp(0)) if alike else logprob)
    return tuple(found)


def byte_scores(ends: Sequence[int | None], scores: TokenScores, *, closes: bool) -> list[float]:
    """`F(x) - F(a)` of each of the student's tokens, in nats; nan where the teacher's is no number, or a stretch is broken.

    Args:
        ends: `Spelling.ends` of the student's tokens. A token of no width has nan.
        scores: of the same text, with openings.
        closes: whether the student's last token ends the response, by role as the teacher's last one does.
    """
    places = _places(scores)
    size = len(scores.query.text.encode())
    starts = [0, *ends[:-1]]
    worth = [_between(start, end, places, scores) for start, end in zip(starts, ends, strict=True)]
    if closes:
        last = len(scores.ids) - 1
        worth[-1] = _rest(size, last, places, scores) + scores.logprobs[last]
    return worth


def _places(scores: TokenScores) -> dict[int, tuple[int, int]]:
    """Where each byte x = 1, 2, ... of the text lies: the token j, and the index of its opening that ends with that byte."""
    places: dict[int, tuple[int, int]] = {}
    start: int | None = 0
    for j, (end, openings) in enumerate(zip(scores.ends, scores.openings, strict=True)):
        if start is not None and end is not None and start < end <= start + len(openings):
            before = len(openings) - (end - start)  # a space that some tokenizers put before a text
            places |= {x: (j, before + x - start - 1) for x in range(start + 1, end + 1)}
        start = end
    return places


def _between(start: int | None, end: int | None, places: Mapping[int, tuple[int, int]], scores: TokenScores) -> float:
    """`F(end) - F(start)`."""
    if start is None or end is None or end <= start or end not in places:
        return math.nan
    j, b = places[end]
    if start in places and places[start][0] == j:
        return scores.openings[j][b] - scores.openings[j][places[start][1]]
    return _rest(start, j, places, scores) + scores.openings[j][b]


def _rest(start: int, j: int, places: Mapping[int, tuple[int, int]], scores: TokenScores) -> float:
    """What the teacher gives the text from byte `start` to the beginning of token j: first that its token ends there."""
    if start == 0:
        return math.fsum(scores.logprobs[:j])
    if start not in places:
        return math.nan
    i, a = places[start]
    return math.fsum([scores.logprobs[i], -scores.openings[i][a], *scores.logprobs[i + 1 : j]])
