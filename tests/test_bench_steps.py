"""The benchmark of whole steps: what is made of the blocks that its processes report."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "examples" / "bench"
FACTS = {"device": "a CPU", "cpu": "a CPU", "threads": 2, "memory_gb": 8, "torch": "2", "trl": "1"}


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("steps", "sides", "compare")})


def side(seconds: float, peak: float) -> Any:
    """Three blocks of two steps, the first of them slow."""
    blocks = [
        {
            "peak_bytes": peak,
            "imports_bytes": 400e6,
            "weights": "",
            "block": {
                "seconds": [each, each],
                "cpu_seconds": [2 * each] * 2,
                "rollout_seconds": [each / 2] * 2,
                "tokens": [900, 920],
                "losses": [1.0, 0.5],
            },
        }
        for each in (10 * seconds, seconds, seconds)
    ]
    return SimpleNamespace(blocks=blocks)


def made(bench: SimpleNamespace, *, ours: float = 0.5, peak: float = 600e6) -> dict[str, Any]:
    sides = {"omniopd": side(ours, peak), "TRL": side(1.0, 800e6)}
    found = {name: bench.steps.figures(each, 0.1, [0.2, 0.3, 0.4]) for name, each in sides.items()}
    return {
        "machine": FACTS,
        "plan": {"prompts": 32, "tokens": 64},
        "accuracy_before": 0.1,
        "sides": found,
        "ratios": {"TRL": bench.steps.ratios(found["omniopd"], found["TRL"])},
    }


def test_warm_up_counts_for_accuracy_per_second_only(bench: SimpleNamespace) -> None:
    found = made(bench)["sides"]["omniopd"]
    assert (found["seconds"], found["cpu_seconds"], found["steps"]) == (0.5, 1.0, 4)
    assert found["added_bytes"] == 200e6
    assert found["gain_per_second"] == pytest.approx(0.3 / 12)
    assert [point["seconds"] for point in found["curve"]] == [10, 11, 12]


def test_ratios_say_how_many_times_as_fast_and_what_share_of_memory(bench: SimpleNamespace) -> None:
    ratio = made(bench)["ratios"]["TRL"]
    assert (ratio["speed"], ratio["speed_rollout"], ratio["speed_rest"], ratio["memory"]) == (2, 2, 2, 0.75)
    assert ratio["memory_without_imports"] == 0.5 and ratio["gain_per_second"] == pytest.approx(2)


@pytest.mark.parametrize(("settings", "holds"), [({}, True), ({"ours": 0.7}, False), ({"peak": 900e6}, False)])
def test_the_verdict_needs_speed_and_memory(bench: SimpleNamespace, settings: dict[str, float], holds: bool) -> None:
    table = bench.steps.table(made(bench, **settings))
    assert ("**does not hold**" not in table) is holds
    assert "| omniopd |" in table and "| TRL |" in table


def test_runs_are_compared_by_named_figures(bench: SimpleNamespace) -> None:
    text = bench.compare.comparison(made(bench), made(bench, ours=0.25), bench.steps.compared)
    line = next(line for line in text.splitlines() if "32 prompts of 64 tokens, omniopd: s a step" in line)
    assert line.split("|")[-2].strip() == "0.50"


def test_a_plan_comes_back_as_it_was_written(bench: SimpleNamespace, tmp_path: Path) -> None:
    plan = bench.sides.Plan("s", "t", "brief", 4, 8, 3, 1e-3, 1, 0)
    plan.write(tmp_path)
    assert bench.sides.Plan.read(tmp_path) == plan


def test_ours_is_configured_as_the_plan_says(bench: SimpleNamespace, tmp_path: Path) -> None:
    from omniopd.config import load_config

    plan = bench.sides.Plan("examples/demo/student", "examples/demo/sibling", "brief", 4, 8, 3, 1e-3, 1, 0)
    config = load_config(bench.sides.config(plan, tmp_path))
    assert (config.train.prompts_per_step, config.train.learning_rate, config.train.steps) == (4, 1e-3, 3)
    assert config.student.max_new_tokens == 8 and config.method.form == "dense" and config.method.anchor.beta == 0
