"""The forward pass of the update: one pass over a micro-batch gives every term of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omniopd.losses import slice_bounds, slice_size, sum_over_slices
from omniopd.model import split_model
from omniopd.types import Target
from students.packing import Row, tensors
from students.policy import Policy
from students.terms import Coefficients, SliceLoss, sites_of


class Learner(nn.Module):
    """The forward pass of the update as one module, so that a distributed wrapper sees every use of the weights."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.model = policy.model  # registered: its parameters are this module's

    def forward(self, rows: list[Row], scaled: Coefficients, targets: Sequence[Target | None]) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, and its parts: `TERMS` and the sum of the held tokens' KL, without gradient."""
        model = self.policy.causal_lm
        inputs = tensors(rows, model.dtype, model.device)
        sites = sites_of(rows, scaled, targets)
        hidden, head = self.states(model, inputs)
        reference = reference_head = None
        if bool(sites.anchor.any()):
            with torch.no_grad(), self.policy.reference() as frozen:
                reference, reference_head = self.states(frozen, inputs)
                reference = _gather(reference, sites.places[: sites.own])
                reference_head = getattr(
                    reference_head, "base_layer", reference_head
                )  # adapters may sit on the head too
        size = self.policy.settings.slice_tokens or slice_size(split_model(model)[1].weight.shape[0])
        return sum_over_slices(
            _gather(hidden, sites.places),
            head,
            SliceLoss(sites.to(model.device), reference, reference_head),
            slice_bounds(len(sites), size, sites.blocks),
        )

    def states(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """Last hidden states and the head; for families that rework the logits, the logits and the identity."""
        if not self.policy.splits_head:
            return model(**inputs, use_cache=False).logits, nn.Identity()
        body, head = split_model(model)
        return body(**inputs, use_cache=False).last_hidden_state, head


def _gather(hidden: Tensor, at: list[tuple[int, int]]) -> Tensor:
    rows, columns = zip(*at, strict=True) if at else ((), ())
    return hidden[list(rows), list(columns)]
