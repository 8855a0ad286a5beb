"""The pass over slices against its dense twin: values, gradients, what it stores, and heads of every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omniopd.losses import forward_kl, frozen_head, reverse_kl, slice_bounds, slice_size, sum_over_slices, token_logp
from omniopd.losses.chunked import is_plain_linear

R, D, V = 7, 6, 11


class Setting:
    """Seven positions, one term each of likelihood, anchor and divergence; a teacher of a wider body and vocabulary."""

    def __init__(self, dtype: torch.dtype = torch.float64, bias: bool = True) -> None:
        torch.manual_seed(0)
        self.head = nn.Linear(D, V, bias=bias, dtype=dtype)
        self.hidden = torch.randn(R, D, dtype=dtype)
        self.ids = torch.randint(V, (R,))
        self.ref_logits, self.teacher = torch.randn(R, V, dtype=dtype), nn.Linear(9, V + 3, dtype=dtype)
        self.teacher_hidden = torch.randn(R, 9, dtype=dtype)
        self.mix = torch.randn(3, R, dtype=torch.promote_types(dtype, torch.float32))

    def loss_of(self, logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher = self.teacher(self.teacher_hidden[at])
        terms = torch.stack(
            [
                -(self.mix[0, at] * token_logp(logits, self.ids[at])).sum(),
                (self.mix[1, at] * forward_kl(self.ref_logits[at], logits)).sum(),
                (self.mix[2, at] * reverse_kl(teacher, logits)).sum(),
            ]
        )
        return terms.sum(), terms.detach()

    def dense(self, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The slow twin: all logits at once, the formulas written out with probabilities."""
        logits = head(hidden)
        p, ref = logits.softmax(-1), self.ref_logits.softmax(-1)
        q = self.teacher(self.teacher_hidden)[:, :V].softmax(-1).detach()  # the wider padding is cut off first
        terms = torch.stack(
            [
                -(self.mix[0] * p[range(R), self.ids].log()).sum(),
                (self.mix[1] * (ref * (ref / p).log()).sum(-1)).sum(),
                (self.mix[2] * (p * (p / q).log()).sum(-1)).sum(),
            ]
        )
        return terms.sum(), terms.detach()


def results(made: Callable[[Tensor], tuple[Tensor, Tensor]], hidden: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Loss, statistics, and the gradients on the hidden states and the trained weights, of a loss that is scaled after."""
    leaf = hidden.clone().requires_grad_()
    loss, stats = made(leaf)
    return [loss.detach(), stats, *torch.autograd.grad(3 * loss, [leaf, *weights])]


def hooked(head: nn.Linear) -> nn.Linear:
    head.register_forward_hook(lambda module, inputs, output: output * 1)
    return head


HEADS: dict[str, Callable[[nn.Linear], Any]] = {
    "linear": lambda head: head,
    "sequence": nn.Sequential,
    "hooked": hooked,
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_o9_sliced_equals_dense_in_value_and_gradient(size: int, bias: bool, kind: str) -> None:
    """'Eight' #3: ragged last slices, a reference, and a teacher that is wider than the student."""
    setting = Setting(bias=bias)
    head = HEADS[kind](setting.head)
    assert is_plain_linear(head) == (kind == "linear")
    weights = list(setting.head.parameters())
    bounds = slice_bounds(R, size)
    truth = results(lambda hidden: setting.dense(hidden, head), setting.hidden, weights)
    sliced = results(lambda hidden: sum_over_slices(hidden, head, setting.loss_of, bounds), setting.hidden, weights)
    assert len(truth) == len(sliced) == (5 if bias else 4)
    for fast, slow in zip(sliced, truth, strict=True):
        assert fast.shape == slow.shape
        assert torch.allclose(fast, slow, atol=1e-12)


def test_an_identity_head_over_logits_that_the_model_has_reworked() -> None:
    setting = Setting()
    capped = 5 * torch.tanh(setting.head(setting.hidden).detach() / 5)
    bounds = slice_bounds(R, 3)
    truth = results(lambda logits: setting.dense(logits, nn.Identity()), capped, [])
    sliced = results(lambda logits: sum_over_slices(logits, nn.Identity(), setting.loss_of, bounds), capped, [])
    for fast, slow in zip(sliced, truth, strict=True):
        assert torch.allclose(fast, slow, atol=1e-12)


@pytest.mark.parametrize("kind", HEADS)
def test_frozen_weights_and_frozen_hidden_states(kind: str) -> None:
    """LoRA leaves the head frozen; an evaluation wants no gradient at all."""
    setting = Setting()
    truth = results(lambda hidden: setting.dense(hidden, setting.head), setting.hidden, [setting.head.weight])
    setting.head.requires_grad_(False)
    head = HEADS[kind](setting.head)
    bounds = slice_bounds(R, 3)
    frozen = results(lambda hidden: sum_over_slices(hidden, head, setting.loss_of, bounds), setting.hidden, [])
    for fast, slow in zip(frozen, truth[:3], strict=True):
        assert torch.allclose(fast, slow, atol=1e-12)
    loss, stats = sum_over_slices(setting.hidden, head, setting.loss_of, bounds)
    assert not loss.requires_grad
    assert torch.allclose(loss, truth[0]) and torch.allclose(stats, truth[1])
    setting.head.weight.requires_grad_(True)
    loss, _ = sum_over_slices(setting.hidden, head, setting.loss_of, bounds)  # only the weights learn
    loss.backward()
    assert setting.head.weight.grad is not None
    assert torch.allclose(3 * setting.head.weight.grad, truth[3], atol=1e-12)

    def unlearned(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        assert not logits.requires_grad
        return setting.loss_of(logits, at)

    with torch.no_grad():
        assert torch.equal(sum_over_slices(setting.hidden, head, unlearned, bounds)[0], loss.detach())


def test_tied_weights_get_the_gradient_of_both_uses() -> None:
    setting = Setting(bias=False)
    words = nn.Embedding(V, D, dtype=torch.float64)
    words.weight = setting.head.weight
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    gradients = []
    for made in (setting.dense, lambda h, head: sum_over_slices(h, head, setting.loss_of, slice_bounds(R, 2))):
        (gradient,) = torch.autograd.grad(made(words(ids), setting.head)[0], setting.head.weight)
        gradients.append(gradient)
    assert torch.allclose(*gradients, atol=1e-12)


def test_bf16_weights_get_the_gradient_of_wide_ones_but_for_one_rounding() -> None:
    """Slices add up in fp32: with bf16 sums the error would grow with the number of slices."""
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=False, dtype=torch.bfloat16)
    hidden, ids = torch.randn(512, D, dtype=torch.bfloat16), torch.randint(V, (512,))

    def loss_of(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        return -token_logp(logits, ids[at]).sum(), torch.zeros(1)

    exact = hidden.double(), head.weight.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(-token_logp(exact[0] @ exact[1].T, ids).sum(), exact[1])
    for size in (1, 100, 512):
        loss, _ = sum_over_slices(hidden, head, loss_of, slice_bounds(512, size))
        (gradient,) = torch.autograd.grad(loss, head.weight)
        assert gradient.dtype == torch.bfloat16
        assert (gradient - truth).norm() < 0.01 * truth.norm()


@pytest.mark.parametrize("size", [1, 100, 512])
def test_o10_under_autocast_a_head_is_cast_once_and_its_gradient_added_up_in_fp32(size: int) -> None:
    """As near to fp64 as products in bf16 can be, on the same path as without; nothing else is under autocast."""
    torch.manual_seed(0)
    head, ids = nn.Linear(D, V), torch.randint(V, (512,))
    hidden = torch.randn(512, D, requires_grad=True)
    seen: list[torch.dtype] = []

    def loss_of(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        seen.append(logits.dtype)
        assert not torch.is_autocast_enabled("cpu")
        return -token_logp(logits, ids[at]).sum(), torch.zeros(1)

    weights = [hidden, head.weight, head.bias]
    exact = [tensor.detach().double().requires_grad_() for tensor in weights]
    truth = torch.autograd.grad(-token_logp(exact[0] @ exact[1].T + exact[2], ids).sum(), exact)
    for wrapped in (head, nn.Sequential(head)):
        seen.clear()
        with torch.autocast("cpu", torch.bfloat16):
            assert is_plain_linear(head)
            loss, _ = sum_over_slices(hidden, wrapped, loss_of, slice_bounds(512, size))
        gradients = torch.autograd.grad(loss, weights)
        assert (loss.dtype, set(seen)) == (torch.float32, {torch.bfloat16})
        assert len(seen) == len(slice_bounds(512, size)) * (1 if wrapped is head else 2)
        for found, true in zip(gradients, truth, strict=True):
            assert found.dtype == torch.float32
            assert (found - true).norm() < (0.01 if wrapped is head else 0.05) * true.norm()


@pytest.mark.parametrize("kind", HEADS)
def test_a_frozen_head_makes_the_logits_that_the_slices_get(kind: str) -> None:
    setting = Setting(torch.float32)
    head = HEADS[kind](setting.head)
    assert frozen_head(head, setting.hidden) is head
    got: list[Tensor] = []

    def loss_of(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        got.append(logits.detach().clone())
        return logits.float().sum(), torch.zeros(1)

    with torch.autocast("cpu", torch.bfloat16):
        sum_over_slices(setting.hidden, head, loss_of, slice_bounds(R, R))
        frozen = frozen_head(head, setting.hidden)
    assert torch.equal(frozen(setting.hidden), got[0]) and got[0].dtype == torch.bfloat16


def test_no_positions_are_a_zero_with_zero_gradients() -> None:
    setting = Setting()
    for head in (setting.head, nn.Sequential(setting.head)):
        hidden = setting.hidden[:0].clone().requires_grad_()
        loss, stats = sum_over_slices(hidden, head, setting.loss_of, slice_bounds(0, 3))
        assert (loss.item(), stats.tolist()) == (0, [0, 0, 0])
        loss.backward()
        assert hidden.grad is not None and hidden.grad.shape == (0, D)
        assert setting.head.weight.grad is not None and not setting.head.weight.grad.any()


def test_slices_that_say_nothing_leave_the_others_alone() -> None:
    """A slice under no term has a loss without a gradient."""
    setting = Setting()

    def loss_of(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        if at.start < 3:
            return torch.zeros((), dtype=torch.float64), torch.zeros(3)
        return setting.loss_of(logits, at)

    for head in (setting.head, nn.Sequential(setting.head)):
        hidden = setting.hidden.clone().requires_grad_()
        sum_over_slices(hidden, head, loss_of, slice_bounds(R, 3))[0].backward()
        assert hidden.grad is not None
        assert hidden.grad.abs().sum(-1).bool().tolist() == [False] * 3 + [True] * 4


def test_it_goes_backward_once() -> None:
    setting = Setting()
    loss, _ = sum_over_slices(setting.hidden.requires_grad_(), setting.head, setting.loss_of, slice_bounds(R, 3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward once"):
        loss.backward()


@pytest.mark.parametrize("wrap", [lambda head: head, nn.Sequential])
def test_no_logits_of_all_positions_are_stored(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """No tensor that is made is larger than a slice of logits or the weights, and none of a slice outlives it."""
    linear, hidden, ids = nn.Linear(8, 1000), torch.randn(64, 8, requires_grad=True), torch.zeros(64, dtype=torch.long)
    saved: list[int] = []
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    def loss_of(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        sizes.append(logits.numel())
        return -token_logp(logits, ids[at]).sum(), torch.zeros(1)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = sum_over_slices(hidden, wrap(linear), loss_of, slice_bounds(64, 4))
        between = list(saved) if wrap is nn.Sequential else []
        loss.backward()
    assert max(sizes) == 4 * 1000
    assert max(between, default=0) <= 64 * 8
    assert max(saved) <= 8 * 1000
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logp(linear(hidden), ids)
    assert max(saved) >= 64 * 1000  # the dense way does store them


def test_a_linear_head_is_computed_once_and_any_other_twice() -> None:
    setting = Setting()
    calls: list[int] = []

    def loss_of(logits: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        calls.append(at.start)
        return setting.loss_of(logits, at)

    for head, times in ((setting.head, 1), (nn.Sequential(setting.head), 2)):
        calls.clear()
        sum_over_slices(setting.hidden.requires_grad_(), head, loss_of, slice_bounds(R, 3))[0].backward()
        assert sorted(calls) == sorted([0, 3, 6] * times)


def test_slices_tile_the_positions_and_cut_no_block() -> None:
    assert slice_bounds(0, 4) == [slice(0, 0)]
    assert slice_bounds(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert slice_bounds(9, 3, [(2, 4), (4, 5), (5, 9)]) == [slice(0, 2), slice(2, 5), slice(5, 9)]
    assert slice_bounds(8, 2, [(1, 7)]) == [slice(0, 1), slice(1, 7), slice(7, 8)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows, size = (int(torch.randint(1, 30, (), generator=generator)) for _ in range(2))
        edges = sorted({int(e) for e in torch.randint(0, rows + 1, (6,), generator=generator)})
        blocks = list(zip(edges[::2], edges[1::2], strict=False))
        bounds = slice_bounds(rows, size, blocks)
        assert [at.start for at in bounds[1:]] == [at.stop for at in bounds[:-1]]
        assert (bounds[0].start, bounds[-1].stop) == (0, rows)
        cuts = {at.start for at in bounds}
        assert not any(start < cut < end for start, end in blocks for cut in cuts)
        longest = max([size, *(end - start for start, end in blocks)])
        assert all(0 < at.stop - at.start <= longest for at in bounds)


def test_a_slice_is_as_long_as_its_bytes_allow() -> None:
    assert slice_size(32_000) == 1048
    assert slice_size(151_936) == 220
    assert slice_size(10**9) == 1
