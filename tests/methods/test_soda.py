"""SODA: DPO's loss and gradient as numbers on tokens, the initial student as reference and writer, and what is left out."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from paired import Step, gradient_of, moved, sums
from torch import Tensor
from torch.nn.functional import logsigmoid

from omniopd.methods.seqkd import SeqKD, SeqKDConfig
from omniopd.methods.soda import Soda, SodaConfig
from omniopd.pairs import INITIAL, PRESENT
from omniopd.types import Prompt, Rollout, Writing
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

BETA = 0.1


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def prompts(*names: str) -> dict[int, Prompt]:
    asked = [replace(tiny.prompt(f"What is {name}?", name), reference=name) for name in names or ("1", "2", "3")]
    return dict(enumerate(prompt for prompt in asked for _ in range(2)))


def measured(student: Policy, present: float, initial: float) -> Rollout:
    """A response of two tokens with such log-probs."""
    facts = {PRESENT: (present / 2,) * 2, INITIAL: (initial / 2,) * 2}
    return replace(tiny.rollout(student, [7, 8]), facts=facts)


def test_golden_margin_and_values(student: Policy) -> None:
    step = Step(student, "soda", prompts("1"))
    rollouts = [measured(student, -12, -14), measured(student, -20, -18)]
    signal = step.method.read(rollouts, step.answers, 1)
    assert signal.stats["margin"] == pytest.approx(0.4)
    assert signal.stats["preference_loss"] == pytest.approx(0.5130152524, abs=1e-10)
    slope = 0.0401312340 * 4  # the mean over 4 tokens of this is the mean over one pair
    assert torch.stack(signal.values_BT).tolist() == [[pytest.approx(slope)] * 2, [pytest.approx(-slope)] * 2]


def test_at_the_initial_student_the_loss_is_log_2_for_every_pair(student: Policy) -> None:
    step = Step(student, "soda", prompts())
    rollouts, signal = step.rollouts(), step.signal()
    assert signal.stats["preference_loss"] == math.log(2) and signal.stats["margin"] == 0.0
    tokens = sum(map(len, rollouts))
    for row, values in enumerate(signal.values_BT):
        assert values.tolist() == pytest.approx([(-1) ** row * BETA / 2 * tokens / 3] * len(rollouts[row]))


@pytest.mark.parametrize("micro_batch_tokens", [8192, 40])
def test_the_update_is_dpo_by_autograd(llama_folder: Path, micro_batch_tokens: int) -> None:
    student = moved(tiny.policy(llama_folder, micro_batch_tokens=micro_batch_tokens))
    step = Step(student, "soda", prompts())
    rollouts = step.rollouts()
    trainer = Trainer(student, OptimizerSettings(), step.method.objective)
    trainer.accumulate(rollouts, signal := step.signal())
    ours = gradient_of(student)

    with student.reference() as initial, torch.no_grad():
        reference = sums(initial, rollouts)
    loss = dpo(sums(student.model, rollouts), reference)
    loss.backward()
    assert signal.stats["preference_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert signal.stats["margin"] != 0
    torch.testing.assert_close(ours, gradient_of(student), rtol=1e-3, atol=1e-5)


def dpo(present: Tensor, reference: Tensor) -> Tensor:
    """The mean over pairs, of sums [B] over tokens, by the textbook."""
    rewards = BETA * (present - reference)
    return -logsigmoid(rewards[0::2] - rewards[1::2]).mean()


def test_the_rejected_text_is_the_initial_students_and_the_same_each_time(student: Policy) -> None:
    method = Step(student, "soda", prompts()).method
    early, late = (method.writings(prompts(), [], step) for step in (1, 9))
    assert early == late
    seeds = {early[row].seed for row in (1, 3, 5)}
    assert all(early[row].initial for row in (1, 3, 5)) and len(seeds) == 3 and None not in seeds


def test_pairs_whose_rejected_answer_is_right_are_left_out_unless_told_otherwise(student: Policy) -> None:
    for filtered, pairs, drops in ((True, 2.0, {"rejected_right": 1}), (False, 3.0, {})):
        step = Step(student, "soda", prompts(), filter=filtered)
        step.rejected[1] = "so it is 1"
        signal = step.signal()
        assert (signal.stats["pairs"], dict(signal.drops)) == (pairs, drops)


def test_without_a_verdict_a_pair_counts(student: Policy) -> None:
    step = Step(student, "soda", {row: replace(prompt, reference=None) for row, prompt in prompts().items()})
    assert step.signal().stats["pairs"] == 3.0


def test_warm_steps_are_seqkd_to_the_last_bit(student: Policy) -> None:
    warm = Step(student, "soda", prompts(), step=2, warm_steps=2)
    assert set(warm.method.writings(warm.prompts, warm.answers, 2).values()) == {Writing(blank=True)}
    seqkd = SeqKD(SeqKDConfig(), student, 0)
    results: list[Any] = []
    for method, signal in (
        (warm.method, warm.signal()),
        (seqkd, seqkd.read(warm.rollouts(), warm.answers, 2)),
    ):
        trainer = Trainer(student, OptimizerSettings(), method.objective)
        loss = trainer.accumulate(warm.rollouts(), signal)["loss"]
        results.append((loss, gradient_of(student)))
    (ours, gradients), (loss, others) = results
    assert ours == loss != 0 and all(map(torch.equal, gradients, others))
    after = Step(student, "soda", prompts(), step=3, warm_steps=2).signal()
    assert not after.branches and after.stats["pairs"] == 3.0


def test_it_needs_no_number_of_the_teachers() -> None:
    assert Soda.needs == {"answer", "group"} and Soda.keeps_initial and SodaConfig().anchor.beta == 0
    assert (SodaConfig().beta, SodaConfig().answers, SodaConfig().filter, SodaConfig().warm_steps) == (0.1, 1, True, 0)
