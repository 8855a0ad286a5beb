"""Share of the chunk's tokens that the reply agrees with before it first differs. [ours]"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from omniopd.registry import SCORES
from omniopd.settings import Settings
from omniopd.types import Chunk, Reply
from omniopd.verification.agreement import agreed
from omniopd.verification.chunks import thresholds


@SCORES.register("token_agreement")
class TokenAgreement:
    """`phi = (leading tokens agreed with) / (tokens at risk)`.

    Strict where wording hardly matters and truth does: a wrong digit ends the agreement, which edit distance forgives.
    Blind to paraphrase for the same reason.
    """

    class Config(Settings):
        """No options."""

        name: Literal["token_agreement"] = "token_agreement"

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, pairs: Sequence[tuple[Chunk, Reply]]) -> list[float]:
        """Scores of comparable pairs, in which every decided token of the chunk is at risk."""
        return [_share(chunk, reply) for chunk, reply in pairs]


def _share(chunk: Chunk, reply: Reply) -> float:
    at_risk = len(thresholds(chunk))
    return agreed(chunk, reply) / at_risk if at_risk else 0.0
