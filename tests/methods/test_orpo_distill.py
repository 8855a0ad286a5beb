"""ORPO-Distill: the odds ratio as numbers on tokens beside the likelihood of right traces; which traces are rejected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from paired import Step, answered, gradient_of, method_of, moved, right, sums
from torch.nn.functional import logsigmoid

from omniopd.methods.orpo_distill import OrpoDistillConfig
from omniopd.methods.seqkd import SeqKD, SeqKDConfig
from omniopd.pairs import PRESENT
from omniopd.types import Prompt, Reply, Writing
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def prompts(*names: str) -> dict[int, Prompt]:
    asked = [replace(tiny.prompt(f"What is {name}?", name), reference=name) for name in names or ("1", "2", "3")]
    return dict(enumerate(prompt for prompt in asked for _ in range(2)))


def test_golden_margin_and_values(student: Policy) -> None:
    step = Step(student, "orpo_distill", prompts("99"))
    rollouts = [
        replace(
            tiny.rollout(student, ids, step.prompts[0], finish="stop"),
            facts={PRESENT: (mean - 0.25, mean + 0.25) * (len(ids) // 2)},
        )
        for ids, mean in (([7, 8], -0.5), ([7, 8, 9, 6], -1.0))
    ]
    signal = step.method.read(rollouts, step.answers, 1)
    assert signal.stats["margin"] == pytest.approx(0.9740769842, abs=1e-10)
    assert signal.stats["preference_loss"] == pytest.approx(0.3202997852, abs=1e-10)
    left = 0.1 * (1 - torch.tensor(0.9740769842, dtype=torch.float64).sigmoid()) * 6  # over 6 tokens
    good, bad = left / (1 - torch.tensor(-0.5).exp()) / 2, left / (1 - torch.tensor(-1.0).exp()) / 4
    torch.testing.assert_close(signal.values_BT[0], good.float().expand(2))
    torch.testing.assert_close(signal.values_BT[1], -bad.float().expand(4))


@pytest.mark.parametrize("micro_batch_tokens", [8192, 40])
@pytest.mark.parametrize("weight", [0.1, 2.0])
def test_the_update_is_likelihood_and_odds_ratio_by_autograd(
    llama_folder: Path, micro_batch_tokens: int, weight: float
) -> None:
    student = moved(tiny.policy(llama_folder, micro_batch_tokens=micro_batch_tokens))
    step = Step(student, "orpo_distill", prompts(), weight=weight)
    rollouts = step.rollouts()
    trainer = Trainer(student, OptimizerSettings(), step.method.objective)
    parts = trainer.accumulate(rollouts, signal := step.signal())
    ours = gradient_of(student)

    logp = sums(student.model, rollouts)
    lengths = torch.tensor([len(rollout) for rollout in rollouts], dtype=torch.float64)
    mean = logp / lengths
    odds = mean - torch.log1p(-mean.exp())
    nll, contrast = -logp[0::2].sum() / lengths[0::2].sum(), -logsigmoid(odds[0::2] - odds[1::2]).mean()
    (nll + weight * contrast).backward()
    assert parts["branch_loss"] == pytest.approx(nll.item(), abs=1e-5)
    assert signal.stats["preference_loss"] == pytest.approx(contrast.item(), abs=1e-5)
    torch.testing.assert_close(ours, gradient_of(student), rtol=1e-3, atol=1e-5)


def test_at_weight_0_it_is_seqkd_on_the_chosen_traces_to_the_last_bit(student: Policy) -> None:
    step = Step(student, "orpo_distill", prompts("1", "2", "3", "4"), weight=0.0, answers=3)
    wrong, cut = Reply("The answer is unknown.", "stop"), Reply("The answer", "length")
    step.answers[0] = answered(step.queries[0], wrong, Reply("So it is 1.", "stop"), cut)
    step.answers[1] = answered(step.queries[1], wrong, wrong, cut)
    step.answers[2] = answered(step.queries[2], *(Reply(f"{way} 3.", "stop") for way in ("It is", "This makes", "So,")))
    rollouts = step.rollouts()
    assert not any(map(len, rollouts)), "nothing is written that nobody compares"
    signal = step.signal()
    assert dict(signal.drops) == {"chosen_not_right": 1} and len(signal.branches) == 3

    said = {branch.row: student.decode(list(branch.ids)) for branch in signal.branches}
    traces = [answered(query, Reply(said[query.row], "stop")) for query in step.queries if query.row in said]
    seqkd = SeqKD(SeqKDConfig(), student, 0)
    results: list[Any] = []
    for method, learned in ((step.method, signal), (seqkd, seqkd.read(rollouts, traces, 1))):
        trainer = Trainer(student, OptimizerSettings(), method.objective)
        results.append((trainer.accumulate(rollouts, learned)["loss"], gradient_of(student)))
    (ours, gradients), (loss, others) = results
    assert ours == loss != 0 and all(map(torch.equal, gradients, others))


def test_a_right_trace_is_imitated_whatever_the_student_wrote(student: Policy) -> None:
    step = Step(student, "orpo_distill", prompts())
    step.rejected = {1: "it is 1", 3: "it is 2", 5: "it is 3"}
    signal = step.signal()
    assert dict(signal.drops) == {"rejected_right": 3}
    assert [branch.row for branch in signal.branches] == [0, 2, 4] and signal.coverage == 0


def test_a_trace_that_was_cut_or_cannot_be_told_is_not_rejected(student: Policy) -> None:
    step = Step(student, "orpo_distill", prompts())
    rollouts = step.rollouts()
    rollouts[3] = replace(rollouts[3], finish="length")
    assert dict(step.method.read(rollouts, step.answers, 1).drops) == {"rejected_unknown": 1}
    blind = Step(student, "orpo_distill", {row: replace(p, reference=None) for row, p in prompts().items()})
    assert dict(blind.signal().drops) == {"chosen_not_right": 3}


def test_chosen_traces_are_right_and_take_turns(student: Policy) -> None:
    step = Step(student, "orpo_distill", prompts("1"), answers=4)
    ways = ("It is 1.", "wrong", "So, 1.", "1")
    step.answers = [answered(step.queries[0], *(Reply(way, "stop") for way in ways))]
    chosen = set()
    for number in range(1, 40):
        (branch,) = step.method.read(step.rollouts(), step.answers, number).branches
        chosen.add(student.decode(list(branch.ids)))
    assert chosen == {"It is 1.", "So, 1.", "1"}


@pytest.mark.parametrize(("phi", "low", "high"), [(0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 1, 1)])
def test_phi_is_the_share_of_the_present_students(student: Policy, phi: float, low: float, high: float) -> None:
    method = method_of(student, "orpo_distill", 2, phi=phi)
    asked = prompts()
    written = [method.writings(asked, [], step)[row] for step in range(1, 101) for row in (1, 3, 5)]
    own = [writing == Writing() for writing in written]
    assert low <= sum(own) / len(own) <= high
    assert all(
        writing.initial and writing.seed is not None for writing, mine in zip(written, own, strict=True) if not mine
    )


def test_it_needs_a_verifier_and_no_number_of_the_teachers(student: Policy) -> None:
    method = method_of(student, "orpo_distill", 2)
    assert method.needs == {"answer", "group", "verify"}
    assert [query.n for query in method.before(prompts(), 1)] == [8] * 3
    assert right(prompts()[0]) == "The answer is 1."
    config = OrpoDistillConfig()
    assert (config.answers, config.phi, config.weight) == (8, 0.5, 0.1)
