"""The self-test: every check passes on what is right, and fails on the fault that it is there for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omniopd import selftest as package
from omniopd.config import load_config
from omniopd.errors import ConfigError
from omniopd.progress import Progress
from omniopd.prompt_check import Compared
from omniopd.run import Run
from omniopd.selftest import checks, mirror
from omniopd.selftest.bench import SHORT, Bench, Push, shortened
from omniopd.selftest.landing import counterparts, otherwise
from omniopd.types import Evidence, Rollout, ScoreQuery, Signal, TokenScores
from omniopd.vocabulary import Spelling, Vocabulary

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
METHODS: dict[str, dict[str, Any]] = {
    "sampled": {"name": "opd"},
    "dense": {"name": "opd", "form": "dense"},
    "top-k": {"name": "opd", "form": "dense", "support": "teacher", "k": 8},
    "dpca": {"name": "dpca"},
    "bpm": {"name": "bpm"},
    "uld": {"name": "uld"},
    "anchored": {"name": "opd", "anchor": {"beta": 0.1, "where": "all"}},
    "omniopd": {"name": "omniopd", "chunks": 2, "chunk_tokens": 6, "continuations": 2},
    "seqkd": {"name": "seqkd", "answer_tokens": 24},
    "fire": {"name": "fire"},
    "scope": {"name": "scope"},
    "parts that ask again, write branches and whiten": {
        "name": "opd",
        "parts": [{"name": "fork_guidance", "horizon": 6, "share": 0.2}, {"name": "teachability", "k": 4}, "whiten"],
    },
}
Make = Callable[..., Bench]


def tree(method: str, teacher: str = "sibling", **student: Any) -> dict[str, Any]:
    return {
        "student": {"path": str(DEMO / "student"), "max_new_tokens": 40, **student},
        "teacher": {"type": "transformers", "path": str(DEMO / teacher)},
        "task": {"type": "arithmetic", "train_size": 32, "heldout_size": 4},
        "method": METHODS[method],
        "train": {"prompts_per_step": 3, **({"rollouts_per_prompt": 2} if method == "scope" else {})},
    }


@pytest.fixture(scope="module")
def benches() -> dict[tuple[Any, ...], Bench]:
    """Those of this file; a check changes none."""
    return {}


@pytest.fixture
def make(benches: dict[tuple[Any, ...], Bench]) -> Make:
    """A bench whose teacher was not asked."""

    def bench(method: str, **student: Any) -> Bench:
        name = (method, str(student))
        if name not in benches:
            run = Run(load_config(tree(method, **student)))
            prompts = run.prompts(1)
            rollouts = run.sampler.sample(prompts, 1) if run.method.on_policy else run.sampler.unwritten(prompts)
            benches[name] = Bench(run, rollouts)
        return replace(benches[name])

    return bench


def asked_of_itself(bench: Bench) -> list[Evidence]:
    """What the student says as its own teacher, about the whole rollouts."""
    queries = bench.method.audit(bench.rollouts, 1)
    return mirror.evidence(bench.run.policy, bench.rollouts, queries, lambda scores: scores)


# ---------------------------------------------------------------------- what is right


@pytest.mark.parametrize("method", METHODS)
def test_every_check_of_the_update_passes_or_says_why_it_is_not_made(make: Make, method: str) -> None:
    bench = make(method)
    for check in checks.CHECKS[:5]:
        seen = check.look(bench)
        assert seen.passed is not False, f"{check.name}: {seen.what}"
        assert seen.what
    made = {check.name for check in checks.CHECKS[:5] if check.look(bench).passed}
    scored = {"teacher = student", "positions"} if bench.scored else set()
    assert made >= {"micro-batches", "slices"} | scored


@pytest.mark.parametrize("method", ["sampled", "dense", "anchored"])
def test_it_holds_in_mixed_precision(make: Make, method: str) -> None:
    bench = make(method, mixed_precision=True)
    found = [check.look(bench) for check in checks.CHECKS[:5]]
    assert all(seen.passed is not False for seen in found), found


@pytest.mark.parametrize("method", ["sampled", "anchored"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_holds_with_adapters_and_in_bf16(make: Make, method: str, dtype: str) -> None:
    bench = make(method, lora={"rank": 2}, dtype=dtype)
    found = [check.look(bench) for check in checks.CHECKS[:5]]
    assert all(seen.passed is not False for seen in found), found


@pytest.mark.parametrize(("method", "teacher"), [("dense", "sibling"), ("dpca", "teacher"), ("omniopd", "teacher")])
def test_the_whole_of_it_on_the_demo_models(method: str, teacher: str) -> None:
    def never(cost: str) -> bool:
        raise AssertionError(f"a free teacher is asked without a word: {cost}")

    results = asyncio.run(package.selftest(load_config(tree(method, teacher)), Progress(enabled=False), never))
    assert [result.name for result in results] == [check.name for check in checks.CHECKS]
    wrong = [result for result in results if result.verdict == "failed"]
    assert not wrong
    skipped = {result.name for result in results if result.verdict == "skipped"}
    assert skipped == ({"teacher = student", "positions", "scored twice"} if method == "omniopd" else set())


def test_the_student_is_as_it_was(make: Make) -> None:
    bench = make("sampled")
    before = {name: value.clone() for name, value in bench.run.policy.model.state_dict().items()}
    settings = bench.run.policy.settings
    for check in checks.CHECKS[:5]:
        check.look(bench)
    assert all(before[name].equal(value) for name, value in bench.run.policy.model.state_dict().items())
    assert bench.run.policy.settings == settings
    assert all(weight.grad is None for weight in bench.run.trainer.trained)
    assert bench.run.trainer.updates == 0


# ---------------------------------------------------------------------- planted faults


def read_as(monkeypatch: pytest.MonkeyPatch, bench: Bench, change: Callable[[Signal], Signal]) -> None:
    """Make the bench's method read evidence wrongly."""
    right = bench.method.read
    monkeypatch.setattr(bench.method, "read", lambda *given: change(right(*given)))


def test_r1_a_row_that_is_shifted_by_one_is_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make("sampled")
    read_as(monkeypatch, bench, lambda said: replace(said, values_BT=tuple(v.roll(1) for v in said.values_BT)))
    assert checks.positions(bench).passed is False


def test_r1_distributions_that_are_shifted_by_one_are_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make("dense")
    right = bench.method.read

    def shifted(rollouts: Sequence[Rollout], evidence: Sequence[TokenScores], step: int) -> Signal:
        late = [
            replace(e, distributions=replace(e.distributions, hidden=e.distributions.hidden.roll(1, 0)))
            for e in evidence
        ]
        return right(rollouts, late, step)

    monkeypatch.setattr(bench.method, "read", shifted)
    assert checks.positions(bench).passed is False
    assert checks.self_teacher(bench).passed is False


def test_o4_an_offset_between_both_sides_is_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make("sampled")
    read_as(monkeypatch, bench, lambda said: replace(said, values_BT=tuple(v + 0.1 for v in said.values_BT)))
    assert checks.self_teacher(bench).passed is False


def test_o6_a_teacher_that_is_dropped_before_the_loss_is_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make("sampled")
    read_as(monkeypatch, bench, lambda said: replace(said, values_BT=tuple(v * 0 for v in said.values_BT)))
    assert checks.self_teacher(bench).passed is False
    assert checks.micro_batches(bench).passed is None  # nothing to compare is no pass


def test_o12_a_mean_per_micro_batch_is_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make("sampled")
    right = bench.push

    def averaged(signal: Signal) -> Push:
        found, cut = right(signal), 1 + (bench.run.policy.settings.micro_batch_tokens < 200)
        return replace(found, loss=found.loss / cut, sample=found.sample / cut)

    monkeypatch.setattr(bench, "push", averaged)
    assert checks.micro_batches(bench).passed is False


def test_o9_a_sliced_pass_that_trains_something_else_is_seen(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make("sampled")
    right = bench.push
    monkeypatch.setattr(bench, "push", lambda signal: replace(right(signal), sample=right(signal).sample.roll(1)))
    assert checks.slices(bench).passed is False


def test_s1_a_sampler_that_disagrees_with_the_update_is_seen(make: Make) -> None:
    bench = make("sampled")
    off = [replace(r, logprobs=tuple(value - 0.05 for value in r.logprobs)) for r in bench.rollouts]
    assert checks.agreement(bench).passed is True
    assert checks.agreement(replace(bench, rollouts=off)).passed is False


def test_r3_different_prompts_are_seen(make: Make) -> None:
    bench = make("sampled")
    assert checks.prompts(bench).passed is True
    seen = checks.prompts(replace(bench, shown=Compared((), ("the teacher's template adds 'Today is'",))))
    assert seen == (False, "the teacher's template adds 'Today is'")


def test_r10_a_silent_teacher_is_seen_with_its_reason(make: Make) -> None:
    bench = make("sampled")
    silent = [TokenScores(query, rejected={"error": 1}) for query in bench.method.audit(bench.rollouts, 1)]  # type: ignore[arg-type]
    seen = checks.coverage(replace(bench, first=silent))
    assert seen.passed is False
    assert seen.what.startswith("0% of the tokens; holes: error")
    assert checks.coverage(replace(bench, first=asked_of_itself(bench))) == (True, "100% of the tokens; no holes")


def test_r9_scores_that_change_are_seen(make: Make) -> None:
    bench = make("sampled")
    first = asked_of_itself(bench)
    assert checks.scored_twice(replace(bench, first=first, again=first)).passed is True
    other = [otherwise(found, 3) for found in first if isinstance(found, TokenScores)]
    assert checks.scored_twice(replace(bench, first=first, again=other)).passed is False
    holes = [replace(found, logprobs=(float("nan"),) * len(found.ids)) for found in other]
    assert (
        checks.scored_twice(replace(bench, first=first, again=holes)).passed is False
    )  # nothing to compare is no pass


# ---------------------------------------------------------------------- its parts


class Spelled:
    """A vocabulary that spells any ids with these ends."""

    def __init__(self, *ends: int | None) -> None:
        self.ends = ends

    def spell(self, ids: Sequence[int]) -> Spelling:
        return Spelling("", tuple(ids), self.ends, (False,) * len(self.ends))


@pytest.mark.parametrize(
    ("student", "teacher", "closes", "expected"),
    [
        ((2, 4, 6), (3, 6), False, [{0, 1}, {1, 2}]),
        ((3, 6), (2, 4, 6), False, [{0}, {0, 1}, {1}]),
        ((2, 2), (1, 2, 2), True, [{0}, {0}, {1}]),  # the ends of both turns belong to each other
        ((2, 4), (0, 2, 4), False, [set(), {0}, {1}]),  # a token of no width spells nothing
        ((2, 4), (2, None, 4), False, [{0}, set(), set()]),  # inside text that the tokenizer changed
    ],
)
def test_counterparts_by_bytes(
    student: tuple[int, ...], teacher: tuple[int | None, ...], closes: bool, expected: list[set[int]], make: Make
) -> None:
    rollout = replace(make("sampled").rollouts[0], ids=tuple(range(len(student))))
    query = ScoreQuery(rollout.prompt, 0, rollout.ids, "", "", closes)
    scores = TokenScores(query, ids=(99,) * len(teacher), ends=teacher)
    vocabulary: Vocabulary = Spelled(*student)  # type: ignore[assignment]
    assert [counterparts(scores, place, rollout, vocabulary) for place in range(len(teacher))] == expected


def test_a_shortened_rollout_is_one_that_a_lower_limit_had_cut(make: Make) -> None:
    rollout = make("sampled").rollouts[0]
    assert shortened(rollout, make("sampled").run.policy.decode) == rollout
    long = replace(rollout, **{name: getattr(rollout, name) * 9 for name in ("ids", "logprobs", "entropy", "ends")})
    cut = shortened(long, make("sampled").run.policy.decode)
    assert len(cut) == len(cut.logprobs) == len(cut.entropy) == len(cut.ends) == SHORT
    assert (cut.finish, cut.text) == ("length", make("sampled").run.policy.decode(list(cut.ids)))


def test_updates_are_compared_by_loss_and_by_gradient() -> None:
    one = Push(1.0, 5.0, torch.tensor([3.0, 4.0]))
    assert one.apart(one) == 0
    assert one.apart(replace(one, loss=0.9)) == pytest.approx(0.1)
    assert one.apart(replace(one, sample=torch.tensor([3.0, 3.0]))) == pytest.approx(0.2)


# ---------------------------------------------------------------------- money


def test_a_teacher_that_costs_money_is_asked_about_first(make: Make) -> None:
    told: list[str] = []

    def no(cost: str) -> bool:
        told.append(cost)
        return False

    settings = tree("sampled")
    settings["teacher"]["price"] = {"prompt": 10, "completion": 10}
    with pytest.raises(ConfigError, match="not agreed to; nothing was sent"):
        asyncio.run(package.selftest(load_config(settings), Progress(enabled=False), no))
    assert told[0].startswith("the self-test asks the live teacher: at most 6 calls")  # three responses, twice
    assert "$" in told[0]
