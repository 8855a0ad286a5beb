"""OPD+: the advantage of each divergence is its gradient, and that of the usual practice is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from pydantic import TypeAdapter
from scored_by import scores_of
from torch import Tensor

from omniopd.composition import compose
from omniopd.draft import Draft
from omniopd.errors import ConfigError
from omniopd.method import Method
from omniopd.parts.f_divergence import Name, exact, stopped
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import Signal
from students.policy import Policy

NAMES: tuple[Name, ...] = get_args(Name)
STUDENT = torch.tensor([0.3, -0.2, 0.8, 0.1], dtype=torch.float64)
TEACHER = torch.tensor([1.0, 0.2, -0.5, 0.4], dtype=torch.float64)
GOLDEN: dict[Name, tuple[float, list[float]]] = {  # the divergence, its gradient for the student's logits
    "reverse_kl": (0.327899, [-0.229368, -0.094455, 0.431227, -0.107404]),
    "forward_kl": (0.246125, [-0.204733, -0.053406, 0.304244, -0.046105]),
    "jsd": (0.067599, [-0.050002, -0.016661, 0.083487, -0.016824]),
    "hellinger": (0.139171, [-0.104042, -0.035020, 0.174910, -0.035848]),
    "chi2": (0.429224, [-0.474871, -0.062066, 0.553466, -0.016529]),
    "total_variation": (0.304244, [-0.099337, -0.060251, 0.240917, -0.081330]),
}


def f(u: Tensor, name: Name) -> Tensor:
    """The divergences by their definitions."""
    return {
        "reverse_kl": lambda: -u.log(),
        "forward_kl": lambda: u * u.log(),
        "jsd": lambda: 0.5 * (u * u.log() - (1 + u) * ((1 + u) / 2).log()),
        "hellinger": lambda: (u.sqrt() - 1) ** 2,
        "chi2": lambda: (u - 1) ** 2,
        "total_variation": lambda: 0.5 * (u - 1).abs(),
    }[name]()


def truth(name: Name) -> tuple[Tensor, Tensor]:
    """The divergence and its gradient, by autograd over the four outcomes."""
    logits = STUDENT.clone().requires_grad_()
    p = logits.softmax(-1)
    value = (p * f(TEACHER.softmax(-1) / p, name)).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


def estimated(advantage: Tensor) -> Tensor:
    """`-E_p[A grad log p]`, the expectation over the four outcomes."""
    p = STUDENT.softmax(-1)
    score = torch.eye(4, dtype=torch.float64) - p  # grad log p(v), row by row
    return -(p * advantage) @ score


def lr() -> Tensor:
    return TEACHER.log_softmax(-1) - STUDENT.log_softmax(-1)


def built(
    student: Policy, parts: Sequence[Any] = (), method: str = "opd_plus", base: Any = None, **part: Any
) -> Method:
    config = {"name": method, "parts": [{"name": "f_divergence", **part}, *parts], **(base or {})}
    return compose(TypeAdapter(tagged(METHODS)).validate_python(config), student, 0)


def advantages(method: Method, student: Policy, ratios: Sequence[float]) -> Signal:
    """The signal of a rollout whose tokens have these log-ratios."""
    row = tiny.rollout(student, list(range(20, 20 + len(ratios))))
    scores = scores_of(method.audit([row], 1), lambda _, t: row.logprobs[t] + ratios[t])
    return method.read([row], scores, 1)


# ------------------------------------------------------------------ the closed forms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("center", [True, False])
def test_the_expected_gradient_is_that_of_the_divergence(name: Name, center: bool) -> None:
    value, gradient = truth(name)
    assert float(value) == pytest.approx(GOLDEN[name][0], abs=1e-6)
    assert gradient.tolist() == pytest.approx(GOLDEN[name][1], abs=1e-6)
    torch.testing.assert_close(estimated(exact(lr(), name, center=center)), gradient, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("name", "cosine"), zip(NAMES, [1.0, -0.982, 0.843, 0.853, 0.038, 0.518], strict=True), ids=lambda name: str(name)
)
def test_without_the_gradient_of_f_the_direction_is_another(name: Name, cosine: float) -> None:
    found = torch.cosine_similarity(estimated(stopped(lr(), name)), truth(name)[1], dim=0)
    assert float(found) == pytest.approx(cosine, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "usual", "ours"),
    [
        ("reverse_kl", 0.693147, -0.306853),
        ("forward_kl", -1.386294, 2),
        ("jsd", -0.084950, 0.202733),
        ("hellinger", -0.171573, 0.414214),
        ("chi2", -1, 3),
        ("total_variation", -0.5, 0.5),
    ],
)
def test_the_sheets_points_where_the_teacher_gives_twice_as_much(name: Name, usual: float, ours: float) -> None:
    twice = torch.tensor(2.0, dtype=torch.float64).log()
    assert float(stopped(twice, name)) == pytest.approx(usual, abs=1e-6)
    assert float(exact(twice, name, center=False)) == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_where_both_agree_there_is_no_advantage(name: Name) -> None:
    assert float(exact(torch.tensor(0.0), name)) == 0
    assert float(stopped(torch.tensor(0.0), name)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_token_that_the_teacher_likes_better_is_never_worth_less(name: Name) -> None:
    grid = torch.linspace(-8, 8, 400, dtype=torch.float64)
    assert bool((exact(grid, name).diff() >= 0).all())
    assert bool((exact(grid, name)[grid < 0] <= 0).all())
    assert not bool((stopped(grid, "forward_kl").diff() >= 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_small_ratios_lose_no_digits(name: Name) -> None:
    """`exp` and then minus 1 would give 0 here."""
    slope = {"reverse_kl": 1, "forward_kl": 1, "jsd": 0.25, "hellinger": 0.5, "chi2": 2}.get(name)
    if slope is not None:
        tiny_ratio = torch.tensor(1e-7, dtype=torch.float64)
        assert float(exact(tiny_ratio, name)) == pytest.approx(slope * 1e-7, rel=1e-5, abs=0)


def test_the_centred_weight_of_the_reverse_kl_is_the_log_ratio_to_the_last_bit() -> None:
    """Not `(lr - 1) + 1`, which in fp32 makes 1e-8 a zero and changes 1e-3."""
    ratios = torch.tensor([1e-8, 1e-3, -7.5])
    assert torch.equal(exact(ratios, "reverse_kl"), ratios)
    rebuilt = exact(ratios, "reverse_kl", center=False) + 1
    assert rebuilt[0] == 0 and rebuilt[1] != ratios[1]


def test_a_token_that_the_teacher_finds_impossible() -> None:
    never = torch.tensor(-math.inf, dtype=torch.float64)
    centred = {name: float(exact(never, name)) for name in NAMES}
    assert centred["reverse_kl"] == -math.inf
    assert [centred[name] for name in NAMES[1:]] == pytest.approx([-1, -0.5 * math.log(2), -1, -1, -0.5])
    assert all(math.isfinite(float(stopped(never, name))) for name in NAMES[1:])
    clipped = never.clamp(-6, 6)
    assert float(exact(clipped, "reverse_kl")) == -6
    assert float(exact(clipped, "forward_kl")) == pytest.approx(math.expm1(-6))


# ------------------------------------------------------------------ the part


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [False, True])
def test_the_signal_is_the_closed_form_of_the_clipped_ratios(student: Policy, name: Name, stop: bool) -> None:
    ratios = [0.5, -1.0, 9.0, -9.0, 0.0]
    signal = advantages(built(student, divergence=name, clip=6.0, stop_gradient=stop), student, ratios)
    clipped = torch.tensor(ratios, dtype=torch.float64).clamp(-6, 6)
    expected = stopped(clipped, name) if stop else exact(clipped, name)
    torch.testing.assert_close(signal.values_BT[0], expected.float(), rtol=1e-5, atol=1e-6)
    assert signal.stats["clip_share"] == pytest.approx(0.4)


@pytest.mark.parametrize(("center", "most"), [(True, 6.0), (False, 7.0)])
def test_the_largest_advantage_of_the_reverse_kl(student: Policy, center: bool, most: float) -> None:
    signal = advantages(built(student, center=center), student, [50.0, -50.0, 1.0])
    assert float(signal.values_BT[0].abs().max()) == pytest.approx(most)


def test_the_default_without_a_clip_is_plain_to_the_last_bit_and_small_ratios_stay(student: Policy) -> None:
    ratios = [1e-8, 1e-3, 30.0]
    plain = advantages(compose(METHODS.get("opd").Config(), student, 0), student, ratios)
    ours = advantages(built(student, clip=math.inf, stop_gradient=True), student, ratios)
    assert torch.equal(plain.values_BT[0], ours.values_BT[0])
    wide = advantages(built(student, clip=1e9), student, ratios)  # not left out, and yet the same bits
    assert torch.equal(plain.values_BT[0], wide.values_BT[0])
    assert float(wide.values_BT[0][0]) != 0


def test_impossible_tokens_are_left_out_and_counted_as_in_plain_distillation(student: Policy) -> None:
    found = [
        advantages(method, student, [0.5, -math.inf])
        for method in (built(student, divergence="chi2"), compose(METHODS.get("opd").Config(), student, 0))
    ]
    assert [signal.mask_BT[0].tolist() for signal in found] == [[True, False]] * 2
    assert [signal.rejects["infinite"] for signal in found] == [1, 1]
    assert bool(found[0].values_BT[0].isfinite().all())


def test_rows_that_learn_by_likelihood_are_left_alone(student: Policy) -> None:
    method: Any = built(student, divergence="chi2")
    signal = advantages(compose(METHODS.get("opd").Config(), student, 0), student, [0.5, 2.0])
    row = tiny.rollout(student, [20, 21])
    for likelihood, changed in ((set[int](), True), ({0}, False)):
        draft = Draft.of(signal, [row], [], 1, lambda _: None)
        draft.likelihood = likelihood
        method.parts[0].apply(draft)
        assert bool((draft.advantage[0] != signal.values_BT[0].double()).any()) == changed


def test_an_empty_step_is_no_trouble(student: Policy) -> None:
    assert built(student).read([], [], 1).stats["clip_share"] is None


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize("part", ["kl_stop", "trajectory_filter", "teachability", "rock_tokens", "behaviour_blend"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl"])
def test_an_advantage_with_a_constant_needs_every_token(student: Policy, part: str, divergence: str) -> None:
    with pytest.raises(ConfigError, match=r"set f_divergence\.center=true"):
        built(student, [part], center=False, divergence=divergence)
    built(student, [part], divergence=divergence)
    built(student, [part], center=False, divergence="jsd")  # which has no constant


def test_a_neutral_part_beside_it_is_none(student: Policy) -> None:
    method = built(student, [{"name": "teachability", "rho": 1.0}], center=False)
    assert [part.config.name for part in method.parts] == ["f_divergence"]  # type: ignore[attr-defined]


def test_an_advantage_with_a_constant_needs_fresh_rollouts(student: Policy) -> None:
    assert "fresh" in built(student, center=False).needs
    assert "fresh" not in built(student, center=False, divergence="chi2").needs | built(student).needs


def test_whitening_is_refused(student: Policy) -> None:
    with pytest.raises(ConfigError, match="'f_divergence' and 'whiten' can't be joined: whitening erases"):
        built(student, ["whiten"])


def test_the_dense_form_is_refused(student: Policy) -> None:
    with pytest.raises(ConfigError, match="form: dense has none"):
        built(student, base={"form": "dense"})


@pytest.mark.parametrize("base", [{"estimator": "k3"}, {"name": "omniopd"}])
def test_advantages_that_are_no_log_ratios_are_refused(student: Policy, base: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="made from log-ratios, which this method's advantages are not"):
        built(student, method="opd", base=base)


def test_a_lag_is_refused_with_a_constant(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from omniopd.fitting import check_method

    train = SimpleNamespace(rollouts_per_prompt=1, max_lag=1)
    config: Any = SimpleNamespace(method=SimpleNamespace(name="opd_plus"), train=train)
    method: Any = SimpleNamespace(needs=frozenset({"fresh"}), writes=frozenset(), candidates=0, one_process=False)
    ranks: Any = SimpleNamespace(count=1)
    sampler: Any = SimpleNamespace(offers=frozenset())
    with pytest.raises(ConfigError, match="set train.max_lag=0"):
        check_method(config, method, sampler, ranks, [])
    train.max_lag = 0
    check_method(config, method, sampler, ranks, [])
