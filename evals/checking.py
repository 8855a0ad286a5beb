"""Is the answer right? The final answer is found by convention, then compared: exactly if possible, else symbolically.

Conventions, the first that applies wins, and within it the last place in the text:

1. `#### N` (GSM8K): a line whose rest is a number; or anything, on the text's last line. Headings such as
   `#### 2. Add them up` don't count.
2. `\\boxed{N}`.
3. "the answer is N", "Answer: N", up to the end of the sentence.
4. The last number in the text.
"""

from __future__ import annotations

import re
from functools import lru_cache

from evals import symbolic
from evals.quantity import MATH_WORDS, clean, last_number, read

_HASHES = re.compile(r"(?<!#)####(?!#)\s*([^\n#]*)")
_LISTED = re.compile(r"\d+[.):]\s+\S")  # the number of a heading, not an answer
_ANSWER = re.compile(r"\banswer", re.IGNORECASE)
_STATED = re.compile(
    r"answers?\b[^.:=\n]{0,80}?(?:\bis\b|[:=])[\s*_:]*(?P<said>[^\n]{1,300}?)\s*(?=[.!?](?:[\s*]|$)|\n|$)",
    re.IGNORECASE,
)
_WORD = re.compile(rf"(?<![\\A-Za-z])(?!(?:{MATH_WORDS})\b)[A-Za-z]{{3,}}")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf)\{([^{}]*)\}")
_SEVERAL = re.compile(r"\b(?:or|and)\b|;|,(?!\d{3})|[<>!]$")
_LONGEST = 300  # what is longer is not an expression that could be compared in reasonable time


def extract(text: str, numeric: bool = False) -> str | None:
    """The final answer in the text, by the conventions above; None if there is none.

    `numeric` says that the answer must be a number, so that "I hope the answer is clear" is no statement of it.
    """
    return _after_hashes(text) or _boxed(text) or _stated(text, numeric) or last_number(text)


def is_right(reference: str, text: str) -> bool | None:
    """Whether the final answer in the text equals the reference, a bare answer or a worked solution that ends in one.

    Two numbers are compared exactly, whatever their spelling; units and currency are ignored, and 50% equals 50 and
    0.5. Words are compared as strings. Everything else goes to math-verify; None if that takes too long.

    Raises:
        RunError: math-verify is needed and can't be started.
    """
    wanted = _after_hashes(reference) or _boxed(reference) or _right_side(clean(reference))
    answer = extract(text, numeric=read(wanted) is not None)
    return answer is not None and _same(wanted, answer)


@lru_cache(maxsize=4096)
def _same(reference: str, answer: str) -> bool | None:
    wanted, given = read(reference), read(answer)
    if wanted is not None and given is not None:
        return wanted.equals(given)
    if _spelling(reference) == _spelling(answer):
        return True
    # To math-verify a word is a product of letters, so that "silent" would equal "listen".
    if _is_wordy(reference) or _is_wordy(answer) or max(len(reference), len(answer)) > _LONGEST:
        return False
    return symbolic.equal(reference, answer)


def _after_hashes(text: str) -> str | None:
    for match in reversed(list(_HASHES.finditer(text))):
        said = match[1].strip()
        if _LISTED.match(said):
            continue
        if read(said) is not None:
            return clean(said)
        # Further up, a line that isn't a number is a heading.
        if said and not text[match.end() :].strip():
            return _value(said)
    return None


def _boxed(text: str) -> str | None:
    """What the last complete \\boxed{...} holds."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for place in range(match.end(), min(len(text), match.end() + _LONGEST)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return _right_side(clean(text[match.end() : place])) or None
    return None


def _stated(text: str, numeric: bool) -> str | None:
    for start in reversed([match.start() for match in _ANSWER.finditer(text)]):
        match = _STATED.match(text, start)
        if match and (not numeric or re.search(r"\d", match["said"])):
            return _value(match["said"])
    return None


def _value(said: str) -> str | None:
    """The answer within a sentence: "12+7=19", "that she has 19 apples" and "19 apples" all say 19."""
    said = _right_side(clean(said))
    if read(said) is None and _WORD.search(_TEXT.sub("", said)):
        return last_number(said) or said
    return said or None


def _right_side(said: str) -> str:
    """What a chain of equations arrives at, if that is one number; else all of it."""
    left, equals, right = said.rpartition("=")
    return clean(right) if equals and not _SEVERAL.search(left) and read(right) is not None else said


def _is_wordy(text: str) -> bool:
    return not re.search(r"\d", text) and _WORD.search(text) is not None


def _spelling(text: str) -> str:
    """The text as strings are compared: case, spaces, `\\text{}` and the brackets of "(B)" don't matter."""
    text = " ".join(_TEXT.sub(r"\1", text).casefold().split())
    return text[1:-1] if re.fullmatch(r"\([a-z]\)", text) else text
