"""Numbers as people write them, read exactly: signs, separators, currency, fractions, percent, units, scale words.

This is the path that nearly every answer takes; it costs microseconds, where symbolic comparison costs milliseconds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_CURRENCY = "$€£¥₹"
_NUMBER = r"(?:(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = rf"(?:\s+(?:{'|'.join(_SCALES)})\b)"
_FRAC = re.compile(r"\\[dt]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))")
MATH_WORDS = "pi|sqrt|sin|cos|tan|log|ln|exp|mod|or|and|to|by|times|over|plus|minus"

# A unit opens with a word of two letters or more (a single one may be a variable) and goes on without digits or signs.
_UNIT = (
    r"\s*(?:°\s*[CF]?|\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^\{?[23]\}?)?"
    rf"|(?:/\s*|\(|per\s+|an?\s+)?(?!(?:{MATH_WORDS})\b)[a-z]{{2,}}(?:\^?[23²³])?[^\d=+*^\\{{}}<>]*)"
)
_WHOLE = re.compile(
    rf"(?P<sign>[-+]?)\s*[{_CURRENCY}]?\s*(?P<sign2>-?)(?:(?P<whole>\d+)\s+(?=\d+\s*/))?"
    rf"(?P<number>{_NUMBER})(?:e(?P<exponent>[-+]?\d{{1,2}}))?(?:\s*/\s*(?P<under>{_NUMBER}))?"
    rf"(?P<scale>{_SCALE})?(?P<percent>\s*(?:%|percent\b|pct\b))?(?:{_UNIT})?",
    re.IGNORECASE,
)
_ANYWHERE = re.compile(
    rf"(?:(?<![\w.)])-)?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}"
    rf"|(?<![\w.])[{_CURRENCY}]?(?:(?:\d+\ )?\d+/\d+|{_NUMBER}){_SCALE}?(?:\s?%|\s+percent\b)?)",
    re.IGNORECASE,
)
_SEPARATORS = re.compile(r"(?<=\d)(?:\\,|\\!,|\{,\}|[\u00a0\u202f\u2009\u2019'])(?=\d{3}(?!\d))")
_LONGEST = 200  # what is longer is a text, not a number


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number, and whether a percent sign stood behind it."""

    value: Fraction
    percent: bool = False

    def equals(self, other: Quantity) -> bool:
        """Exact equality. 50% equals both 50 (the sign read as a unit) and 0.5 (read as a factor)."""
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        share, plain = (self, other) if self.percent else (other, self)
        return share.value / 100 == plain.value


def clean(text: str) -> str:
    """The text without the wrapping of an answer: math delimiters, emphasis, quotes, a closing full stop."""
    text = _SEPARATORS.sub(",", text.replace("\u2212", "-"))
    text = text.replace(r"\$", "$").replace(r"\%", "%")
    before = None
    while before != text:
        before = text
        text = text.strip().strip("*_`\"'").rstrip(".,;:").removeprefix("=")
        for opening, closing in ((r"\(", r"\)"), (r"\[", r"\]"), ("$", "$")):
            if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening):
                text = text[len(opening) : -len(closing)]
    return text


def read(text: str) -> Quantity | None:
    """The number that the whole text is, with an optional currency sign and unit; None if it is anything else."""
    if len(text) > _LONGEST:
        return None
    text = _FRAC.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", clean(text)).strip().rstrip("$")
    match = _WHOLE.fullmatch(text)
    if match is None:
        return None
    value = _fraction(match["number"]) * Fraction(10) ** int(match["exponent"] or 0)
    if match["under"]:
        under = _fraction(match["under"])
        if not under:
            return None
        value = int(match["whole"] or 0) + value / under
    value *= _SCALES[match["scale"].strip().lower()] if match["scale"] else 1
    return Quantity(-value if "-" in match["sign"] + match["sign2"] else value, bool(match["percent"]))


def last_number(text: str) -> str | None:
    """The last number written anywhere in the text, as it stands there."""
    found = None
    for match in _ANYWHERE.finditer(_SEPARATORS.sub(",", text.replace("\u2212", "-"))):
        found = match[0].strip()
    return found


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))
