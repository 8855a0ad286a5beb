"""ADWIN: the shortest window whose gradient points where the whole rollout's does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter, ValidationError
from scored_by import scored
from torch import Tensor

from omniopd.composition import Composed, compose
from omniopd.config import load_config
from omniopd.errors import ConfigError
from omniopd.method import Method
from omniopd.parts.adaptive_window import AdaptiveWindow, AdaptiveWindowSettings
from omniopd.registry import METHODS
from omniopd.run import Run
from omniopd.segments import null_cosine, prefix_cosines, segment_gram
from omniopd.settings import tagged
from omniopd.types import Metric, Rollout, Signal
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer
from students.view import StudentView

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
GOLDEN = torch.tensor([[1, 0.2, 0], [0.2, 1, 0.1], [0, 0.1, 1]], dtype=torch.float64)
PROMPTS = {row: tiny.prompt(f"What is {row} + 7?", f"p{row}") for row in range(4)}
RHO = math.sqrt(0.5)


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def built(student: Policy, window: dict[str, Any] | None = None, **config: Any) -> Method:
    parts = {} if window is None else {"parts": [{"name": "adaptive_window", **window}]}
    return compose(TypeAdapter(tagged(METHODS)).validate_python({"name": "adwin", **config, **parts}), student, 0)


def part_of(method: Method) -> AdaptiveWindow:
    assert isinstance(method, Composed)
    (part,) = method.parts
    assert isinstance(part, AdaptiveWindow)
    return part


SHORT: dict[str, Any] = {"candidates": [2, 4, 8], "longest": 16, "probes": 2, "every": 2}


def written(student: Policy, method: Method | None, step: int = 1) -> list[Rollout]:
    """The rows of a step as the sampler writes them."""
    student.end_ids = frozenset({student.vocabulary.size + 1})  # nothing ends by itself
    found: dict[int, Rollout] = {}
    writings = method.writings(PROMPTS, (), step) if method else {}
    tiny.sampler(student).fill(PROMPTS, step, found.__setitem__, writings)
    return [found[row] for row in PROMPTS]


def learned(
    student: Policy, teacher: Policy, method: Method, rows: Sequence[Rollout], step: int = 1
) -> tuple[float, list[Tensor], Signal, Trainer]:
    signal = method.read(rows, [scored(teacher, query) for query in method.audit(rows, step)], step)
    trainer = Trainer(student, OptimizerSettings(), method.objective)
    loss = trainer.accumulate(rows, signal)["loss"]
    return loss, [p.grad.clone() for p in trainer.trained if p.grad is not None], signal, trainer


class Vectors:
    """Gradients of made-up tokens: that of a signal is the sum of its values times each token's vector [P]."""

    def __init__(self, vectors: Callable[[int, int], Tensor]) -> None:
        self.vectors, self.asked, self.lengths = vectors, 0, list[int]()

    def gram(
        self, rollouts: Sequence[Rollout], signals: Sequence[Signal], metric: Metric = "identity"
    ) -> list[list[float]]:
        self.asked, self.lengths = self.asked + 1, [len(rollout) for rollout in rollouts]
        sums = []
        for signal in signals:
            terms = [
                float(value) * self.vectors(row, t)
                for row, values in enumerate(signal.values_BT)
                for t, value in enumerate(values.tolist())
                if value
            ]
            sums.append(torch.stack(terms).sum(0) if terms else torch.zeros_like(self.vectors(0, 0)))
        stacked = torch.stack(sums).double()
        return (stacked @ stacked.T).tolist()


def decided(student: Policy, vectors: Vectors, lengths: Sequence[int], window: dict[str, Any]) -> dict[str, float]:
    """What the method says after a step of rollouts that long, each token with value 1."""
    method = built(student, window)
    rows = [tiny.rollout(student, [7 + t for t in range(length)]) for length in lengths]
    part_of(method)._probe = Signal(tuple(torch.ones(n) for n in lengths), tuple(torch.ones(n).bool() for n in lengths))
    return dict(method.after(rows, Signal((), ()), 1, vectors))


# ------------------------------------------------------------------ the cosine


def test_golden_inner_products() -> None:
    cosines = prefix_cosines(GOLDEN)
    assert cosines is not None
    assert cosines.tolist() == pytest.approx([0.632456, 0.850517, 1.0], abs=1e-6)


def test_golden_inner_products_choose_the_second_segment(student: Policy) -> None:
    class Golden(Vectors):
        def gram(self, *args: Any) -> list[list[float]]:
            return GOLDEN.tolist()

    found = decided(student, Golden(lambda row, t: torch.zeros(1)), [16, 16], {**SHORT, "candidates": [2, 4]})
    assert (found["window_cos_2"], found["window_cos_4"]) == pytest.approx((0.632456, 0.850517), abs=1e-6)
    assert found["window_next"] == 4


@pytest.mark.parametrize(
    ("tail", "cosine", "accepted"), [(1.0, 0.70710678, True), (1.01, 0.70358, False), (0.99, 0.71065, True)]
)
def test_a_head_as_strong_as_the_tail_is_just_enough(
    student: Policy, tail: float, cosine: float, accepted: bool
) -> None:
    def vector(row: int, t: int) -> Tensor:
        return torch.tensor([1.0, 0.0] if t < 2 else [0.0, tail], dtype=torch.float64)

    found = decided(student, Vectors(vector), [4], {**SHORT, "candidates": [2, 8]})
    assert found["window_cos_2"] == pytest.approx(cosine, abs=6e-6)
    assert found["window_next"] == (2 if accepted else 8)


def test_half_of_the_best_decrease_is_a_cosine_of_a_root_of_a_half() -> None:
    """S(D) = g'D - D'MD/2: the best step along M^-1 g_L reaches cos^2 of the best step of all, in the metric M^-1."""
    generator = torch.Generator().manual_seed(1)
    n = 30
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    inverse = (root @ root.T + torch.eye(n, dtype=torch.float64)).inverse()
    head, tail = torch.randn(2, n, generator=generator, dtype=torch.float64)
    g = head + tail
    along = float(head @ inverse @ g) ** 2 / (2 * float(head @ inverse @ head))
    both = torch.stack([head, tail])
    cosines = prefix_cosines(both @ inverse @ both.T)
    assert cosines is not None
    assert along / (float(g @ inverse @ g) / 2) == pytest.approx(float(cosines[0]) ** 2)


def test_noise_alone_has_the_cosine_of_the_share_of_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(20):  # the sum of n independent vectors is as sqrt(n) times one
        segments = torch.randn(3, 2000, generator=generator, dtype=torch.float64)
        segments *= torch.tensor([256.0, 768.0, 1024.0])[:, None].sqrt()
        cosines = prefix_cosines(segments @ segments.T)
        assert cosines is not None
        found.append(cosines)
    mean = torch.stack(found).mean(0).tolist()
    assert mean == pytest.approx([0.3539, 0.7076, 1.0], abs=0.01)
    assert [null_cosine([2048] * 3, window) for window in (256, 1024, 4096)] == pytest.approx(
        [math.sqrt(1 / 8), RHO, 1.0]
    )
    assert null_cosine([2, 8], 4) == pytest.approx(math.sqrt(6 / 10))


@pytest.mark.parametrize(("noise", "plain"), [(0.05, 0.873), (0.2, 0.776)])
def test_noise_hides_alignment_and_half_against_half_does_not(student: Policy, noise: float, plain: float) -> None:
    size, samples, population = 2000, 64, 0.892
    tail = math.sqrt(1 / population**2 - 1)
    n = size * noise**2 / samples
    assert math.sqrt((1 + n) / (1 + tail**2 + 2 * n)) == pytest.approx(plain, abs=3e-3)
    means = {}
    for split in (False, True):
        found = []
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            each = noise * torch.randn(samples, 2, size, generator=generator, dtype=torch.float64)
            each[:, 0, 0] += 1
            each[:, 1, 1] += tail
            vectors = Vectors(lambda row, t, each=each: each[row, t])
            window = {"candidates": [1], "longest": 2, "probes": samples, "split_half": split}
            found.append(decided(student, vectors, [2] * samples, window)["window_cos_1"])
        means[split] = sum(found) / len(found)
    assert means[False] == pytest.approx(plain, abs=0.01)
    assert means[True] == pytest.approx(population, abs=0.015)


# ------------------------------------------------------------------ the decision


def test_the_shortest_good_window_is_next(student: Policy) -> None:
    def vector(row: int, t: int) -> Tensor:
        return torch.eye(3, dtype=torch.float64)[min(t // 2, 2)] * (3.0 if t < 4 else 1.0)

    vectors = Vectors(vector)
    found = decided(student, vectors, [16, 3, 8, 8], SHORT)
    assert vectors.lengths == [16, 3, 0, 0]  # what is no probe is not computed
    assert found["window_next"] == 4  # after 2 tokens a half of what 4 have; the tail adds little
    assert found["window_cos_2"] < RHO < found["window_cos_4"] < found["window_cos_8"]
    assert found["window_null_4"] == pytest.approx(math.sqrt(7 / 19))


@pytest.mark.parametrize(
    ("window", "expected"),
    [({"rho": -1}, 2), ({"rho": 2}, 8), ({"rho": 2, "fallback": "full"}, 16), ({"rho": 2, "start": "full"}, 8)],
)
def test_ends_of_the_threshold(student: Policy, window: dict[str, Any], expected: int) -> None:
    towards = torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = decided(student, Vectors(lambda row, t: towards * (t - 3)), [16, 16], {**SHORT, **window})
    assert found["window_next"] == expected


def test_a_candidate_that_cuts_nothing_has_nothing_to_prove(student: Policy) -> None:
    vectors = Vectors(lambda row, t: torch.tensor([1.0 if t >= 5 else -0.1], dtype=torch.float64))
    found = decided(student, vectors, [6, 1], SHORT)
    assert found["window_next"] == 8
    assert "window_cos_8" not in found


def test_responses_shorter_than_all_windows_and_gradients_of_zero_change_nothing(student: Policy) -> None:
    nothing = Vectors(lambda row, t: torch.zeros(2, dtype=torch.float64))
    assert decided(student, nothing, [2, 1], {**SHORT, "start": "full"}) == {}
    assert nothing.asked == 0
    assert decided(student, nothing, [16, 16], SHORT) == {"window_zero_gradient": 1.0}
    cancelled = Vectors(lambda row, t: torch.tensor([0.0 if t < 2 else 1.0], dtype=torch.float64))
    assert decided(student, cancelled, [16, 16], SHORT)["window_cos_2"] == 0  # not 0 / 0


def test_probes_come_every_few_steps_and_the_state_survives_a_restart(student: Policy) -> None:
    method = built(student, SHORT)
    limits = [[w.max_tokens for w in method.writings(PROMPTS, (), step).values()] for step in (1, 2, 3)]
    assert limits == [[16, 16, 8, 8], [8] * 4, [16, 16, 8, 8]]
    part_of(method).windows.append((1, 4))
    again = built(student, SHORT)
    again.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert [w.max_tokens for w in again.writings(PROMPTS, (), 2).values()] == [4] * 4
    assert part_of(again).windows == [(0, 8), (1, 4)]


# ------------------------------------------------------------------ through the update


@pytest.mark.parametrize("form", ["sampled", "dense"])
def test_what_a_probe_has_beyond_the_window_is_neither_learned_nor_counted(
    student: Policy, teacher: Policy, form: str
) -> None:
    method = built(student, SHORT, form=form)
    probed, cut = written(student, method), written(student, built(student, SHORT), step=2)
    assert list(map(len, probed)) == [16, 16, 8, 8]
    assert list(map(len, cut)) == [8] * 4
    cut = [replace(row, ids=whole.ids[:8], logprobs=whole.logprobs[:8], prompt_ids=whole.prompt_ids)
           for row, whole in zip(cut, probed, strict=True)]  # fmt: skip
    with_probe = learned(student, teacher, method, probed)
    without = learned(student, teacher, built(student, form=form, parts=[]), cut)
    assert with_probe[0] == pytest.approx(without[0], rel=1e-5)
    for one, other in zip(with_probe[1], without[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert sum(int(mask.sum()) for mask in with_probe[2].mask_BT) == 32
    assert with_probe[2].stats["window_probe_tokens"] == 16


@pytest.mark.parametrize("form", ["sampled", "dense"])
def test_inner_products_are_those_of_the_prefixes_own_gradients(student: Policy, teacher: Policy, form: str) -> None:
    """Against a backward pass for each prefix and the whole; of the probed rows alone, whatever the micro-batches."""
    student.settings = student.settings.model_copy(update={"micro_batch_tokens": 40})
    method = built(student, {**SHORT, "candidates": [2, 4, 20]}, form=form)
    part_of(method).windows = [(0, 4)]  # the update learns less than the probe has
    rows = written(student, method)
    _, _, signal, trainer = learned(student, teacher, method, rows)
    base = part_of(method)._probe
    assert base is not None
    found = method.after(rows, signal, 1, trainer)
    assert all(p.grad is None for p in trainer.trained)  # nothing is left for the next update
    prefixes = []
    for end in (2, 4, 16):
        masks = [mask & (torch.arange(len(mask)) < (end if row < 2 else 0)) for row, mask in enumerate(base.mask_BT)]
        values = [value * mask for value, mask in zip(base.values_BT, masks, strict=True)]
        trainer.accumulate(rows, replace(base, values_BT=tuple(values), mask_BT=tuple(masks)))
        prefixes.append(torch.cat([p.grad.double().flatten() for p in trainer.trained if p.grad is not None]))
    for prefix, end in zip(prefixes, (2, 4), strict=False):
        expected = float(prefix @ prefixes[-1] / (prefix.norm() * prefixes[-1].norm()))
        assert found[f"window_cos_{end}"] == pytest.approx(expected, rel=1e-5)


def test_in_adams_metric_gradients_are_divided_by_its_second_moments(student: Policy, teacher: Policy) -> None:
    method = built(student, {**SHORT, "metric": "adam"})
    rows = written(student, method)
    _, _, signal, trainer = learned(student, teacher, method, rows)
    trainer.update(rows, signal)
    base = part_of(method)._probe
    assert base is not None
    segments = [(0, 2), (2, 4), (4, 8), (8, 16)]
    found, plain = (segment_gram(trainer, rows, base, range(2), [2, 4, 8], metric=m) for m in ("adam", "identity"))
    moments = [trainer.optimizer.state[p]["exp_avg_sq"].double().flatten() for p in trainer.trained]
    metric = torch.cat(moments) + torch.cat(moments).mean()
    gradients = []
    for start, end in segments:
        masks = [m & (torch.arange(len(m)) >= start) & (torch.arange(len(m)) < end) for m in base.mask_BT]
        values = [v * m * (row < 2) for row, (v, m) in enumerate(zip(base.values_BT, masks, strict=True))]
        trainer.accumulate(rows, replace(base, values_BT=tuple(values)))
        gradients.append(torch.cat([p.grad.double().flatten() for p in trainer.trained if p.grad is not None]))
    stacked = torch.stack(gradients)
    expected = prefix_cosines(stacked / metric @ stacked.T)
    torch.testing.assert_close(prefix_cosines(found), expected, rtol=1e-4, atol=1e-6)
    assert expected is not None and (expected - prefix_cosines(plain))[:-1].abs().max() > 1e-3  # type: ignore[operator]
    assert method.after(rows, signal, 1, trainer)["window_cos_2"] == pytest.approx(float(expected[0]), rel=1e-4)


def test_before_any_update_adams_metric_is_the_identity(student: Policy, teacher: Policy) -> None:
    method = built(student, SHORT)
    rows = written(student, method)
    _, _, signal, trainer = learned(student, teacher, method, rows)
    assert trainer.gram(rows, [signal], "adam") == trainer.gram(rows, [signal])


@pytest.mark.parametrize("reduction", ["sum_seqmean", "token_mean"])
def test_one_normaliser_leaves_the_cosine_as_it_is_and_so_do_decay_and_clipping(
    student: Policy, teacher: Policy, reduction: str
) -> None:
    """A mean for each sequence would weigh sequences anew."""
    found = []
    for how, settings in (("term_mean", {}), (reduction, {"weight_decay": 0.5, "max_grad_norm": 1e-6})):
        method = built(student, SHORT, reduction=how)
        rows = written(student, method)
        rows = [rows[0], replace(rows[1], ids=rows[1].ids[:7], logprobs=rows[1].logprobs[:7]), *rows[2:]]
        signal = method.read(rows, [scored(teacher, query) for query in method.audit(rows, 1)], 1)
        trainer = Trainer(student, OptimizerSettings(**settings), method.objective)
        found.append(method.after(rows, signal, 1, trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert len(found[0]) == 7


def test_the_shortest_window_for_good_is_esr_of_that_length(student: Policy, teacher: Policy) -> None:
    """rho = -1, between probes: what is written, learned and asked, to the last bit."""
    method = built(student, {**SHORT, "rho": -1})
    probe = written(student, method)
    method.read(probe, [scored(teacher, query) for query in method.audit(probe, 1)], 1)
    method.after(probe, Signal((), ()), 1, Vectors(lambda row, t: torch.ones(1)))
    early = compose(
        TypeAdapter(tagged(METHODS)).validate_python(
            {"name": "esr", "form": "sampled", "parts": [{"name": "horizon", "tokens": 2}]}
        ),
        student,
        0,
    )
    rows = [replace(row, version=1) for row in written(student, method, step=2)]
    assert rows == [replace(row, version=1) for row in written(student, early, step=2)]
    assert list(map(len, rows)) == [2] * 4
    one, other = (learned(student, teacher, chosen, rows, step=2) for chosen in (method, early))
    assert one[0] == other[0] != 0
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_the_defaults_are_the_sheets() -> None:
    defaults = AdaptiveWindowSettings()
    assert defaults.rho == pytest.approx(math.sqrt(2) / 2)
    assert defaults.candidates == [64, 128, 256, 512, 1024, 2048]
    assert (defaults.longest, defaults.probes, defaults.every) == (8192, 64, 5)
    assert (defaults.start, defaults.fallback) == ("largest", "largest")
    assert (defaults.split_half, defaults.metric) == (False, "identity")


def test_an_anchor_on_what_nobody_spoke_about_is_no_part_of_it(student: Policy, teacher: Policy) -> None:
    anchored = {"beta": 0.5, "where": "unaudited"}
    found = []
    for config in ({}, {"anchor": anchored}):
        method = built(student, SHORT, **config)
        rows = written(student, method)
        _, _, signal, trainer = learned(student, teacher, method, rows)
        found.append(method.after(rows, signal, 1, trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    with pytest.raises(ConfigError, match=r"method\.anchor\.where: .*set where: unaudited"):
        built(student, SHORT, anchor={"beta": 0.5, "where": "all"})


def test_a_window_that_cuts_nothing_is_the_plain_method_to_the_last_bit(student: Policy, teacher: Policy) -> None:
    method = built(student, {"candidates": [64], "longest": 64})
    rows = written(student, method)
    assert rows == written(student, None)
    one = learned(student, teacher, method, rows)
    other = learned(student, teacher, built(student, parts=[]), rows)
    assert one[0] == other[0] != 0
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert method.after(rows, one[2], 1, one[3]) == {}


def test_a_rollout_is_learned_up_to_the_window_that_it_was_written_with(student: Policy, teacher: Policy) -> None:
    method = built(student, SHORT)
    part_of(method).windows = [(0, 8), (3, 2), (5, 4)]
    rows = [replace(row, version=version) for row, version in zip(written(student, None), (0, 3, 4, 6), strict=True)]
    signal = method.read(rows, [scored(teacher, query) for query in method.audit(rows, 7)], 7)
    assert [int(mask.sum()) for mask in signal.mask_BT] == [8, 2, 2, 4]


def test_what_other_parts_leave_out_is_in_the_probe_all_the_same(student: Policy, teacher: Policy) -> None:
    parts = [{"name": "adaptive_window", **SHORT}, {"name": "trajectory_filter", "drop": 0.5}, "entropy_weights"]
    tree = {"name": "adwin", "parts": parts}
    method = compose(TypeAdapter(tagged(METHODS)).validate_python(tree), student, 0)
    assert isinstance(method, Composed)
    window = next(part for part in method.parts if isinstance(part, AdaptiveWindow))
    rows = written(student, method)
    evidence = [scored(teacher, query) for query in method.audit(rows, 1)]
    facts = method.measure(dict(enumerate(rows)), evidence, StudentView(student, rows))
    measured = [replace(row, facts={k: tuple(v) for k, v in facts.get(n, {}).items()}) for n, row in enumerate(rows)]
    signal = method.read(measured, evidence, 1)
    plain = method.base.read(rows, evidence, 1)
    assert window._probe is not None
    assert any(not mask.any() for mask in signal.mask_BT)
    assert all(map(torch.equal, window._probe.mask_BT, plain.mask_BT))
    assert all(map(torch.equal, window._probe.values_BT, plain.values_BT))


def test_a_control_deals_out_no_token_of_the_probe(student: Policy, teacher: Policy) -> None:
    method = built(student, SHORT, control="shuffled")
    _, _, signal, _ = learned(student, teacher, method, written(student, method))
    assert not any(mask[8:].any() for mask in signal.mask_BT)


@pytest.mark.parametrize("candidates", [[], [0, 4], [4, 4], [8, 2]])
def test_windows_that_make_no_list_are_refused(student: Policy, candidates: list[int]) -> None:
    with pytest.raises(ValidationError, match="candidates"):
        built(student, {"candidates": candidates})


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_cuts_from_the_step_after_the_probe(tmp_path: Path, lag: int) -> None:
    window = {"name": "adaptive_window", "rho": -1, "candidates": [6, 12], "longest": 24, "probes": 2, "every": 4}
    config = {
        "student": {"path": str(DEMO / "student"), "max_new_tokens": 24},
        "teacher": {"type": "transformers", "path": str(DEMO / "sibling")},
        "task": {"type": "arithmetic", "train_size": 16, "heldout_size": 4},
        "method": {"name": "adwin", "parts": [window]},
        "train": {"steps": 3, "prompts_per_step": 4, "max_lag": lag},
        "eval": {"problems": 0},
        "output": str(tmp_path / "run"),
    }
    assert Run(load_config(config)).train()["status"] == "finished"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["window"] for row in rows] == ([12, 12, 6] if lag else [12, 6, 6])
    assert rows[0]["window_next"] == 6
    assert rows[0]["window_probe_tokens"] > 0
    assert rows[2]["mean_length"] == 6
