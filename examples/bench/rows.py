"""The losses that are compared, each a function of the same inputs, and nothing about how they are measured.

Every row gives a mean over the tokens. A `foreign` row is somebody else's code, which may be absent or unable to run here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omniopd.losses.chunked import LossOf, slice_bounds, slice_size, sum_over_slices
from omniopd.losses.divergence import forward_kl
from omniopd.losses.likelihood import token_logp
from omniopd.targets.full import FullTarget
from omniopd.types import Distributions


@dataclass(frozen=True)
class Shape:
    """Tokens N, width of the hidden states D (student's, teacher's and reference's alike), vocabulary V."""

    tokens: int
    hidden: int
    vocab: int

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens x {self.hidden:,} x {self.vocab:,}"


@dataclass(frozen=True)
class Inputs:
    """What all rows are given. Only `hidden` and the weight of `head` have gradients."""

    hidden: Tensor  # [N, D]
    head: nn.Linear  # D -> V
    teacher_hidden: Tensor  # [N, D]
    teacher_head: nn.Linear
    reference_hidden: Tensor  # [N, D], of the frozen student that the anchor holds to
    reference_head: nn.Linear  # its head is the teacher's tensor: one fewer [V, D] to hold
    ids: Tensor  # [N], the student's own tokens
    values: Tensor  # [N], advantages on them


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Row:
    """A loss and, in tensors [N, V] of fp32, about what it needs at its peak (0: does not grow that way)."""

    loss: Loss
    fulls: int = 0
    foreign: bool = False


def make_inputs(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Random inputs whose logits have a standard deviation of about 2, made without temporaries."""
    torch.manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype).mul_(scale)

    def head(trained: bool) -> nn.Linear:
        layer = nn.utils.skip_init(nn.Linear, shape.hidden, shape.vocab, bias=False, device=device, dtype=dtype)
        layer.weight = nn.Parameter(normal(shape.vocab, shape.hidden, scale=2 / shape.hidden**0.5), trained)
        return layer

    student, teacher = head(True), head(False)
    return Inputs(
        hidden=normal(shape.tokens, shape.hidden).requires_grad_(),
        head=student,
        teacher_hidden=normal(shape.tokens, shape.hidden),
        teacher_head=teacher,
        reference_hidden=normal(shape.tokens, shape.hidden),
        reference_head=teacher,
        ids=torch.randint(shape.vocab, (shape.tokens,), device=device),
        values=torch.randn(shape.tokens, device=device),
    )


# Reverse KL, mean over the tokens of KL(student || teacher)


def dense(inputs: Inputs) -> Tensor:
    """The reference form: both models' logits in full."""
    logp = inputs.head(inputs.hidden).float().log_softmax(-1)
    with torch.no_grad():
        teacher_logp = inputs.teacher_head(inputs.teacher_hidden).float().log_softmax(-1)
    return (logp.exp() * (logp - teacher_logp)).sum(-1).mean()


def omniopd(inputs: Inputs) -> Tensor:
    """Ours: the teacher's hidden states and head as a target, slices of both models' logits."""
    target = FullTarget(Distributions(inputs.teacher_hidden, inputs.teacher_head), "reverse")
    tokens = len(inputs.hidden)

    def loss_of(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        divergence = target.divergence(logits, inputs.ids[at], at.start)
        return divergence.sum() / tokens, divergence.new_zeros(0)

    return _over_slices(inputs, loss_of)


def trl(inputs: Inputs) -> Tensor:
    """What TRL's `DistillationTrainer` calls with `beta=1`."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        inputs.hidden, inputs.head.weight, None, inputs.teacher_hidden, inputs.teacher_head.weight, None, 1.0
    )
    return divergence.mean()


def liger_torch(inputs: Inputs) -> Tensor:
    """Liger's fused linear JSD written in torch, compiled on CUDA only: on a CPU the compiler's memory would count."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=inputs.hidden.is_cuda)
    teacher = inputs.teacher_hidden, inputs.teacher_head.weight
    return loss(inputs.hidden, inputs.head.weight, *teacher, inputs.ids)


def liger_triton(inputs: Inputs) -> Tensor:
    """Liger's fused linear JSD over its Triton kernel."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    teacher = inputs.teacher_hidden, inputs.teacher_head.weight
    return LigerFusedLinearJSD(jsd_beta=1.0)(inputs.hidden, inputs.head.weight, *teacher, None)


# -mean(v log p(y)) + 0.1 mean(KL(reference || student)) + mean(KL(student || teacher))

ANCHOR = 0.1


def dense_terms(inputs: Inputs) -> Tensor:
    """The reference form of all three terms: three models' logits in full."""
    logp = inputs.head(inputs.hidden).float().log_softmax(-1)
    with torch.no_grad():
        teacher_logp = inputs.teacher_head(inputs.teacher_hidden).float().log_softmax(-1)
        reference_logp = inputs.reference_head(inputs.reference_hidden).float().log_softmax(-1)
    value = -inputs.values * logp.gather(-1, inputs.ids.unsqueeze(-1)).squeeze(-1)
    anchor = (reference_logp.exp() * (reference_logp - logp)).sum(-1)
    divergence = (logp.exp() * (logp - teacher_logp)).sum(-1)
    return (value + ANCHOR * anchor + divergence).mean()


def omniopd_terms(inputs: Inputs) -> Tensor:
    """Ours: all three terms from one slice of the student's logits."""
    target = FullTarget(Distributions(inputs.teacher_hidden, inputs.teacher_head), "reverse")
    tokens = len(inputs.hidden)

    def loss_of(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            reference_logits = inputs.reference_head(inputs.reference_hidden[at])
        value = -inputs.values[at] * token_logp(logits, inputs.ids[at])
        anchor = forward_kl(reference_logits, logits)
        divergence = target.divergence(logits, inputs.ids[at], at.start)
        return (value + ANCHOR * anchor + divergence).sum() / tokens, divergence.new_zeros(0)

    return _over_slices(inputs, loss_of)


def _over_slices(inputs: Inputs, loss_of: LossOf) -> Tensor:
    bounds = slice_bounds(len(inputs.hidden), slice_size(inputs.head.out_features))
    return sum_over_slices(inputs.hidden, inputs.head, loss_of, bounds)[0]


CASES: dict[str, dict[str, Row]] = {
    "reverse KL": {
        "dense": Row(dense, fulls=6),
        "omniopd": Row(omniopd),
        "TRL": Row(trl, foreign=True),
        "Liger, torch": Row(liger_torch, foreign=True),
        "Liger, Triton": Row(liger_triton, foreign=True),
    },
    "several terms": {
        "dense": Row(dense_terms, fulls=8),
        "omniopd": Row(omniopd_terms),
    },
}
