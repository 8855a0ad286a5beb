"""A whole run whose rollouts are an engine's: pushed to after each update, compared where asked, closed at the end."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
from fake_vllm import Copy

from omniopd.config import RunConfig
from omniopd.errors import StudentError
from omniopd.run import Run
from omniopd.summary import step_row
from omniopd.types import Prompt, Rollout, Signal

OPD = {"name": "opd"}
OMNIOPD = {"name": "omniopd", "chunks": 2, "chunk_tokens": 4, "continuations": 2}
DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"


@pytest.fixture
def copy() -> Copy:
    return Copy()


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, copy: Copy) -> list[Any]:
    engines: list[Any] = []
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.package(copy, engines))
    return engines


def config(folder: Path, method: dict[str, Any], **rollouts: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {
                "path": str(DEMO / "student"),
                "max_new_tokens": 24,
                "rollouts": {"type": "vllm", **rollouts},
            },
            "teacher": {"type": "transformers", "path": str(DEMO / "sibling")},
            "task": {"type": "arithmetic", "train_size": 16, "heldout_size": 4},
            "method": method,
            "train": {"steps": 3, "prompts_per_step": 2, "learning_rate": 1e-3},
            "eval": {"problems": 2},
            "output": str(folder / "run"),
        }
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["step"]]


def test_s1_the_gap_of_each_step_that_was_compared_is_in_its_row(tmp_path: Path, copy: Copy, built: list[Any]) -> None:
    Run(config(tmp_path, OPD, check_every=2)).train()
    found = rows(tmp_path)
    assert ["gap_p99" in row for row in found] == [True, True, False]
    assert all(0 <= row["gap_mean"] <= row["gap_p99"] < 1e-4 for row in found[:2])
    assert [row["mean_entropy"] is None for row in found] == [False, False, True]  # nobody reads it in that step
    assert [Path(folder).name for folder in copy.loaded[1:]] == [f"version-{update}" for update in range(4)]
    assert [engine.shut for engine in built] == [1]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["student"]["rollouts"] == "vllm"


def test_no_hole_becomes_a_zero_what_is_unknown_has_no_mean() -> None:
    text = Rollout(Prompt("p", ()), (1,), (2, 3), (-1.0, -1.0), (0.5, 1.5), (1, 2), "ab", "length")
    dark = replace(text, entropy=(math.nan, math.nan))
    silent = Signal((), ())
    assert step_row(1, [text], [], silent, {}, {})["mean_entropy"] == 1.0
    assert step_row(1, [text, dark], [], silent, {}, {})["mean_entropy"] is None
    assert step_row(1, [replace(text, ids=(), entropy=())], [], silent, {}, {})["mean_entropy"] is None


def test_l10_a_method_that_chooses_by_entropy_has_it_in_every_step(tmp_path: Path, built: list[Any]) -> None:
    Run(config(tmp_path, OMNIOPD, check_every=2)).train()
    found = rows(tmp_path)
    assert ["gap_p99" in row for row in found] == [True, True, False]
    assert all(row["mean_entropy"] > 0 for row in found)


def test_s6_a_run_whose_engine_takes_no_weights_ends_with_its_engine(
    tmp_path: Path, copy: Copy, built: list[Any]
) -> None:
    copy.deaf = True
    with pytest.raises(StudentError, match="after update 1, more than max_gap"):
        Run(config(tmp_path, OPD)).train()
    assert len(rows(tmp_path)) == 1
    assert [engine.shut for engine in built] == [1]
