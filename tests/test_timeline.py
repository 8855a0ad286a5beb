"""The timeline benchmark and the lag table: figures of made-up runs whose answers are known."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import httpx
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FACTS = {"device": "a CPU", "cpu": "a CPU", "threads": 1, "memory_gb": 8, "torch": "2"}


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES / "bench"))
        patch.syspath_prepend(str(EXAMPLES / "measure"))
        yield SimpleNamespace(timeline=importlib.import_module("timeline"), lag=importlib.import_module("lag"))


def plain(steps: int) -> list[dict[str, Any]]:
    """A step after the other: 1 s of rollouts, 6 s of evidence from their middle on, 2 s of update."""
    rows = []
    for step in range(1, steps + 1):
        at = 8.5 * (step - 1)
        spans = {"rollout": [at, at + 1], "evidence": [at + 0.5, at + 6.5]}
        spans |= {"wait": [at + 1, at + 6.5], "update": [at + 6.5, at + 8.5]}
        rows.append({"step": step, "queries": 192, "lag": {"0": 64}, "spans": spans})
    return rows


def lagging(steps: int) -> list[dict[str, Any]]:
    """The same, but that evidence follows evidence: six seconds a step."""
    rows = []
    for step in range(1, steps + 1):
        at = 6.0 * (step - 1)
        spans = {"rollout": [at - 3, at - 2], "evidence": [at - 2.5, at + 6]}
        spans |= {"wait": [at + 3, at + 6], "update": [at + 6, at + 8]}
        rows.append({"step": step, "queries": 192, "lag": {str(min(1, step - 1)): 64}, "spans": spans})
    return rows


def found(bench: SimpleNamespace) -> dict[str, Any]:
    runs = {"0": plain(12), "1": lagging(12)}
    stages = bench.timeline.stage_seconds(runs["0"])
    return {
        "machine": FACTS,
        "server": {"latency_s": 2.0, "takes_at_once": 64},
        "run": {"steps": 12, "prompts": 64, "chunks": 3, "new_tokens": 64},
        "stages": stages,
        "lags": {lag: bench.timeline.figures_of(rows, stages) for lag, rows in runs.items()},
        "rows": runs,
    }


def test_a_step_is_held_against_the_largest_stage_of_the_run_without_lag(bench: SimpleNamespace) -> None:
    measured = found(bench)
    assert measured["stages"] == {"rollout": 1.0, "evidence": 6.0, "update": 2.0}
    without, with_lag = measured["lags"]["0"], measured["lags"]["1"]
    assert (without["step_seconds"], without["over_largest_stage"]) == (8.5, 1.417)
    assert without["wait_share"] == pytest.approx(5.5 / 8.5, abs=1e-3)
    assert (with_lag["step_seconds"], with_lag["over_largest_stage"]) == (6.0, 1.0)
    assert with_lag["over_own_largest_stage"] == pytest.approx(6 / 8.5, abs=1e-3)
    assert bench.timeline.figures(measured)["64 prompts, 2 s latency, max_lag 1: s a step"] == 6.0
    assert "| 1 | 6.00 | **1.00** | 0.71 | 50% |" in bench.timeline.table(measured)


def test_the_picture_shows_each_stage_where_it_was(bench: SimpleNamespace) -> None:
    root = ElementTree.fromstring(bench.timeline.picture(found(bench)))
    rects = [one.attrib for one in root.iter() if one.tag.endswith("rect")]
    colour = bench.timeline.COLOURS["update"]
    per_second = (bench.timeline.WIDTH - bench.timeline.LEFT - bench.timeline.RIGHT) / (6 * 8.5)
    whole = [float(one["width"]) for one in rects if one["fill"] in colour][:5]
    assert whole == pytest.approx([2 * per_second] * 5, abs=0.2)
    first = next(one for one in rects if one["fill"] in bench.timeline.COLOURS["rollout"])
    assert float(first["x"]) == bench.timeline.LEFT
    assert all(float(one["width"]) > 0 for one in rects)


def test_the_teacher_answers_after_the_latency_and_so_many_at_once(bench: SimpleNamespace) -> None:
    body = {"messages": [{"role": "user", "content": "1+1"}], "seed": 3, "n": 2}

    async def both(url: str) -> list[Any]:
        async with httpx.AsyncClient() as client:
            sent = [client.post(f"{url}/chat/completions", json={**body, "seed": seed}) for seed in (3, 3, 4)]
            return [answer.json() for answer in await asyncio.gather(*sent)]

    with bench.timeline.slow_teacher(takes=2, latency_s=0.01) as url:
        one, same, other = asyncio.run(both(url))
    assert one == same == bench.timeline.reply(body)
    assert one["choices"][1] == other["choices"][0] != one["choices"][0]


def test_the_lag_table_holds_each_lag_against_none(bench: SimpleNamespace) -> None:
    def row(lag: int, seed: int, after: float, ratio: float | None) -> dict[str, Any]:
        ratios = dict.fromkeys(bench.lag.RATIOS, ratio)
        return {
            "signal": "s", "max_lag": lag, "seed": seed, "after": after, "problems": 400, "seconds_a_step": 2.0, **ratios
        }  # fmt: skip

    rows = [row(0, 0, 0.5, None), row(0, 1, 0.5, None), row(1, 0, 0.6, 1.0), row(1, 1, 0.5, 0.5)]
    mean, half = bench.lag.against(rows[2:], rows[:2])
    assert mean == pytest.approx(5.0)
    assert half == pytest.approx(196 * ((0.25 * 3 + 0.24) / 400 / 4) ** 0.5)
    table = bench.lag.table(rows)
    assert "| s | 0 | 50.0 50.0 | 50.0 |  |  |  |  | 2.00 |" in table
    assert f"| s | 1 | 60.0 50.0 | 55.0 | +5.0 ± {half:.1f} | 0.750 | 0.75 | 75.00% | 2.00 |" in table
