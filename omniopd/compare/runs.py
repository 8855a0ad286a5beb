"""One run in a process of its own, and what is kept of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from omniopd.config import RunConfig, dump_config
from omniopd.errors import RunError
from omniopd.report.folder import read_run
from omniopd.report.formats import number
from omniopd.report.verdict import course


def run(config: RunConfig) -> str:
    """Train as the config says, unless that is done; what was begun is gone on with. Returns what went wrong, or ""."""
    output = config.output
    if read(config)["status"] == "finished":
        return ""
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_suffix(".yaml")
    path.write_text(dump_config(config), encoding="utf-8")
    resume = ["--resume"] if (output / "config.yaml").exists() else []
    command = [sys.executable, "-m", "omniopd.cli", "train", str(path), *resume]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return said[-1].removeprefix("omniopd: ")


def _environment() -> dict[str, str]:
    """Runs side by side take a core each, unless the environment says otherwise."""
    return {"OMP_NUM_THREADS": "1", **os.environ}


def read(config: RunConfig) -> dict[str, Any]:
    """What a run has come to so far, as plain data.

    `course` are the evaluations with all that was spent until then: seconds (evaluations not counted), tokens that the
    student wrote and that it learned, and the teacher's, read and written.
    """
    try:
        folder = read_run(config.output)
    except RunError:
        return {"status": "not begun", "course": [], "correct": {}, "totals": _totals([])}
    steps = [row for row in folder.metrics if row["step"]]
    rows = config.train.prompts_per_step * config.train.rollouts_per_prompt
    spent = [_totals([]), *accumulate([_spent(row, rows) for row in steps], _sum)]
    by_step = dict(zip([0, *(row["step"] for row in steps)], spent, strict=True))
    measured = folder.summary.get("eval", {})
    return {
        "status": folder.summary.get("status", "unfinished"),
        "course": [
            {"step": step, "accuracy": found.get("accuracy"), "n": found.get("n"), **by_step[step]}
            for step, found in course(folder.summary, folder.metrics)
            if step in by_step
        ],
        "correct": measured.get("correct", {}),
        "steps": len(steps),
        "rollouts": rows * len(steps),
        "totals": spent[-1],
    }


def _spent(row: Mapping[str, Any], rollouts: int) -> dict[str, float]:
    """What one step took."""
    stages = ("rollout", "wait", "update")
    return {
        "seconds": sum(number(row.get(f"seconds_{stage}")) or 0.0 for stage in stages),
        "student_tokens": (number(row.get("mean_length")) or 0.0) * rollouts - (number(row.get("given_tokens")) or 0.0),
        "trained_tokens": number(row.get("audited_tokens")) or 0.0,
        "teacher_read": number(row.get("teacher_prompt_tokens")) or 0.0,
        "teacher_written": number(row.get("teacher_completion_tokens")) or 0.0,
    }


def _totals(rows: list[Mapping[str, float]]) -> dict[str, float]:
    names = ("seconds", "student_tokens", "trained_tokens", "teacher_read", "teacher_written")
    return {name: sum(row[name] for row in rows) for name in names}


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return _totals([one, other])
