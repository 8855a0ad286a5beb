"""Compositions that no paper has run, as short real runs of the demo pair; and one over two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from omniopd.config import load_config
from omniopd.run import distill

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


def config(place: Path, method: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {
        "student": {"path": str(DEMO / "student"), "max_new_tokens": 24},
        "teacher": {"type": "transformers", "path": str(DEMO / "sibling")},
        "task": {"type": "arithmetic", "train_size": 32, "heldout_size": 4},
        "method": method,
        "train": {"steps": 2, "prompts_per_step": 6, "learning_rate": 1e-3, **train},
        "eval": {"problems": 0},
        "output": str(place / "run"),
    }


def rows_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]


GATE = {"name": "sign_gate"}
NEW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "black-box chunks, weighed by entropy, on short rollouts": (
        {"name": "omniopd", "chunks": 2, "chunk_tokens": 6, "continuations": 2,
         "parts": ["entropy_weights", {"name": "horizon", "tokens": 20}]},
        {"weight_mean": (0.5, 1.5), "mean_length": (1, 20)},
    ),
    "FiRe with whitened advantages": (
        {"name": "fire", "parts": ["trajectory_filter", "entropy_weights", "whiten"]},
        {"weight_mean": (0.99, 1.01), "whiten_sigma": (0.01, 9), "kept_rollouts": (4, 5)},
    ),
    "a verifier's gate on filtered rollouts": (
        {"name": "opd", "parts": [GATE, {"name": "trajectory_filter", "drop": 0.4}]},
        {"kept_rollouts": (3, 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEW)
def test_a_composition_that_nobody_has_published_runs(name: str, tmp_path: Path) -> None:
    method, bounds = NEW[name]
    summary = distill(load_config(config(tmp_path, method)))
    assert summary["steps"] == 2
    for row in rows_of(tmp_path):
        assert row["grad_norm"] > 0 and row["audited_tokens"] > 0
        for figure, (low, high) in bounds.items():
            assert low <= row[figure] <= high, (figure, row[figure])


SHARED: dict[str, Any] = {
    "name": "opd",
    "parts": [
        "correctness_router",
        "trajectory_filter",
        {"name": "fork_guidance", "horizon": 6, "share": 0.2, "most": 2, "spacing": 2},
        "entropy_weights",
        "whiten",
    ],
}
DECIDED = ("kept_rollouts", "kept_share", "forks", "fork_candidates", "routed_right", "routed_wrong", "audited_tokens")


def test_s3_two_processes_decide_and_learn_what_one_does(tmp_path: Path) -> None:
    """Groups, quantiles, percentiles and moments are those of the whole step, not of a process's share."""
    places = [tmp_path / name for name in ("alone", "together")]
    for place in places:
        place.mkdir()
        tree = config(place, SHARED, prompts_per_step=3, rollouts_per_prompt=2)
        (place / "config.yaml").write_text(yaml.safe_dump(tree))
    one, two = (["-m", "omniopd", "train", str(place / "config.yaml")] for place in places)
    for code, _, errors in [*processes.finish([processes.alone(one)]), *processes.finish(processes.start(two))]:
        assert code == 0, errors
    alone, together = map(rows_of, places)
    for mine, theirs in zip(alone, together, strict=True):
        assert {name: mine[name] for name in DECIDED} == {name: theirs[name] for name in DECIDED}
        for name in ("filter_threshold", "whiten_mu", "whiten_sigma", "fork_delta", "loss", "weight_max"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name
    assert {row["forks"] for row in alone} != {0.0} and {row["kept_share"] for row in alone} != {1.0}
    students = [load_file(place / "run" / "student" / "model.safetensors") for place in places]
    assert_close(*students, atol=2e-5, rtol=0)
