"""End a rollout where the student has drifted so far that the teacher merely goes along (KAT, arXiv 2606.09471).

    z_t = (1/W) sum_{i=t-W+1..t} d_i for t >= W;    m(y) = min_t z_t, into a FIFO buffer B;    s = Quantile_{1-eta}(B)

d is the reverse KL. A window is low where z_t < s; N low ones in a row end the rollout just before the first token of the
first one. B holds recent rollouts; s stands still during a step [second-hand]. Windows that count are `stride` apart, and
those that end in the exempt first tokens do not count; m(y) looks at every window [ours]. d over the k likeliest tokens and a
bucket for the rest is a lower bound of the whole reverse KL, which the bare sum over the k is not.

The rollout is written whole and cut afterwards: the saving of not writing the rest is not built. So B sees whole rollouts,
and does not drift with what it cuts [ours]. `control: shuffled` deals the cut lengths to random rollouts: the length-matched
control that the paper lacks [ours].
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from omniopd.draft import Draft
from omniopd.errors import ConfigError
from omniopd.measures import divergences
from omniopd.method import Facts, Gradients, StudentModel, StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.scored import nats
from omniopd.targets.subset import SubsetTarget, TopKTarget
from omniopd.types import Rollout, Signal, TokenScores

KL = "kl_stop.kl"
NEEDS = {"student": "logits", "teacher": "topk", "sampled": "score"}
ALARM = 0.5  # share of rollouts that are cut, from which on the log warns [ours]

log = logging.getLogger(__name__)


class KlStopSettings(PartSettings):
    """What counts as a trap, and from when on."""

    name: Literal["kl_stop"] = "kl_stop"
    window: int = Field(default=64, ge=1, description="W, tokens of a window")
    stride: int | None = Field(default=None, ge=1, description="tokens between windows that count; null: window [ours]")
    low_windows: int = Field(default=4, ge=1, description="N, low windows in a row that end a rollout")
    eta: float = Field(default=0.3, ge=0, le=1, description="the threshold is the quantile 1 - eta of the buffer")
    exempt: int | None = Field(
        default=None, ge=0, description="first tokens whose windows do not count; null: 2 windows [ours]"
    )
    buffer: int = Field(default=4096, ge=1, description="rollouts that the buffer holds")
    least: int = Field(default=512, ge=1, description="rollouts in the buffer from which on it is used")
    warmup_steps: int = Field(default=50, ge=0, description="first steps, in which nothing is cut")
    threshold: float | None = Field(
        default=None, description="s in nats instead of the quantile, from the first step on; -inf: never [ours]"
    )
    tokens: Literal["student", "teacher", "sampled"] = Field(
        default="student",
        description="d over the k likeliest of this side and a bucket for the rest; sampled: log p - log q, noisier [ours]",
    )
    k: int = Field(default=64, ge=1, description="likeliest tokens")

    @model_validator(mode="after")
    def _can_fill(self) -> KlStopSettings:
        if self.least > self.buffer:
            raise ValueError(f"least: the buffer never holds {self.least} rollouts; lower least or raise buffer")
        return self

    @property
    def step(self) -> int:
        """Tokens between windows that count."""
        return self.window if self.stride is None else self.stride

    @property
    def free(self) -> int:
        """First tokens whose windows do not count."""
        return 2 * self.window if self.exempt is None else self.exempt

    @property
    def earliest(self) -> int:
        """Tokens after which a rollout can be stopped at the earliest."""
        skipped = (self.free - self.window) // self.step + 1 if self.free >= self.window else 0
        return self.window + (skipped + self.low_windows - 1) * self.step

    @property
    def neutral(self) -> bool:
        return self.threshold == -math.inf


@PARTS.register("kl_stop")
class KlStop(Part):
    """Cut rollouts where a low reverse KL has lasted."""

    Config = KlStopSettings
    slots = ("credit", "schedule")
    place = Place.CUT
    refuses: ClassVar = {"adaptive_window": "its probe needs whole rollouts, which this one cuts; leave one out"}
    warns: ClassVar = {
        "correctness_router": "a rollout that is right counts as right though its end is cut; watch kept_share",
        "lookahead": "one shortens rollouts, the other lives on their length, and sure repetition has a low KL, too",
        "teachability": "one drops lasting agreement, the other drops disagreement; watch kept_share",
        "rock_tokens": "one drops lasting agreement, the other weakens disagreement; watch kept_share",
    }
    neutral: ClassVar = {"threshold": -math.inf}

    def __init__(self, config: KlStopSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        self.needs = frozenset({NEEDS[config.tokens], "same tokenizer"})
        self.whole = config.tokens == "student"
        self.top = config.k if config.tokens == "teacher" else 0
        self.buffer: deque[float] = deque(maxlen=config.buffer)
        limit = next((part.tokens for part in objective.parts if part.name == "horizon"), None)
        if limit is not None and limit < config.earliest:
            raise ConfigError(
                f"method.parts: 'horizon' ends rollouts after {limit} tokens, and 'kl_stop' can't stop one before "
                f"{config.earliest}; lower kl_stop.window, or leave one of them out"
            )

    def measure(self, rollout: Rollout, scores: TokenScores | None, student: StudentModel) -> Facts:
        """See `Part`."""
        if scores is None or scores.ids != rollout.ids:
            return {}
        if self.config.tokens == "sampled":
            return {KL: (nats(rollout.logprobs) - nats(scores.logprobs)).tolist()}
        target = self._target(scores)
        if target is None:
            return {}
        (own,) = student.distributions([rollout])
        return {KL: divergences(own, target, rollout.ids).tolist()}

    def apply(self, draft: Draft) -> None:
        """See `Part`."""
        config, threshold = self.config, self._threshold(draft.step)
        found = {row: draft.facts(row, KL) for row in draft.rows}
        cuts = {
            row: cut
            for row, d in found.items()
            if d is not None
            and (cut := cut_at(d, threshold, config.window, config.step, config.low_windows, config.free)) is not None
        }
        draft.cut(cuts)
        share = len(cuts) / len(found) if found else 0.0
        if share > ALARM:
            log.warning("kl_stop cuts %.0f%% of the rollouts; lower method.parts kl_stop.eta", 100 * share)
        draft.note(
            kl_stop_threshold=threshold if math.isfinite(threshold) else None,
            kl_stop_share=share,
            kl_stop_length=sum(cuts.values()) / len(cuts) if cuts else None,
        )

    def after(
        self, rollouts: Sequence[Rollout], signal: Signal, step: int, gradients: Gradients
    ) -> Mapping[str, float]:
        """The buffer hears of the step's rollouts, in their order; those too short to be judged are counted."""
        lowest = [lowest_window(self._kl(one), self.config.window, self.config.free) for one in rollouts]
        self.buffer.extend(one for one in lowest if one is not None)
        return {"kl_stop_buffer": float(len(self.buffer)), "kl_stop_unjudged": float(lowest.count(None))}

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": list(self.buffer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.buffer = deque(state["buffer"], maxlen=self.config.buffer)

    def _target(self, scores: TokenScores) -> SubsetTarget | TopKTarget | None:
        if self.config.tokens == "teacher":
            return TopKTarget(scores.top) if scores.top else None
        return None if scores.distributions is None else SubsetTarget(scores.distributions, self.config.k)

    def _kl(self, rollout: Rollout) -> Tensor:
        return torch.tensor(rollout.facts.get(KL, ()), dtype=torch.float64)

    def _threshold(self, step: int) -> float:
        """s of a step; -inf while nothing is cut."""
        config = self.config
        if config.threshold is not None:
            return float(config.threshold)
        if step <= config.warmup_steps or len(self.buffer) < config.least:
            return -math.inf
        return threshold_of(self.buffer, config.eta)


def threshold_of(lowest: Sequence[float], eta: float) -> float:
    """`Quantile_{1-eta}` of the buffer, between two of its numbers by linear interpolation."""
    return float(torch.tensor(list(lowest), dtype=torch.float64).quantile(1 - eta))


def window_means(d: Tensor, window: int) -> Tensor:
    """z [T - W + 1]: the mean of each window of d [T]; empty if there is none."""
    return d.unfold(0, window, 1).mean(-1) if len(d) >= window else d[:0]


def lowest_window(d: Tensor, window: int, exempt: int) -> float | None:
    """m(y): the least mean of any window; None where the rollout is exempt, has no window, or none of known mean."""
    means = window_means(d, window)
    means = means[means.isfinite()]
    return float(means.min()) if len(means) and len(d) > exempt else None


def cut_at(d: Tensor, threshold: float, window: int, stride: int, low_windows: int, exempt: int) -> int | None:
    """How many tokens a rollout keeps; None: all of them. A window that holds an unknown number (nan) is not low.

    Args:
        d: [T] in nats.
    """
    low = (window_means(d, window) < threshold).tolist()
    in_a_row = 0
    for end in range(window, len(d) + 1, stride):
        in_a_row = in_a_row + 1 if end > exempt and low[end - window] else 0
        if in_a_row == low_windows:
            return end - (low_windows - 1) * stride - window
    return None
