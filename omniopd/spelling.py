"""Tokens laid over a text, byte for byte: where each ends, and which say something else than the text."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_STRAY = re.compile("([\udc80-\udcff]+)")  # bytes that make no character, as `surrogateescape` decodes them


@dataclass(frozen=True, slots=True)
class Spelling:
    """A text with the tokens that spell it. `ends` [n] counts the bytes that the tokens up to each have spelled.

    `ends[i]` is None where token i ends inside a stretch of `text` that is not what the tokens say, byte for byte: bytes that
    make no character (`text` has a replacement character there), or text that a normaliser has changed. The last token
    of such a stretch has its end again; `broken` [n] is True for all of its tokens.
    """

    text: str
    ids: tuple[int, ...]
    ends: tuple[int | None, ...]
    broken: tuple[bool, ...]


def spelled_by(ids: Sequence[int], pieces: Sequence[bytes]) -> Spelling:
    """The text that pieces [n] make, without half a character at its end, whose tokens have no end and are broken."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    marked = decoder.decode(b"".join(pieces))
    half = len(decoder.getstate()[0])  # bytes that wait for the rest of their character
    ends = list(accumulate(map(len, pieces)))
    if not half and not _STRAY.search(marked):
        return Spelling(marked, tuple(ids), tuple(ends), (False,) * len(ends))
    text, places, stray = _without_strays(marked)
    places += [None] * half
    stray += [True] * half
    broken = (places[end] is None or any(stray[start:end]) for start, end in zip([0, *ends], ends, strict=False))
    return Spelling(text, tuple(ids), tuple(places[end] for end in ends), tuple(broken))


def _without_strays(marked: str) -> tuple[str, list[int | None], list[bool]]:
    """Text with replacement characters for stray bytes.

    Also, of the n bytes that the tokens spell: where in the text's bytes the first 0 to n of them end [n + 1], None inside
    a run of strays; and which are stray [n].
    """
    shown: list[str] = []
    places: list[int | None] = [0]
    stray: list[bool] = []
    end = 0
    for i, part in enumerate(_STRAY.split(marked)):
        spelled = part.encode("utf-8", "surrogateescape")
        shown.append(spelled.decode("utf-8", "replace"))
        start, end = end, end + len(shown[-1].encode())
        is_stray = i % 2 == 1
        places += [*[None] * (len(spelled) - 1), end] if is_stray else range(start + 1, end + 1)
        stray += [is_stray] * len(spelled)
    return "".join(shown), places, stray


def laid_over(text: str, ids: Sequence[int], pieces: Sequence[bytes], offsets: Sequence[tuple[int, int]]) -> Spelling:
    """A text and the pieces [n] that a tokenizer cut it into, which may spell it only in part.

    A broken stretch has a None in any case: one of a single token takes the next token in, and one at the end of the
    text has no end.

    Args:
        offsets: [n] which characters the tokenizer says that each token stands for. They only decide where the comparison
            starts again: a token counts as whole where it and the text agree, byte for byte.
    """
    if b"".join(pieces) == text.encode():
        return Spelling(text, tuple(ids), tuple(accumulate(map(len, pieces))), (False,) * len(pieces))
    ends: list[int | None] = []
    broken: list[bool] = []
    char = at = 0  # how much has been compared: characters, bytes
    for i in range(1, len(pieces) + 1):
        last = i == len(pieces)
        next_char = len(text) if last else offsets[i][0]
        if not last and (offsets[i - 1][1] > next_char or next_char <= char):
            continue  # the next token shares a character with this one
        tokens = pieces[len(ends) : i]
        stretch = text[char:next_char].encode()
        same = b"".join(tokens) == stretch
        if not (same or last) and len(tokens) == 1:
            continue
        if same:
            ends += [at + width for width in accumulate(map(len, tokens))]
        else:
            ends += [*[None] * (len(tokens) - 1), None if last else at + len(stretch)]
        broken += [not same] * len(tokens)
        char, at = next_char, at + len(stretch)
    return Spelling(text, tuple(ids), tuple(ends), tuple(broken))
