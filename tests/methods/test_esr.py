"""ESR: rollouts that are cut when they are written, and the controls that learn as many tokens elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter, ValidationError
from scored_by import scored
from torch import Tensor

from omniopd.composition import compose
from omniopd.errors import ConfigError
from omniopd.losses import reverse_kl
from omniopd.method import Method
from omniopd.parts.horizon import line, some_of
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import Rollout, ScoreQuery, Signal
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

DENSE = {"name": "opd", "form": "dense"}
PROMPTS = [tiny.prompt(f"What is {n} + 7?", f"p{n}") for n in range(4)]


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def built(student: Policy, **config: Any) -> Method:
    return compose(TypeAdapter(tagged(METHODS)).validate_python({"name": "esr", **config}), student, 0)


def esr(student: Policy, tokens: int | None, reduction: str = "term_mean", **horizon: Any) -> Method:
    return built(student, reduction=reduction, parts=[{"name": "horizon", "tokens": tokens, **horizon}])


def written(student: Policy, method: Method | None = None, step: int = 1) -> list[Rollout]:
    """The rows of a step as the sampler writes them."""
    prompts = dict(enumerate(PROMPTS))
    writings = method.writings(prompts, (), step) if method else {}
    found: dict[int, Rollout] = {}
    tiny.sampler(student).fill(prompts, step, found.__setitem__, writings)
    return [found[row] for row in prompts]


def learned(
    student: Policy, teacher: Policy, method: Method, rows: Sequence[Rollout]
) -> tuple[float, list[Tensor], Signal]:
    signal = method.read(rows, [scored(teacher, query) for query in method.audit(rows, 1)], 1)
    trainer = Trainer(student, OptimizerSettings(), method.objective)
    loss = trainer.accumulate(rows, signal)["loss"]
    return loss, [p.grad.clone() for p in trainer.trained if p.grad is not None], signal


def test_a_cut_rollout_is_the_beginning_of_the_whole_one_and_is_learned_alike(student: Policy, teacher: Policy) -> None:
    method = esr(student, 5)
    cut, whole = written(student, method), written(student)
    assert [row.ids for row in cut] == [row.ids[:5] for row in whole]
    assert max(map(len, whole)) > 5
    assert all(row.finish == "length" and student.end_id not in row.ids for row in cut if len(row) == 5)
    of_cut, of_whole = learned(student, teacher, method, cut), learned(student, teacher, method, whole)
    assert of_cut[0] == pytest.approx(of_whole[0], rel=1e-5)
    for one, other in zip(of_cut[1], of_whole[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert not any(mask[5:].any() for mask in of_whole[2].mask_BT)


@pytest.mark.parametrize("reduction", ["term_mean", "sum_seqmean"])
def test_a_horizon_behind_the_longest_response_is_the_plain_method(
    student: Policy, teacher: Policy, reduction: str
) -> None:
    far = esr(student, 10_000, reduction)
    rows = written(student, far)
    plain = built(student, reduction=reduction, **DENSE)
    assert rows == written(student)
    one, other = learned(student, teacher, far, rows), learned(student, teacher, plain, rows)
    assert one[0] == other[0] != 0
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_the_sum_form_does_not_shrink_with_the_horizon(student: Policy, teacher: Policy) -> None:
    rows = written(student)
    lengths = [1, 2, 5, 9, 16]
    sums = [learned(student, teacher, esr(student, n, "sum_seqmean"), rows)[0] for n in lengths]
    means = [learned(student, teacher, esr(student, n), rows)[0] for n in lengths]
    assert sums == sorted(sums)
    tokens = [sum(min(len(row), n) for row in rows) for n in lengths]
    for total, mean, count in zip(sums, means, tokens, strict=True):
        assert total == pytest.approx(mean * count / len(rows), rel=1e-5)


@pytest.mark.parametrize(("subset", "monotone"), [("tail_bucket", True), ("partial", False)])
def test_a_bare_sum_over_the_teachers_likeliest_ids_may_shrink_with_the_horizon(
    student: Policy, teacher: Policy, subset: str, monotone: bool
) -> None:
    """Its terms may be negative; with a bucket for the rest they are a divergence."""
    rows = written(student)
    config = {"reduction": "sum_seqmean", "support": "teacher", "k": 2, "subset": subset}
    methods = [built(student, **config, parts=[{"name": "horizon", "tokens": n}]) for n in range(1, 17)]
    sums = [learned(student, teacher, method, rows)[0] for method in methods]
    assert (sums == sorted(sums)) == monotone


@pytest.mark.parametrize("form", ["dense", "sampled"])
def test_no_gradient_reaches_logits_behind_the_horizon(student: Policy, teacher: Policy, form: str) -> None:
    """Exactly none, of whole rollouts that are learned up to it."""
    row = next(row for row in written(student) if len(row) > 5)
    method = built(student, form=form, parts=[{"name": "horizon", "tokens": 5}])
    student.splits_head = False  # so that the update sees the model's own logits
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        output.logits.retain_grad()
        seen.append(output.logits)

    with student.causal_lm.register_forward_hook(keep):
        learned(student, teacher, method, [row])
    (logits,) = seen
    assert logits.grad is not None and len(logits.grad) == 1
    first = len(row.prompt_ids) - 1
    assert logits.grad[0].abs().sum(-1).nonzero()[:, 0].tolist() == list(range(first, first + 5))


def test_a_cut_is_no_end_for_the_teacher_either(student: Policy) -> None:
    """It scores no end token behind the cut, so none is learned and nothing is punished."""
    method = esr(student, 5)
    cut = [row for row in written(student, method) if row.finish == "length"]
    queries = [query for query in method.audit(cut, 1) if isinstance(query, ScoreQuery)]
    assert queries and all(not query.closes and query.ids == cut[query.row].ids for query in queries)


def test_what_is_left_out_is_the_return_to_go() -> None:
    """Student [1,0,0], teacher [0,1,0], c(a) what is to come after first token a."""
    logits = torch.tensor([1.0, 0, 0], dtype=torch.float64, requires_grad=True)
    teacher, to_come = (torch.tensor(x, dtype=torch.float64) for x in ([0.0, 1, 0], [0.5, 0.2, 0.1]))
    cut, whole = reverse_kl(teacher, logits), reverse_kl(teacher, logits) + (logits.softmax(-1) * to_come).sum()
    of_cut, of_whole = torch.autograd.grad(cut, logits)[0], torch.autograd.grad(whole, logits)[0]
    assert of_cut.tolist() == pytest.approx([0.366309, -0.289125, -0.077184], abs=1e-6)
    assert of_whole.tolist() == pytest.approx([0.451782, -0.321264, -0.130517], abs=1e-6)
    p = logits.detach().softmax(-1)
    assert (of_whole - of_cut).tolist() == pytest.approx([0.085472, -0.032139, -0.053333], abs=1e-6)
    torch.testing.assert_close(of_whole - of_cut, p * (to_come - (p * to_come).sum()))


def test_one_token_an_end_at_the_horizon_and_no_response_are_finite_and_logged(
    student: Policy, teacher: Policy
) -> None:
    ends = tiny.rollout(student, [11, 12, student.end_id], finish="stop")
    rows = [ends, tiny.rollout(student, [14]), tiny.rollout(student, []), tiny.rollout(student, [15, 16, 17])]
    loss, gradient, signal = learned(student, teacher, esr(student, 3), rows)
    assert math.isfinite(loss)
    assert all(bool(g.isfinite().all()) for g in gradient)
    assert signal.mask_BT[0].all()  # the end token, too: nobody cut there
    assert signal.stats["horizon_cut_share"] == 0.25
    loss, _, signal = learned(student, teacher, esr(student, 1), rows)
    assert math.isfinite(loss)
    assert [int(mask.sum()) for mask in signal.mask_BT] == [1, 1, 0, 1]
    assert math.isfinite(learned(student, teacher, esr(student, 1), rows[2:3])[0])


@pytest.mark.parametrize("where", ["last", "random"])
def test_the_control_learns_as_many_tokens_elsewhere(student: Policy, teacher: Policy, where: str) -> None:
    method = esr(student, 5, where=where)
    rows = written(student, method)
    assert rows == written(student)
    _, _, signal = learned(student, teacher, method, rows)
    _, _, first = learned(student, teacher, esr(student, 5), rows)
    assert [int(mask.sum()) for mask in signal.mask_BT] == [int(mask.sum()) for mask in first.mask_BT]
    assert any(not torch.equal(a, b) for a, b in zip(signal.mask_BT, first.mask_BT, strict=True))


def test_which_tokens_are_kept() -> None:
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    assert some_of(mask, 3, "first", 0).tolist() == [True, True, False, False, False, False]
    assert some_of(mask, 3, "last", 0).tolist() == [False, False, False, True, True, True]
    chosen = [some_of(mask, 3, "random", seed) for seed in range(200)]
    assert all(int(one.sum()) == 3 and not one[2] for one in chosen)
    share = torch.stack(chosen).double().mean(0)[mask]
    assert share.tolist() == pytest.approx([0.6] * 5, abs=0.15)
    assert torch.equal(some_of(mask, 3, "random", 1), chosen[1])
    for where in ("first", "last", "random"):
        assert torch.equal(some_of(mask, 9, where, 0), mask)  # type: ignore[arg-type]
        assert not some_of(mask & False, 2, where, 0).any()  # type: ignore[arg-type]


def test_a_horizon_may_move_in_a_line(student: Policy) -> None:
    assert [line(10, 50, 4, k) for k in range(6)] == [10, 20, 30, 40, 50, 50]
    assert [line(50, 10, 3, k) for k in range(5)] == [50, 37, 23, 10, 10]
    assert line(100, 100, 0, 0) == 100
    method = esr(student, 4, start=12, steps=4)
    limits = [method.writings({3: PROMPTS[0]}, (), step)[3].max_tokens for step in (1, 3, 5, 9)]
    assert limits == [12, 8, 4, 4]


def test_held_out_answers_are_written_whole(student: Policy) -> None:
    student.end_ids = frozenset({student.vocabulary.size + 1})  # nothing ends by itself
    assert [len(row) for row in tiny.sampler(student).greedy(PROMPTS)] == [16] * 4
    assert [len(row) for row in written(student, esr(student, 5))] == [5] * 4


def test_the_default_is_the_published_one_but_for_the_mean(student: Policy) -> None:
    method = built(student)
    assert method.needs == {"logits", "same tokenizer"}
    assert method.objective.reduction == "term_mean"
    assert method.writings({0: PROMPTS[0]}, (), 1)[0].max_tokens == 100


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": 0}, "tokens"),
        ({"tokens": 9, "start": 4}, "needs start, tokens and steps"),
        ({"tokens": 9, "steps": 4}, "needs start, tokens and steps"),
        ({"tokens": None, "start": 4, "steps": 4}, "needs start, tokens and steps"),
    ],
)
def test_settings_that_make_no_horizon_are_refused(student: Policy, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        built(student, parts=[{"name": "horizon", **settings}])


def test_two_owners_of_the_length_are_refused(student: Policy) -> None:
    with pytest.raises(ConfigError, match=r"method\.parts: .*both own the length"):
        built(student, parts=["horizon", "adaptive_window"], form="sampled")


def test_a_random_choice_knows_nothing_of_other_rows(student: Policy, teacher: Policy) -> None:
    method = esr(student, 5, where="random")
    rows = written(student)
    _, _, signal = learned(student, teacher, method, rows)
    changed = [rows[0], replace(rows[1], ids=rows[1].ids[:3], logprobs=rows[1].logprobs[:3]), *rows[2:]]
    _, _, other = learned(student, teacher, method, changed)
    assert torch.equal(signal.mask_BT[2], other.mask_BT[2])
    assert torch.equal(signal.mask_BT[3], other.mask_BT[3])


def test_no_order_of_prompts_moves_a_random_choice(student: Policy, teacher: Policy) -> None:
    method = esr(student, 5, where="random")
    rows, order = written(student), [2, 0, 3, 1]
    one, other = (learned(student, teacher, method, some)[2] for some in (rows, [rows[i] for i in order]))
    assert all(torch.equal(one.mask_BT[row], other.mask_BT[order.index(row)]) for row in range(4))
