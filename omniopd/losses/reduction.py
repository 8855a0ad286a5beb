"""How the terms of the loss are averaged over a whole optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omniopd.objective import Reduction


def reduction_scales(
    mode: Reduction, audited: int, unaudited: int, sequences: int, response_tokens: int | None = None
) -> tuple[float, float]:
    """(scale of the value term's sum, scale of the KL term's sum); the loss is `a * values + beta * b * KLs`. [ours]

    - `term_mean`: `1 / audited`, `1 / unaudited`
    - `token_mean`: both `1 / response_tokens`
    - `sum_seqmean`: both `1 / sequences`, as arXiv 2606.01476 is re-implemented [second-hand]

    Counts are those of the whole optimizer step, over micro-batches and processes: a micro-batch multiplies its sums by
    the scales, and however the step is split it adds up to one loss. A term without tokens gets scale 0.

    Args:
        unaudited: tokens under the KL.
        response_tokens: `audited + unaudited` unless given; give it where the KL covers audited tokens too.
    """
    if mode == "term_mean":
        return _inverse(audited), _inverse(unaudited)
    if mode == "sum_seqmean":
        return _inverse(sequences), _inverse(sequences)
    scale = _inverse(audited + unaudited if response_tokens is None else response_tokens)
    return scale, scale


def _inverse(count: int) -> float:
    return 1.0 / count if count else 0.0
