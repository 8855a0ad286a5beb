"""Run folders as runs leave them, for the referee's tests: what is learned is made up, what is read is what runs write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def leave(
    folder: Path,
    right: Sequence[bool],
    *,
    steps: int = 4,
    length: float = 10.0,
    learned: int = 80,
    status: str = "finished",
) -> None:
    """The files of a run of 8 rollouts a step, half of whose problems are answered rightly before it.

    Of the rollouts' tokens a step, 8 are the teacher's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    n = len(right)
    before = [problem % 2 == 0 for problem in range(n)]
    rows: list[dict[str, Any]] = [{"step": 0, "eval": measured(before)}]
    for step in range(1, steps + 1):
        row = {"step": step, "mean_length": length, "audited_tokens": learned, "teacher_prompt_tokens": 100}
        row["given_tokens"] = 8
        row |= {"teacher_completion_tokens": 20, "seconds_rollout": 1.0, "seconds_wait": 0.5, "seconds_update": 0.5}
        rows.append(row | ({"eval": measured(before[: n // 2])} if step == 2 else {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text("{}")
    found: dict[str, Any] = {"before": measured(before)}
    if status == "finished":
        digits = {"before": text(before), "after": text(right)}
        found |= {"after": measured(right), "correct": digits}
    (folder / "summary.json").write_text(json.dumps({"status": status, "steps": steps, "eval": found}))


def measured(right: Sequence[bool]) -> dict[str, Any]:
    return {"accuracy": sum(right) / len(right), "ci95": [0.0, 1.0], "n": len(right)}


def text(right: Sequence[bool]) -> str:
    return "".join(str(int(one)) for one in right)
