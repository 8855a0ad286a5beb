"""SG-OPD, the reconstruction: the gate against its golden numbers, and the teacher's rollouts of its first phase."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from answered import Say, begun, built, heard
from torch import Tensor

from omniopd.composition import keeps_initial
from omniopd.errors import ConfigError
from omniopd.methods.sg_opd import PHASED
from omniopd.parts.sign_gate import agreement, coefficients, gated
from omniopd.parts.teacher_rollouts import falls_on, linear_share
from omniopd.types import AnswerQuery, Evidence, Prompt, Reply, Rollout, Signal, TokenScores
from students.policy import Policy
from students.scoring import score
from students.trainer import OptimizerSettings, Trainer

GATE = {"name": "sign_gate"}
MIX = {"name": "teacher_rollouts"}
NEUTRAL = [{"name": "sign_gate", "lam_hi": 1, "lam_lo": 1}, {"name": "teacher_rollouts", "share": 0}]


class View:
    """The student for `measure`."""

    def __init__(self, student: Policy) -> None:
        self.student = student

    def initial_logprobs(self, rollouts: list[Rollout]) -> list[tuple[float, ...]]:
        return [logprobs for logprobs, _ in score(self.student, [(r.prompt_ids, r.ids) for r in rollouts])]


@pytest.fixture(scope="module")
def initial(tiny_folder: Callable[..., Path]) -> Policy:
    return tiny.policy(tiny_folder(seed=2))


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def asked(name: str, reference: str | None = "19") -> Prompt:
    return replace(tiny.prompt(f"What is {name}?", name), reference=reference)


def rows_of(student: Policy) -> list[Rollout]:
    """A right rollout, a wrong one, and one of which nobody knows."""
    torch.manual_seed(4)
    ids = [torch.randint(5, 200, (length,)).tolist() for length in (13, 9, 8)]
    ended = [[*part, student.end_id] for part in ids]
    prompts = [asked("right"), asked("wrong"), asked("unknown", None)]
    return [tiny.rollout(student, part, prompt, "stop") for part, prompt in zip(ended, prompts, strict=True)]


def right(prompt: Prompt, text: str) -> bool:
    return prompt.id == "right"


def read(
    student: Policy, teacher: Policy, *parts: dict[str, Any], check: Any = right, step: int = 1, **config: Any
) -> Signal:
    rows = rows_of(student)
    method = built(student, {"name": "opd", "parts": list(parts), **config}, check)
    return method.read(rows, heard(method, teacher, rows), step)


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


# ------------------------------------------------------------------ the gate


def test_golden_advantages() -> None:
    t, s, r = math.log(0.6), math.log(0.3), math.log(0.2)
    agrees = torch.tensor([True])
    found = {lam: gated(one(t - s), one(t - r), one(lam), agrees).item() for lam in (1.0, 1.8, 0.5)}
    assert found == pytest.approx({1.0: 0.693147, 1.8: 1.572037, 0.5: 0.143841}, abs=1e-6)
    assert gated(one(t - s), one(t - s), one(1.8), agrees).item() == pytest.approx(1.247665, abs=1e-6)


def test_a_coefficient_of_one_keeps_every_bit() -> None:
    torch.manual_seed(0)
    t, s, r = (-torch.rand(3, 10_000, dtype=torch.float64) * 20).unbind()
    ones = torch.ones(10_000, dtype=torch.float64)
    assert torch.equal(gated(t - s, t - r, ones, t > s), t - s)
    assert torch.equal(gated(t - s, torch.full_like(t, math.inf), ones, t > s), t - s)
    assert gated(one(0.5), one(math.nan), one(1.8), torch.tensor([True])).item() == 0.5  # a hole in R moves nothing


def test_the_form_with_two_differences_against_r_does_not_keep_them() -> None:
    """Of float32 triples of uniform probabilities more than a quarter are off: the sheet's 29%."""
    torch.manual_seed(0)
    t, s, r = torch.rand(3, 100_000).log().unbind()
    assert float(((t - r) - (s - r) != t - s).double().mean()) == pytest.approx(0.29, abs=0.015)
    assert torch.equal(gated(t - s, t - r, torch.ones(100_000), t > s), t - s)


def test_an_agreeing_token_never_turns_round() -> None:
    ratio, away = torch.tensor([0.5, -0.5, 0.5]), torch.tensor([-9.0, 9.0, -9.0])
    agrees = torch.tensor([True, True, False])
    assert gated(ratio, away, torch.full((3,), 1.8), agrees).tolist() == pytest.approx([0.0, 0.0, -6.7])
    torch.manual_seed(0)
    r, away = torch.randn(2, 1000, dtype=torch.float64).unbind()
    moved = gated(r, away, torch.full((1000,), 1.8, dtype=torch.float64), r > 0)
    assert not bool(((moved * r < 0) & (r > 0)).any())
    assert bool((gated(r, r, torch.full((1000,), 0.3, dtype=torch.float64), r > 0).sign() == r.sign()).all())


def test_the_other_outcome_swaps_who_agrees_outside_the_band() -> None:
    ratio = torch.tensor([2.0, -2.0, 0.005, -0.005, 0.0], dtype=torch.float64)
    lams = [coefficients(ratio, agreement(ratio, outcome), 1.8, 0.5, 0.01).tolist() for outcome in (True, False)]
    assert lams == [[1.8, 0.5, 1.0, 1.0, 1.0], [0.5, 1.8, 1.0, 1.0, 1.0]]


def test_verdicts_decide_and_an_unknown_one_leaves_the_row_alone(student: Policy, teacher: Policy) -> None:
    plain = read(student, teacher)
    signal = read(student, teacher, GATE | {"lam_lo": 0.25})
    lams = [coefficients(v.double(), agreement(v, outcome), 1.8, 0.25, 0.01)
            for v, outcome in zip(plain.values_BT, (True, False), strict=False)]  # fmt: skip
    for row, lam in enumerate(lams):
        assert {1.8, 0.25} <= set(lam.tolist())
        torch.testing.assert_close(signal.values_BT[row], (plain.values_BT[row] * lam).float())
    assert torch.equal(signal.values_BT[2], plain.values_BT[2])
    assert signal.stats["gate_unknown"] == 1.0
    shares = [float(agreement(plain.values_BT[row], row == 0).double().mean()) for row in (0, 1)]
    assert [signal.stats["gate_agree_right"], signal.stats["gate_agree_wrong"]] == pytest.approx(shares)


def test_a_verifier_that_can_not_decide_is_no_verdict(student: Policy, teacher: Policy) -> None:
    """One that times out says nothing; that is not the same as wrong."""
    plain, signal = read(student, teacher), read(student, teacher, GATE, check=lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(plain.values_BT, signal.values_BT, strict=True))
    assert signal.stats["gate_unknown"] == 3.0
    method = built(student, {"name": "opd", "parts": [PHASED]}, lambda *_: None)
    rows, _ = begun(method, student, [asked("12 + 7")] * 4, say)
    assert all(len(rollout) for rollout in rows)


def test_tokens_that_the_teacher_did_not_score_are_masked_and_no_ratio_of_zero(
    student: Policy, teacher: Policy
) -> None:
    rows = rows_of(student)
    method = built(student, {"name": "opd", "parts": [GATE]}, right)
    found = [s for s in heard(method, teacher, rows) if isinstance(s, TokenScores)]
    whole = method.read(rows, found, 1)
    holed = [replace(found[0], logprobs=(*found[0].logprobs[:3], math.nan, *found[0].logprobs[4:])), *found[1:]]
    signal = method.read(rows, holed, 1)
    others = [t for t in range(len(rows[0])) if t != 3]
    assert signal.mask_BT[0].tolist() == [t != 3 for t in range(len(rows[0]))]
    assert torch.equal(signal.values_BT[0][others], whole.values_BT[0][others])
    assert signal.rejects["missing"] == 1
    ratio = read(student, teacher).values_BT[0][others]
    assert signal.stats["gate_agree_right"] == pytest.approx(float((ratio > 0).double().mean()))


@pytest.mark.parametrize("outcome", [True, False])
def test_steps_all_right_or_all_wrong_have_one_share(student: Policy, teacher: Policy, outcome: bool) -> None:
    stats = read(student, teacher, GATE, check=lambda *_: outcome).stats
    names = "gate_agree_right", "gate_agree_wrong"
    known, missing = names if outcome else names[::-1]
    assert 0 < (stats[known] or 0) < 1 and stats[missing] is None


def test_a_teacher_that_is_the_student_gives_nothing_to_gate(student: Policy) -> None:
    rows = rows_of(student)
    method = built(student, {"name": "opd", "parts": [GATE | {"band": 0}]}, right)
    same = [replace(s, logprobs=rows[s.query.row].logprobs) for s in heard(method, student, rows)]  # type: ignore[type-var, union-attr]
    assert not bool(torch.cat(method.read(rows, same, 1).values_BT).any())


def test_the_untrained_student_as_reference(student: Policy, teacher: Policy, initial: Policy) -> None:
    gate = GATE | {"reference": "init", "lam_lo": 0.5}
    method = built(student, {"name": "opd", "parts": [gate]}, right)
    assert method.keeps_initial and "same tokenizer" in method.needs
    rows = rows_of(student)
    found = heard(method, teacher, rows)
    facts = method.measure(dict(enumerate(rows)), found, View(initial))  # type: ignore[arg-type]
    rows = [replace(r, facts={name: tuple(n) for name, n in facts[row].items()}) for row, r in enumerate(rows)]
    signal, plain = method.read(rows, found, 1), read(student, teacher)
    for row in (0, 1):
        r = plain.values_BT[row].double()
        logq = torch.tensor([s.logprobs for s in found if isinstance(s, TokenScores)][row])
        away = logq - tiny.dense(initial.model, rows[row].prompt_ids, rows[row].ids)[0]
        agrees = agreement(r, row == 0)
        expected = gated(r, away.double(), coefficients(r, agrees, 1.8, 0.5, 0.01), agrees)
        torch.testing.assert_close(signal.values_BT[row].double(), expected, atol=2e-5, rtol=1e-4)
    assert method.read(rows_of(student), found, 1).stats["gate_unknown"] == 3.0  # nobody measured


def test_only_the_untrained_student_as_reference_is_kept(student: Policy) -> None:
    config = built(student, {"name": "opd", "parts": [GATE | {"reference": "init"}]}).objective
    assert keeps_initial(config)
    assert not keeps_initial(built(student, {"name": "opd", "parts": [GATE]}).objective)
    idle = GATE | {"reference": "init", "lam_hi": 1}
    assert not keeps_initial(built(student, {"name": "opd", "parts": [idle]}).objective)


@pytest.mark.parametrize("reference", ["old", "init"])
def test_the_neutral_gate_is_plain_for_both_references(student: Policy, teacher: Policy, reference: str) -> None:
    plain, signal = read(student, teacher), read(student, teacher, NEUTRAL[0] | {"reference": reference})
    assert all(torch.equal(a, b) for a, b in zip(plain.values_BT, signal.values_BT, strict=True))


def test_the_random_gate_keeps_the_coefficients_of_each_rollout(student: Policy, teacher: Policy) -> None:
    gate = GATE | {"lam_lo": 0.25, "band": 0}
    plain, real = read(student, teacher), read(student, teacher, gate)
    random = read(student, teacher, gate | {"placebo": "random"})
    for row in (0, 1):
        ratio = plain.values_BT[row].double()
        lams = [(signal.values_BT[row] / ratio).tolist() for signal in (real, random)]
        assert sorted(lams[0]) == pytest.approx(sorted(lams[1]), rel=1e-5) and lams[0] != pytest.approx(lams[1])
    assert read(student, teacher, gate | {"placebo": "random"}).values_BT[0].tolist() == random.values_BT[0].tolist()
    assert real.stats["gate_agree_right"] == random.stats["gate_agree_right"]


def test_the_random_gate_draws_by_prompt_whatever_the_order_of_rows(student: Policy, teacher: Policy) -> None:
    gate = {"name": "opd", "parts": [GATE | {"lam_lo": 0.25, "placebo": "random"}]}
    rows, method = rows_of(student), built(student, gate, right)
    there = method.read(rows, heard(method, teacher, rows), 1).values_BT
    back = method.read(rows[::-1], heard(method, teacher, rows[::-1]), 1).values_BT
    assert all(torch.equal(a, b) for a, b in zip(there, back[::-1], strict=True))


@pytest.mark.parametrize("outlier", ["mask", "clip"])
def test_trust_is_of_the_raw_ratio_and_the_clamp_comes_after_the_gate(
    student: Policy, teacher: Policy, outlier: str
) -> None:
    region = {"name": "trust_region", "region": "static", "tau": -1.0, "outlier": outlier}
    plain, signal = read(student, teacher), read(student, teacher, region, GATE)
    for row in (0, 1):
        ratio = plain.values_BT[row].double()
        gate = ratio * coefficients(ratio, agreement(ratio, row == 0), 1.8, 1.0, 0.01)
        outside = 0.0 if outlier == "mask" else gate.clamp(min=-1.0)
        torch.testing.assert_close(signal.values_BT[row], gate.where(ratio > -1.0, outside).float())
        assert bool((ratio <= -1.0).any()) and bool((ratio > -1.0).any())
    order = built(student, {"name": "opd", "parts": ["whiten", region, GATE]}).parts  # type: ignore[attr-defined]
    assert [part.config.name for part in order] == ["sign_gate", "trust_region", "whiten"]


@pytest.mark.parametrize("credit", ["share", "uniform", "full"])
@pytest.mark.parametrize(("outcome", "lams"), [(True, (1.8, 0.25)), (False, (0.25, 1.8))])
def test_between_tokenizers_it_is_a_gate_per_chunk(
    student: Policy, credit: str, outcome: bool, lams: tuple[float, float]
) -> None:
    """Gating a chunk's advantage and dealing it out, or the other way round, is the same: a part has the chunk's sign.

    The student writes he|re|n|i, the teacher h|er|e|n|i: chunks of advantage 1, -1 and, inside the band, 0.005.
    """
    ids = [student.tokenizer.convert_tokens_to_ids(piece) for piece in ("he", "re", "n", "i")]
    row = tiny.rollout(student, ids, asked("right"), "stop")
    row = replace(row, logprobs=(-0.5, -1.5, -1.0, -1.0))
    config = {"name": "dpca", "openings": 0, "credit": credit}
    plain, method = (
        built(student, config | {"parts": parts}, lambda *_: outcome) for parts in ([], [GATE | {"lam_lo": 0.25}])
    )
    query: Any = replace(plain.audit([row], 1)[0], closes=False)  # type: ignore[type-var]
    other: Any = SimpleNamespace(digest="other")
    logprobs = (-0.3, -0.4, -0.3, -2.0, -0.995)
    found = [TokenScores(query, (5, 6, 7, 8, 9), (1, 3, 4, 5, 6), logprobs, vocabulary=other)]
    values = plain.read([row], found, 1).values_BT[0]
    golden = {"share": [0.25, 0.75], "uniform": [0.5, 0.5], "full": [1.0, 1.0]}[credit]
    assert values.tolist() == pytest.approx([*golden, -1.0, 0.005], abs=1e-6)
    up, down = lams
    expected = values * torch.tensor([up, up, down, 1.0])
    torch.testing.assert_close(method.read([row], found, 1).values_BT[0], expected)
    assert method.needs == {"score", "verify"}


def test_the_control_deals_verdicts_to_other_rollouts(student: Policy, teacher: Policy) -> None:
    gate = GATE | {"lam_lo": 0.25}
    real, swapped = (
        read(student, teacher, gate, check=lambda prompt, _, name=name: prompt.id == name)
        for name in ("right", "wrong")
    )
    dealt = [read(student, teacher, gate, control="shuffled", step=step).values_BT[0] for step in range(1, 9)]
    found = {tuple(values.tolist()) for values in dealt}
    assert found == {tuple(real.values_BT[0].tolist()), tuple(swapped.values_BT[0].tolist())}


# ------------------------------------------------------------------ the teacher's rollouts


def counts(share: float, steps: int | None, group: int, until: int) -> list[int]:
    shares = [linear_share(share, k, steps) for k in range(until)]
    return [sum(falls_on(row, rho) for row in range(group)) for rho in shares]


def test_how_many_of_a_group_are_the_teachers() -> None:
    assert counts(0.5, 10, 8, 13) == [4, 4, 3, 3, 2, 2, 2, 1, 1, 0, 0, 0, 0]
    assert counts(0.5, None, 8, 3) == [4, 4, 4]
    for share in (0.0, 0.1, 0.45, 0.5, 1.0):
        rows = [falls_on(row, share) for row in range(64)]
        assert all(sum(rows[:n]) == math.floor(n * share + 0.5) for n in range(65))
        assert all(abs(sum(rows[at : at + 8]) - 8 * share) < 1 for at in range(57))


def say(query: AnswerQuery) -> list[Reply]:
    """Wrong at first, cut at second, right at third, for the prompt that the verifier accepts anything right of."""
    return [Reply("18", "stop"), Reply("19 it is, sin", "length"), Reply("It is 19.", "stop")][: query.n]


def nineteen(prompt: Prompt, text: str) -> bool:
    return "19" in text


def mixed(
    student: Policy, teacher: Policy, step: int = 1, said: Say = say, **settings: Any
) -> tuple[list[Rollout], list[Evidence], Signal]:
    method = built(student, {"name": "opd", "parts": [{**PHASED, **settings}]}, nineteen)
    rows, before = begun(method, student, [asked("12 + 7")] * 4, said, step)
    return rows, before, method.read(rows, before + heard(method, teacher, rows, step), step)


def test_accepted_answers_stand_in_for_rollouts(student: Policy, teacher: Policy) -> None:
    rows, before, signal = mixed(student, teacher)
    taught = [row for row in range(4) if falls_on(row, 0.5)]
    assert [one.query.row for one in before] == taught and all(one.query.n == 4 for one in before)
    assert [row for row, rollout in enumerate(rows) if not len(rollout)] == taught and len(rows) == 4
    ids, _ = student.encode("It is 19.")
    assert [(b.row, b.at, b.ids) for b in signal.branches] == [(row, 0, (*ids, student.end_id)) for row in taught]
    assert (signal.stats["teacher_rollouts"], signal.stats["teacher_rollouts_refused"]) == (2.0, 0.0)


@pytest.mark.parametrize("settings", [{"tries": 2}, {"tries": 1}], ids=str)
def test_a_group_without_an_accepted_answer_is_all_the_students(
    student: Policy, teacher: Policy, settings: dict[str, Any]
) -> None:
    rows, _, signal = mixed(student, teacher, **settings)
    assert all(len(rollout) for rollout in rows) and not signal.branches
    assert (signal.stats["teacher_rollouts"], signal.stats["teacher_rollouts_refused"]) == (0.0, 2.0)


def test_an_answer_that_nobody_can_check_is_not_taken(student: Policy) -> None:
    method = built(student, {"name": "opd", "parts": [PHASED]}, nineteen)
    rows, _ = begun(method, student, [asked("12 + 7", None)] * 4, say)
    assert all(len(rollout) for rollout in rows)
    anything = built(student, {"name": "opd", "parts": [PHASED | {"accept": "all"}]})
    assert anything.needs == {"score", "same tokenizer", "answer"}
    rows, _ = begun(anything, student, [asked("12 + 7", None)] * 4, say)
    assert sum(not len(rollout) for rollout in rows) == 2


def test_past_the_last_step_nothing_is_asked(student: Policy, teacher: Policy) -> None:
    rows, before, signal = mixed(student, teacher, step=21)
    assert not before and all(len(rollout) for rollout in rows) and not signal.branches
    assert not mixed(student, teacher, step=20)[1] and mixed(student, teacher, step=12)[1]


def test_both_terms_are_means_over_their_own_tokens(student: Policy, teacher: Policy) -> None:
    rows, _, signal = mixed(student, teacher, weight=0.5, said=lambda query: [Reply("19" * (1 + query.row), "stop")])
    assert len({len(branch.ids) for branch in signal.branches}) == 2
    plain = built(student, {"name": "opd"})
    terms = Trainer(student, OptimizerSettings(), plain.objective).accumulate(rows, signal)
    own = torch.cat([tiny.dense(student.model, r.prompt_ids, r.ids)[0] for r in rows if len(r)])
    values = torch.cat([v for v, r in zip(signal.values_BT, rows, strict=True) if len(r)])
    assert terms["value_loss"] == pytest.approx(-float((values * own).mean()), rel=1e-4)
    said = torch.cat([tiny.dense(student.model, rows[b.row].prompt_ids, b.ids)[0] for b in signal.branches])
    assert terms["branch_loss"] == pytest.approx(-0.5 * float(said.mean()), rel=1e-4)

    cut = tiny.policy(Path(student.settings.path), micro_batch_tokens=40)
    again = Trainer(cut, OptimizerSettings(), plain.objective).accumulate(rows, signal)
    assert again == pytest.approx(terms, abs=1e-6)


def test_how_likely_the_teacher_finds_its_own_text_has_no_say(
    student: Policy, teacher: Policy, initial: Policy
) -> None:
    found = [mixed(student, one) for one in (teacher, initial)]
    assert found[0][2].branches == found[1][2].branches
    objective = built(student, {"name": "opd"}).objective
    terms = [Trainer(student, OptimizerSettings(), objective).accumulate(rows, signal) for rows, _, signal in found]
    assert terms[0]["branch_loss"] == pytest.approx(terms[1]["branch_loss"], abs=1e-6)
    assert terms[0]["value_loss"] != pytest.approx(terms[1]["value_loss"], abs=1e-2)


def test_the_teachers_own_rollouts_are_not_scored(student: Policy, teacher: Policy) -> None:
    method = built(student, {"name": "sg_opd", "parts": [GATE, PHASED]}, nineteen)
    rows, _ = begun(method, student, [asked("12 + 7")] * 4, say)
    assert {query.row for query in method.audit(rows, 1)} == {row for row in range(4) if not falls_on(row, 0.5)}


def test_what_is_known_of_the_published_settings_is_the_default(student: Policy) -> None:
    phased, gate = (part.config for part in built(student, {"name": "sg_opd"}).parts)  # type: ignore[attr-defined]
    assert (gate.lam_hi, gate.lam_lo, gate.reference, gate.band) == (1.8, 1.0, "old", 0.01)
    assert (phased.share, phased.accept, phased.tries, phased.loss, phased.weight) == (0.5, "right", 4, "nll", 1.0)


def test_a_text_only_method_learns_them_too(student: Policy) -> None:
    method = built(student, {"name": "omniopd", "chunks": 1, "chunk_tokens": 4, "parts": [MIX]})
    rows, before = begun(method, student, [tiny.prompt()] * 4, lambda _: [Reply("It is 19.", "stop")])
    signal = method.read(rows, before, 1)
    assert method.needs == {"continuation", "answer"}
    assert [b.row for b in signal.branches] == [0, 2] and signal.branch_scale == 1.0


def test_a_divergence_needs_the_dense_form(student: Policy) -> None:
    with pytest.raises(ConfigError, match="form: dense"):
        built(student, {"name": "opd", "parts": [MIX | {"loss": "divergence"}]})
