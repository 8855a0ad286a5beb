"""TrOPD: the trust region against its golden numbers, the prefix's schedule, and where each token's signal comes from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from answered import answers, begun, built, heard
from scored_by import scored, scores_of
from torch import Tensor

from omniopd import losses
from omniopd.alignment import align_scores
from omniopd.composition import compose
from omniopd.draft import Draft
from omniopd.errors import ConfigError
from omniopd.method import Method
from omniopd.parts.teacher_prefix import cosine_length
from omniopd.parts.trust_region import trust
from omniopd.targets.subset import TopKTarget
from omniopd.types import Capabilities, Evidence, Reply, Rollout, ScoreQuery, Signal, TokenScores
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

S = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
T = torch.tensor([0.1, 0.6, 0.05, 0.25], dtype=torch.float64)
REGION = {"name": "trust_region", "k": 4}
PREFIX = {"name": "teacher_prefix", "tokens": 8, "steps": 10}
TEXT = "The answer is 12 + 7 = 19, so Tom has 19 apples."


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def say(_: Any) -> list[Reply]:
    return [Reply(TEXT, "stop")]


def rows_of(student: Policy, lengths: Sequence[int] = (13, 5, 1, 8)) -> list[Rollout]:
    torch.manual_seed(4)
    return [tiny.rollout(student, torch.randint(5, 200, (length,)).tolist()) for length in lengths]


def read(student: Policy, teacher: Policy, rows: list[Rollout], *parts: dict[str, Any], **config: Any) -> Signal:
    method = built(student, {"name": "opd", "parts": list(parts), **config})
    return method.read(rows, heard(method, teacher, rows), 1)


def gradient(student: Policy, rows: list[Rollout], signal: Signal, **settings: Any) -> tuple[float, list[Tensor]]:
    method = built(student, {"name": "opd"})
    loss = Trainer(student, OptimizerSettings(), method.objective).accumulate(rows, signal)["loss"]
    return loss, [p.grad.clone() for p in student.model.parameters() if p.grad is not None]


def outside(signal: Signal) -> Tensor:
    """What multiplies the divergence of each token of the step; 0 in rows without one."""
    pairs = zip(signal.weights_BT, signal.targets, strict=True)
    return torch.cat([weight.double() * (target is not None) for weight, target in pairs])


def everywhere(region: str, ratio: Tensor, coins: Tensor | None = None) -> Tensor:
    return trust(ratio, region, -3.0, torch.zeros_like(ratio) if coins is None else coins)  # type: ignore[arg-type]


# ------------------------------------------------------------------ the region


def test_the_trusted_share_is_one_less_the_total_variation() -> None:
    trusted = everywhere("soft", T.log() - S.log())
    torch.testing.assert_close(trusted, torch.tensor([0.2, 1, 1 / 3, 1], dtype=torch.float64))
    assert float((S * trusted).sum()) == pytest.approx(0.5) == pytest.approx(1 - float((S - T).abs().sum()) / 2)

    s = torch.tensor([2, 1, 0.5, 0, -1], dtype=torch.float64).softmax(-1)  # the toy fixture of plain distillation
    t = torch.tensor([0.5, 2, 0, 1, -0.5], dtype=torch.float64).softmax(-1)
    assert float((s * everywhere("soft", t.log() - s.log())).sum()) == pytest.approx(0.5095709056, abs=1e-10)


def test_a_soft_token_adds_at_least_minus_one_over_e() -> None:
    ratio = T.log() - S.log()
    expected = torch.tensor([-0.32189, 0.69315, -0.36620, 1.60944], dtype=torch.float64)
    torch.testing.assert_close(everywhere("soft", ratio) * ratio, expected, atol=5e-6, rtol=0)
    grid = torch.linspace(-40, 0, 4001, dtype=torch.float64)
    least = (everywhere("soft", grid) * grid).min()
    assert float(least) == pytest.approx(-1 / math.e, abs=1e-6) and float(least) >= -1 / math.e


def test_the_coin_falls_as_often_as_the_teacher_would_accept() -> None:
    ratio = (T.log() - S.log()).repeat(20_000)
    coins = torch.rand(len(ratio), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    mean = everywhere("bernoulli", ratio, coins).view(-1, 4).mean(0)
    accepted = everywhere("soft", ratio)[:4]
    assert bool(((mean - accepted).abs() <= 3 * (accepted * (1 - accepted) / 20_000).sqrt()).all())
    assert mean[1] == mean[3] == 1


def test_a_static_region_ends_at_tau_itself() -> None:
    ratio = torch.tensor([-3.1, -3.0, -2.9, 0.5], dtype=torch.float64)
    assert everywhere("static", ratio).tolist() == [0, 0, 1, 1]


def test_extreme_ratios_give_no_nan() -> None:
    ratio = torch.tensor([-math.inf, -1e6, 0.0, 1e6], dtype=torch.float64)
    assert everywhere("soft", ratio).tolist() == [0, 0, 1, 1]
    assert everywhere("bernoulli", ratio).tolist() == [0, 0, 1, 1]  # of coins that are 0, too


# ------------------------------------------------------------------ the outlier's divergence


def forward_kl(teacher: Tensor, student: Tensor, k: int) -> tuple[float, Tensor]:
    """Value and gradient on the student's logits of what an outlier gets."""
    logits = student.log()[None].clone().requires_grad_()
    values, ids = teacher.log().topk(k)
    target = TopKTarget([dict(zip(ids.tolist(), values.tolist(), strict=True))], "partial", "forward")
    value = target.divergence(logits, torch.zeros(1, dtype=torch.long), 0)
    value.sum().backward()
    assert logits.grad is not None
    return value.item(), logits.grad[0]


def test_the_outliers_divergence_has_its_golden_value_and_a_bounded_gradient() -> None:
    value, slope = forward_kl(T, S, 2)
    assert value == pytest.approx(0.818248, abs=1e-6)
    expected = torch.tensor([0.425, -0.345, 0.1275, -0.2075], dtype=torch.float64)
    torch.testing.assert_close(slope, expected, atol=1e-9, rtol=0)
    assert float(slope.abs().sum()) == pytest.approx(1.105) and float(slope.abs().sum()) <= 2 * 0.85
    assert forward_kl(T, S, 4)[0] == pytest.approx(0.602373, abs=1e-6)
    assert float(losses.forward_kl(T.log(), S.log())) == pytest.approx(0.602373, abs=1e-6)


@pytest.mark.parametrize("k", [1, 3, 7, 11])
def test_the_outliers_gradient_in_closed_form(k: int) -> None:
    """`m S_j - T_j` for the j that the teacher named, `m S_j` for the others, m their mass: at most 2m in all."""
    generator = torch.Generator().manual_seed(k)
    s, t = torch.randn(2, 11, generator=generator, dtype=torch.float64).mul(3).softmax(-1)
    named = torch.zeros(11, dtype=torch.float64).index_fill(0, t.topk(k).indices, 1.0)
    mass, slope = (t * named).sum(), forward_kl(t, s, k)[1]
    torch.testing.assert_close(slope, mass * s - t * named, atol=1e-12, rtol=0)
    assert float(slope.abs().sum()) <= 2 * float(mass) + 1e-12


def test_it_may_be_negative_and_is_not_bounded_above() -> None:
    one = torch.tensor([0.6, 0.4], dtype=torch.float64)
    assert forward_kl(one, torch.tensor([0.9, 0.1], dtype=torch.float64), 1)[0] == pytest.approx(-0.243279, abs=1e-6)
    rare = torch.tensor([1e-8, 1e-8, 1 - 2e-8], dtype=torch.float64)
    value, slope = forward_kl(torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64), rare, 2)
    assert value == pytest.approx(17.7477, abs=1e-4) and float(slope.abs().sum()) <= 2


def test_expected_ascent_of_the_three_losses() -> None:
    ratio, trusted = T.log() - S.log(), everywhere("soft", T.log() - S.log())
    score = torch.eye(4, dtype=torch.float64) - S  # row y: the gradient of log p(y)

    def ascent(advantage: Tensor) -> Tensor:
        return ((S * advantage)[:, None] * score).sum(0)

    plain = torch.tensor([-0.46417158, 0.41227258, -0.06262763, 0.11452663], dtype=torch.float64)
    part = torch.tensor([-0.19721461, 0.18618166, -0.06581186, 0.07684481], dtype=torch.float64)
    whole = torch.tensor([-0.40971461, 0.35868166, -0.12956186, 0.18059481], dtype=torch.float64)
    torch.testing.assert_close(ascent(ratio), plain, atol=1e-8, rtol=0)
    torch.testing.assert_close(ascent(trusted * ratio), part, atol=1e-8, rtol=0)
    doubt = float((S * (1 - trusted)).sum())
    torch.testing.assert_close(ascent(trusted * ratio) - doubt * forward_kl(T, S, 2)[1], whole, atol=1e-8, rtol=0)


# ------------------------------------------------------------------ the region in a step


@pytest.mark.parametrize("region", ["bernoulli", "soft", "static"])
def test_a_teacher_that_is_the_student_trusts_everything(student: Policy, region: str) -> None:
    rows = rows_of(student)
    method = built(student, {"name": "opd", "parts": [REGION | {"region": region}]})
    asked = method.audit(rows, 1)
    same = [replace(scored(student, q), logprobs=rows[q.row].logprobs) for q in asked]  # type: ignore[arg-type]
    signal = method.read(rows, same, 1)
    plain = built(student, {"name": "opd"}).read(rows, same, 1)
    assert signal.targets == () and signal.stats["trusted_share"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(signal.values_BT, plain.values_BT, strict=True))


@pytest.mark.parametrize("region", ["bernoulli", "soft", "static"])
def test_trusted_tokens_keep_their_advantage_and_outliers_get_a_divergence(
    student: Policy, teacher: Policy, region: str
) -> None:
    rows = rows_of(student)
    plain, signal = read(student, teacher, rows), read(student, teacher, rows, REGION | {"region": region})
    trusted = 1 - outside(signal)
    assert 0 < float(trusted.mean()) < 1 and signal.stats["trusted_share"] == pytest.approx(float(trusted.mean()))
    torch.testing.assert_close(torch.cat(signal.values_BT), (torch.cat(plain.values_BT) * trusted).float())
    if region != "soft":  # each token in one of the two
        assert set(trusted.tolist()) == {0.0, 1.0}
    assert [int(mask.sum()) for mask in signal.mask_BT] == [13, 5, 1, 8]
    named = [target for target in signal.targets if target is not None]
    assert named and all(isinstance(t, TopKTarget) and (t.mode, t.kind) == ("partial", "forward") for t in named)
    assert all(t.ids.shape[1] == 4 for t in named if isinstance(t, TopKTarget))


def test_clip_bounds_from_below_and_mask_leaves_nothing_in_n(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    plain = torch.cat(read(student, teacher, rows).values_BT)
    tau = float(plain.quantile(0.4))
    static = REGION | {"region": "static", "tau": min(tau, -1e-3)}
    low = plain.double() <= static["tau"]
    assert 0 < int(low.sum()) < len(plain)
    clipped = read(student, teacher, rows, static | {"outlier": "clip"})
    torch.testing.assert_close(torch.cat(clipped.values_BT), plain.clamp(min=static["tau"]))
    masked = read(student, teacher, rows, static | {"outlier": "mask"})
    assert torch.equal(torch.cat(masked.values_BT), plain.masked_fill(low, 0.0))
    assert bool(torch.cat(masked.mask_BT).all()) and not masked.targets and not clipped.targets


def test_coins_depend_on_run_step_prompt_and_place_alone(student: Policy, teacher: Policy) -> None:
    torch.manual_seed(4)
    rows = [
        tiny.rollout(student, torch.randint(5, 200, (n,)).tolist(), tiny.prompt(name=name))
        for n, name in ((13, "a"), (5, "a"), (9, "b"), (8, "b"))
    ]
    method = built(student, {"name": "opd", "parts": [REGION]})
    found = heard(method, teacher, rows)
    one, again = method.read(rows, found, 1), method.read(rows, found[::-1], 1)
    other = method.read(rows, found, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.values_BT, again.values_BT, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.values_BT, other.values_BT, strict=True))
    turned = method.read(rows[2:] + rows[:2], heard(method, teacher, rows[2:] + rows[:2]), 1)
    for name in ("values_BT", "weights_BT"):
        moved = getattr(turned, name)
        assert all(torch.equal(a, b) for a, b in zip(getattr(one, name), moved[2:] + moved[:2], strict=True))
    twins = [rows[0], rows[0]]
    apart = method.read(twins, heard(method, teacher, twins), 1)
    assert not torch.equal(apart.values_BT[0], apart.values_BT[1])
    alone = method.read(rows[:2], [e for e in found if e.query.row < 2], 1)
    assert all(torch.equal(a, b) for a, b in zip(one.values_BT[:2], alone.values_BT, strict=True))
    elsewhere = compose(method.objective, student, 1).read(rows, found, 1)
    assert not all(torch.equal(a, b) for a, b in zip(one.values_BT, elsewhere.values_BT, strict=True))


@pytest.mark.parametrize("region", ["bernoulli", "soft"])
def test_the_logs_trusted_share_estimates_one_less_the_total_variation(student: Policy, region: str) -> None:
    """Tokens drawn from S at 2,000 places, judged by T: the share is within 4 standard errors of 1 - TV = 0.5."""
    draws = torch.multinomial(S, 2000, True, generator=torch.Generator().manual_seed(3))
    row = replace(
        tiny.rollout(student, [20]), ids=tuple((20 + draws).tolist()), logprobs=tuple(S.log()[draws].tolist())
    )
    method = built(student, {"name": "opd", "parts": [REGION | {"region": region, "outlier": "mask"}]})
    said = scores_of(method.audit([row], 1), lambda _, t: T.log()[draws[t]].item())
    share = method.read([row], said, 1).stats["trusted_share"]
    assert share == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5) and share != 0.5


@pytest.mark.parametrize("budget", [20, 4000])
def test_how_a_step_is_cut_changes_nothing(llama_folder: Path, teacher: Policy, budget: int) -> None:
    student = tiny.policy(llama_folder, micro_batch_tokens=budget)
    rows = rows_of(student)
    loss, _ = gradient(student, rows, read(student, teacher, rows, REGION))
    whole = tiny.policy(llama_folder)
    assert loss == pytest.approx(gradient(whole, rows, read(whole, teacher, rows, REGION))[0], abs=1e-6)


def test_the_control_keeps_the_share_and_moves_the_places(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, (14, 14))
    real = read(student, teacher, rows, REGION | {"region": "soft"})
    dealt = read(student, teacher, rows, REGION | {"region": "soft"}, control="shuffled")
    assert real.stats["trusted_share"] == pytest.approx(dealt.stats["trusted_share"])
    assert not torch.equal(real.weights_BT[0], dealt.weights_BT[0])


def test_a_row_without_likeliest_tokens_is_counted(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student)
    method = built(student, {"name": "opd", "parts": [REGION]})
    bare = [replace(one, top=()) for one in heard(method, teacher, rows) if isinstance(one, TokenScores)]
    signal = method.read(rows, bare, 1)
    assert signal.targets == () and (signal.stats["outliers_unaimed"] or 0) > 0


def test_little_trust_is_said(student: Policy, caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(student)
    method = built(student, {"name": "opd", "parts": [REGION | {"region": "soft"}]})
    asked = [replace(scored(student, q), logprobs=(-90.0,) * len(rows[q.row])) for q in method.audit(rows, 1)]  # type: ignore[arg-type]
    method.read(rows, asked, 3)
    assert "only 0% of the tokens are in the trust region" in caplog.text


def test_a_teacher_without_likeliest_tokens_is_refused_for_the_divergence_only(student: Policy) -> None:
    offered = Capabilities(score=True, vocabulary=student.vocabulary.digest)
    assert "likeliest tokens" in str(built(student, {"name": "opd", "parts": [REGION]}).lacking(offered))
    assert not built(student, {"name": "opd", "parts": [REGION | {"outlier": "mask"}]}).lacking(offered)


def test_the_dense_form_has_no_tokens_to_trust(student: Policy) -> None:
    with pytest.raises(ConfigError, match="form: sampled"):
        built(student, {"name": "opd", "form": "dense", "parts": ["trust_region"]})


# ------------------------------------------------------------------ chunks, where the teacher cuts otherwise


@pytest.fixture(scope="module")
def foreigner(tiny_folder: Callable[..., Path]) -> Policy:
    """A teacher of another tokenizer."""
    return tiny.policy(tiny_folder("pieces", seed=1))


def chunked(student: Policy, region: str = "soft", **base: Any) -> Method:
    part = {"name": "trust_region", "region": region, "outlier": "mask"}
    return built(student, {"name": "dpca", "openings": 0, "parts": [part], **base})


def cut_apart(student: Policy, method: Method, teacher: Sequence[float]) -> tuple[Rollout, TokenScores]:
    """A student that spells "here" as he|re with log-probs of -0.5 and -1.5, and what a teacher gives h|er|e."""
    ids = [student.tokenizer.convert_tokens_to_ids(piece) for piece in ("he", "re")]
    row = replace(tiny.rollout(student, ids), logprobs=(-0.5, -1.5))
    (query,) = method.audit([row], 1)
    assert isinstance(query, ScoreQuery)
    other: Any = SimpleNamespace(digest="other")
    return row, TokenScores(query, (0, 1, 2), (1, 3, 4), tuple(teacher), vocabulary=other)


@pytest.mark.parametrize(
    ("teacher", "trusted"), [((-0.3, -0.4, -0.3), 1.0), ((-1.0, -2.0, -0.5), math.exp(-1.5)), ((-40, -40, -40), 0.0)]
)
def test_a_chunk_is_trusted_by_both_of_its_likelihoods(
    student: Policy, teacher: Sequence[float], trusted: float
) -> None:
    """P = min(exp(L_T - L_S), 1), here with L_S = -2."""
    method = chunked(student)
    row, said = cut_apart(student, method, teacher)
    signal = method.read([row], [said], 1)
    ratio = sum(teacher) + 2
    assert signal.values_BT[0].tolist() == pytest.approx([0.25 * ratio * trusted, 0.75 * ratio * trusted], abs=1e-6)
    assert signal.stats["trusted_share"] == pytest.approx(trusted, abs=1e-6)


def test_one_coin_falls_for_all_tokens_of_a_chunk(student: Policy) -> None:
    """Over 400 steps as often as P = exp(-1.5) says, within 3 standard errors."""
    method = chunked(student, "bernoulli")
    row, said = cut_apart(student, method, (-1.0, -2.0, -0.5))
    fell = [method.read([row], [said], step).stats["trusted_share"] for step in range(400)]
    assert set(fell) == {0.0, 1.0}
    p = math.exp(-1.5)
    assert sum(fell) / 400 == pytest.approx(p, abs=3 * math.sqrt(p * (1 - p) / 400))


@pytest.mark.parametrize("openings", [0, 20])
def test_every_chunk_of_a_text_is_trusted_as_one(student: Policy, foreigner: Policy, openings: int) -> None:
    texts = (TEXT, "First, we add 東京 and 😀👍🏽 the two numbers.", "naïve café, then return x  # done")
    rows = [tiny.rollout(student, student.encode(text)[0]) for text in texts]
    rows = [replace(row, logprobs=tuple(0.2 * p for p in row.logprobs)) for row in rows]  # surer than its teacher
    method, plain = (chunked(student, openings=openings), built(student, {"name": "dpca", "openings": openings}))
    found = heard(method, foreigner, rows)
    signal, base = method.read(rows, found, 1), plain.read(rows, found, 1)
    several = 0
    for row, said in zip(rows, found, strict=True):
        assert isinstance(said, TokenScores) and said.ids != row.ids
        at = said.query.row
        for chunk in align_scores(row, said, student.vocabulary).chunks:
            span = slice(chunk.start, chunk.end)
            trusted = min(1.0, math.exp(float(base.values_BT[at][span].double().sum())))
            torch.testing.assert_close(
                signal.values_BT[at][span], trusted * base.values_BT[at][span], atol=1e-6, rtol=1e-4
            )
            several += (chunk.end - chunk.start > 1) and trusted < 1
    assert several > 0
    assert all(map(torch.equal, signal.mask_BT, base.mask_BT))


@pytest.mark.parametrize("region", ["bernoulli", "soft"])
def test_with_one_tokenizer_every_token_is_a_chunk_to_the_last_bit(
    student: Policy, teacher: Policy, region: str
) -> None:
    rows = rows_of(student)
    apart = chunked(student, region)
    tokens = read(student, teacher, rows, REGION | {"region": region, "outlier": "mask"})
    chunks = apart.read(rows, heard(apart, teacher, rows), 1)
    assert all(map(torch.equal, tokens.values_BT, chunks.values_BT))


def test_only_the_divergence_needs_the_students_tokens(student: Policy) -> None:
    served = Capabilities(score=True, topk=64, vocabulary="other")
    assert chunked(student).lacking(served) == []
    assert "same tokenizer" in built(student, {"name": "dpca", "parts": ["trust_region"]}).lacking(served)


def test_of_a_token_without_a_score_nothing_is_believed_or_doubted(student: Policy) -> None:
    """On a method whose own signal does not rest on scores."""
    (row,) = rows_of(student, (3,))
    method = chunked(student)
    (query,) = method.audit([row], 1)
    assert isinstance(query, ScoreQuery)
    said = TokenScores(query, row.ids, (None,) * 3, (row.logprobs[0], math.nan, row.logprobs[2] - 1))
    draft = Draft.of(Signal((torch.ones(3),), (torch.ones(3, dtype=torch.bool),)), [row], [said], 1, lambda _: None)
    method.parts[0].apply(draft)  # type: ignore[attr-defined]
    assert draft.mask[0].tolist() == [True, False, True]
    assert draft.finish().values_BT[0].tolist() == pytest.approx([1, 0, math.exp(-1)])


# ------------------------------------------------------------------ the prefix


def test_the_prefix_shrinks_on_a_cosine() -> None:
    assert [cosine_length(8096, k, 200) for k in (0, 100, 200, 300)] == [8096, 4048, 0, 0]
    lengths = [cosine_length(64, k, 50) for k in range(51)]
    assert lengths == sorted(lengths, reverse=True)


def test_rollouts_begin_with_the_teachers_tokens(student: Policy) -> None:
    method = built(student, {"name": "opd", "parts": [PREFIX]})
    ids, _ = student.encode(TEXT)
    assert len(ids) > 8
    for step, given in ((1, 8), (6, 4), (11, 0)):
        rows, before = begun(method, student, [tiny.prompt()] * 2, say, step)
        assert [row.given for row in rows] == [given] * 2 and len(before) == (2 if given else 0)
        assert all(list(row.ids[:given]) == ids[:given] and len(row) > given for row in rows)


def test_the_student_writes_the_end_itself(student: Policy) -> None:
    method = built(student, {"name": "opd", "parts": [PREFIX | {"tokens": 15}]})
    rows, _ = begun(method, student, [tiny.prompt()], lambda _: [Reply("19", "stop")])
    short, _ = student.encode("19")
    assert rows[0].given == len(short) < len(rows[0])
    cut, _ = begun(method, student, [tiny.prompt()], lambda _: [Reply("19", "length")])
    assert cut[0].given == len(short) - 1


def test_a_row_whose_answer_did_not_come_is_the_students(student: Policy, teacher: Policy) -> None:
    method = built(student, {"name": "opd", "parts": [PREFIX]})
    rows, before = begun(method, student, [tiny.prompt()] * 2, lambda q: say(q) if q.row else [])
    assert [row.given for row in rows] == [0, 8]
    signal = method.read(rows, before + heard(method, teacher, rows), 1)
    assert signal.stats["prefix_missing"] == 1.0 and [b.row for b in signal.branches] == [1]


def test_answers_may_be_longer_than_what_is_used_of_them(student: Policy) -> None:
    for settings, limit in (({}, 8), ({"answer_tokens": 512}, 512)):
        asked = built(student, {"name": "opd", "parts": [PREFIX | settings]}).before({0: tiny.prompt()}, 6)
        assert [query.max_tokens for query in asked] == [limit]  # type: ignore[union-attr]


def test_share_and_lengths_are_drawn_from_named_streams(student: Policy) -> None:
    some = built(student, {"name": "opd", "parts": [PREFIX | {"share": 0.5, "length": "uniform"}]})
    prompts = dict(enumerate([tiny.prompt()] * 200))
    asked = some.before(prompts, 1)
    assert 70 < len(asked) < 130 and asked == some.before(prompts, 1)
    assert {q.row for q in some.before({3: tiny.prompt(), 4: tiny.prompt()}, 1)} == {q.row for q in asked} & {3, 4}
    writings = some.writings(prompts, answers(asked, say), 1)
    assert {len(writing.begins) for writing in writings.values()} == set(range(1, 9))


def test_given_tokens_are_learned_by_likelihood_alone(student: Policy, teacher: Policy) -> None:
    method = built(student, {"name": "tropd", "parts": [REGION, PREFIX | {"beta": 0.25}]})
    rows, before = begun(method, student, [tiny.prompt(), tiny.prompt("And 3?", "b")], say)
    found = heard(method, teacher, rows)
    signal = method.read(rows, before + found, 1)

    for row, rollout in enumerate(rows):
        assert not bool(signal.mask_BT[row][: rollout.given].any()) and bool(signal.mask_BT[row][rollout.given :].all())
        assert not bool(signal.values_BT[row][: rollout.given].any())
        if signal.targets and signal.targets[row] is not None:
            assert not bool(signal.weights_BT[row][: rollout.given].any())
    assert [(b.at, b.ids) for b in signal.branches] == [(0, row.ids[: row.given]) for row in rows]
    assert signal.branch_scale == 0.25 and signal.coverage == 1.0
    base = built(student, {"name": "opd"}).read(rows, found, 1)  # whoever gives the tokens: they have no log-ratio
    assert all(torch.equal(own, mask) for own, mask in zip(base.mask_BT, signal.mask_BT, strict=True))
    assert base.rejects["given"] == 16 and base.coverage == 1.0
    values = torch.cat([values[mask] for values, mask in zip(base.values_BT, base.mask_BT, strict=True)])
    assert base.stats["reverse_kl_k1"] == pytest.approx(-float(values.double().mean()))
    assert signal.stats["prefix_tokens"] == 8 and signal.stats["prefix_share"] == 16 / sum(map(len, rows))

    terms = Trainer(student, OptimizerSettings(), method.objective).accumulate(rows, signal)
    nll = [tiny.dense(student.model, row.prompt_ids, row.ids[: row.given])[0] for row in rows]
    assert terms["branch_loss"] == pytest.approx(-0.25 * float(torch.cat(nll).mean()), rel=1e-5)

    other = [replace(e, logprobs=tuple(lp - 5 * (t < rows[e.query.row].given) for t, lp in enumerate(e.logprobs)))
             for e in found if isinstance(e, TokenScores)]  # fmt: skip
    changed = method.read(rows, before + list[Evidence](other), 1)
    assert all(torch.equal(a, b) for a, b in zip(signal.values_BT, changed.values_BT, strict=True))
    assert changed.stats["reverse_kl_k1"] == signal.stats["reverse_kl_k1"]  # the log's, too, is of the student's draws


def test_every_token_is_in_one_of_three_ways(student: Policy, teacher: Policy) -> None:
    method = built(student, {"name": "tropd", "parts": [REGION, PREFIX]})
    rows, before = begun(method, student, [tiny.prompt(name=str(i), text=f"{i} + 1?") for i in range(6)], say)
    signal = method.read(rows, before + heard(method, teacher, rows), 1)
    given = sum(len(branch.ids) for branch in signal.branches)
    outliers = int(outside(signal).count_nonzero())
    trusted = sum(int(v.count_nonzero()) for v in signal.values_BT)
    assert min(given, outliers, trusted) > 0
    assert given + outliers + trusted == sum(map(len, rows))


def test_at_the_end_the_teachers_text_plays_no_part(student: Policy, teacher: Policy) -> None:
    method, plain = (
        built(student, {"name": "tropd", "parts": [REGION, PREFIX]}),
        built(student, {"name": "opd", "parts": [REGION]}),
    )
    prompts = [tiny.prompt(), tiny.prompt("And 3?", "b")]
    rows, before = begun(method, student, prompts, say, 11)
    own, _ = begun(plain, student, prompts, say, 11)
    assert not before and [row.ids for row in rows] == [row.ids for row in own]
    signal, reference = (m.read(rows, heard(m, teacher, rows, 11), 11) for m in (method, plain))
    assert gradient(student, rows, signal)[0] == gradient(student, rows, reference)[0] != 0


def test_the_teacher_does_not_write_a_rollout_twice(student: Policy) -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        built(student, {"name": "opd", "parts": ["teacher_prefix", "teacher_rollouts"]})
