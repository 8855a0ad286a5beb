"""Reading a teacher's distributions row by row, and laying values on the positions of a slice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from omniopd.types import Distributions


@torch.no_grad()
def teacher_logits(distributions: Distributions, rows: Sequence[int], size: int, like: Tensor) -> Tensor:
    """The teacher's logits [r, size] of some of its places, in fp32 or wider, on the device of the tensor `like`.

    What its output layer is wider than its vocabulary is cut off; ids that the layer lacks have no probability.
    """
    logits = distributions.head(distributions.hidden[list(rows)])[:, :size].to(like.device)
    return pad(
        logits if logits.dtype == torch.float64 else logits.float(), (0, size - logits.shape[-1]), value=-torch.inf
    )


def spread(at: Sequence[int], values: Tensor | None, like: Tensor) -> Tensor:
    """[r] for the r rows of `like`: `values` at positions `at`, 0 elsewhere."""
    if values is None:
        return torch.zeros(len(like), device=like.device)
    places = torch.tensor(at, dtype=torch.long, device=like.device)
    return values.new_zeros(len(like)).index_copy(0, places, values)
