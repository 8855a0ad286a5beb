"""Token advantages from how long continuations go on agreeing: sampled OPD from text alone. [ours]"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from omniopd.registry import SIGNALS
from omniopd.signals import SignalConfig
from omniopd.verification.audit import Audit, ChunkSignal
from omniopd.verification.chunks import steps
from omniopd.verification.weights import survival_advantages


@SIGNALS.register("survival")
class Survival:
    """`A_j = log q_j - log p_j` with `q_j = (s_j + a p_j) / (r_j + a)`, clipped.

    s_j of N continuations agree with the student's text through token j; r_j agree through the token before and were
    not cut off before they could speak about j. As N grows q_j tends to the teacher's probability of that text, so
    this is plain sampled OPD across tokenizers. Tokens that nobody could speak about are masked.

    Tokens that complete one character between them are one step: they share its advantage, with the product of
    their probabilities for p, as text can't tell them apart.
    """

    class Config(SignalConfig):
        """Shrinkage and clip."""

        name: Literal["survival"] = "survival"
        strength: float = Field(
            default=1.0, ge=0, description="a: weight of the student's own probability, in continuations"
        )
        clip: float = Field(
            default=5.0,
            gt=0,
            description="bound on |A|, nats. With a = 1 a refuted token gets -log(r + 1), so that 5 bounds only rare "
            "tokens that the teacher likes (p below e^-5) and counts above 147",
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    def read(self, audits: Sequence[Audit]) -> list[ChunkSignal]:
        """An advantage per token, and a mask of the tokens that some continuation could speak about."""
        return [self._read(audit) for audit in audits]

    def _read(self, audit: Audit) -> ChunkSignal:
        verdict, spans = audit.verdict, steps(audit.chunk)
        advantages, spoken = survival_advantages(
            survivors=[verdict.survivors[span.stop] for span in spans],
            at_risk=[verdict.at_risk[span.start] for span in spans],
            logp=[math.fsum(audit.logp[j] for j in span) for span in spans],
            strength=self.config.strength,
            clip=self.config.clip,
        )
        values, mask = [0.0] * len(audit.logp), [False] * len(audit.logp)
        for span, advantage, known in zip(spans, advantages, spoken, strict=True):
            for j in span:
                values[j], mask[j] = advantage, known
        return ChunkSignal(tuple(values), tuple(mask))
