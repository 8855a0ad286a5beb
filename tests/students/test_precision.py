"""Mixed precision: bfloat16 products, fp32 weights; the same update but for rounding, and a sampler that agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from omniopd.errors import ConfigError
from omniopd.losses.chunked import is_plain_linear
from omniopd.objective import Anchor, Objective
from omniopd.targets.full import FullTarget
from omniopd.types import Branch, Distributions, Rollout, Signal
from students.policy import Policy
from students.scoring import score
from students.trainer import OptimizerSettings, Trainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that products in bfloat16 are not all rounding."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 32}
    return tiny.saved(tmp_path_factory.mktemp("wide"), tiny.byte_level(), initializer_range=0.08, **shape)


def trainer_of(student: Policy, **settings: Any) -> Trainer:
    return Trainer(student, OptimizerSettings(**settings), Objective(anchor=Anchor(beta=0.5)))


def rollouts_of(student: Policy) -> list[Rollout]:
    generator = torch.Generator().manual_seed(1)
    return [tiny.rollout(student, torch.randint(2, 300, (n,), generator=generator).tolist()) for n in (13, 30, 9, 20)]


def signal_of(rollouts: Sequence[Rollout]) -> Signal:
    """Values, divergences, a branch, and tokens left to the anchor: all terms of the loss."""
    generator = torch.Generator().manual_seed(3)
    masks = tuple(torch.arange(len(r)) % 3 < 2 for r in rollouts)
    values = tuple(torch.randn(len(r), generator=generator) * m for r, m in zip(rollouts, masks, strict=True))
    logits = [torch.randn(len(r), 320, generator=generator) for r in rollouts]
    targets = tuple(FullTarget(Distributions(one, lambda hidden: hidden)) for one in logits)
    return Signal(values, masks, targets, (Branch(0, 3, (20, 21, 22), 1.0),))


def moved(student: Policy) -> Policy:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return student


def gradient(student: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize(
    "how",
    [{}, {"gradient_checkpointing": True}, {"lora": {"rank": 4, "target_modules": ["q_proj", "lm_head"]}}],
    ids=["all weights", "checkpointing", "adapters on the head"],
)
def test_o10_loss_and_gradient_are_those_of_fp32_but_for_rounding(folder: Path, how: Any) -> None:
    """Terms within 1 % and 2e-3, gradients at cosine 0.999: products round to 8 bits, nothing that is summed up does."""
    found = []
    for mixed in (False, True):
        torch.manual_seed(0)  # adapters' initial weights
        student = moved(tiny.policy(folder, mixed_precision=mixed, **how))
        rollouts = rollouts_of(student)
        found.append((trainer_of(student).accumulate(rollouts, signal_of(rollouts)), gradient(student)))
        assert found[-1][1].dtype == torch.float32
    (plain, expected), (mixed_terms, ours) = found
    for name in ("value_loss", "divergence_loss", "anchor_loss", "branch_loss"):
        assert mixed_terms[name] != plain[name]  # it was computed in another type
        assert mixed_terms[name] == pytest.approx(plain[name], rel=0.01, abs=2e-3)
    assert 0.999 < cosine(ours, expected) < 1 - 1e-9


def test_weights_gradients_and_optimizer_stay_fp32_and_small_updates_are_kept(folder: Path) -> None:
    student = tiny.policy(folder, mixed_precision=True)
    rollouts = rollouts_of(student)
    before = [p.detach().clone() for p in student.model.parameters()]
    trainer = trainer_of(student, learning_rate=1e-7)
    trainer.update(rollouts, signal_of(rollouts))
    for parameter, old in zip(student.model.parameters(), before, strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert not torch.equal(parameter, old)  # bfloat16 would have lost all of it
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    assert states and {value.dtype for value in states} == {torch.float32}


def test_o10_an_anchor_on_equal_weights_is_zero(folder: Path) -> None:
    """Both sides' logits are made in the same type from equal states: not even rounding differs."""
    student = tiny.policy(folder, mixed_precision=True)
    rollouts = rollouts_of(student)
    terms = trainer_of(student).accumulate(rollouts, signal_of(rollouts))
    assert 0 <= terms["kl"] < 1e-6


def test_the_head_keeps_its_fast_path(folder: Path) -> None:
    """One product per slice on the way forward: with recomputation the targets would be asked twice."""
    student = tiny.policy(folder, mixed_precision=True)
    rollouts = rollouts_of(student)
    asked: list[torch.dtype] = []

    class Asked(FullTarget):
        def divergence(self, logits: Tensor, ids: Tensor, start: int) -> Tensor:
            assert not torch.is_autocast_enabled("cpu")
            asked.append(logits.dtype)
            return super().divergence(logits, ids, start)

    signal = signal_of(rollouts)
    targets = tuple(Asked(target.distributions) for target in signal.targets)
    trainer_of(student).accumulate(rollouts, Signal(signal.values_BT, signal.mask_BT, targets))
    assert is_plain_linear(student.model.lm_head)
    assert asked == [torch.bfloat16] * len(rollouts)


def test_s1_the_sampler_computes_as_the_update_does(folder: Path) -> None:
    """A smaller gap than rollouts in fp32 would have to an update in bfloat16; what is left is the rounding of logits."""
    gaps = {}
    for mixed in (False, True):
        writer, learner = tiny.policy(folder, mixed_precision=mixed, max_new_tokens=40), tiny.policy(folder)
        learner.settings = learner.settings.model_copy(update={"mixed_precision": True})
        rollouts = tiny.sampler(writer).sample([tiny.prompt(f"What is {n} + 7?") for n in range(12)], 1)
        again = score(learner, [(r.prompt_ids, r.ids) for r in rollouts])
        apart = [
            abs(then - now)
            for r, (logp, _) in zip(rollouts, again, strict=True)
            for then, now in zip(r.logprobs, logp, strict=True)
        ]
        assert len(apart) > 200
        gaps[mixed] = sum(apart) / len(apart)
    assert 1e-4 < gaps[True] < 0.75 * gaps[False]
    assert gaps[True] < 0.02


def test_fp32_is_the_default_and_computes_no_bit_in_another_type(folder: Path) -> None:
    student = tiny.policy(folder)
    with student.computing():
        assert not torch.is_autocast_enabled("cpu")
    assert (student.settings.compute_dtype, tiny.policy(folder, mixed_precision=True).settings.compute_dtype) == (
        "float32",
        "bfloat16",
    )
    (caution,) = tiny.policy(folder, dtype="bfloat16").cautions()
    assert "student.mixed_precision=true" in caution


def test_a_launchers_own_mixed_precision_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("students.trainer.Accelerator.mixed_precision", "bf16")
    with pytest.raises(
        ConfigError, match=r"student\.mixed_precision: the launcher's is bf16, .* student\.mixed_precision=true"
    ):
        trainer_of(tiny.policy(folder))
