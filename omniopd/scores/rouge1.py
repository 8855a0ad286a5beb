"""ROUGE-1: overlap of words, whatever their order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from omniopd.registry import SCORES
from omniopd.settings import Settings
from omniopd.types import Chunk, Reply


@SCORES.register("rouge1")
class Rouge1:
    """`phi = 2 * shared / (words(a) + words(b))`, words counted as often as they occur in both: the F1 of ROUGE-1.

    Studied in arXiv 2606.01476 [second-hand]; the definition of a word is ours: a run of letters, digits and
    underscores in any script, case ignored, no stemming. So "12+7" and "12-7" are the same, as are two orders.
    """

    class Config(Settings):
        """No options."""

        name: Literal["rouge1"] = "rouge1"

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, pairs: Sequence[tuple[Chunk, Reply]]) -> list[float]:
        """One F1 in [0, 1] per pair."""
        return [f1(chunk.text, reply.text) for chunk, reply in pairs]


def f1(a: str, b: str) -> float:
    """F1 of the two bags of words; of two texts without any word, 1 if they are equal and 0 if not."""
    words_a, words_b = (Counter(re.findall(r"\w+", text.casefold())) for text in (a, b))
    if not words_a and not words_b:
        return float(a.strip() == b.strip())
    return 2 * (words_a & words_b).total() / (words_a.total() + words_b.total())
