"""One likelihood weight per chunk: the signal of OmniOPD (Zhou et al. 2026)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from pydantic import Field, model_validator

from omniopd.registry import SIGNALS
from omniopd.signals import SignalConfig
from omniopd.verification.audit import Audit, ChunkSignal
from omniopd.verification.weights import geometric_mean, log_ratio, smoothed


@SIGNALS.register("likelihood_weight")
class LikelihoodWeight:
    """`pi_hat(c) = (k + alpha * pi_bar) / (n_eff + alpha)` on every token of chunk c. Source: arXiv 2606.01476.

    By default a weight lies in (0, 1]: disagreement reinforces less, and never pushes down. A chunk without a scored
    reply stays unaudited.
    """

    class Config(SignalConfig):
        """The published form, and two named variants."""

        name: Literal["likelihood_weight"] = "likelihood_weight"
        alpha: float = Field(
            default=1.0, ge=0, description="weight of the student's own probability, in replies [second-hand]"
        )
        centred: bool = Field(
            default=False, description="subtract the step's mean; less variance, but negative weights [ours]"
        )
        form: Literal["weight", "log_ratio"] = Field(
            default="weight", description="log_ratio: log pi_hat - log pi_bar, experimental [ours]"
        )

        @model_validator(mode="after")
        def _finite(self) -> LikelihoodWeight.Config:
            if self.form == "log_ratio" and self.alpha == 0:
                raise ValueError(
                    "form=log_ratio needs alpha above 0: without a prior log 0 occurs where nothing matches"
                )
            return self

    def __init__(self, config: Config) -> None:
        self.config = config

    def read(self, audits: Sequence[Audit]) -> list[ChunkSignal]:
        """One value per chunk, spread over its tokens."""
        values = [self._value(audit) if audit.verdict.n_eff else None for audit in audits]
        known = [value for value in values if value is not None]
        mean = fmean(known) if self.config.centred and known else 0.0
        return [
            _spread(None if value is None else value - mean, len(audit.logp))
            for audit, value in zip(audits, values, strict=True)
        ]

    def _value(self, audit: Audit) -> float:
        pi_bar = geometric_mean(audit.logp)
        pi_hat = smoothed(audit.verdict.k, audit.verdict.n_eff, pi_bar, self.config.alpha)
        return log_ratio(pi_hat, pi_bar) if self.config.form == "log_ratio" else pi_hat


def _spread(value: float | None, tokens: int) -> ChunkSignal:
    return ChunkSignal((value or 0.0,) * tokens, (value is not None,) * tokens)
