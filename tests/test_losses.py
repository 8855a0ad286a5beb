"""Losses against golden numbers, finite differences and dense twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from omniopd.losses import chunked_logp_and_kl, entropy, forward_kl, reduction_scales, token_logp, token_nll
from omniopd.objective import Reduction

STUDENT = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0], dtype=torch.float64)
TEACHER = torch.tensor([0.5, 2.0, 0.0, 1.0, -0.5], dtype=torch.float64)


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a scalar function, coordinate by coordinate."""
    flat = []
    for i in range(at.numel()):
        shift = torch.zeros_like(at).flatten()
        shift[i] = step
        shift = shift.view_as(at)
        flat.append((function(at + shift) - function(at - shift)) / (2 * step))
    return torch.stack(flat).view_as(at)


def test_anchor_golden_value_and_gradient() -> None:
    student = STUDENT.clone().requires_grad_()
    kl = forward_kl(TEACHER, student)
    (gradient,) = torch.autograd.grad(kl, student)
    assert kl.item() == pytest.approx(0.5385717422, abs=5e-11)
    golden = [0.4396378691, -0.3458419318, 0.0507912253, -0.1272281366, -0.0173590259]
    assert gradient.tolist() == pytest.approx(golden, abs=5e-11)


def test_l7_the_anchor_is_kl_of_reference_to_student() -> None:
    """With student samples E[r log r], r = ref / student, estimates it; the common k3 form estimates the other one."""
    p, q = STUDENT.softmax(0), TEACHER.softmax(0)
    r = q / p
    exact = forward_kl(TEACHER, STUDENT).item()
    assert (p * r * r.log()).sum().item() == pytest.approx(exact, abs=1e-12)
    k3 = (p * (r - 1 - r.log())).sum().item()
    assert k3 == pytest.approx(0.6280302556, abs=5e-11)  # KL(student || reference)
    assert abs(k3 - exact) > 0.05
    draws = torch.multinomial(p, 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimates = (r * r.log())[draws]
    assert abs(estimates.mean().item() - exact) < 4 * estimates.std().item() / math.sqrt(len(draws))


def test_l7_no_value_and_no_gradient_at_the_reference() -> None:
    logits = STUDENT.clone().requires_grad_()
    kl = forward_kl(STUDENT, logits)
    (gradient,) = torch.autograd.grad(kl, logits)
    assert kl.item() == 0.0
    assert gradient.abs().max().item() < 1e-15


def test_the_reference_gets_no_gradient() -> None:
    ref, student = TEACHER.clone().requires_grad_(), STUDENT.clone().requires_grad_()
    forward_kl(ref, student).backward()
    assert ref.grad is None
    assert student.grad is not None


def test_o10_identical_bf16_logits_over_a_large_vocabulary_have_no_floor() -> None:
    logits = (4 * torch.randn(4, 248_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    student = logits.clone().requires_grad_()
    kl = forward_kl(logits, student)
    assert kl.dtype == torch.float32
    assert kl.abs().max().item() < 1e-5
    (gradient,) = torch.autograd.grad(kl.sum(), student)
    assert gradient.abs().max().item() < 1e-6
    p = logits.log_softmax(-1)  # the same in bf16, to know that the test could fail
    naive = -(p.exp() * p).sum(-1).float()
    assert (naive - entropy(logits)).abs().max().item() > 1e-2


def test_o11_padded_vocabulary_stays_finite() -> None:
    pad = torch.full((3,), -torch.inf, dtype=torch.float64)
    student = torch.cat([STUDENT, torch.zeros(3, dtype=torch.float64)]).requires_grad_()
    kl = forward_kl(torch.cat([TEACHER, pad]), student)
    kl.backward()
    assert kl.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    both = torch.cat([STUDENT, pad]).requires_grad_()
    kl = forward_kl(torch.cat([TEACHER, pad]), both)
    (gradient,) = torch.autograd.grad(kl, both)
    assert kl.item() == pytest.approx(0.5385717422, abs=5e-11)
    assert gradient[:5].isfinite().all()
    assert gradient[5:].tolist() == [0.0] * 3
    assert entropy(both.detach()).item() == pytest.approx(entropy(STUDENT).item(), abs=1e-12)


def test_entropy_golden() -> None:
    assert entropy(torch.zeros(8)).item() == pytest.approx(math.log(8), abs=1e-6)
    p = STUDENT.softmax(0)
    assert entropy(STUDENT).item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-12)


def test_l5_no_gradient_leaks_through_the_weight() -> None:
    """Autograd equals finite differences with the weight frozen, and not those where it moves with the policy."""
    targets = torch.tensor([0, 2, 1])

    def logp(theta: Tensor) -> Tensor:
        return token_logp(theta * torch.tensor([[1.0], [0.7], [-0.4]], dtype=torch.float64), targets)

    def weight(theta: Tensor) -> Tensor:
        return (3.2 + logp(theta).mean().exp()).expand(3) / 11

    theta = STUDENT.clone().requires_grad_()
    token_nll(logp(theta), weight(theta)).backward()
    frozen = weight(STUDENT)
    expected = finite_differences(lambda at: -(frozen * logp(at)).sum(), STUDENT)
    leaking = finite_differences(lambda at: -(weight(at) * logp(at)).sum(), STUDENT)
    assert theta.grad is not None
    assert torch.allclose(theta.grad, expected, atol=1e-8)
    assert not torch.allclose(theta.grad, leaking, atol=1e-3)


LOGP = [(-0.2, -0.6), (-1.0, -0.4)]
KL = (0.05, 0.01, 0.02, 0.12)


@pytest.mark.parametrize(("mode", "golden"), [("sum_seqmean", 0.84), ("term_mean", 0.21), ("token_mean", 0.105)])
def test_reductions_golden(mode: Reduction, golden: float) -> None:
    value = sum(token_nll(torch.tensor(c), torch.full((2,), w)).item() for c, w in zip(LOGP, (0.5, 0.3), strict=True))
    a, b = reduction_scales(mode, audited=4, unaudited=4, sequences=1)
    assert a * value + 0.1 * b * sum(KL) == pytest.approx(golden)


def test_reductions_of_nothing_are_zero_and_of_overlapping_terms_told() -> None:
    assert reduction_scales("term_mean", 0, 4, 1) == (0.0, 0.25)
    assert reduction_scales("term_mean", 4, 0, 1) == (0.25, 0.0)
    assert reduction_scales("token_mean", 0, 0, 0) == (0.0, 0.0)
    assert reduction_scales("token_mean", 2, 8, 1, response_tokens=8) == (0.125, 0.125)


def test_l8_beta_means_what_the_mode_says_whatever_the_lengths() -> None:
    """Two responses of unequal length: term_mean weighs a mean against a mean, sums weigh the audited share in."""
    for audited, unaudited in ((500, 3500), (500, 500)):
        value_scale, kl_scale = reduction_scales("term_mean", audited, unaudited, 1)
        assert (kl_scale * unaudited) / (value_scale * audited) == pytest.approx(1.0)
        value_scale, kl_scale = reduction_scales("sum_seqmean", audited, unaudited, 1)
        assert (kl_scale * unaudited) / (value_scale * audited) == pytest.approx(unaudited / audited)


@pytest.mark.parametrize("mode", ["sum_seqmean", "term_mean", "token_mean"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_o12_split_into_micro_batches(mode: Reduction, parts: int) -> None:
    """Four ragged sequences as 1, 2 and 4 micro-batches: the loss and gradient of one batch."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 9, 1, 6]
    edges = [sum(lengths[:i]) for i in range(5)]
    total = sum(lengths)
    inputs = torch.randn(total, 5, generator=generator, dtype=torch.float64)
    ref = torch.randn(total, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (total,), generator=generator)
    weights = torch.rand(total, generator=generator, dtype=torch.float64)
    audited = torch.rand(total, generator=generator) < 0.4
    a, b = reduction_scales(mode, int(audited.sum()), int((~audited).sum()), 4)
    theta = STUDENT.clone().requires_grad_()

    def micro(rows: slice) -> Tensor:
        logits = inputs[rows] * theta
        value = token_nll(token_logp(logits, targets[rows]), weights[rows] * audited[rows])
        return a * value + 0.1 * b * (forward_kl(ref[rows], logits) * ~audited[rows]).sum()

    whole = micro(slice(0, total))
    (expected,) = torch.autograd.grad(whole, theta)
    loss = 0.0
    for start, end in pairwise(edges[:: 4 // parts]):
        part = micro(slice(start, end))
        part.backward()
        loss += part.item()
    assert loss == pytest.approx(whole.item(), abs=1e-12)
    assert theta.grad is not None
    assert torch.allclose(theta.grad, expected, atol=1e-12)


def dense(
    hidden: Tensor, head: nn.Module, targets: Tensor, ref_hidden: Tensor, ref_head: nn.Module
) -> tuple[Tensor, Tensor]:
    """The slow twin: all logits at once, the formulas written out."""
    logp = torch.log(torch.softmax(head(hidden), -1))
    ref = torch.softmax(ref_head(ref_hidden), -1).detach()
    return logp[range(len(targets)), targets], (ref * (ref.log() - logp)).sum(-1)


@pytest.mark.parametrize("slice_size", [1, 2, 3, 5, 7, 64])
def test_o9_sliced_equals_dense_in_value_and_gradient(slice_size: int) -> None:
    """Seven positions, ragged last slices, a reference that is wider than the student."""
    torch.manual_seed(0)
    head, ref_head = nn.Linear(6, 11).double(), nn.Linear(10, 11).double()
    hidden, ref_hidden = torch.randn(7, 6, dtype=torch.float64), torch.randn(7, 10, dtype=torch.float64)
    targets, mix = torch.randint(11, (7,)), torch.randn(2, 7, dtype=torch.float64)
    results = []
    for function in (dense, partial(chunked_logp_and_kl, slice_size=slice_size)):
        leaf = hidden.clone().requires_grad_()
        logp, kl = function(leaf, head, targets, ref_hidden, ref_head)
        assert kl is not None
        gradients = torch.autograd.grad((mix[0] * logp + mix[1] * kl).sum(), [leaf, *head.parameters()])
        results.append((logp, kl, *gradients))
    for slow, fast in zip(*results, strict=True):
        assert fast.shape == slow.shape
        assert torch.allclose(fast, slow, atol=1e-12)


def test_sliced_without_a_reference_and_without_rows() -> None:
    head, hidden = nn.Linear(6, 11), torch.randn(5, 6, requires_grad=True)
    targets = torch.arange(5)
    logp, kl = chunked_logp_and_kl(hidden, head, targets, slice_size=2)
    assert kl is None
    assert torch.allclose(logp, token_logp(head(hidden), targets))
    logp, kl = chunked_logp_and_kl(hidden[:0], head, targets[:0], torch.zeros(0, 3), nn.Linear(3, 11))
    assert logp.shape == (0,)
    assert kl is not None
    assert kl.shape == (0,)
    (logp.sum() + kl.sum()).backward()


def test_no_logits_of_all_positions_are_stored() -> None:
    """Between the passes nothing as large as [R, V] is saved, and no single result is larger than a slice."""
    head, hidden = nn.Linear(8, 1000), torch.randn(64, 8, requires_grad=True)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logp, kl = chunked_logp_and_kl(hidden, head, torch.zeros(64, dtype=torch.long), hidden.detach(), head, 4)
    assert kl is not None
    assert max(saved, default=0) < 64 * 8 + 1
    (logp.sum() + kl.sum()).backward()
    assert hidden.grad is not None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logp(head(hidden), torch.zeros(64, dtype=torch.long))
    assert max(saved) >= 64 * 1000  # the dense way does store them


def test_r11_lengths_that_differ_raise() -> None:
    head, hidden = nn.Linear(6, 11), torch.randn(5, 6)
    with pytest.raises(ValueError, match="one row per position"):
        chunked_logp_and_kl(hidden, head, torch.arange(3))
    with pytest.raises(ValueError, match="one row per position"):
        chunked_logp_and_kl(hidden, head, torch.arange(5), hidden[:4], head)
    with pytest.raises(ValueError, match="together"):
        chunked_logp_and_kl(hidden, head, torch.arange(5), hidden)
