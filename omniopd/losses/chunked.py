"""One pass over slices of positions, in which every term of the loss shares the student's logits of the slice.

Logits [R, V] of a large vocabulary are by far the largest tensor of a step, so they are never stored: a slice's logits are
made, all terms are computed from them, and they are gone before the next slice's are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states [r, D] to logits [r, V]."""

LossOf = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""Logits [r, V] of a slice of the positions, and that slice, to its part of the loss (a scalar) and of the statistics [k]."""

SLICE_BYTES = 128 * 2**20  # smaller ones make the matrix products slower, larger ones take memory for nothing


def slice_size(vocabulary: int) -> int:
    """The number of positions whose logits in fp32 take about 128 MiB; a slice's temporaries take a few times as much."""
    return max(1, SLICE_BYTES // (4 * vocabulary))


def slice_bounds(rows: int, size: int, blocks: Sequence[tuple[int, int]] = ()) -> list[slice]:
    """Slices that tile `rows` positions, at most `size` long unless a block is longer. No rows are one empty slice.

    Args:
        blocks: runs [start, end) that must not be cut, in order and without overlap.
    """
    slices = []
    start = 0
    ahead = iter([*blocks, (rows, rows)])
    block = next(ahead)
    while start < rows:
        end = min(start + size, rows)
        while block[1] < end:
            block = next(ahead)
        if block[0] < end < block[1]:
            end = block[0] if block[0] > start else block[1]
        slices.append(slice(start, end))
        start = end
    return slices or [slice(0, 0)]


def sum_over_slices(hidden: Tensor, head: Head, loss_of: LossOf, bounds: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """`sum over slices of loss_of(head(hidden[slice]), slice)`: (loss with gradient, statistics [k] without).

    Value and gradient are those of the whole at once. A plain linear head costs three matrix products, as the dense way
    does: each slice's gradient is computed in the forward pass, while its logits are there, and the backward pass only
    scales it; hence one backward pass per forward pass, and none through the gradient. Any other head (adapters, hooks,
    the identity over logits that a model reworks) is computed twice, the second time on the way back.

    Under autocast the head's products are made in its type, of hidden states and weights that are cast once; `loss_of` gets
    such logits and is itself not under autocast, so that what it reduces in fp32 stays so (trap O10). The gradient on fp32
    weights is added up in fp32.

    Args:
        hidden: [R, D], last hidden states.
        head: output layer; its weights get their gradient where they are trained.
        loss_of: must be a sum over positions; whatever else it hangs on gets no gradient.
        bounds: see `slice_bounds`.
    """
    kind, dtype = hidden.device.type, _autocast_dtype(hidden)

    def alone(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        with torch.autocast(kind, enabled=False):
            return loss_of(logits, at)

    if is_plain_linear(head):
        tensors: tuple[Any, ...] = (hidden, head.weight, head.bias)  # type: ignore[attr-defined]
        if not torch.is_grad_enabled():  # the function itself can't tell
            tensors = tuple(tensor if tensor is None else tensor.detach() for tensor in tensors)
        return _LinearSlices.apply(*tensors, alone, bounds, dtype)

    def part(states: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        return alone(head(states), at)

    parts = [checkpoint(part, hidden[at], at, use_reentrant=False) for at in bounds]
    losses, stats = zip(*parts, strict=True)
    return torch.stack(losses).sum(), torch.stack(stats).detach().sum(0)


def is_plain_linear(head: Head) -> bool:
    """Whether `head(x)` is `x @ weight.T + bias` and nothing else: no adapter, no hook, no other forward."""
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )


def frozen_head(head: Head, hidden: Tensor) -> Head:
    """A head that gets no gradient, for use inside `loss_of`: it computes as `sum_over_slices` would have it compute here."""
    kind, dtype = hidden.device.type, _autocast_dtype(hidden)
    if not torch.is_autocast_enabled(kind):
        return head
    if not is_plain_linear(head):
        return torch.autocast(kind, dtype)(head)
    weight: Tensor = head.weight.detach().to(dtype)  # type: ignore[attr-defined]
    bias: Tensor | None = None if head.bias is None else head.bias.detach().to(dtype)  # type: ignore[attr-defined]
    return lambda states: nn.functional.linear(states.to(dtype), weight, bias)


class _LinearSlices(torch.autograd.Function):
    """Loss and gradients of a linear head over slices, all in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss_of: LossOf,
        bounds: Sequence[slice],
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        like = [tensor if want else None for tensor, want in zip((hidden, weight, bias), wanted, strict=True)]
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        d_hidden = None if like[0] is None else torch.zeros_like(hidden)
        d_weight, d_bias = (None if t is None else torch.zeros_like(t, dtype=_at_least_fp32(t)) for t in like[1:])
        room = hidden.new_empty(max(at.stop - at.start for at in bounds), len(weight))  # new memory costs time
        losses, stats = [], []
        for at in bounds:
            logits = _linear(hidden[at], weight, bias, room[: at.stop - at.start])
            with torch.set_grad_enabled(any(wanted)):
                loss, stat = loss_of(logits.requires_grad_(any(wanted)), at)
            losses.append(loss.detach())
            stats.append(stat.detach())
            if not loss.requires_grad:
                continue
            (d_logits,) = torch.autograd.grad(loss, logits)
            del loss, logits  # the graph of this slice, before the gradients' own temporaries
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[at])
            if d_weight is not None:
                _add_product(d_weight, d_logits, hidden[at])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in like)
        total, statistics = torch.stack(losses).sum(), torch.stack(stats).sum(0)
        ctx.mark_non_differentiable(statistics)
        return total, statistics

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the sliced loss goes backward once: its gradients were given away")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(upstream[0]).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """`total += d_logits.T @ hidden`: [V, D]. `total` may be wider than the factors, whose rounding does not add up in it."""
    if total.dtype == d_logits.dtype:
        total.addmm_(d_logits.T, hidden)
    else:
        total += d_logits.T @ hidden


def _autocast_dtype(like: Tensor) -> torch.dtype:
    """What a matrix product of this tensor is made in."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else like.dtype


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
