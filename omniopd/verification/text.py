"""Characters that tokens have completed, and text cut without breaking a character."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import regex  # type: ignore[import-untyped]

from omniopd.types import Chunk, Reply
from omniopd.verification.chunks import thresholds

BROKEN = "\ufffd"  # what decoders write for bytes that do not make a character (yet)

Decode = Callable[[list[int]], str]


def char_ends(ids: Sequence[int], decode: Decode) -> list[int]:
    """How many characters of the text the tokens up to and including t have completed, for each t: [T], never falling.

    The definition is the length of `decode(ids[:t + 1])` without the broken character at its end. Decoding every
    prefix costs O(T^2) characters, so tokens are decoded in short windows, and the assembled text is compared with
    the whole one. They differ only where bytes that never make a character turn their valid neighbours into broken
    ones (SentencePiece's byte fallback does); such a text is measured by the definition.

    Args:
        decode: ids to text, without cleaning up spaces.
    """
    ids = list(ids)
    pieces = _pieces(ids, decode)
    if "".join(pieces) == decode(ids).rstrip(BROKEN):
        return list(accumulate(map(len, pieces)))
    whole = (len(decode(ids[: t + 1]).rstrip(BROKEN)) for t in range(len(ids)))
    return list(accumulate(whole, max))


def _pieces(ids: list[int], decode: Decode) -> list[str]:
    """The text that each token completes, by windows that open one settled segment before the token.

    The segment in front is context: decoders drop the first space of what they are given, and so drop it from
    the context and not from the token's own text. A segment is settled when it added text and ends on a full character.
    """
    pieces: list[str] = []
    opened = settled = 0
    context = ""
    told = 0  # characters of the window's text that are already in pieces
    for t in range(len(ids)):
        window = decode(ids[opened : t + 1])
        whole = window.rstrip(BROKEN)
        pieces.append(whole[told:])
        told = max(told, len(whole))
        if len(window) > len(context) and whole == window:
            opened, settled = settled, t + 1
            context = decode(ids[opened:settled])
            told = len(context)
    return pieces


def cut(text: str, length: int) -> str:
    """The longest beginning of `text` that holds at most `length` characters and no half of a grapheme."""
    if len(text) <= length:
        return text
    end = 0
    for grapheme in regex.finditer(r"\X", text):
        if grapheme.end() > length:
            break
        end = grapheme.end()
    return text[:end]


def reached(reply: Reply) -> str:
    """A reply's text without the half character that a token limit can leave at its end."""
    return reply.text.rstrip(BROKEN) if reply.finish == "length" else reply.text


def comparable(chunk: Chunk, reply: Reply) -> tuple[Chunk, Reply]:
    """A chunk and a reply cut to equal length in characters, so that no score rewards mere length. [ours]

    - A reply that runs on past the chunk is cut on a grapheme boundary and marked "length".
    - A reply that stopped early stays short: stopping is evidence.
    - A censored reply, cut by the token limit before it said all that the chunk says, shortens the *chunk* to the
      length that it reached, and to the tokens that it could speak about.

    So in a comparable pair "length" means that the teacher went on: what it would have said is never unknown.
    """
    text = reached(reply)
    if len(text) > len(chunk.text):
        return chunk, Reply(cut(text, len(chunk.text)), "length")
    if reply.finish == "stop":
        return chunk, reply
    tokens = bisect_right(thresholds(chunk), len(text))
    shorter = replace(
        chunk, end=chunk.start + tokens, text=chunk.text[: len(text)], ends=chunk.ends[:tokens], closes=False
    )
    return shorter, Reply(text, "length")
