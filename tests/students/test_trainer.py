"""The update: one loss and gradient however the step is cut, equal to a slow reference, refused if not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
from torch import Tensor

from omniopd.errors import NonFiniteLoss
from omniopd.methods.omniopd import OmniOPD, OmniOPDConfig
from omniopd.objective import Anchor, Objective, Reduction
from omniopd.sampling import Request, named_seed, sample
from omniopd.targets.full import FullTarget
from omniopd.targets.subset import SubsetTarget, TopKTarget
from omniopd.types import Branch, Continuations, Distributions, Query, Reply, Rollout, Signal, Target
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer, coefficients

Folder = Callable[..., Path]
REDUCTIONS: list[Reduction] = ["term_mean", "sum_seqmean", "token_mean"]
WHERE: list[Literal["unaudited", "all"]] = ["unaudited", "all"]
FAST = OptimizerSettings(learning_rate=1e-2)


def rollouts_of(student: Policy) -> list[Rollout]:
    torch.manual_seed(1)
    top = student.model.get_input_embeddings().num_embeddings
    return [tiny.rollout(student, torch.randint(2, top, (length,)).tolist()) for length in (13, 4, 0, 9, 20)]


def signal_of(rollouts: Sequence[Rollout], branches: bool = True) -> Signal:
    """Values of both signs on every other stretch of three tokens; three branches, one with context."""
    masks = [torch.tensor([t // 3 % 2 == 0 for t in range(len(r))], dtype=torch.bool) for r in rollouts]
    values = [
        torch.sin(torch.arange(float(len(r))) + i) * m for i, (r, m) in enumerate(zip(rollouts, masks, strict=True))
    ]
    wrote = (
        Branch(0, 3, (20, 21, 22), 2.0),
        Branch(4, 20, (23, 1), 1.0),
        Branch(3, 4, (24, 25, 26, 27), 1.0, context=1),
    )
    return Signal(tuple(values), tuple(masks), branches=wrote if branches else (), branch_scale=0.7)


def objective(reduction: Reduction = "term_mean", where: Literal["unaudited", "all"] = "unaudited", beta: float = 0.1):
    return Objective(anchor=Anchor(beta=beta, where=where, allow_none=beta == 0), reduction=reduction)


def trainer_of(student: Policy, *, settings: OptimizerSettings = FAST, **how: Any) -> Trainer:
    return Trainer(student, settings, objective(**how))


def retuned(student: Policy, **settings: Any) -> None:
    student.settings = student.settings.model_copy(update=settings)


def moved(student: Policy, seed: int = 3) -> Policy:
    """The student a little away from its reference, so that the anchor has something to hold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return student


def gradient(student: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in student.model.parameters() if p.requires_grad and p.grad is not None])


def weights(student: Policy) -> list[Tensor]:
    return [p.detach().clone() for p in student.model.parameters()]


def slow_loss(student: Policy, rollouts: Sequence[Rollout], signal: Signal, how: Objective) -> Tensor:
    """The loss as the documentation words it: one sequence at a time, dense logits, every term by hand."""

    def logits(model: Any, before: Sequence[int], ids: Sequence[int]) -> Tensor:
        return model(input_ids=torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1].log_softmax(-1)

    value = branch = kl = torch.zeros(())
    audited = held = learned = 0.0
    for rollout, values, mask in zip(rollouts, signal.values_BT, signal.mask_BT, strict=True):
        if not rollout.ids:
            continue
        logp = logits(student.model, rollout.prompt_ids, rollout.ids)
        with torch.no_grad(), student.reference() as frozen:
            ref = logits(frozen, rollout.prompt_ids, rollout.ids)
        for t, token in enumerate(rollout.ids):
            if mask[t]:
                value = value - values[t] * logp[t, token]
                audited += 1
            if how.anchor.where == "all" or not mask[t]:
                kl = kl + (ref[t].exp() * (ref[t] - logp[t])).sum()
                held += 1
    for b in signal.branches:
        before = [*rollouts[b.row].prompt_ids, *rollouts[b.row].ids[: b.at], *b.ids[: b.context]]
        logp = logits(student.model, before, b.ids[b.context :])
        branch = branch - b.weight * logp.gather(1, torch.tensor(b.ids[b.context :])[:, None]).sum()
        learned += b.weight * (len(b.ids) - b.context)
    tokens = sum(map(len, rollouts)) + learned
    a, u, c = {
        "term_mean": (audited, held, learned),
        "sum_seqmean": (len(rollouts),) * 3,
        "token_mean": (tokens,) * 3,
    }[how.reduction]
    return value / a + how.anchor.beta * kl / u + signal.branch_scale * branch / (c or 1)


# ------------------------------------------------------------------ the loss


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_o15_loss_and_gradient_are_those_of_the_slow_reference(llama_folder: Path, reduction: Any, where: Any) -> None:
    student = moved(tiny.policy(llama_folder))
    rollouts = rollouts_of(student)
    signal = signal_of(rollouts)
    trainer = trainer_of(student, reduction=reduction, where=where, beta=0.3)
    terms = trainer.accumulate(rollouts, signal)
    ours = gradient(student)
    student.model.zero_grad()
    truth = slow_loss(student, rollouts, signal, trainer.objective)
    truth.backward()
    assert terms["loss"] == pytest.approx(truth.item(), abs=1e-5)
    assert terms["loss"] == pytest.approx(terms["value_loss"] + terms["branch_loss"] + terms["anchor_loss"], abs=1e-6)
    torch.testing.assert_close(ours, gradient(student), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("trees", [True, False])
def test_o12_however_the_step_is_cut_it_is_one_loss_and_one_gradient(
    llama_folder: Path, reduction: Any, trees: bool
) -> None:
    """'Eight' #2: one, two, four and many micro-batches."""
    student = moved(tiny.policy(llama_folder))
    student.packs_trees = trees
    rollouts = rollouts_of(student)
    signal = signal_of(rollouts)
    trainer = trainer_of(student, reduction=reduction)
    counted: list[int] = []
    hook = trainer.learner.register_forward_hook(lambda *_: counted.append(1))
    results, parts = [], []
    for budget in (10_000, 140, 60, 1):
        retuned(student, micro_batch_tokens=budget)
        counted.clear()
        results.append((trainer.accumulate(rollouts, signal), gradient(student)))
        parts.append(len(counted))
    hook.remove()
    assert parts[0] == 1 and parts == sorted(set(parts)) and parts[-1] >= 4
    for terms, grad in results[1:]:
        assert terms == pytest.approx(results[0][0], abs=1e-5)
        torch.testing.assert_close(grad, results[0][1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 5, 7])
def test_o9_slices_of_any_size_give_one_loss_and_one_gradient(llama_folder: Path, size: int) -> None:
    student = moved(tiny.policy(llama_folder))
    rollouts = rollouts_of(student)
    trainer = trainer_of(student)
    whole = trainer.accumulate(rollouts, signal_of(rollouts)), gradient(student)
    retuned(student, slice_tokens=size)
    sliced = trainer.accumulate(rollouts, signal_of(rollouts)), gradient(student)
    assert sliced[0] == pytest.approx(whole[0], abs=1e-5)
    torch.testing.assert_close(sliced[1], whole[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0, "sliding_window": 3}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 4.0}),
        ("mistral", {"sliding_window": 3}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("qwen3", {"tie_word_embeddings": True}),
        ("gpt2", {}),
    ],
)
def test_odd_families_get_the_same_loss_and_gradient(tiny_folder: Folder, kind: str, settings: dict[str, Any]) -> None:
    """Capped or scaled logits, windows and recurrent layers fall back to what is exact for them."""
    student = moved(tiny.policy(tiny_folder(kind=kind, **settings), attention="eager"))
    rollouts = rollouts_of(student)
    signal = signal_of(rollouts)
    trainer = trainer_of(student)
    terms = trainer.accumulate(rollouts, signal)
    ours = gradient(student)
    student.model.zero_grad()
    truth = slow_loss(student, rollouts, signal, trainer.objective)
    truth.backward()
    assert terms["loss"] == pytest.approx(truth.item(), abs=2e-5)
    torch.testing.assert_close(ours, gradient(student), atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize(("reduction", "golden"), [("sum_seqmean", 0.84), ("term_mean", 0.21), ("token_mean", 0.105)])
def test_golden_reductions(llama_folder: Path, reduction: Any, golden: float) -> None:
    """The sheet's numbers: log p (-.2, -.6) and (-1, -.4), weights .5 and .3, KL (.05, .01, .02, .12), beta .1."""
    student = tiny.policy(llama_folder)
    rollout = tiny.rollout(student, range(20, 28))
    value = torch.tensor([0.5, 0.5, 0, 0, 0.3, 0.3, 0, 0])
    scaled = coefficients([rollout], Signal((value,), (value > 0,)), objective(reduction))
    logp = torch.tensor([-0.2, -0.6, -9, -9, -1.0, -0.4, -9, -9])
    kl = torch.tensor([9, 9, 0.05, 0.01, 9, 9, 0.02, 0.12])
    assert float(-(scaled.value_R * logp).sum() + (scaled.anchor_R * kl).sum()) == pytest.approx(golden)


def test_token_mean_does_not_count_a_token_twice_where_the_anchor_is_everywhere(llama_folder: Path) -> None:
    rollout = tiny.rollout(tiny.policy(llama_folder), range(20, 28))
    value = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    scaled = coefficients([rollout], Signal((value,), (value > 0,)), objective("token_mean", "all"))
    assert scaled.value_R.tolist() == pytest.approx([1 / 8] * 4 + [0] * 4)
    assert scaled.anchor_R.tolist() == pytest.approx([0.1 / 8] * 8)


@pytest.mark.parametrize(("reduction", "each"), [("term_mean", 1 / 8), ("token_mean", 1 / 8), ("sum_seqmean", 1 / 2)])
def test_answers_without_rollouts_are_learned_in_every_reduction(
    llama_folder: Path, reduction: Any, each: float
) -> None:
    student = tiny.policy(llama_folder)
    rollouts = tiny.sampler(student, 0).unwritten([tiny.prompt(), tiny.prompt()])
    branches = (Branch(0, 0, (20, 21, 22, 1), 1.0), Branch(1, 0, (23, 24, 25, 1), 1.0))
    empty = Signal((torch.zeros(0),) * 2, (torch.zeros(0, dtype=torch.bool),) * 2, branches=branches)
    assert coefficients(rollouts, empty, objective(reduction)).branch_Q.tolist() == pytest.approx([each] * 8)
    trainer = trainer_of(student, reduction=reduction)
    before = weights(student)
    first, *_, last = [trainer.update(rollouts, empty)["loss"] for _ in range(5)]
    assert last < first
    assert any(not torch.equal(a, b) for a, b in zip(before, weights(student), strict=True))


def test_r11_a_signal_of_other_lengths_raises(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    rollouts = [tiny.rollout(student, (20, 21, 22)), tiny.rollout(student, (23,))]
    for lengths in ((3,), (1, 3), (3, 2)):
        values = tuple(torch.ones(n) for n in lengths)
        with pytest.raises(ValueError, match="signal has"):
            coefficients(rollouts, Signal(values, tuple(v > 0 for v in values)), objective())


def test_o13_the_final_end_token_is_learned_also_where_the_pad_id_is_zero(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    assert student.tokenizer.pad_token_id == 0
    short, long = tiny.rollout(student, (20, 0, 1), finish="stop"), tiny.rollout(student, range(30, 45))
    last = torch.tensor([0.0, 0, 1])
    signal = Signal((last, torch.zeros(15)), (last > 0, torch.zeros(15, dtype=torch.bool)))
    trainer = trainer_of(student)
    assert trainer.accumulate([short, long], signal)["value_loss"] == pytest.approx(-short.logprobs[2], abs=1e-5)
    for _ in range(20):
        trainer.update([short, long], signal)
    after, _ = tiny.dense(student.model, short.prompt_ids, short.ids)
    assert float(after[2]) > short.logprobs[2] + 0.5


# ------------------------------------------------------------------ targets


def taught(
    student: Policy, rollouts: Sequence[Rollout], seed: int = 7, **how: Any
) -> tuple[tuple[FullTarget | None, ...], list[Tensor]]:
    """Targets for all rollouts but the second from a random teacher, and its logits [T, V] for each rollout."""
    generator = torch.Generator().manual_seed(seed)
    size = student.model.get_input_embeddings().num_embeddings
    logits = [2 * torch.randn(len(r), size, generator=generator) for r in rollouts]
    targets = [FullTarget(Distributions(rows, lambda hidden: hidden), **how) for rows in logits]
    return tuple(None if n == 1 else target for n, target in enumerate(targets)), logits


def slow_divergence(student: Policy, rollouts: Sequence[Rollout], signal: Signal, teacher: list[Tensor]) -> Tensor:
    """The reverse KL under the mask, rollout by rollout, summed."""
    total = torch.zeros(())
    for n, rollout in enumerate(rollouts):
        if signal.targets[n] is None or not rollout.ids:
            continue
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
        logp = student.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        kl = (logp.exp() * (logp - teacher[n].log_softmax(-1))).sum(-1)
        total = total + kl[signal.mask_BT[n]].sum()
    return total


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_o15_a_divergence_beside_all_other_terms(tiny_folder: Folder, reduction: Any, kind: str) -> None:
    """Values, branches, anchor and targets in one pass: the slow reference's loss and gradient, scaled as the values are."""
    settings = {"final_logit_softcapping": 5.0, "sliding_window": 3} if kind == "gemma2" else {}
    student = moved(tiny.policy(tiny_folder(kind=kind, **settings), attention="eager"))
    rollouts = rollouts_of(student)
    targets, teacher = taught(student, rollouts)
    signal = replace(signal_of(rollouts), targets=targets)
    trainer = trainer_of(student, reduction=reduction, beta=0.3)
    terms = trainer.accumulate(rollouts, signal)
    ours = gradient(student)
    student.model.zero_grad()
    audited = sum(int(mask.sum()) for mask in signal.mask_BT)
    learned = sum(b.weight * (len(b.ids) - b.context) for b in signal.branches)
    tokens = sum(map(len, rollouts)) + learned
    count = {"term_mean": audited, "sum_seqmean": len(rollouts), "token_mean": tokens}[reduction]
    divergence = slow_divergence(student, rollouts, signal, teacher) / count
    truth = slow_loss(student, rollouts, signal, trainer.objective) + divergence
    truth.backward()
    assert terms["divergence_loss"] == pytest.approx(divergence.item(), rel=1e-5) and divergence.item() > 0.5
    assert terms["loss"] == pytest.approx(truth.item(), rel=1e-5)
    torch.testing.assert_close(ours, gradient(student), atol=5e-5, rtol=1e-3)


def test_o9_o12_a_divergence_does_not_depend_on_micro_batches_or_slices(llama_folder: Path) -> None:
    student = moved(tiny.policy(llama_folder))
    rollouts = rollouts_of(student)
    signal = replace(signal_of(rollouts), targets=taught(student, rollouts, divergence="jsd")[0])
    trainer = trainer_of(student)
    whole = trainer.accumulate(rollouts, signal), gradient(student)
    for budget, size in ((10_000, 1), (140, 5), (60, 7), (1, None)):
        retuned(student, micro_batch_tokens=budget, slice_tokens=size)
        cut = trainer.accumulate(rollouts, signal), gradient(student)
        assert cut[0] == pytest.approx(whole[0], abs=1e-5)
        torch.testing.assert_close(cut[1], whole[1], atol=1e-5, rtol=1e-4)


class Canary:
    """A target that notes what it is asked, and whose gradient is 1 on the logit of token t at position t."""

    def __init__(self, blocks: Sequence[tuple[int, int]] = ()) -> None:
        self.blocks = blocks
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    def divergence(self, logits: Tensor, ids: Tensor, start: int) -> Tensor:
        self.asked.append((start, tuple(ids.tolist())))
        assert len(logits) == len(ids)
        return logits[range(len(ids)), range(start, start + len(ids))].float()


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_r1_a_target_is_asked_about_its_own_positions_and_no_block_is_cut(llama_folder: Path, size: int) -> None:
    student = tiny.policy(llama_folder, slice_tokens=size)
    rollouts = rollouts_of(student)
    blocks = ((), (), (), ((1, 4), (4, 8)), ((0, 3), (10, 20)))
    targets = tuple(Canary(b) for b in blocks)
    masks = tuple(torch.ones(len(r), dtype=torch.bool) for r in rollouts)
    silent = Signal(
        tuple(torch.zeros(len(r)) for r in rollouts), masks, targets=targets, branches=(Branch(0, 3, (20, 21), 1.0),)
    )
    terms = trainer_of(student, beta=0).accumulate(rollouts, silent)
    expected = 0.0
    for rollout, target in zip(rollouts, targets, strict=True):
        spoken = [(start + i, token) for start, ids in target.asked for i, token in enumerate(ids)]
        assert spoken == list(enumerate(rollout.ids))
        for start, end in target.blocks:
            assert any(first <= start and end <= first + len(ids) for first, ids in target.asked)
        if rollout.ids:
            ids = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
            logits = student.model(input_ids=ids).logits[0, len(rollout.prompt_ids) - 1 : -1]
            expected += float(logits[range(len(rollout)), range(len(rollout))].detach().sum())
    assert terms["divergence_loss"] == pytest.approx(expected / sum(map(len, rollouts)), abs=1e-4)


def test_r10_outside_the_mask_a_target_is_not_asked_or_not_heard(llama_folder: Path) -> None:
    student = moved(tiny.policy(llama_folder))
    rollouts = [tiny.rollout(student, range(20, 30))]
    (target,), teacher = taught(student, rollouts)
    assert target is not None
    mask = (torch.arange(10) < 4,)
    gradients = []
    for beyond in (0.0, 30.0):
        teacher[0][4:, 5] = beyond
        trainer_of(student, beta=0).accumulate(rollouts, Signal((torch.zeros(10),), mask, targets=(target,)))
        gradients.append(gradient(student))
    assert gradients[0].abs().max() > 1e-3
    assert torch.equal(*gradients)
    canary = Canary()
    nothing = Signal((torch.zeros(10),), (torch.zeros(10, dtype=torch.bool),), targets=(canary,))
    assert trainer_of(student, beta=0).accumulate(rollouts, nothing)["loss"] == 0
    assert canary.asked == []


def test_r17_another_teacher_gives_another_gradient(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    rollouts = rollouts_of(student)
    found = []
    for seed in (1, 2):
        targets, _ = taught(student, rollouts, seed)
        trainer_of(student).accumulate(rollouts, replace(signal_of(rollouts, branches=False), targets=targets))
        found.append(gradient(student))
    assert (found[0] - found[1]).norm() > 0.1 * found[0].norm()


def own_target(student: Policy, rollout: Rollout, kind: str) -> Target:
    """The student itself as the teacher."""
    with torch.no_grad():
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
        hidden = student.model.model(input_ids=ids).last_hidden_state[0, len(rollout.prompt_ids) - 1 : -1]
        top = student.model.lm_head(hidden).log_softmax(-1).topk(6)
    distributions = Distributions(hidden, student.model.lm_head)
    named = [dict(zip(i, v, strict=True)) for i, v in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return {
        "full": lambda: FullTarget(distributions, "reverse"),
        "jsd": lambda: FullTarget(distributions, "jsd", 0.3),
        "tail": lambda: SubsetTarget(distributions, 4, "teacher", "tail_bucket"),
        "sg": lambda: SubsetTarget(distributions, 4, "student", "partial_sg"),
        "renorm": lambda: SubsetTarget(distributions, 4, "common", "renorm"),
        "top": lambda: TopKTarget(named, "tail_bucket"),
    }[kind]()


@pytest.mark.parametrize("size", [3, 100])
@pytest.mark.parametrize("kind", ["full", "jsd", "tail", "sg", "renorm", "top"])
def test_eight_1_o4_a_student_that_is_its_own_target_learns_nothing(llama_folder: Path, kind: str, size: int) -> None:
    student = moved(tiny.policy(llama_folder, slice_tokens=size))
    rollouts = [r for r in rollouts_of(student) if r.ids]
    masks = tuple(torch.ones(len(r), dtype=torch.bool) for r in rollouts)
    values = tuple(torch.zeros(len(r)) for r in rollouts)
    targets = tuple(own_target(student, r, kind) for r in rollouts)
    terms = trainer_of(student, beta=0).accumulate(rollouts, Signal(values, masks, targets=targets))
    assert terms["loss"] == pytest.approx(0, abs=1e-6)
    assert gradient(student).abs().max() < 1e-5
    if kind in ("tail", "sg", "renorm", "top"):
        assert terms["support_student_mass"] == pytest.approx(terms["support_teacher_mass"], abs=1e-5)
        assert 0.1 < terms["support_student_mass"] < 1 and terms["support_dead"] == 0
    other = tuple(own_target(moved(tiny.policy(llama_folder), seed=9), r, kind) for r in rollouts)
    assert trainer_of(student, beta=0).accumulate(rollouts, Signal(values, masks, targets=other))["loss"] > 1e-3


def test_training_on_a_target_brings_the_student_near_to_it(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    rollouts = rollouts_of(student)
    masks = tuple(torch.ones(len(r), dtype=torch.bool) for r in rollouts)
    signal = Signal(tuple(torch.zeros(len(r)) for r in rollouts), masks, targets=taught(student, rollouts)[0])
    trainer = trainer_of(student, beta=0)
    losses = [trainer.update(rollouts, signal)["divergence_loss"] for _ in range(15)]
    assert losses[-1] < 0.7 * losses[0]


def test_r11_targets_for_other_rollouts_raise(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    rollouts = rollouts_of(student)
    with pytest.raises(ValueError, match="signal has 2 targets, there are 5 rollouts"):
        coefficients(rollouts, replace(signal_of(rollouts), targets=(None, None)), objective())


# ------------------------------------------------------------------ the anchor


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_l6_the_anchor_is_zero_at_step_zero_and_holds_what_beta_says(tied_folder: Path, lora: Any) -> None:
    drift = {}
    for beta in (1e-6, 30.0):
        student = tiny.policy(tied_folder, lora=lora)
        rollouts = rollouts_of(student)
        trainer = trainer_of(student, beta=beta)
        rows = [trainer.update(rollouts, signal_of(rollouts)) for _ in range(12)]
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert rows[0]["anchor_loss"] == pytest.approx(0, abs=1e-6)
        drift[beta] = rows[-1]["kl"]
    assert drift[1e-6] > 0.02
    assert drift[1e-6] > 5 * drift[30.0] > 0


def test_l6_no_anchor_only_when_asked_for(llama_folder: Path) -> None:
    with pytest.raises(ValueError, match="allow_none=true"):
        Anchor(beta=0)
    student = moved(tiny.policy(llama_folder))
    rollouts = rollouts_of(student)
    terms = trainer_of(student, beta=0).accumulate(rollouts, signal_of(rollouts))
    assert terms["anchor_loss"] == terms["kl"] == 0.0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_l8_the_ratio_of_the_terms_is_the_one_the_mode_states(llama_folder: Path, reduction: Any) -> None:
    """Two responses of unequal length; the logged KL is the plain mean over the held tokens, whatever the mode."""
    student = moved(tiny.policy(llama_folder))
    rollouts = [tiny.rollout(student, range(20, 25)), tiny.rollout(student, range(30, 47))]
    masks = (torch.arange(5) < 3, torch.arange(17) < 4)
    signal = Signal(tuple(m.float() for m in masks), masks)
    terms = trainer_of(student, reduction=reduction, beta=0.5).accumulate(rollouts, signal)
    counts = {"term_mean": 15, "sum_seqmean": 2, "token_mean": 22}
    assert terms["anchor_loss"] == pytest.approx(0.5 * terms["kl"] * 15 / counts[reduction], rel=1e-5)
    logp = [tiny.dense(student.model, r.prompt_ids, r.ids)[0][m] for r, m in zip(rollouts, masks, strict=True)]
    audited = counts | {"term_mean": 7}
    assert terms["value_loss"] == pytest.approx(-float(torch.cat(logp).sum()) / audited[reduction], rel=1e-5)


# ------------------------------------------------------------------ what must not happen


def test_l5_no_gradient_leaks_through_the_values(llama_folder: Path) -> None:
    student = moved(tiny.policy(llama_folder))
    rollouts = [tiny.rollout(student, range(20, 30))]
    mask = (torch.arange(10) < 6,)
    trainer = trainer_of(student)
    ids = torch.tensor([[*rollouts[0].prompt_ids, *rollouts[0].ids]])
    logits = student.model(input_ids=ids).logits[0, -11:-1].log_softmax(-1)
    live = logits.gather(1, torch.tensor(rollouts[0].ids)[:, None])[:, 0].exp()  # a weight that hangs on the student
    trainer.accumulate(rollouts, Signal((live,), mask))
    leaky = gradient(student)
    trainer.accumulate(rollouts, Signal((live.detach(),), mask))
    assert torch.equal(leaky, gradient(student))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(llama_folder: Path, bad: float) -> None:
    student = tiny.policy(llama_folder)
    rollouts = rollouts_of(student)
    good = signal_of(rollouts)
    trainer = trainer_of(student)
    trainer.update(rollouts, good)
    before, state = weights(student), copy.deepcopy(trainer.state_dict())
    values = [v.clone() for v in good.values_BT]
    values[0][0] = bad
    with pytest.raises(NonFiniteLoss, match=r"lower train\.learning_rate"):
        trainer.update(rollouts, Signal(tuple(values), good.mask_BT))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(student), strict=True))
    torch.testing.assert_close(trainer.state_dict(), state, rtol=0, atol=0)
    assert all(p.grad is None for p in student.model.parameters())
    assert math.isfinite(trainer.update(rollouts, good)["loss"])


def test_r10_a_value_outside_the_mask_adds_nothing_even_if_it_is_nan(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    rollouts = [tiny.rollout(student, (20, 21, 22))]
    mask = torch.tensor([True, False, True])
    clean = trainer_of(student).accumulate(rollouts, Signal((torch.tensor([1.0, 0, 2]),), (mask,)))
    holes = trainer_of(student).accumulate(rollouts, Signal((torch.tensor([1.0, math.nan, 2]),), (mask,)))
    assert holes == clean


def test_eight_5_nothing_said_is_a_zero_loss_that_changes_nothing(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    rollouts = rollouts_of(student)
    silent = Signal(tuple(torch.zeros(len(r)) for r in rollouts), tuple(torch.zeros(len(r)).bool() for r in rollouts))
    before = weights(student)
    terms = trainer_of(student).update(rollouts, silent)
    assert terms["loss"] == pytest.approx(0, abs=1e-6)  # only the anchor speaks, and it has nothing to say yet
    assert terms["grad_norm"] == pytest.approx(0, abs=1e-5)
    unwritten = tiny.sampler(student, 0).unwritten([tiny.prompt()])
    nothing = Signal((torch.zeros(0),), (torch.zeros(0, dtype=torch.bool),))
    fresh = tiny.policy(llama_folder)
    assert trainer_of(fresh).update(unwritten, nothing)["loss"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, weights(fresh), strict=True))
    assert trainer_of(fresh).update([], Signal((), ()))["loss"] == 0


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_o14_only_the_students_own_weights_are_in_the_optimizer(llama_folder: Path, lora: Any) -> None:
    student = tiny.policy(llama_folder, lora=lora)
    trainer = trainer_of(student)
    inside = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert inside == {id(p) for p in student.model.parameters() if p.requires_grad}
    assert {id(p) for p in trainer.learner.parameters()} == {id(p) for p in student.model.parameters()}
    rollouts = rollouts_of(student)
    names = {name: p.detach().clone() for name, p in student.model.named_parameters()}
    with student.reference() as frozen:
        initial = [p.detach().clone() for p in frozen.parameters()] if lora is None else []
    for _ in range(3):
        trainer.update(rollouts, signal_of(rollouts))
    changed = {name for name, p in student.model.named_parameters() if not torch.equal(p, names[name])}
    assert changed == ({n for n in names if "lora" in n} if lora else set(names))
    if lora is None:
        with student.reference() as frozen:
            assert all(torch.equal(p, q) for p, q in zip(frozen.parameters(), initial, strict=True))
    else:
        assert len(inside) < len(names)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_lora_loss_and_gradient_are_those_of_the_slow_reference(llama_folder: Path, targets: Any) -> None:
    """With adapters on the head too the reference's head is the bare one."""
    student = moved(tiny.policy(llama_folder, lora={"rank": 2, "target_modules": targets}))
    rollouts = rollouts_of(student)
    signal = signal_of(rollouts)
    trainer = trainer_of(student, beta=0.5)
    terms = trainer.accumulate(rollouts, signal)
    ours = gradient(student)
    student.model.zero_grad()
    truth = slow_loss(student, rollouts, signal, trainer.objective)
    truth.backward()
    assert terms["kl"] > 1e-3
    assert terms["loss"] == pytest.approx(truth.item(), abs=1e-5)
    torch.testing.assert_close(ours, gradient(student), atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_computes_layers_again_and_changes_no_number(llama_folder: Path) -> None:
    plain, thrifty = tiny.policy(llama_folder), tiny.policy(llama_folder, gradient_checkpointing=True)
    results = []
    for student in (plain, thrifty):
        calls: list[int] = []
        student.model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        rollouts = rollouts_of(student)
        calls.clear()
        terms = trainer_of(student).accumulate(rollouts, signal_of(rollouts))
        results.append((len(calls), terms, gradient(student)))
    assert (results[0][0], results[1][0]) == (1, 2)
    assert results[1][1] == pytest.approx(results[0][1], abs=1e-6)
    torch.testing.assert_close(results[1][2], results[0][2], atol=1e-6, rtol=1e-5)
    assert (
        tiny.sampler(thrifty, 0).sample([tiny.prompt()], 0)[0].ids
        == tiny.sampler(plain, 0).sample([tiny.prompt()], 0)[0].ids
    )


def test_warm_up_rises_to_the_rate_and_stays(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    rollouts = rollouts_of(student)
    trainer = trainer_of(student, settings=OptimizerSettings(learning_rate=0.004, warmup_steps=3))
    rates = [trainer.update(rollouts, signal_of(rollouts))["learning_rate"] for _ in range(5)]
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004])


# ------------------------------------------------------------------ the eight: self-teacher, agreement everywhere


@pytest.fixture(scope="module")
def speller(tiny_folder: Folder) -> Policy:
    """A student whose ids and text are one thing, and that never ends, so that every draw is as long as the others."""
    student = tiny.policy(tiny_folder("letters"), max_new_tokens=8)
    student.model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + never(logits))
    return student


def never(logits: Tensor) -> Tensor:
    return torch.where(torch.arange(logits.shape[-1]) == 0, -40.0, 0.0)


def continued(teacher: Any, student: Policy, queries: Sequence[Query], seed: int) -> list[Continuations]:
    """A teacher of the student's own tokenizer that goes on from the prefix."""
    prefixes = [(*student.prompt_ids(q.prompt), *student.encode(q.chunk.prefix)[0]) for q in queries]
    asked = [
        Request(ids, named_seed(seed, i), q.max_tokens, q.n)
        for i, (ids, q) in enumerate(zip(prefixes, queries, strict=True))
    ]
    drawn = sample(teacher, asked, student.end_ids)
    return [
        Continuations(query, tuple(Reply(student.decode(list(d.ids)), d.finish) for d in draws))
        for query, draws in zip(queries, drawn, strict=True)
    ]


def drift(gradients: list[Tensor]) -> float:
    """How far the mean of the later gradients goes along the mean of the earlier, in its standard errors."""
    half = len(gradients) // 2
    along = torch.stack(gradients[half:]) @ torch.stack(gradients[:half]).mean(0)
    return float(along.mean() / (along.std() / math.sqrt(len(along))))


@pytest.mark.parametrize(("same", "low", "high"), [(True, -3.0, 3.0), (False, 6.0, math.inf)])
def test_eight_1_a_student_taught_by_itself_does_not_move(speller: Policy, same: bool, low: float, high: float) -> None:
    method = OmniOPD(OmniOPDConfig(chunks=2, chunk_tokens=3, continuations=4), speller, seed=0)
    teacher = speller.model if same else tiny.model(tiny.letters(), seed=5)
    trainer = trainer_of(speller, beta=0)
    sampler = tiny.sampler(speller, 0)
    gradients = []
    for step in range(30):
        rollouts = sampler.sample([tiny.prompt("abc"), tiny.prompt("fed")], step)
        evidence = continued(teacher, speller, method.audit(rollouts, step), step)
        trainer.accumulate(rollouts, method.read(rollouts, evidence, step))
        gradients.append(gradient(speller))
    assert low <= drift(gradients) < high


def test_eight_1_survival_finds_no_advantage_in_the_students_own_words(speller: Policy) -> None:
    """Within the binomial error of N continuations; another teacher's advantages lie far outside."""
    config = OmniOPDConfig(chunks=2, chunk_tokens=3, continuations=128, teacher_tokens=4, signals=["survival"])
    method = OmniOPD(config, speller, seed=0)
    rollouts = tiny.sampler(speller, 0).sample(
        [tiny.prompt(t) for t in ("abc", "fed", "cab", "bee", "add", "face", "dad", "bad")], 1
    )
    queries = method.audit(rollouts, 1)

    def mean_square(teacher: Any) -> float:
        signal = method.read(rollouts, continued(teacher, speller, queries, 9), 1)
        scaled = []
        for query in queries:
            chunk, row = query.chunk, rollouts[query.chunk.row]
            reach = 0.0  # log of the expected share that still agrees
            for t in range(chunk.start, chunk.end):
                p = math.exp(row.logprobs[t])
                if config.continuations * math.exp(reach) * p > 10:
                    error = math.sqrt((1 - p) / (config.continuations * math.exp(reach) * p)) + 1e-3
                    scaled.append(float(signal.values_BT[chunk.row][t]) / error)
                reach += row.logprobs[t]
        assert len(scaled) >= 12
        return sum(z * z for z in scaled) / len(scaled)

    assert mean_square(speller.model) < 3
    assert mean_square(tiny.model(tiny.letters(), seed=5)) > 20


@pytest.mark.parametrize(("steered", "low", "high"), [(False, -3.0, 3.0), (True, 6.0, math.inf)])
def test_eight_6_agreement_everywhere_does_not_steer(speller: Policy, steered: bool, low: float, high: float) -> None:
    """The same value on every token has no expected gradient on-policy; a value that favours some letters has."""
    trainer, sampler = trainer_of(speller, beta=0), tiny.sampler(speller, 1)
    gradients = []
    for step in range(30):
        rollouts = sampler.sample([tiny.prompt(text) for text in ("abc", "fed", "cab", "bee")], step)
        values = tuple(torch.tensor([-1.0 if steered and token <= 3 else 1.0 for token in r.ids]) for r in rollouts)
        trainer.accumulate(rollouts, Signal(values, tuple(v != 0 for v in values)))
        gradients.append(gradient(speller))
    assert low <= drift(gradients) < high
