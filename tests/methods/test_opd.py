"""Plain on-policy distillation: what its settings refuse, and that both forms follow the teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter, ValidationError
from scored_by import scored, scores_of
from torch import Tensor

from omniopd.config import load_config
from omniopd.errors import ConfigError
from omniopd.methods.opd import Opd, OpdConfig
from omniopd.objective import Objective
from omniopd.registry import METHODS
from omniopd.settings import first_problem, tagged
from omniopd.types import Capabilities, Distributions, Rollout, ScoreQuery, Signal, Target, TokenScores
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

STUDENT_LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0], dtype=torch.float64)
TEACHER_LOGITS = torch.tensor([0.5, 2.0, 0.0, 1.0, -0.5], dtype=torch.float64)
REVERSE = [0.501084, -0.333471, -0.013820, -0.122677, -0.031115]  # d KL(p||q) / d s
FORWARD = [0.439638, -0.345842, 0.050791, -0.127228, -0.017359]  # d KL(q||p) / d s = p - q
FORMS: list[dict[str, Any]] = [
    {},
    {"estimator": "k3"},
    {"form": "dense"},
    {"form": "dense", "divergence": "forward"},
    {"form": "dense", "divergence": "jsd"},
    {"form": "dense", "support": "student", "k": 8},
    {"form": "dense", "support": "common", "k": 8},
    {"form": "dense", "support": "teacher", "k": 8},
]


@pytest.fixture(scope="module")
def teachers(tiny_folder: Callable[..., Path]) -> list[Policy]:
    """Two teachers of the student's tokenizer."""
    return [tiny.policy(tiny_folder(seed=seed)) for seed in (1, 2)]


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def method_of(student: Policy, **config: Any) -> Opd:
    return Opd(OpdConfig(**config), student, 0)


def rows_of(student: Policy) -> list[Rollout]:
    torch.manual_seed(4)
    ids = [torch.randint(5, 200, (length,)).tolist() for length in (11, 3, 6)]
    rows = [tiny.rollout(student, [*ids[0], student.end_id], finish="stop")]
    return [*rows, *(tiny.rollout(student, part) for part in ids[1:])]


def taught(student: Policy, teacher: Policy, **config: Any) -> tuple[Signal, dict[str, float], Tensor]:
    """The signal of a teacher, the loss by term and the gradient."""
    method, rows = method_of(student, **config), rows_of(student)
    signal = method.read(rows, [scored(teacher, query) for query in method.audit(rows, 1)], 1)
    trainer = Trainer(student, OptimizerSettings(), method.objective)
    terms = trainer.accumulate(rows, signal)
    gradient = torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])
    return signal, terms, gradient


# ------------------------------------------------------------------ settings


def built(**config: Any) -> Objective:
    return TypeAdapter(tagged(METHODS)).validate_python({"name": "opd", **config})  # type: ignore[no-any-return]


def test_the_default_is_the_sampled_form_with_k1_as_an_advantage() -> None:
    plain = built()
    assert isinstance(plain, OpdConfig)
    assert (plain.form, plain.estimator, plain.apply, plain.reduction) == ("sampled", "k1", "advantage", "term_mean")
    assert (plain.anchor.beta, plain.min_coverage) == (0, 0.5)


@pytest.mark.parametrize("config", FORMS)
def test_s11_a_config_that_is_written_out_is_read_back_the_same(config: dict[str, Any]) -> None:
    resolved = built(**config)
    assert TypeAdapter(tagged(METHODS)).validate_python(resolved.model_dump(mode="json")) == resolved


def test_what_is_a_loss_is_applied_as_one() -> None:
    assert [OpdConfig(**config).apply for config in FORMS[:3]] == ["advantage", "loss", "loss"]


@pytest.mark.parametrize(
    ("config", "field", "said"),
    [
        ({"form": "dense", "apply": "advantage"}, "apply", ["expected gradient is 0", "set apply: loss"]),
        (
            {"form": "dense", "support": "student", "apply": "advantage"},
            "apply",
            ["expected gradient is 0", "apply: loss"],
        ),
        ({"apply": "loss"}, "apply", ["the teacher does not occur", "apply: advantage", "k2"]),
        ({"estimator": "k2", "apply": "advantage"}, "apply", ["never negative", "apply: loss"]),
        ({"estimator": "k3", "apply": "advantage"}, "apply", ["never negative", "apply: loss"]),
        ({"form": "dense", "support": "teacher", "subset": "renorm", "k": 1}, "k", ["loss of 0", "raise k"]),
        ({"divergence": "forward"}, "divergence", ["form: dense"]),
        ({"form": "dense", "estimator": "k2"}, "estimator", ["form: sampled"]),
        ({"form": "dense", "beta": 0.3}, "beta", ["divergence: jsd"]),
        ({"form": "dense", "k": 8}, "k", ["not full"]),
        ({"form": "dense", "subset": "renorm"}, "subset", ["not full"]),
        ({"support": "student"}, "support", ["form: dense"]),
        ({"form": "dense", "divergence": "jsd", "beta": 1.5}, "beta", ["less than or equal to 1"]),
    ],
)
def test_o2_o7_what_carries_no_teacher_is_refused_by_name_with_its_mend(
    config: dict[str, Any], field: str, said: list[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        OpdConfig(**config)
    message = first_problem(caught.value, OpdConfig)
    assert message.startswith(f"{field}: ")
    assert all(part in message for part in said), message
    tree = {
        "student": {"path": "s"},
        "teacher": {"type": "replay", "path": "t"},
        "task": "arithmetic",
        "method": {"name": "opd", **config},
    }
    with pytest.raises(ConfigError, match=rf"method\.{field}: "):
        load_config(tree)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"form": "dense", "divergence": "jsd", "beta": 0.005}, "method.beta=0.005"),
        ({"form": "dense", "divergence": "jsd", "beta": 0.995}, "method.beta=0.995"),
        ({"form": "dense", "support": "student", "subset": "partial"}, "method.subset=partial"),
        ({"form": "dense", "support": "teacher", "subset": "renorm"}, "method.subset=renorm"),
        ({"form": "dense", "support": "common", "subset": "renorm"}, "method.subset=renorm"),
    ],
)
def test_o3_o8_what_is_known_to_end_badly_is_said(student: Policy, config: dict[str, Any], said: str) -> None:
    (caution,) = method_of(student, **config).cautions()
    assert caution.startswith(said)


@pytest.mark.parametrize("config", [*FORMS, {"form": "dense", "divergence": "jsd", "beta": 0.0}])
def test_sound_settings_need_no_word(student: Policy, config: dict[str, Any]) -> None:
    assert method_of(student, **config).cautions() == []


def test_r18_each_form_asks_for_what_it_reads(student: Policy) -> None:
    digest = student.vocabulary.digest
    server = Capabilities(score=True, topk=20, vocabulary=digest)
    weights = replace(server, logits=True, topk=len(student.tokenizer))
    lacking = {
        "sampled": method_of(student).lacking(server),
        "full": method_of(student, form="dense").lacking(server),
        "student": method_of(student, form="dense", support="student", k=8).lacking(server),
        "common": method_of(student, form="dense", support="common", k=8).lacking(server),
        "teacher": method_of(student, form="dense", support="teacher", k=20).lacking(server),
    }
    assert lacking == {
        "sampled": [],
        "full": ["logits"],
        "student": ["logits"],
        "common": ["logits"],
        "teacher": [],
    }
    (few,) = method_of(student, form="dense", support="teacher", k=21).lacking(server)
    assert "the 21 likeliest" in few and "it has 20: lower method.k" in few
    for config in FORMS:
        assert method_of(student, **config).lacking(weights) == []
        assert "same tokenizer" in method_of(student, **config).lacking(replace(weights, vocabulary="other"))


@pytest.mark.parametrize(
    ("config", "top", "whole"),
    [({}, 0, False), ({"form": "dense"}, 0, True), ({"form": "dense", "support": "teacher", "k": 8}, 8, False)],
)
def test_a_query_asks_for_no_more_than_is_read(student: Policy, config: dict[str, Any], top: int, whole: bool) -> None:
    query = method_of(student, **config).audit(rows_of(student), 1)[0]
    assert isinstance(query, ScoreQuery)
    assert (query.top, query.whole) == (top, whole)


# ------------------------------------------------------------------ the sampled form


def every_token(student: Policy, **config: Any) -> Tensor:
    """The values of a response that is each of five tokens once, with the toy's log-probs on both sides."""
    p, q = STUDENT_LOGITS.log_softmax(-1), TEACHER_LOGITS.log_softmax(-1)
    row = replace(tiny.rollout(student, [20, 21, 22, 23, 24]), logprobs=tuple(p.tolist()))
    method = method_of(student, **config)
    evidence = scores_of(method.audit([row], 1), lambda _, t: q[t].item())
    return method.read([row], evidence, 1).values_BT[0].double()


def test_golden_advantages(student: Policy) -> None:
    golden = [-1.518021, 0.981979, -0.518021, 0.981979, 0.481979]
    assert every_token(student).tolist() == pytest.approx(golden, abs=1e-6)


@pytest.mark.parametrize(
    ("config", "golden"), [({}, REVERSE), ({"estimator": "k2"}, REVERSE), ({"estimator": "k3"}, FORWARD)]
)
def test_golden_expected_gradient_of_each_estimator(
    student: Policy, config: dict[str, Any], golden: list[float]
) -> None:
    """Enumerated over the sampled token: k1 and k2 follow the reverse KL, k3 the forward KL."""
    logits = STUDENT_LOGITS.clone().requires_grad_()
    logp = logits.log_softmax(-1)
    expected = -(logp.exp().detach() * every_token(student, **config) * logp).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    assert gradient.tolist() == pytest.approx(golden, abs=1e-6)


def test_golden_discount_0_credits_a_token_with_its_own_log_ratio_only(student: Policy) -> None:
    """Two binary tokens, enumerated: the logit of a 1 is theta_0 first, then theta_1 after a 0 and theta_2 after a 1.

    Credited with the later log-ratios as well (discount 1), it would be the gradient of the KL of whole sequences.
    """
    theta = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64).requires_grad_()
    joint = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64)
    first, second = joint.sum(1), joint / joint.sum(1, keepdim=True)
    own, later, sequence = torch.zeros(3, dtype=torch.float64)
    for one, two in ((0, 0), (0, 1), (1, 0), (1, 1)):
        logits = torch.stack([theta[0], theta[1 + one]])
        logp = torch.nn.functional.logsigmoid(torch.where(torch.tensor([one, two]) == 1, logits, -logits))
        row = replace(tiny.rollout(student, [20 + one, 30 + two]), logprobs=tuple(logp.tolist()))
        method, teacher = method_of(student), (math.log(first[one]), math.log(second[one, two]))
        evidence = scores_of(method.audit([row], 1), lambda _, t, said=teacher: said[t])  # type: ignore[misc]
        advantage = method.read([row], evidence, 1).values_BT[0].double()
        p = logp.sum().exp()
        own = own + p.detach() * (advantage * logp).sum()
        later = later + p.detach() * (advantage.flip(0).cumsum(0).flip(0) * logp).sum()
        sequence = sequence + p * (joint[one, two].log() - logp.sum())  # - KL(p || q) of both tokens
    gradients = [torch.autograd.grad(total, theta, retain_graph=True)[0] for total in (own, later, sequence)]
    assert gradients[0].tolist() == pytest.approx([0.13379151, 0.11932377, -0.06295302], abs=1e-7)
    assert gradients[1].tolist() == pytest.approx([0.16908890, 0.11932377, -0.06295302], abs=1e-7)
    assert gradients[1].tolist() == pytest.approx(gradients[2].tolist(), abs=1e-7)


def test_golden_a_baseline_keeps_the_mean_and_need_not_lower_the_variance(student: Policy) -> None:
    """Of the one-sample gradient, by its trace: why no baseline is taken off the advantages."""
    p, advantage = STUDENT_LOGITS.softmax(-1), every_token(student)
    score = torch.eye(5, dtype=torch.float64) - p  # grad log p(y), row by row

    def moments(each: Tensor) -> tuple[Tensor, float]:
        mean = p @ (each[:, None] * score)
        return mean, float(p @ (each[:, None] * score - mean).square().sum(1))

    baseline = (p * advantage).sum()
    (plain, spread), (shifted, wider) = moments(advantage), moments(advantage - baseline)
    assert float(baseline) == pytest.approx(-0.6280302556, abs=1e-7)
    torch.testing.assert_close(plain, shifted, atol=1e-12, rtol=0)
    assert (spread, wider) == pytest.approx((0.284402, 0.545929), abs=1e-6)


@pytest.mark.parametrize("config", [{}, {"estimator": "k2"}, {"estimator": "k3"}])
def test_a_token_that_both_find_equally_likely_has_exactly_no_advantage(
    student: Policy, config: dict[str, Any]
) -> None:
    rows, method = rows_of(student), method_of(student, **config)
    signal = method.read(rows, scores_of(method.audit(rows, 1), lambda row, t: rows[row].logprobs[t]), 1)
    assert bool(torch.cat(signal.mask_BT).all())
    assert not bool(torch.cat(signal.values_BT).any())


def test_a_hole_costs_its_own_token(student: Policy) -> None:
    rows = rows_of(student)
    method = method_of(student)
    evidence = scores_of(method.audit(rows, 1), lambda row, t: math.nan if t == 1 else -math.inf if t == 2 else -1.0)
    signal = method.read(rows, evidence, 1)
    assert signal.rejects == {"missing": 3, "infinite": 3}
    for row, values, mask in zip(rows, signal.values_BT, signal.mask_BT, strict=True):
        said = [t for t in range(len(row)) if t not in (1, 2)]
        assert mask.nonzero()[:, 0].tolist() == said
        assert values[said].tolist() == pytest.approx([-1.0 - row.logprobs[t] for t in said])
        assert values[1:3].tolist() == [0, 0]


@pytest.mark.parametrize("config", [{}, {"form": "dense"}, {"form": "dense", "support": "teacher", "k": 8}])
def test_r4_other_ids_than_those_sampled_are_a_counted_hole(
    student: Policy, teachers: list[Policy], config: dict[str, Any]
) -> None:
    rows, method = rows_of(student), method_of(student, **config)
    evidence = [scored(teachers[0], query) for query in method.audit(rows, 1)]
    evidence[1] = replace(evidence[1], ids=(*evidence[1].ids[:-1], 7))
    signal = method.read(rows, evidence, 1)
    assert (signal.drops, signal.rejects) == ({"retokenized": 1}, {"retokenized": len(rows[1])})
    assert [bool(mask.any()) for mask in signal.mask_BT] == [True, False, True]


def test_distributions_that_did_not_come_are_a_counted_hole(student: Policy, teachers: list[Policy]) -> None:
    rows = rows_of(student)
    for config in ({"form": "dense"}, {"form": "dense", "support": "teacher", "k": 8}):
        method = method_of(student, **config)
        evidence = [scored(teachers[0], query) for query in method.audit(rows, 1)]
        bare = [replace(found, distributions=None, top=()) for found in evidence]
        signal = method.read(rows, bare, 1)
        assert (signal.drops, signal.coverage) == ({"missing": 3}, 0)
        assert signal.rejects == {"missing": sum(map(len, rows))}
    evidence[0] = replace(evidence[0], top=({}, *evidence[0].top[1:]))
    signal = method.read(rows, evidence, 1)
    assert (signal.drops, signal.rejects) == ({}, {"missing": 1})
    assert signal.mask_BT[0].tolist() == [False, *[True] * 11]


# ------------------------------------------------------------------ the dense form


def target_of(student: Policy, **config: Any) -> Target:
    """The target of a response of one token, of a teacher that gives the toy's logits."""
    row = tiny.rollout(student, [3])
    method = method_of(student, form="dense", **config)
    (query,) = method.audit([row], 1)
    q = TEACHER_LOGITS.log_softmax(-1).tolist()
    best = sorted(range(5), key=lambda v: -q[v])[: query.top]  # type: ignore[union-attr]
    given = Distributions(TEACHER_LOGITS[None], lambda hidden: hidden)
    found = TokenScores(query, (3,), (None,), (q[3],), ({v: q[v] for v in best},), given)  # type: ignore[arg-type]
    (target,) = method.read([row], [found], 1).targets
    assert target is not None
    return target


@pytest.mark.parametrize(
    ("config", "value", "gradient"),
    [
        ({}, 0.6280302556, REVERSE),
        ({"divergence": "forward"}, 0.5385717422, FORWARD),
        ({"divergence": "jsd"}, 0.1363653448, [0.103444, -0.076067, 0.006175, -0.027984, -0.005568]),
        ({"divergence": "jsd", "beta": 0.1}, 0.0481910567, None),
        ({"divergence": "jsd", "beta": 0.9}, 0.0540503123, None),
        ({"divergence": "jsd", "beta": 0.0}, 0.5385717422, FORWARD),
        ({"divergence": "jsd", "beta": 1.0}, 0.6280302556, REVERSE),
        (
            {"support": "student", "k": 2},
            0.5726264868,
            [0.532277, -0.321996, -0.114929, -0.069708, -0.025644],
        ),
        ({"support": "student", "k": 2, "divergence": "jsd"}, 0.1210515657, None),
        (
            {"support": "student", "k": 2, "subset": "partial"},
            0.6512867449,
            [0.617403, -0.290680, -0.178570, -0.108308, -0.039844],
        ),
        (
            {"support": "student", "k": 2, "subset": "partial_sg"},
            0.6512867449,
            [0.487990, -0.338288, -0.081819, -0.049626, -0.018256],
        ),
        ({"support": "student", "k": 2, "subset": "renorm"}, 0.7157980370, [0.49153, -0.49153, 0, 0, 0]),
        ({"support": "common", "k": 2, "subset": "renorm"}, 0.0, [0.0] * 5),
        ({"support": "common", "k": 3, "subset": "renorm"}, 0.7157980370, [0.49153, -0.49153, 0, 0, 0]),
        ({"support": "teacher", "k": 5}, 0.6280302556, REVERSE),
    ],
)
def test_golden_divergences(
    student: Policy, config: dict[str, Any], value: float, gradient: list[float] | None
) -> None:
    logits = STUDENT_LOGITS.clone()[None].requires_grad_()
    found = target_of(student, **config).divergence(logits, torch.tensor([3]), 0)
    assert found.item() == pytest.approx(value, abs=1e-9)
    (slope,) = torch.autograd.grad(found.sum(), logits)
    if gradient is not None:
        assert slope[0].tolist() == pytest.approx(gradient, abs=6e-7)


# ------------------------------------------------------------------ both forms, through the update


@pytest.mark.parametrize("config", FORMS)
def test_o6_r17_another_teacher_gives_another_loss_and_another_gradient(
    student: Policy, teachers: list[Policy], config: dict[str, Any]
) -> None:
    one, other = (taught(student, teacher, **config) for teacher in teachers)
    assert one[1]["loss"] != pytest.approx(other[1]["loss"], rel=1e-4)
    assert (one[2] - other[2]).norm() > 0.1 * one[2].norm() > 0


@pytest.mark.parametrize("config", FORMS)
def test_eight_1_o4_a_student_that_is_its_own_teacher_has_no_loss_and_no_gradient(
    student: Policy, config: dict[str, Any]
) -> None:
    signal, terms, gradient = taught(student, student, **config)
    assert signal.coverage == 1
    assert abs(terms["loss"]) < 1e-6
    assert gradient.abs().max() < 1e-5
    assert signal.stats["reverse_kl_k1"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("config", FORMS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_o12_however_the_step_is_cut_it_is_one_loss_and_one_gradient(
    student: Policy, teachers: list[Policy], config: dict[str, Any], tokens: int
) -> None:
    _, whole, gradient = taught(student, teachers[0], **config)
    student.settings = student.settings.model_copy(update={"micro_batch_tokens": tokens})
    _, cut, of_parts = taught(student, teachers[0], **config)
    assert cut["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    torch.testing.assert_close(of_parts, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [config for config in FORMS if "form" in config])
def test_an_update_brings_the_student_nearer_to_its_teacher(
    llama_folder: Path, teachers: list[Policy], config: dict[str, Any]
) -> None:
    """Descent on one batch lowers the very divergence that the form names."""
    student = tiny.policy(llama_folder)
    rows, method = rows_of(student), method_of(student, **config)
    trainer = Trainer(student, OptimizerSettings(learning_rate=1e-3), method.objective)
    signal = method.read(rows, [scored(teachers[0], query) for query in method.audit(rows, 1)], 1)
    losses = [trainer.update(rows, signal)["loss"] for _ in range(6)]
    assert losses[5] < 0.98 * losses[0]


def test_reading_is_pure(student: Policy, teachers: list[Policy]) -> None:
    rows, method = rows_of(student), method_of(student)
    evidence: Sequence[TokenScores] = [scored(teachers[0], query) for query in method.audit(rows, 1)]
    one, other = method.read(rows, evidence, 1), method.read(rows, evidence, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.values_BT, other.values_BT, strict=True))
    assert (one.stats, one.audits) == (other.stats, other.audits)
