"""Rollouts of older weights: their values count by truncated importance ratios, however the step is cut (trap S2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from omniopd.objective import Anchor, Objective
from omniopd.targets.full import FullTarget
from omniopd.types import Branch, Distributions, Rollout, Signal
from students.policy import Policy
from students.stale import Stale, ratio_figures
from students.trainer import OptimizerSettings, Trainer

MOST = 1.25
UPDATES = 7


def trainer_of(student: Policy, updates: int = UPDATES) -> Trainer:
    trainer = Trainer(student, OptimizerSettings(max_ratio=MOST), Objective(anchor=Anchor(beta=0.3)))
    trainer.updates = updates
    return trainer


def written(student: Policy, versions: Sequence[int]) -> list[Rollout]:
    """Rollouts by the student as it is, then the student moves on."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(2, 300, (8 + 3 * n,), generator=generator).tolist() for n in range(len(versions))]
    rollouts = [replace(tiny.rollout(student, row), version=v) for row, v in zip(ids, versions, strict=True)]
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return rollouts


def signal_of(rollouts: Sequence[Rollout]) -> Signal:
    """Values on two of three tokens, a branch, and divergences: all terms of the loss."""
    generator = torch.Generator().manual_seed(3)
    masks = tuple(torch.arange(len(r)) % 3 < 2 for r in rollouts)
    values = tuple(torch.randn(len(r), generator=generator) * m for r, m in zip(rollouts, masks, strict=True))
    logits = [torch.randn(len(r), 320, generator=generator) for r in rollouts]
    targets = tuple(FullTarget(Distributions(one, lambda hidden: hidden)) for one in logits)
    branches = (Branch(0, 3, (20, 21, 22), 2.0), Branch(1, 0, (23, 1), 1.0))
    return Signal(values, masks, targets, branches=branches)


def ratios_by_hand(student: Policy, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """p_now / p_then, one dense pass for each rollout that lags, 1 for the others."""
    found = []
    for rollout in rollouts:
        now = tiny.dense(student.model, rollout.prompt_ids, rollout.ids)[0]
        ratio = (now - torch.tensor(rollout.logprobs)).exp()
        found.append(ratio if rollout.version < UPDATES else torch.ones_like(ratio))
    return found


def result(student: Policy, trainer: Trainer, rollouts: Sequence[Rollout], signal: Signal) -> tuple[Any, Tensor]:
    terms = trainer.accumulate(rollouts, signal)
    return terms, torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("lora", [None, {"rank": 2, "target_modules": ["q_proj", "lm_head"]}])
@pytest.mark.parametrize("cut", [{}, {"micro_batch_tokens": 50}, {"slice_tokens": 3}])
def test_s2_o12_values_of_older_weights_count_by_truncated_ratios_however_the_step_is_cut(
    llama_folder: Path, cut: dict[str, int], lora: Any
) -> None:
    """The loss and gradient of the same step without lag, whose values have been multiplied with the ratios by hand."""
    student = tiny.policy(llama_folder, lora=lora)
    rollouts = written(student, [UPDATES - 1, UPDATES, UPDATES - 3, UPDATES])
    signal = signal_of(rollouts)
    ratios = ratios_by_hand(student, rollouts)
    trainer = trainer_of(student)
    by_hand = replace(
        signal, values_BT=tuple(v * r.clamp(max=MOST) for v, r in zip(signal.values_BT, ratios, strict=True))
    )
    truth, expected = result(student, trainer, [replace(r, version=UPDATES) for r in rollouts], by_hand)
    student.settings = student.settings.model_copy(update=cut)
    terms, gradient = result(student, trainer, rollouts, signal)
    old = torch.cat([r[m] for r, m, one in zip(ratios, signal.mask_BT, rollouts, strict=True) if one.version < UPDATES])
    assert 0.1 < float((old > MOST).float().mean()) < 0.9  # some are truncated, some are not
    figures = {name: terms.pop(name) for name in ("ratio_mean", "ratio_max", "ratio_truncated")}
    assert figures == pytest.approx(
        {
            "ratio_mean": float(old.mean()),
            "ratio_max": float(old.max()),
            "ratio_truncated": float((old > MOST).float().mean()),
        },
        rel=1e-4,
    )
    assert terms == pytest.approx(truth, abs=2e-5)
    torch.testing.assert_close(gradient, expected, atol=2e-5, rtol=1e-4)


def test_s2_without_lag_no_bit_depends_on_the_log_probs_of_the_rollouts(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    rollouts = written(student, [UPDATES, UPDATES])
    nonsense = [replace(r, logprobs=(-1.0,) * len(r)) for r in rollouts]
    signal = signal_of(rollouts)
    plain, others = (result(student, trainer_of(student), r, signal) for r in (rollouts, nonsense))
    assert plain[0] == others[0]
    assert torch.equal(plain[1], others[1])
    assert not any(name.startswith("ratio") for name in plain[0])
    older = [replace(r, version=UPDATES - 1) for r in nonsense]
    assert not torch.equal(result(student, trainer_of(student), older, signal)[1], plain[1])


def test_s2_after_an_update_the_same_rollouts_lag(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    rollouts = tiny.sampler(student).sample([tiny.prompt(), tiny.prompt("And 3 + 4?")], 1)
    values = tuple(torch.ones(len(r)) for r in rollouts)
    signal = Signal(values, tuple(v > 0 for v in values))
    trainer = trainer_of(student, updates=0)
    assert "ratio_mean" not in trainer.update(rollouts, signal)
    after = trainer.update(rollouts, signal)
    assert 1 < after["ratio_mean"] <= after["ratio_max"]  # every token was made likelier


def test_s2_a_rollout_that_lags_without_its_log_probs_is_refused(llama_folder: Path) -> None:
    (rollout,) = written(tiny.policy(llama_folder), [UPDATES - 2])
    for logprobs in ((), (math.nan,) * len(rollout)):
        bare = replace(rollout, logprobs=logprobs)
        with pytest.raises(ValueError, match="prompt p is 2 updates old and lacks log-probs"):
            Stale.of([bare], UPDATES, MOST)
        assert Stale.of([replace(bare, version=UPDATES)], UPDATES, MOST) is None


def test_nothing_lags_where_nothing_was_written() -> None:
    assert Stale.of([], UPDATES, MOST) is None
    unwritten = Rollout(tiny.prompt(), (3, 4), (), (), (), (), "", "length")
    assert Stale.of([unwritten], UPDATES, MOST) is None
    assert ratio_figures(torch.zeros(0), MOST) == {}


def test_s2_only_what_the_older_student_sampled_has_a_ratio(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    own, teachers, initial, mixed = written(student, [UPDATES - 1] * 4)
    rollouts = [own, replace(teachers, author="teacher"), replace(initial, author="initial"), replace(mixed, given=3)]
    stale = Stale.of(rollouts, UPDATES, MOST)
    assert stale is not None
    known = [part.isfinite() for part in stale.logp.split([len(rollout) for rollout in rollouts])]
    assert [int(part.sum()) for part in known] == [len(own), 0, 0, len(mixed) - 3] and not bool(known[3][:3].any())
