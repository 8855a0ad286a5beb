"""Normalised edit similarity of characters: the default of OmniOPD (Zhou et al. 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rapidfuzz.distance import Levenshtein

from omniopd.registry import SCORES
from omniopd.settings import Settings
from omniopd.types import Chunk, Reply

CAP = 4000  # characters of each side that are compared [second-hand]


@SCORES.register("edit_distance")
class EditDistance:
    """`phi(a, b) = 1 - Lev(a, b) / max(|a|, |b|)`; both empty 1, exactly one empty 0.

    Source: arXiv 2606.01476 [second-hand]. Rewards wording, not truth: the same words around a wrong number get 0.99,
    and unrelated English about 0.2, so consider calibrating it.
    """

    class Config(Settings):
        """No options."""

        name: Literal["edit_distance"] = "edit_distance"

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, pairs: Sequence[tuple[Chunk, Reply]]) -> list[float]:
        """One similarity in [0, 1] per pair."""
        return [similarity(chunk.text, reply.text) for chunk, reply in pairs]


def similarity(a: str, b: str) -> float:
    """The formula above, symmetric in a and b."""
    return Levenshtein.normalized_similarity(a[:CAP], b[:CAP])
