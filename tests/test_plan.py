"""The plan of a run and its forecast, before a probe and after one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from omniopd import pilot, plan
from omniopd.config import load_config
from omniopd.errors import ConfigError
from omniopd.ledger import Price
from omniopd.opening import open_teacher
from omniopd.pilot import Counter, Pilot, pilot_queries, queries_of, run_digest
from omniopd.plan import describe, forecast, known_of, memory_gb, sampled, teacher_eval
from omniopd.probing import ahead
from omniopd.run import Run
from omniopd.store import Store
from omniopd.types import AnswerQuery, ContinueQuery, Query, Usage
from students.policy import Policy, StudentSettings
from teachers.ladder import ECHO_TOKENS

STUDENT = str(Path(__file__).resolve().parents[1] / "examples" / "demo" / "student")
Make = Callable[..., Run]


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, ...], Run]:
    """Those of this file; a forecast changes none."""
    return {}


@pytest.fixture(scope="module")
def policies() -> dict[StudentSettings, Policy]:
    """Their students, which nothing trains here."""
    return {}


@pytest.fixture
def make(
    runs: dict[tuple[str, ...], Run],
    policies: dict[StudentSettings, Policy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Make:
    """A run with these settings over those of a small one."""

    def policy(settings: StudentSettings, anchored: bool) -> Policy:
        return policies.get(settings) or policies.setdefault(settings, Policy(settings, anchored=anchored))

    monkeypatch.setattr("omniopd.run.Policy", policy)
    monkeypatch.setattr(plan, "SAMPLED", 8)

    def run(*overrides: str) -> Run:
        tree = {
            "student": {"path": STUDENT, "max_new_tokens": 32},
            "teacher": {"type": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": None},
            "task": {"type": "arithmetic", "train_size": 48, "heldout_size": 8},
            "method": {"name": "omniopd", "chunks": 3, "chunk_tokens": 6, "continuations": 4},
            "train": {"steps": 10, "prompts_per_step": 4},
            "output": "nowhere",
        }
        if overrides not in runs:
            runs[overrides] = Run(load_config(tree, overrides))
        runs[overrides].config = runs[overrides].config.model_copy(update={"output": tmp_path / "run"})
        return runs[overrides]

    return run


SEQKD = "method={name: seqkd, answers: 2, answer_tokens: 50}"


def record(run: Run, queries: Sequence[Query], used: Usage, rung: Any = "prefill", **changes: Any) -> dict[str, Any]:
    """A probe's record whose pilot used that for these queries."""
    found = Pilot.of(run, Counter(run, rung), queries, used).to_json() | changes
    return {"rung": rung, "findings": [], "at": "2026-11-01T00:00:00+00:00", "pilot": found}


# ---------------------------------------------------------------------- which queries


def test_the_pilot_asks_the_very_queries_of_the_first_step(make: Make) -> None:
    asked: list[Query] = []

    class Listening:
        streams = False

        async def gather(self, queries: Sequence[Query], progress: Any = None) -> list[Any]:
            asked.extend(queries)
            raise KeyboardInterrupt

    run = make()
    piloted = pilot_queries(run)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run.step(1, Listening()))  # type: ignore[arg-type]
    assert piloted == asked
    assert len(piloted) > 4


def test_a_large_pilot_is_whole_rollouts_up_to_both_bounds(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make("train.prompts_per_step=20")
    whole = queries_of(run, 1)
    for rollouts, queries in ((2, 1), (1, 20), (3, 9), (99, 1), (1, 9999)):
        monkeypatch.setattr(pilot, "ROLLOUTS", rollouts)
        monkeypatch.setattr(pilot, "QUERIES", queries)
        asked = pilot_queries(run)
        assert asked == whole[: len(asked)]
        rows = {query.row for query in asked}
        assert rows.isdisjoint(query.row for query in whole[len(asked) :])
        assert (len(rows) >= rollouts and len(asked) >= queries) or len(asked) == len(whole)
        before = [query for query in asked if query.row != max(rows)]
        assert len(rows) - 1 < rollouts or len(before) < queries  # and not one rollout more than that takes


def test_a_method_whose_student_writes_nothing_is_counted_whole(make: Make) -> None:
    run = make(SEQKD, "train.steps=30")
    queries, scale = sampled(run)
    assert scale == 1
    assert queries == [query for step in range(1, 31) for query in queries_of(run, step)]
    assert {type(query) for query in queries} == {AnswerQuery}


def test_what_is_asked_before_the_student_writes_is_counted(make: Make) -> None:
    run = make("method={name: soda, answers: 3, answer_tokens: 50}", "train.rollouts_per_prompt=2")
    asked = run.method.before(dict(enumerate(run.prompts(1))), 1)
    assert queries_of(run, 1) == asked and [(query.row, query.n) for query in asked] == [
        (row, 3) for row in (0, 2, 4, 6)
    ]
    assert forecast(run).most.completion_tokens == 10 * 4 * 3 * 50


def test_rollouts_are_sampled_all_over_the_run(make: Make) -> None:
    run = make("train.steps=100")
    queries, scale = sampled(run)
    assert scale == pytest.approx(50)  # 8 of 400 rollouts
    prompts = {query.prompt.id for query in queries}
    assert not prompts <= {prompt.id for step in (1, 2, 3, 4) for prompt in run.prompts(step)}
    assert sampled(make("train.prompts_per_step=32", "train.steps=5"))[1] == pytest.approx(5 * 4)
    assert sampled(make("train.steps=0")) == ([], 0.0)


# ---------------------------------------------------------------------- the forecast


def test_without_a_probe_it_counts_with_the_students_tokenizer(make: Make) -> None:
    run = make("train.steps=1", "teacher.continuation=prefill")
    queries = queries_of(run, 1)
    ahead = forecast(run)
    assert not ahead.measured
    assert ahead.expected.calls == len(queries)
    prefixes = [query.chunk.prefix for query in queries if isinstance(query, ContinueQuery)]
    expected = sum(len(run.policy.prompt_ids(query.prompt)) for query in queries)
    expected += sum(len(run.policy.encode(prefix)[0]) for prefix in prefixes)
    assert ahead.expected.prompt_tokens == expected
    assert ahead.expected.completion_tokens == ahead.most.completion_tokens == sum(q.n * q.max_tokens for q in queries)


def test_an_answer_is_expected_to_take_half_of_its_limit(make: Make) -> None:
    ahead = forecast(make(SEQKD))
    assert ahead.most.completion_tokens == 10 * 4 * 2 * 50
    assert ahead.expected.completion_tokens == ahead.most.completion_tokens / 2


def test_what_the_rung_and_the_settings_add_is_counted(make: Make) -> None:
    plain = forecast(make("teacher.continuation=prefill"))
    instructed = forecast(make("teacher.continuation=instruct"))
    draws = plain.most.completion_tokens / 13  # 1.5 x 6 + 4 tokens each
    assert instructed.most.completion_tokens == pytest.approx(draws * (13 + ECHO_TOKENS))
    assert instructed.expected.prompt_tokens > 3 * plain.expected.prompt_tokens
    system = forecast(make("teacher.continuation=prefill", "teacher.system=Answer in equations only."))
    assert system.expected.prompt_tokens > plain.expected.prompt_tokens
    thinking = forecast(make("teacher.continuation=prefill", "teacher.thinking_tokens=100"))
    assert thinking.most.completion_tokens == pytest.approx(draws * 113)


def test_the_rung_of_an_auto_teacher_is_the_one_that_was_proved(make: Make) -> None:
    run = make("teacher.continuation=auto")
    found = {"rung": "instruct", "pilot": None, "findings": []}
    assert forecast(run, found).expected == forecast(make("teacher.continuation=instruct")).expected
    named = make("teacher.continuation=prefill")  # a rung that is named is used, whatever is better
    assert forecast(named, found).expected == forecast(named).expected != forecast(run, found).expected


def test_draws_that_share_no_call_are_counted_one_by_one(make: Make) -> None:
    together, alone, either = (forecast(make(f"teacher.n={n}")) for n in ("true", "false", "auto"))
    assert alone.expected.calls == pytest.approx(4 * together.expected.calls, abs=4)
    assert alone.expected.prompt_tokens == pytest.approx(4 * together.expected.prompt_tokens, abs=4)
    assert alone.expected.completion_tokens == together.expected.completion_tokens
    assert either.expected == together.expected
    assert either.most.prompt_tokens == alone.expected.prompt_tokens  # it may turn out that it takes one at a time


def test_a_pilot_is_scaled_up_by_what_is_read_and_by_what_is_asked(make: Make) -> None:
    run = make("train.steps=50")
    queries = queries_of(run, 1)
    counted = sum(map(Counter(run, "prefill").read, queries))
    used = Usage(
        calls=2 * len(queries),
        prompt_tokens=3 * counted,
        completion_tokens=7 * len(queries),
        cache_read_tokens=2 * counted,
        cache_write_tokens=counted // 2,
    )
    ahead, plain = forecast(run, record(run, queries, used)), forecast(run)
    assert ahead.measured
    assert ahead.expected.calls == pytest.approx(2 * plain.expected.calls, rel=1e-3)
    assert ahead.expected.prompt_tokens == pytest.approx(3 * plain.expected.prompt_tokens, rel=1e-3)
    assert ahead.expected.completion_tokens == pytest.approx(7 * plain.expected.calls, rel=2e-3)
    assert ahead.expected.cache_read_tokens == pytest.approx(2 * plain.expected.prompt_tokens, rel=1e-3)
    assert ahead.expected.cache_write_tokens == pytest.approx(plain.expected.prompt_tokens / 2, rel=1e-2)
    assert ahead.most.completion_tokens == plain.most.completion_tokens
    assert (ahead.most.cache_read_tokens, ahead.most.cache_write_tokens) == (0, 0)
    assert ahead.most.prompt_tokens == ahead.expected.prompt_tokens


@pytest.mark.parametrize(
    "change",
    ["method.chunk_tokens=5", "seed=1", "student.max_new_tokens=40", "teacher.n=false", "train.prompts_per_step=5"],
)
def test_the_pilot_of_another_run_tells_nothing(make: Make, change: str) -> None:
    run = make()
    found = record(run, queries_of(run, 1), Usage(calls=1, prompt_tokens=1, completion_tokens=1))
    assert forecast(run, found).measured
    assert not forecast(make(change), found).measured


def test_a_pilot_serves_a_longer_run_and_another_price(make: Make) -> None:
    run = make()
    found = record(run, queries_of(run, 1), Usage(calls=1, prompt_tokens=1, completion_tokens=1))
    for change in ("train.steps=99", "teacher.price={prompt: 1}", "train.learning_rate=0.1", "budget_usd=4"):
        assert run_digest(make(change)) == run_digest(run)
        assert forecast(make(change), found).measured


# ---------------------------------------------------------------------- money, and the rows of the plan


def row(run: Run, name: str) -> str:
    return dict(describe(run))[name]


def test_cached_input_is_forecast_at_its_price_and_at_most_without_it(make: Make, tmp_path: Path) -> None:
    run = make("teacher.price={prompt: 1000, completion: 0, cache_read: 100}", "train.steps=100")
    queries = queries_of(run, 1)
    counted = sum(map(Counter(run, "prefill").read, queries))
    used = Usage(calls=len(queries), prompt_tokens=counted, completion_tokens=0, cache_read_tokens=counted // 2)
    found = record(run, queries, used)

    async def keep() -> None:
        async with open_teacher(run) as (teacher, _):
            teacher.keep_probe(found)  # type: ignore[attr-defined]

    asyncio.run(keep())
    price, kept = known_of(run)
    assert price == Price(prompt=1000, cache_read=100)
    assert kept == found
    ahead = forecast(run, kept)
    expected, most = (float(word[1:]) for word in row(run, "price").split() if word.startswith("$"))
    assert most == pytest.approx(ahead.expected.prompt_tokens * 1000 / 1e6, abs=0.01)
    assert expected == pytest.approx(most * (0.5 * 1000 + 0.5 * 100) / 1000, rel=0.01)
    assert "measured by the probe's pilot" in row(run, "teacher tokens")
    assert row(run, "probe") == "2026-11-01T00:00:00+00:00: continuation prefill"


def test_a_cache_that_is_dearer_to_fill_is_in_the_most(make: Make) -> None:
    run = make("teacher.price={prompt: 1000, completion: 0, cache_write: 1250}", "train.steps=100")
    read = forecast(run).most.prompt_tokens
    assert f"${read * 1250 / 1e6:,.2f} at most" in row(run, "price")


def test_without_a_probe_or_a_price_it_says_so(make: Make) -> None:
    run = make()
    assert "estimated; omniopd probe measures it" in row(run, "teacher tokens")
    assert "no price is known" in row(run, "price")
    assert "probe" not in dict(describe(run))
    assert known_of(run) == (None, None)
    assert not run.config.store_path.exists()


def test_the_teachers_own_evaluation_is_in_the_price(make: Make, tmp_path: Path) -> None:
    price = "teacher.price={prompt: 0, completion: 1000}"
    run = make(price, "eval.teacher=true", "eval.teacher_tokens=500", "train.steps=100", "budget_usd=99")
    measuring = teacher_eval(run)
    assert (measuring.calls, measuring.completion_tokens) == (8, 8 * 500)
    assert measuring.prompt_tokens == sum(len(run.policy.prompt_ids(prompt)) for prompt in run.heldout)
    ahead = forecast(run)
    assert f"${(ahead.most.completion_tokens + 4000) / 1000:,.2f} at most" in row(run, "price")
    assert row(run, "price").endswith("budget $99")
    assert "8 more calls" in row(run, "eval.teacher")


def test_prices_of_a_file_are_found_with_and_without_a_store(make: Make, tmp_path: Path) -> None:
    (tmp_path / "prices.yaml").write_text("date: 2026-11-01\nmodels: {m: {prompt: 5}}\n")
    run = make(f"prices={tmp_path / 'prices.yaml'}")
    assert known_of(run)[0] == Price(prompt=5)
    run.config.store_path.parent.mkdir()
    Store(run.config.store_path).close()
    assert known_of(run)[0] == Price(prompt=5)


def test_what_a_probe_uses_at_most_holds_its_pilot_and_its_comparison(make: Make) -> None:
    run = make("teacher.price={prompt: 0, completion: 1000}", "teacher.prefill_style=plain")
    queries = pilot_queries(run)

    async def say() -> list[str]:
        async with open_teacher(run) as (teacher, _):
            return [
                ahead(run, teacher, asked, chunks) for asked, chunks in (([], []), (queries, []), (queries, queries))
            ]  # type: ignore[arg-type]

    numbers = [
        [
            float(word.strip("$").replace(",", ""))
            for word in line.replace("at most", "").split()
            if word[0] in "$123456789"
        ]
        for line in asyncio.run(say())
    ]
    draws = 4 * len(queries)
    assert numbers[1][0] - numbers[0][0] == draws
    assert numbers[2][0] - numbers[1][0] == 3 * draws  # both rungs, and the better one again
    assert numbers[1][2] - numbers[0][2] == draws * (13 + ECHO_TOKENS)  # `auto` may end on instruct
    assert numbers[1][3] == pytest.approx(numbers[1][2] / 1000)


# ---------------------------------------------------------------------- memory and signal


OTHER = str(Path(STUDENT).parent / "teacher")


@pytest.mark.parametrize(
    ("teacher", "width"),
    [
        (f"{{type: transformers, path: {OTHER}, dtype: float32}}", 4),
        (f"{{type: transformers, path: {OTHER}, dtype: bfloat16}}", 2),
        (
            f"{{type: routed, weights: {{a: 1}}, teachers: {{a: {{type: transformers, path: {OTHER}, dtype: float32}}, "
            f"b: {{type: transformers, path: {OTHER}, dtype: float32}}}}}}",
            8,
        ),
        ("{type: openai, model: m}", 0),
    ],
)
def test_the_weights_of_a_teacher_in_this_process_take_memory(make: Make, teacher: str, width: int) -> None:
    numbers = sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(OTHER).parameters())
    assert memory_gb(make(f"teacher={teacher}"))["teacher weights"] == pytest.approx(width * numbers / 1e9)


def test_a_teacher_that_does_not_load_is_known_before_the_run(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.path: 'nowhere' is no causal language model"):
        describe(make("teacher={type: transformers, path: nowhere}"))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (SEQKD, "the teacher's own answers"),
        ("method.chunks=3", "continuations of the student's text: continuation_likelihood (score token_agreement)"),
        ("method={name: opd}", "scores of given text, token by token"),
        ("method={name: opd, form: dense}", "whole distributions, token by token"),
        ("method={name: opd, form: dense, support: teacher}", "likeliest tokens of given text, token by token"),
        ("method={name: dpca}", "scores of given text, aligned by bytes"),
        ("method={name: bpm}", "whole distributions, aligned by bytes"),
    ],
)
def test_a_method_says_what_it_learns_from(make: Make, method: str, words: str) -> None:
    assert row(make(method), "signal") == words


def test_scores_are_a_call_for_each_response(make: Make) -> None:
    assert row(make("method={name: opd}"), "teacher calls") == "40"  # 10 steps of 4 responses


def test_what_a_judge_is_asked_is_told_apart(make: Make) -> None:
    grouped = ("method={name: ovd}", "train.rollouts_per_prompt=2")
    alone = make(*grouped)
    assert all(isinstance(query, AnswerQuery) and query.judge for query in queries_of(alone, 1))
    assert forecast(alone).expected.calls == 10 * 8
    rows = dict(plan.describe(alone))
    assert "judge" not in rows and rows["asked again"].startswith("not in the forecast")
    beside = make(*grouped, "judge={type: scripted, rule: arithmetic}")
    assert queries_of(beside, 1) == [] and forecast(beside).expected.calls == 0
    assert dict(plan.describe(beside))["judge"] == "scripted: arithmetic; what it is asked is not in the forecast"
    unasked = dict(plan.describe(make("judge={type: scripted, rule: arithmetic}")))
    assert "judge" not in unasked and "asked again" not in unasked
