"""ESR (arXiv 2605.27028): early stopping rollouts, which write and learn 100 tokens. See `omniopd.parts.horizon`.

The published loss is the full reverse KL, summed over a response's tokens [second-hand]: `reduction: sum_seqmean`. The
default is plain distillation's mean over all tokens of the step [ours]. For pairs of two families 50 tokens are advised
[second-hand]; the part goes with any method, so also with those between tokenizers. Students that can't reason yet are said
not to gain (arXiv 2602.15260). Responses become shorter, so length is a confounder: compare with `where: last` and `random`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective, Parts
from omniopd.registry import METHODS


class EsrConfig(OpdConfig):
    """Plain distillation, dense form, with one part."""

    name: Literal["esr"] = "esr"  # type: ignore[assignment]
    form: Literal["sampled", "dense"] = "dense"
    parts: Parts = Field(default=["horizon"], validate_default=True)


@METHODS.register("esr")
class Esr(Opd):
    """The first tokens only."""

    Config: ClassVar[type[Objective]] = EsrConfig
    paper = "2605.27028"
    neutral: ClassVar = {"parts": [{"name": "horizon", "tokens": None}]}
    plain: ClassVar = {"name": "opd", "form": "dense"}
