"""The forward pass of the update: one pass over a micro-batch gives every term of the loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from omniopd.losses import frozen_head, slice_bounds, slice_size, sum_over_slices
from omniopd.model import split_model
from omniopd.types import Target
from students.batches import Batch, tensors
from students.policy import Policy
from students.terms import Coefficients, SliceLoss, sites_of


class Learner(nn.Module):
    """The forward pass of the update as one module, so that a distributed wrapper sees every use of the weights."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.model = policy.model  # registered: its parameters are this module's
        self.frozen: nn.Module | None = None  # the reference, registered where all weights are sharded
        self.sharded = False

    def forward(
        self, batch: Batch, scaled: Coefficients, targets: Sequence[Target | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of a micro-batch; its parts without gradient, `TERMS` and the sum of the held tokens' KL; its ratios [n].

        The ratios are those of older weights' tokens that have a value, before truncation (see `Stale`).
        """
        with self.policy.computing():
            return self._forward(batch, scaled, targets)

    def _forward(
        self, batch: Batch, scaled: Coefficients, targets: Sequence[Target | None]
    ) -> tuple[Tensor, Tensor, Tensor]:
        model = self.policy.causal_lm
        inputs = tensors(batch, model.dtype, model.device)
        sites = sites_of(batch, scaled, targets).to(model.device)
        hidden, head = self.policy.states(model, inputs)
        reference = reference_head = None
        if bool(scaled.anchor_R.any()):  # asked of the whole step: all processes make the same forward passes
            with torch.no_grad(), self.policy.reference() as frozen:
                reference, reference_head = self.policy.states(frozen, inputs)
                reference = _gather(reference, sites.places[: sites.own])
                bare = getattr(reference_head, "base_layer", reference_head)  # adapters may sit on the head too
                reference_head = frozen_head(bare, reference)
        size = self.policy.settings.slice_tokens or slice_size(split_model(model)[1].weight.shape[0])
        loss_of = SliceLoss(sites, reference, reference_head)
        loss, parts = sum_over_slices(
            _gather(hidden, sites.places), head, loss_of, slice_bounds(len(sites), size, sites.blocks)
        )
        if self.sharded and not loss.requires_grad:  # no coefficients here; other processes may have some
            loss = loss + 0 * hidden.sum()
        return loss, parts, loss_of.ratios


def _gather(hidden: Tensor, places: Tensor) -> Tensor:
    """[bins, width, D] at the places [S] among all tokens: [S, D]."""
    return hidden.flatten(0, 1).index_select(0, places)
