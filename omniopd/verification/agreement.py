"""How far a teacher's continuation agrees with what the student wrote, counted in the student's tokens. [ours]

Agreement is on text, so it holds across tokenizers: a token is agreed with if the continuation, read from the
prefix on, says the same characters through that token's end. It ends at the first difference.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from rapidfuzz.distance import Prefix

from omniopd.types import Chunk, Reply
from omniopd.verification.chunks import thresholds
from omniopd.verification.text import reached

_END = "\uffff"  # stands for the end of text; not a character, so no text holds it


def agreed(chunk: Chunk, reply: Reply) -> int:
    """Number of leading chunk tokens whose text the reply agrees with.

    The token that ends the response is agreed with only by a reply that stopped of itself just there.
    """
    written = chunk.text + _END * chunk.closes
    said = reached(reply) + _END * (reply.finish == "stop")
    return bisect_right(thresholds(chunk), Prefix.similarity(written, said))


def spoken(chunk: Chunk, reply: Reply) -> int:
    """Number of leading chunk tokens that the reply can speak about: all, unless the token limit cut it before.

    A censored reply speaks only about the tokens that end within what it reached, even where it already differs
    inside the next one. To count that difference, when agreement there would have gone uncounted, would bias the
    estimate towards disagreement.
    """
    needed = thresholds(chunk)
    return len(needed) if reply.finish == "stop" else bisect_right(needed, len(reached(reply)))


def agreed_tokens(chunk: Chunk, reply: Reply) -> tuple[int, int]:
    """(tokens agreed with, tokens at risk), of a reply as the teacher gave it."""
    return agreed(chunk, reply), spoken(chunk, reply)


def survival_counts(chunk: Chunk, replies: Sequence[Reply]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How many replies still agree, and of how many that could be told (Kaplan and Meier 1958, token by token).

    `survivors[j]` replies agree through the first j tokens: [C+1], `survivors[0]` is all of them.
    `at_risk[j]` of those that agree through the tokens before j can also speak about token j: [C]. The teacher's
    probability of token j, where the student wrote it, is estimated by `survivors[j + 1] / at_risk[j]`. Without
    censored replies `at_risk[j] == survivors[j]` on every token that some text decides.
    """
    pairs = [agreed_tokens(chunk, reply) for reply in replies]
    tokens = range(len(chunk.ends))
    survivors = (len(replies), *(sum(a > j for a, _ in pairs) for j in tokens))
    at_risk = tuple(sum(a >= j and told > j for a, told in pairs) for j in tokens)
    return survivors, at_risk
