"""Weights spread over the processes (FSDP2), and whole again where something reads them outside the update.

`torch.distributed.fsdp.fully_shard` itself, not accelerate's way to it, which is for GPUs only and for modules that are
models. Each decoder layer is a group of its own; embeddings, head and whatever else there is belong to the learner's. The
frozen reference is spread in the same way (trap O14).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from students.learner import Learner


def shard(learner: Learner) -> None:
    """Spread the learner's weights, and those of its frozen reference, over all processes."""
    learner.sharded = True
    learner.frozen = learner.policy.frozen  # under the learner, whose forward pass is the only one that reads it
    for module in list(learner.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module)
    fully_shard(learner)


@contextmanager
def unsharded(learner: Any) -> Iterator[None]:
    """The student's weights are whole in this block, in every process; nothing is exchanged until its end.

    So each process may read them as often as it likes, and for as long. Where nothing is spread, nothing is done.
    """
    spread = isinstance(learner, FSDPModule)
    if not spread:
        yield
        return
    layers = [module for module in learner.model.modules() if isinstance(module, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
    for group in (learner, *layers):
        group.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(True, recurse=False)
        for group in (learner, *layers):
            group.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread. Every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that all processes have, spread as `like` is; nothing is exchanged."""
    if not isinstance(like, DTensor):
        return tensor
    there = tensor.to(like.device, like.dtype)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, Tensor] | None:
    """A sharded model's weights by name, in CPU memory; None if it is not sharded. Every process must ask.

    Args:
        keep: whether this process wants them; the others' are empty.
    """
    weights: dict[str, Any] = model.state_dict(keep_vars=True)
    if not any(isinstance(weight, DTensor) for weight in weights.values()):
        return None
    gathered: dict[int, Tensor] = {}  # tied weights have two names
    for weight in weights.values():
        if id(weight) not in gathered:
            full = whole(weight.detach())
            gathered[id(weight)] = full.cpu() if keep else torch.empty(0)
    return {name: gathered[id(weight)] for name, weight in weights.items()}
