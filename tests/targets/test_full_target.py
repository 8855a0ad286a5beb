"""The teacher's whole distributions as a target, slice by slice."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toy import value_and_gradient

from omniopd.losses import Divergence, forward_kl, generalised_jsd, reverse_kl
from omniopd.targets.full import FullTarget
from omniopd.types import Distributions

R, V = 7, 11


def teacher(width: int = V) -> tuple[Distributions, Tensor]:
    """Seven places, and their logits: hidden states of another width than any student's."""
    torch.manual_seed(0)
    head = torch.nn.Linear(9, width, dtype=torch.float64)
    hidden = 2 * torch.randn(R, 9, dtype=torch.float64)
    return Distributions(hidden, head), head(hidden).detach()


def student() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(R, V, dtype=torch.float64), torch.randint(V, (R,))


@pytest.mark.parametrize("width", [V, V + 4, V - 2])
@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd"])
def test_o9_r12_the_pieces_are_the_whole(kind: Divergence, width: int) -> None:
    """Cut at any place, against a teacher of a wider or a narrower output layer: the dense divergence of those positions."""
    distributions, dense = teacher(width)
    logits, ids = student()
    target = FullTarget(distributions, kind, beta=0.3)
    truth = {
        "reverse": reverse_kl(dense, logits),
        "forward": forward_kl(dense, logits),
        "jsd": generalised_jsd(dense, logits, 0.3),
    }[kind]
    for cut in range(R + 1):
        parts = [target.divergence(logits[:cut], ids[:cut], 0), target.divergence(logits[cut:], ids[cut:], cut)]
        assert torch.allclose(torch.cat(parts), truth, atol=1e-14)
    assert target.blocks == ()


def test_r1_every_row_of_the_teacher_lands_on_its_own_position() -> None:
    """A canary: the teacher of position t is certain of token t."""
    certain = Distributions(100 * torch.eye(R, V), lambda hidden: hidden)
    logits, ids = torch.zeros(R, V), torch.zeros(R, dtype=torch.long)
    _, gradient = value_and_gradient(lambda at: FullTarget(certain, "forward").divergence(at[2:5], ids[2:5], 2), logits)
    assert gradient.argmin(-1)[2:5].tolist() == [2, 3, 4]
    assert not gradient[[0, 1, 5, 6]].any()


def test_o11_a_row_that_is_no_distribution_adds_nothing() -> None:
    """All -inf, or nan: a finite number without gradient there, and the others as if it were not."""
    distributions, dense = teacher()
    broken = dense.clone()
    broken[2], broken[4], broken[5, 3:6] = -torch.inf, torch.nan, -torch.inf
    logits, ids = student()
    for kind in ("reverse", "forward", "jsd"):
        target = FullTarget(Distributions(broken, lambda hidden: hidden), kind)
        value, gradient = value_and_gradient(lambda at, target=target: target.divergence(at, ids, 0), logits)
        assert value.isfinite().all() and gradient.isfinite().all()
        assert value[[2, 4]].tolist() == [0, 0] and not gradient[[2, 4]].any()
        truth = FullTarget(distributions, kind).divergence(logits, ids, 0)
        assert torch.equal(value[[0, 1, 3, 6]], truth[[0, 1, 3, 6]])
        assert value[5].item() > 0


def test_r11_too_few_rows_raise() -> None:
    distributions, _ = teacher()
    logits, ids = student()
    with pytest.raises(ValueError, match="gave 7 distributions, position 8 is asked for"):
        FullTarget(distributions).divergence(logits, ids, 2)
