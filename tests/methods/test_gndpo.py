"""GNDPO: advantages whitened over the whole step, against golden numbers and by enumeration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from answered import built
from scored_by import scores_of
from torch import Tensor
from toy import STUDENT, TEACHER, P

from omniopd.draft import Draft
from omniopd.parts.whiten import Whiten, WhitenSettings, moments
from omniopd.types import Capabilities, Rollout, Signal
from students.policy import Policy

NAN, INF = math.nan, math.inf
GOLDEN = [[0.2, -0.1, -8.0, 0.0], [0.5, -0.3, NAN, NAN]]  # nan: the teacher said nothing of that token
AS_PUBLISHED = {"sigma_min": 0.0}
CLIPPED = {"center": False, "scale": False}


def read(student: Policy, ratios: Sequence[Sequence[float]], config: str = "gndpo", **whiten: Any) -> Signal:
    """The signal of rollouts whose tokens have these log-ratios."""
    parts = {"parts": [{"name": "whiten", **whiten}]} if config == "gndpo" else {}
    method = built(student, {"name": config, **parts})
    rows = [tiny.rollout(student, list(range(20, 20 + len(own)))) for own in ratios]
    said = scores_of(method.audit(rows, 1), lambda row, t: rows[row].logprobs[t] + ratios[row][t])
    return method.read(rows, said, 1)


def draft_of(ratios: Sequence[Tensor], mask: Sequence[Tensor] | None = None) -> Draft:
    """A step of rollouts with these advantages, of which the teacher spoke under the mask."""
    mask = [torch.ones(len(own), dtype=torch.bool) for own in ratios] if mask is None else mask
    sizes = [len(own) for own in ratios]
    rows = [Rollout(tiny.prompt(), (1,), (5,) * n, (0.0,) * n, (0.0,) * n, (0,) * n, "", "length") for n in sizes]
    draft = Draft.of(Signal(tuple(ratios), tuple(mask)), rows, [], 1, lambda _: None)
    draft.advantage = [own.double() for own in ratios]
    return draft


def whitened(draft: Draft, **config: Any) -> Tensor:
    """The advantages [sum T] of a step, in float64, before they are masked."""
    Whiten(WhitenSettings(**{**AS_PUBLISHED, **config}), None, None, 0).apply(draft)  # type: ignore[arg-type]
    return torch.cat(draft.advantage)


def noise(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]


# ------------------------------------------------------------------ golden numbers


def test_golden_advantages_of_two_rollouts(student: Policy) -> None:
    """The -8 is clamped to -5 before anything is counted; two tokens of which nothing came count nowhere."""
    signal = read(student, GOLDEN, **AS_PUBLISHED)
    expected = [[0.471924, 0.327948, -2.023676, 0.375940], [0.615901, 0.231963, 0.0, 0.0]]
    for values, golden in zip(signal.values_BT, expected, strict=True):
        assert values.tolist() == pytest.approx(golden, abs=1e-6)
    assert signal.stats["whiten_mu"] == pytest.approx(-0.7833333, abs=1e-7)
    assert signal.stats["whiten_sigma"] == pytest.approx(2.0836666, abs=1e-7)
    assert signal.stats["clip_share"] == pytest.approx(1 / 6)
    assert [mask.tolist() for mask in signal.mask_BT] == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize(("sigma_min", "largest"), [(0.0, 2.0333), (0.05, 0.1343)])
def test_golden_noise_is_blown_up_unless_sigma_has_a_floor(student: Policy, sigma_min: float, largest: float) -> None:
    signal = read(student, [[1e-3 * d for d in own] for own in GOLDEN], sigma_min=sigma_min)
    assert float(torch.cat(signal.values_BT).abs().max()) == pytest.approx(largest, abs=5e-5)
    assert signal.stats["clip_share"] == 0


def test_golden_expected_gradient_is_that_of_plain_distillation_over_sigma() -> None:
    """A step in which each token occurs as often as the student would draw it stands for the expectation."""
    ratio = TEACHER.log_softmax(-1) - STUDENT.log_softmax(-1)
    times = (1e6 * P).round().long()
    mu, sigma = moments(ratio.repeat_interleave(times))
    assert mu == pytest.approx(-0.6280302556, abs=1e-6)
    assert sigma == pytest.approx(1.1029151, abs=2e-6)

    step = whitened(draft_of([ratio.repeat_interleave(times)]))
    advantage = step[torch.cat([torch.zeros(1, dtype=torch.long), times.cumsum(0)[:-1]])]  # one of each token
    score = torch.eye(5, dtype=torch.float64) - P  # grad log p(v), row by row
    ours, plain = (P * advantage) @ score, (P * ratio) @ score
    assert (ours / plain).tolist() == pytest.approx([0.906688] * 5, abs=5e-6)


# ------------------------------------------------------------------ what whitening is


def test_mean_0_and_variance_1_over_what_is_learned_whatever_stands_elsewhere() -> None:
    ratios = noise(40, 7, 1)
    mask = [torch.rand(len(own), generator=torch.Generator().manual_seed(1)) < 0.6 for own in ratios]
    mask[2][:] = False
    garbage = [own.masked_fill(~some, bad) for own, some, bad in zip(ratios, mask, (NAN, INF, 1e30), strict=True)]
    learned = torch.cat(mask)
    clean, dirty = (whitened(draft_of(step, mask), clip=INF)[learned] for step in (ratios, garbage))
    assert torch.equal(clean, dirty)
    assert float(clean.mean()) == pytest.approx(0, abs=1e-12)
    assert float(clean.var()) == pytest.approx(1, abs=1e-7)  # but for the 1e-8 inside the root
    draft = draft_of(garbage, mask)
    whitened(draft)
    values = torch.cat(draft.finish().values_BT)
    assert bool(values.isfinite().all()) and not bool(values[~learned].any())


@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (0.25, -2.0), (1.0, 1e6)])
def test_scale_and_shift_of_the_log_ratios_are_lost(scale: float, shift: float) -> None:
    """Where nothing is clipped. The mean may be far above the deviation: a sum of squares would lose all digits."""
    ratios = noise(30, 12)
    plain = whitened(draft_of(ratios), clip=INF)
    moved = whitened(draft_of([scale * own + shift for own in ratios]), clip=INF)
    torch.testing.assert_close(moved, plain, atol=1e-6, rtol=1e-6)


def test_statistics_are_of_the_whole_step_in_any_order_and_not_of_a_share() -> None:
    ratios = noise(9, 4, 7, 1)
    whole = whitened(draft_of(ratios)).split([9, 4, 7, 1])
    turned = whitened(draft_of(ratios[::-1])).split([1, 7, 4, 9])[::-1]
    torch.testing.assert_close(turned, whole, atol=1e-12, rtol=0)
    shares = whitened(draft_of(ratios[:2])), whitened(draft_of(ratios[2:]))
    assert (torch.cat(shares) - torch.cat(whole)).abs().max() > 0.05


def test_over_prompts_each_prompt_is_a_step_of_its_own() -> None:
    ratios = noise(9, 4, 7, 1)
    names = ["a", "b", "a", "b"]

    def step(rows: Sequence[int]) -> Draft:
        draft = draft_of([ratios[row] for row in rows])
        draft.rollouts = [
            replace(one, prompt=tiny.prompt(name=names[row])) for row, one in zip(rows, draft.rollouts, strict=True)
        ]
        return draft

    both = step([0, 1, 2, 3])
    found = whitened(both, over="prompt").split([9, 4, 7, 1])
    for rows in ([0, 2], [1, 3]):
        assert torch.equal(torch.cat([found[row] for row in rows]), whitened(step(rows)))
    whole = step([0, 1, 2, 3])
    assert not torch.allclose(torch.cat(found), whitened(whole))
    assert both.stats == whole.stats  # the log's progress is the step's


def test_order_is_clamp_mask_whiten_weights() -> None:
    ratios = noise(20)
    kept = torch.arange(20) % 3 != 0
    masked, alone = draft_of(ratios), draft_of([ratios[0][kept]])
    masked.keep(0, kept)
    masked.weigh(0, torch.linspace(0, 2, 20, dtype=torch.float64))
    assert torch.equal(whitened(masked)[kept], whitened(alone))  # a mask counts, a weight does not
    signal = masked.finish().values_BT[0]
    torch.testing.assert_close(signal, (torch.linspace(0, 2, 20) * masked.advantage[0]).float() * kept)


def test_rows_that_learn_by_likelihood_are_left_alone_and_count_nowhere() -> None:
    ratios = noise(6, 5)
    draft = draft_of(ratios)
    draft.likelihood = {1}
    found = whitened(draft)
    assert torch.equal(found[6:], ratios[1])
    assert torch.equal(found[:6], whitened(draft_of(ratios[:1])))


# ------------------------------------------------------------------ edges


@pytest.mark.parametrize("ratios", [[[0.3, 0.3], [0.3]], [[0.7]], [[NAN, -2.0], [NAN]]])
def test_equal_numbers_and_a_single_one_have_no_advantage(student: Policy, ratios: list[list[float]]) -> None:
    signal = read(student, ratios, **AS_PUBLISHED)
    assert torch.cat(signal.values_BT).tolist() == pytest.approx([0] * sum(map(len, ratios)), abs=1e-9)
    assert signal.stats["whiten_sigma"] == pytest.approx(1e-4)  # sqrt(0 + 1e-8)


def test_a_step_of_nothing_is_no_trouble(student: Policy) -> None:
    signal = read(student, [[NAN, NAN]])
    assert torch.cat(signal.values_BT).tolist() == [0, 0]
    assert signal.stats["clip_share"] is None


# ------------------------------------------------------------------ the authors' baseline


def test_without_centre_and_scale_it_is_the_clipped_baseline_to_the_last_bit(student: Policy) -> None:
    ratios = [[0.2, -0.1, -8.0, 0.0], [1e-8, 7.5, -0.3]]
    plain = torch.cat(read(student, ratios, "opd").values_BT)
    clipped = torch.cat(read(student, ratios, **CLIPPED).values_BT)
    assert torch.equal(clipped, plain.clamp(-5, 5)) and not torch.equal(clipped, plain)
    wide = torch.cat(read(student, ratios, clip=1e9, **CLIPPED).values_BT)  # not left out, and yet the same bits
    assert torch.equal(wide, plain)


def test_the_reverse_kl_under_the_same_clip_is_that_baseline_too(student: Policy) -> None:
    """opd_plus.md, its neutral setting: the same bits as a baseline of the same clip."""
    ratios = [0.2, -0.1, -8.0, 0.0, 1e-8, 7.5]
    rows = [tiny.rollout(student, list(range(20, 26)))]
    found = []
    for part in ({"name": "whiten", "clip": 5.0, **CLIPPED}, {"name": "f_divergence", "clip": 5.0}):
        method = built(student, {"name": "opd", "parts": [part]})
        said = scores_of(method.audit(rows, 1), lambda _, t: rows[0].logprobs[t] + ratios[t])
        found.append(method.read(rows, said, 1).values_BT[0])
    assert torch.equal(*found)


def test_the_transform_asks_for_nothing_that_a_text_only_teacher_lacks(student: Policy) -> None:
    """It takes any number on tokens; the published signal needs scores."""
    chats = Capabilities(continuation="prefill")
    assert built(student, {"name": "omniopd", "parts": ["whiten"]}).lacking(chats) == []
    assert "score" in built(student, {"name": "gndpo"}).lacking(chats)
