"""Rollouts no longer than their gradient needs (ADWIN, arXiv 2605.28396, reconstructed).

    cos_L = <g_L, g> / (|g_L| |g|),   g_L: gradient of the first L tokens of some rollouts, g: of all their tokens
    next window = the shortest candidate with cos_L >= rho;   rho = sqrt(1/2)                               [second-hand]

The best step along g_L reaches cos^2 of the local decrease that g reaches: rho asks for half of it. Every few steps the first
rollouts of the step, which are a random draw since prompts are shuffled, are written to the end as a probe. Each row has a
random stream of its own, so their first tokens are those of a rollout that is cut; the others are measured and never learned.

The probe is read at once, not some steps late: its gradients are those of the weights right after the update, in which its
tokens count by the update's own importance ratio. They are the base method's, before other parts, with one constant as
their normaliser. Published is the cosine in Fisher's metric [second-hand]; here it is that of the identity, or by `metric:
adam` of the diagonal of the optimizer's second moments, damped by their mean. Noise makes the cosine too small and so the
window too long: `split_half` multiplies gradients of different rollouts only. Compare with `window_null`, sqrt(tokens in
the window / all tokens): so much has a gradient of pure noise. All of this [ours].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from omniopd.draft import Draft
from omniopd.errors import ConfigError
from omniopd.method import Gradients, StudentText
from omniopd.objective import Objective
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import PARTS
from omniopd.segments import null_cosine, prefix_cosines, segment_gram
from omniopd.types import Evidence, Metric, Prompt, Rollout, Signal, Writing

TOLERANCE = 1e-9  # of the cosine: rounding must not decide a tie
Edge = Literal["largest", "full"]


class AdaptiveWindowSettings(PartSettings):
    """Which windows there are, and what one has to show."""

    name: Literal["adaptive_window"] = "adaptive_window"
    rho: float = Field(default=math.sqrt(0.5), description="least cosine of a window; above 1 none is good enough")
    candidates: list[int] = Field(
        default=[64, 128, 256, 512, 1024, 2048], min_length=1, description="windows, in tokens"
    )
    longest: int = Field(default=8192, ge=1, description="tokens of a rollout that is written to its end")
    probes: int = Field(default=64, ge=1, description="rollouts of a probe")
    every: int = Field(default=5, ge=1, description="steps from one probe to the next [ours]")
    start: Edge = Field(default="largest", description="first window: the largest candidate, or `longest`")
    fallback: Edge = Field(default="largest", description="window where no candidate is good enough")
    split_half: bool = Field(default=False, description="multiply gradients of different rollouts only")
    metric: Metric = Field(
        default="identity",
        description="M of the cosine in M^-1; adam: the diagonal of the optimizer's second moments, nearer to Fisher's",
    )

    @field_validator("candidates")
    @classmethod
    def _ascending(cls, given: list[int]) -> list[int]:
        if given[0] < 1 or any(a >= b for a, b in pairwise(given)):
            raise ValueError("candidates: name windows from 1 up, each once, the shortest first")
        return given

    @property
    def neutral(self) -> bool:
        return self.rho > 1 and self.start == self.fallback == "full"


@PARTS.register("adaptive_window")
class AdaptiveWindow(Part):
    """A limit on what is written and learned, as short as the gradient allows."""

    Config = AdaptiveWindowSettings
    slots = ("sampling", "schedule")
    place = Place.SAMPLE
    decides = False
    writes = frozenset({"horizon"})
    neutral: ClassVar = {"rho": 2.0, "start": "full", "fallback": "full"}
    refuses: ClassVar = {
        "horizon": "both own the length of rollouts; leave one out",
        "kl_stop": "it would cut the probe, which has to be whole; leave one out",
        "teachability": "it would mask the probe, which has to be whole; leave one out",
    }

    def __init__(self, config: AdaptiveWindowSettings, objective: Objective, text: StudentText, seed: int) -> None:
        super().__init__(config, objective, text, seed)
        if objective.anchor.beta > 0 and objective.anchor.where == "all":
            raise ConfigError(
                "method.anchor.where: the anchor on all tokens would be in every gradient that adaptive_window compares; set "
                "where: unaudited"
            )
        self.windows = [(0, self._length(config.start))]  # since so many updates, ascending
        self._probe: Signal | None = None  # the step's signal before any part, between `apply` and `after`

    def writings(self, prompts: Mapping[int, Prompt], evidence: Sequence[Evidence], step: int) -> dict[int, Writing]:
        """See `Part`."""
        window, whole = self.windows[-1][1], self._probed(step)
        return {row: Writing(max_tokens=self.config.longest if row in whole else window) for row in prompts}

    def apply(self, draft: Draft) -> None:
        """See `Part`. Not `draft.keep`: what a probe has beyond the window is no decision that a control could deal out."""
        beyond = 0
        for row, rollout in enumerate(draft.rollouts):
            within = torch.arange(len(rollout)) < self._window(rollout.version)
            beyond += int((~within).sum())
            draft.mask[row] = draft.mask[row] & within
        window = max((self._window(rollout.version) for rollout in draft.rollouts), default=0)
        draft.note(window=float(window), window_probe_tokens=float(beyond))
        self._probe = draft.signal if self._probed(draft.step) else None

    def after(
        self, rollouts: Sequence[Rollout], signal: Signal, step: int, gradients: Gradients
    ) -> Mapping[str, float]:
        """See `Part`."""
        base, self._probe = self._probe, None
        if base is None:
            return {}
        rows = [row for row in self._probed(step) if row < len(rollouts)]
        lengths = [len(rollouts[row]) for row in rows]
        edges = [edge for edge in self.config.candidates if edge < max(lengths, default=0)]
        if not edges:  # nothing to be cut by any window
            return {}
        config = self.config
        gram = segment_gram(gradients, rollouts, base, rows, edges, split=config.split_half, metric=config.metric)
        cosines = prefix_cosines(gram)
        if cosines is None:
            return {"window_zero_gradient": 1.0}
        self._choose(step, edges, cosines.tolist())
        found = {f"window_cos_{edge}": cos for edge, cos in zip(edges, cosines.tolist(), strict=False)}
        null = {f"window_null_{edge}": null_cosine(lengths, edge) for edge in edges}
        return {"window_next": float(self.windows[-1][1]), **found, **null}

    def state_dict(self) -> dict[str, Any]:
        """See `Part`."""
        return {"windows": [list(one) for one in self.windows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Part`."""
        self.windows = [(updates, window) for updates, window in state["windows"]]

    def _length(self, edge: Edge) -> int:
        return self.config.longest if edge == "full" else self.config.candidates[-1]

    def _probed(self, step: int) -> range:
        """The rows that are written to the end in a step."""
        return range(self.config.probes if (step - 1) % self.config.every == 0 else 0)

    def _window(self, version: int) -> int:
        """The window when the weights had seen so many updates: a rollout's own, also where it is learned later."""
        return next(window for updates, window in reversed(self.windows) if updates <= version)

    def _choose(self, step: int, edges: Sequence[int], cosines: Sequence[float]) -> None:
        """The window after this step's update. Candidates beyond `edges` cut nothing: their cosine is 1."""
        known = dict(zip(edges, cosines, strict=False))
        fit = [one for one in self.config.candidates if known.get(one, 1.0) >= self.config.rho - TOLERANCE]
        window = fit[0] if fit else self._length(self.config.fallback)
        if window != self.windows[-1][1]:
            self.windows.append((step, window))
