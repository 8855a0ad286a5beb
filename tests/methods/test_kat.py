"""KAT: where a rollout is cut, by which threshold, and what the buffer hears."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter, ValidationError
from scored_by import scored, scores_of
from torch import Tensor

from omniopd.composition import compose
from omniopd.errors import ConfigError
from omniopd.losses.subset import subset_divergence
from omniopd.method import Method
from omniopd.parts.kl_stop import KL, KlStop, KlStopSettings, cut_at, lowest_window, threshold_of, window_means
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import Capabilities, Evidence, Rollout, Signal
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer
from students.view import StudentView

TRAP = [1.0, 0.9, 0.2, 0.1, 0.1, 1.2, 0.1, 0.1, 0.1, 0.1]
SHORT = {"window": 2, "stride": 1, "low_windows": 2, "exempt": 0}


def built(student: Policy, control: str = "none", **part: Any) -> Method:
    config = {"name": "kat", "control": control, "parts": [{"name": "kl_stop", **part}]}
    return compose(TypeAdapter(tagged(METHODS)).validate_python(config), student, 0)


def part_of(method: Method) -> KlStop:
    (part,) = method.parts  # type: ignore[attr-defined]
    assert isinstance(part, KlStop)
    return part


def rows_of(student: Policy, lengths: Sequence[int] = (13, 5, 0, 8)) -> list[Rollout]:
    torch.manual_seed(4)
    return [tiny.rollout(student, torch.randint(5, 200, (length,)).tolist()) for length in lengths]


def with_kl(student: Policy, kls: Sequence[Sequence[float]]) -> list[Rollout]:
    rows = rows_of(student, [len(kl) for kl in kls])
    return [replace(row, facts={KL: tuple(kl)}) for row, kl in zip(rows, kls, strict=True)]


def read(method: Method, rows: Sequence[Rollout], step: int = 1) -> Signal:
    return method.read(rows, scores_of(method.audit(rows, step), lambda row, t: -1.0), step)


def kept(signal: Signal) -> list[int]:
    assert all(mask[: int(mask.sum())].all() for mask in signal.mask_BT)
    return [int(mask.sum()) for mask in signal.mask_BT]


def measured(
    method: Method, rows: Sequence[Rollout], evidence: Sequence[Evidence], student: Policy
) -> Mapping[int, Mapping[str, Sequence[float]]]:
    return method.measure(dict(enumerate(rows)), evidence, StudentView(student, rows))


class Detector:
    """The rule as it would be applied while a rollout is written, with a state of fixed size: the reference."""

    def __init__(self, threshold: float, settings: KlStopSettings) -> None:
        self.threshold, self.settings = threshold, settings
        self.last: list[float] = []
        self.seen = self.low = 0

    def hear(self, d: float) -> int | None:
        """How many tokens are kept, once the rollout is over."""
        self.seen += 1
        self.last = [*self.last, d][-self.settings.window :]
        if self.seen < self.settings.window or (self.seen - self.settings.window) % self.settings.step:
            return None
        low = sum(self.last) / self.settings.window < self.threshold and self.seen > self.settings.free
        self.low = self.low + 1 if low else 0
        if self.low < self.settings.low_windows:
            return None
        return self.seen - (self.low - 1) * self.settings.step - self.settings.window


# ------------------------------------------------------------------ the rule


@pytest.mark.parametrize(("runs", "stride", "keeps"), [(2, 1, 2), (2, 2, 6), (3, 1, 6), (4, 1, None)])
def test_the_sheets_trap_is_cut_before_the_first_low_window(runs: int, stride: int, keeps: int | None) -> None:
    assert cut_at(torch.tensor(TRAP), 0.5, 2, stride, runs, 0) == keeps


def test_the_sheets_windows_and_their_least_mean() -> None:
    d = torch.tensor(TRAP, dtype=torch.float64)
    expected = torch.tensor([0.95, 0.55, 0.15, 0.1, 0.65, 0.65, 0.1, 0.1, 0.1], dtype=torch.float64)
    torch.testing.assert_close(window_means(d, 2), expected)
    assert lowest_window(d, 2, 0) == pytest.approx(0.1)


def test_the_threshold_is_the_upper_quantile_of_the_buffer() -> None:
    assert threshold_of([tenth / 10 for tenth in range(1, 11)], 0.3) == pytest.approx(0.73)


def test_kl_over_some_ids_with_a_bucket_for_the_rest_is_a_lower_bound() -> None:
    def kl(p: Sequence[float], q: Sequence[float], **how: Any) -> float:
        logp, logq = (torch.tensor(side, dtype=torch.float64).log() for side in (p, q))
        return float(subset_divergence(logp, torch.tensor([0, 1]), logq[:2], **how)[0])

    def full(p: Sequence[float], q: Sequence[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    p, q = [0.5, 0.3, 0.15, 0.05], [0.4, 0.2, 0.1, 0.3]
    assert full(p, q) == pytest.approx(0.204443, abs=1e-6)
    assert kl(p, q) == pytest.approx(0.094582, abs=1e-6)
    assert kl(p, q, mode="partial") == pytest.approx(0.233212, abs=1e-6)
    p, q = [0.3, 0.3, 0.2, 0.2], [0.45, 0.45, 0.05, 0.05]
    assert full(p, q) == pytest.approx(0.311239, abs=1e-6)
    assert kl(p, q, mode="partial") == pytest.approx(-0.243279, abs=1e-6)
    assert kl(p, q) <= full(p, q) + 1e-12  # equal: inside either bucket the proportions agree
    torch.manual_seed(0)
    for p, q in torch.randn(100, 2, 6, dtype=torch.float64).mul(2).softmax(-1).tolist():
        assert 0 <= kl(p, q) <= full(p, q) + 1e-12


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("exempt", [0, 5])
def test_cutting_afterwards_cuts_where_stopping_while_writing_would_have(stride: int, exempt: int) -> None:
    settings = KlStopSettings(window=3, stride=stride, low_windows=2, exempt=exempt)
    generator = torch.Generator().manual_seed(stride)
    cut = 0
    for _ in range(200):
        d = torch.rand(12, generator=generator, dtype=torch.float64)
        detector = Detector(0.45, settings)
        stops = [stop for number in d.tolist() if (stop := detector.hear(number)) is not None]
        found = cut_at(d, 0.45, 3, stride, 2, exempt)
        assert found == (stops[0] if stops else None)
        cut += found is not None
    assert 0 < cut < 200


@pytest.mark.parametrize("window", [2, 4, 5])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("exempt", [0, 4, 9])
def test_the_earliest_stop_is_told_from_the_settings(window: int, stride: int, exempt: int) -> None:
    settings = KlStopSettings(window=window, stride=stride, low_windows=3, exempt=exempt)
    lowest = torch.zeros(settings.earliest)
    assert cut_at(lowest, 1.0, window, stride, 3, exempt) is not None
    assert cut_at(lowest[:-1], 1.0, window, stride, 3, exempt) is None


def test_the_published_defaults_stop_no_rollout_before_384_tokens() -> None:
    found = KlStopSettings()
    assert found.earliest == 384
    assert (found.window, found.low_windows, found.eta, found.k, found.tokens) == (64, 4, 0.3, 64, "student")
    assert (found.buffer, found.least, found.warmup_steps, found.step, found.free) == (4096, 512, 50, 64, 128)


def test_four_windows_in_a_row_span_67_tokens_or_256() -> None:
    assert [KlStopSettings(stride=stride, exempt=0).earliest for stride in (1, None)] == [67, 256]


def test_unknown_numbers_make_no_window_low_and_impossible_ones_none_either() -> None:
    d = torch.tensor([0.0, math.nan, 0.0, math.inf, 0.0, 0.0])
    assert cut_at(d, 1.0, 2, 1, 1, 0) == 4
    assert lowest_window(d, 2, 0) == 0.0
    assert lowest_window(d[:4], 2, 0) is None


def test_the_scale_of_the_divergence_changes_no_cut() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(20, generator=generator, dtype=torch.float64) for _ in range(8)]

    def cuts(factor: float) -> list[int | None]:
        lowest = [lowest_window(factor * d, 3, 0) for d in rows]
        threshold = threshold_of([one for one in lowest if one is not None], 0.3)
        return [cut_at(factor * d, threshold, 3, 1, 1, 0) for d in rows]

    assert cuts(1.0) == cuts(7.5)
    assert {cut is None for cut in cuts(1.0)} == {True, False}


# ------------------------------------------------------------------ the part


def test_a_rollout_is_learned_up_to_the_cut_and_divided_by_what_is_left(student: Policy) -> None:
    rows = with_kl(student, [TRAP, [5.0] * 4, []])
    signal = read(built(student, threshold=0.5, **SHORT), rows)
    assert kept(signal) == [2, 4, 0]
    assert signal.stats["kl_stop_share"] == 0.5
    assert signal.stats["kl_stop_length"] == 2
    assert signal.coverage == 1

    whole = Trainer(student, OptimizerSettings(), METHODS.get("opd").Config())
    loss = whole.accumulate(rows, signal)["loss"]
    values = [
        v[m] * -torch.tensor(row.logprobs)[m] for v, m, row in zip(signal.values_BT, signal.mask_BT, rows, strict=True)
    ]
    assert loss == pytest.approx(float(torch.cat(values).sum()) / 6, rel=1e-4)


def test_cutting_afterwards_learns_what_was_written_by_one_that_stopped(student: Policy) -> None:
    rows = with_kl(student, [TRAP, [5.0] * 4, [*[5.0] * 3, *[0.1] * 6]])
    signal = read(built(student, threshold=0.5, **SHORT), rows)
    assert kept(signal) == [2, 4, 3]
    stopped = [tiny.rollout(student, row.ids[:length]) for row, length in zip(rows, kept(signal), strict=True)]
    plain = compose(METHODS.get("opd").Config(), student, 0)
    trainer = Trainer(student, OptimizerSettings(), plain.objective)
    afterwards = trainer.accumulate(rows, signal)["loss"]
    online = trainer.accumulate(stopped, read(plain, stopped))["loss"]
    assert afterwards == pytest.approx(online, rel=1e-6) and online != 0


@pytest.mark.parametrize(
    "part",
    [{"low_windows": 10}, {"threshold": None, "least": 512}, {"threshold": 0.0}],
    ids=lambda part: next(iter(part)),
)
def test_what_never_fires_is_plain_to_the_last_bit(student: Policy, part: dict[str, Any]) -> None:
    """More windows than there are, too few rollouts in the buffer, a threshold that nothing is below."""
    rows = with_kl(student, [TRAP, [0.0] * 6, []])
    method = built(student, **{**SHORT, "threshold": 0.5, "warmup_steps": 0, **part})
    part_of(method).buffer.extend([9.0] * 511)
    found, plain = read(method, rows), read(compose(METHODS.get("opd").Config(), student, 0), rows)
    assert all(torch.equal(a, b) for a, b in zip(found.values_BT, plain.values_BT, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found.mask_BT, plain.mask_BT, strict=True))
    assert kept(read(built(student, threshold=0.5, **SHORT), rows)) != kept(plain)


def test_the_buffer_hears_of_whole_rollouts_so_that_cuts_make_it_no_lower(student: Policy) -> None:
    """Minima over what is left of a cut rollout would drift with the cuts."""
    method, rows = built(student, threshold=0.5, **SHORT), with_kl(student, [[5.0, 0.4, 0.4, 0.4, 5.0, 0.1, 0.1]])
    signal = read(method, rows)
    assert kept(signal) == [1]
    method.after(rows, signal, 1, None)  # type: ignore[arg-type]
    assert list(part_of(method).buffer) == pytest.approx([0.1])


def test_until_the_buffer_is_full_enough_and_warm_up_is_over_nothing_changes(student: Policy) -> None:
    method = built(student, least=3, warmup_steps=2, buffer=4, **SHORT)
    part, rows = part_of(method), with_kl(student, [TRAP, TRAP, [0.3, 0.3]])
    plain = compose(METHODS.get("opd").Config(), student, 0)
    cuts = []
    for step in (1, 2, 3):
        signal = read(method, rows, step)
        cuts.append(kept(signal))
        method.after(rows, signal, step, None)  # type: ignore[arg-type]
    assert cuts[:2] == [[10, 10, 2]] * 2
    assert all(
        torch.equal(a, b) for a, b in zip(read(plain, rows).values_BT, read(method, rows, 1).values_BT, strict=True)
    )
    assert cuts[2] == [2, 2, 2]
    assert list(part.buffer) == pytest.approx([0.3, 0.1, 0.1, 0.3])  # the first in goes first, in the order of the rows


def test_the_threshold_stands_still_while_a_step_is_read(student: Policy) -> None:
    method = built(student, least=1, warmup_steps=0, **SHORT)
    part_of(method).buffer.append(0.5)
    rows = with_kl(student, [TRAP])
    assert kept(read(method, rows)) == kept(read(method, rows)) == [2]
    assert list(part_of(method).buffer) == [0.5]


def test_rollouts_too_short_to_be_judged_are_whole_and_only_counted(student: Policy) -> None:
    method = built(student, threshold=10.0, window=4, low_windows=1, exempt=6)
    rows = [*with_kl(student, [[0.1] * 3, [0.1] * 6]), *rows_of(student, [9])]  # no window; exempt; not measured
    signal = read(method, rows)
    assert kept(signal) == [3, 6, 9]
    figures = method.after(rows, signal, 1, None)  # type: ignore[arg-type]
    assert figures == {"kl_stop_buffer": 0.0, "kl_stop_unjudged": 3.0}


def test_the_buffer_survives_a_restart(student: Policy) -> None:
    method = built(student, least=1, warmup_steps=0, **SHORT)
    method.after(with_kl(student, [TRAP, [0.7, 0.7]]), read(method, []), 1, None)  # type: ignore[arg-type]
    resumed = built(student, least=1, warmup_steps=0, **SHORT)
    resumed.load_state_dict(method.state_dict())
    assert list(part_of(resumed).buffer) == list(part_of(method).buffer) == pytest.approx([0.1, 0.7])
    rows = with_kl(student, [TRAP])
    assert read(resumed, rows).stats["kl_stop_threshold"] == read(method, rows).stats["kl_stop_threshold"] is not None


def test_the_control_deals_the_same_lengths_to_random_rollouts_that_are_longer(student: Policy) -> None:
    rows = with_kl(student, [TRAP, [5.0] * 12, [5.0] * 9, [5.0, 5.0], *[[5.0] * 11] * 4])
    method = built(student, control="shuffled", threshold=0.5, **SHORT)
    found = [kept(read(method, rows, step)) for step in range(1, 9)]
    whole = [len(row) for row in rows]
    for lengths in found:
        changed = [row for row, (left, full) in enumerate(zip(lengths, whole, strict=True)) if left != full]
        assert [lengths[row] for row in changed] == [2]
        assert changed != [3]
    assert len({tuple(lengths) for lengths in found}) > 2


def test_many_cuts_are_said_in_the_log(student: Policy, caplog: pytest.LogCaptureFixture) -> None:
    rows = with_kl(student, [TRAP, TRAP, [5.0] * 4])
    with caplog.at_level(logging.WARNING):
        read(built(student, threshold=0.5, **SHORT), rows)
    assert "kl_stop cuts 67% of the rollouts" in caplog.text


# ------------------------------------------------------------------ what is measured


def full_kl(student: Policy, teacher: Policy, row: Rollout) -> Tensor:
    with torch.no_grad():
        whole = torch.tensor([[*row.prompt_ids, *row.ids]])
        p, q = (one.model(input_ids=whole).logits[0].log_softmax(-1) for one in (student, teacher))
    kl: Tensor = (p.exp() * (p - q)).sum(-1)[len(row.prompt_ids) - 1 : -1]
    return kl


@pytest.mark.parametrize("tokens", ["student", "teacher"])
def test_the_divergence_is_that_of_both_distributions_at_each_token(
    student: Policy, teacher: Policy, tokens: str
) -> None:
    rows = rows_of(student)
    method = built(student, tokens=tokens, k=len(student.tokenizer))
    evidence = [scored(teacher, query) for query in method.audit(rows, 1)]
    facts = measured(method, rows, evidence, student)
    assert set(facts) == {0, 1, 3}
    for row in facts:
        expected = full_kl(student, teacher, rows[row])
        torch.testing.assert_close(torch.tensor(facts[row][KL]), expected, rtol=1e-3, atol=1e-4)
    few = built(student, tokens=tokens, k=4)
    found = measured(few, rows, [scored(teacher, query) for query in few.audit(rows, 1)], student)
    assert all(a <= b + 1e-4 for row in facts for a, b in zip(found[row][KL], facts[row][KL], strict=True))


def test_from_scores_alone_it_is_the_sampled_log_ratio(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, [6])
    method = built(student, tokens="sampled")
    (evidence,) = [scored(teacher, query) for query in method.audit(rows, 1)]
    facts = measured(method, rows, [evidence], student)
    expected = [p - q for p, q in zip(rows[0].logprobs, evidence.logprobs, strict=True)]
    assert list(facts[0][KL]) == pytest.approx(expected, abs=1e-9)


def test_what_the_teacher_scored_otherwise_is_not_measured(student: Policy, teacher: Policy) -> None:
    rows = rows_of(student, [6])
    method = built(student)
    (evidence,) = [scored(teacher, query) for query in method.audit(rows, 1)]
    assert not measured(method, rows, [replace(evidence, ids=(*evidence.ids[:-1], 5))], student)
    assert not measured(method, rows, [replace(evidence, distributions=None)], student)


@pytest.mark.parametrize(
    ("tokens", "offered", "lacks"),
    [
        ("student", Capabilities(score=True, topk=20), ["logits"]),
        (
            "teacher",
            Capabilities(score=True, topk=20),
            ["the 64 likeliest tokens of given text (it has 20: lower k of method.parts 'kl_stop')"],
        ),
        ("sampled", Capabilities(score=True), []),
    ],
)
def test_a_teacher_that_can_not_tell_enough_is_refused(
    student: Policy, tokens: str, offered: Capabilities, lacks: list[str]
) -> None:
    said = built(student, tokens=tokens).lacking(replace(offered, vocabulary=student.vocabulary.digest))
    assert len(said) == len(lacks)
    assert all(word in sentence for word, sentence in zip(lacks, said, strict=True))


# ------------------------------------------------------------------ settings


def test_a_buffer_that_can_never_fill_is_refused() -> None:
    with pytest.raises(ValidationError, match="lower least or raise buffer"):
        KlStopSettings(buffer=10, least=11)


def test_a_horizon_before_the_earliest_stop_is_refused(student: Policy) -> None:
    parts = [{"name": "horizon", "tokens": 100}, "kl_stop"]
    config = TypeAdapter(tagged(METHODS)).validate_python({"name": "kat", "parts": parts})
    with pytest.raises(ConfigError, match="after 100 tokens, and 'kl_stop' can't stop one before 384"):
        compose(config, student, 0)
