"""Credit: what a chunk's advantage is worth on each of the student's tokens in it. Pure functions on tensors.

Source: arXiv 2606.09456; `share` is its released code's rule [official code] in a form that no quotient of two
log-likelihoods can blow up [ours]; `uniform` and `full` [ours].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Credit = Literal["share", "uniform", "full"]
CERTAIN = (
    1e-8  # nats; below this the student was sure of the whole chunk, and shares of it mean nothing [official code]
)


def span_index(spans: Sequence[tuple[int, int]], tokens: int) -> Tensor:
    """[tokens] which of the C disjoint spans [start, end) each token is in; C for those in none."""
    index = torch.full((tokens,), len(spans), dtype=torch.long)
    for place, (start, end) in enumerate(spans):
        index[start:end] = place
    return index


def span_sums(numbers: Tensor, index: Tensor, count: int) -> Tensor:
    """Sum of each span's numbers: [n], [n] -> [count]. A span of one has its number, to the last bit."""
    return numbers.new_zeros(count + 1).index_add(0, index, numbers)[:count]


def spread(numbers: Tensor, index: Tensor) -> Tensor:
    """Each token's number is its chunk's, 0 in no chunk: [C], [T] -> [T]."""
    return torch.cat([numbers, numbers.new_zeros(1)])[index]


def chunk_advantages(logprobs: Tensor, ratios: Tensor, index: Tensor, credit: Credit = "share") -> Tensor:
    """Advantage of each token, [T]: its part of its chunk's `L_T - L_S`; 0 in no chunk.

    - `share`: `A_i = (log p_i / L_S) (L_T - L_S)`, equal to the released `(L_T / L_S - 1) log p_i`
    - `uniform`: `A_i = (L_T - L_S) / m`
    - `full`: `A_i = L_T - L_S`, the exact gradient of `E[L_S - L_T]`

    The first two add up to `L_T - L_S` over a chunk of m tokens; where `|L_S| < 1e-8`, `share` is `uniform`. A chunk of
    one token has the weight x / x = 1 exactly, so that its advantage is `log q - log p` bit for bit.

    Args:
        logprobs: [T] the student's when it sampled, in nats.
        ratios: [C] `L_T - L_S` of each chunk.
        index: [T] which chunk each token is in, C for none (`span_index`).
    """
    count = len(ratios)
    of_chunk = spread(ratios, index)
    if credit == "full":
        return of_chunk
    sizes = span_sums(torch.ones_like(logprobs), index, count + 1)[index]
    even = 1 / sizes
    if credit == "uniform":
        return even * of_chunk
    own = span_sums(logprobs, index, count + 1)[index]
    return torch.where(own.abs() < CERTAIN, even, logprobs / own) * of_chunk
