"""What is said of a step and of a run: rows of the log, the progress line, `summary.json`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evals.intervals import paired_difference
from evals.runner import Evaluation
from omniopd.config import RunConfig
from omniopd.folder import Record
from omniopd.ledger import Ledger
from omniopd.types import ContinueQuery, Evidence, Query, Rollout, ScoreQuery, Signal, TokenScores, Usage, asked_by


def step_row(
    step: int,
    rollouts: Sequence[Rollout],
    evidence: Sequence[Evidence],
    signal: Signal,
    metrics: Mapping[str, float],
    lag: Mapping[int, int],
) -> dict[str, Any]:
    """A step's row of `metrics.jsonl`, but for the times. `lag`: how many rollouts so many updates have come after.

    `queries` = `chunks` (or `responses`, where scores are read) + the sum of `drops`, always; those of parts, which log
    their own figures, are not counted.
    """
    tokens = sum(map(len, rollouts))
    spent = usage_json(used(evidence))
    return {
        "step": step,
        **metrics,
        "coverage": signal.coverage,
        "audited_tokens": sum(int(mask.sum()) for mask in signal.mask_BT),
        "queries": len(asked_by(evidence)),
        "drops": dict(signal.drops),
        "rejects": dict(signal.rejects),
        **signal.stats,
        "mean_entropy": _mean(value for rollout in rollouts for value in rollout.entropy),
        "mean_length": tokens / len(rollouts),
        "given_tokens": sum(rollout.given for rollout in rollouts),  # of these, the teacher's own
        "finished_share": sum(rollout.finish == "stop" for rollout in rollouts) / len(rollouts),
        "lag": {str(updates): number for updates, number in sorted(lag.items())},
        **({"teachers": shares} if (shares := per_teacher(evidence)) else {}),
        "cost_usd": spent.pop("cost_usd"),
        **{f"teacher_{name}": amount for name, amount in spent.items()},
    }


def _mean(values: Iterable[float]) -> float | None:
    """None where there are no values, or one of them is unknown."""
    mean = sum(known) / len(known) if (known := list(values)) else math.nan
    return None if math.isnan(mean) else mean


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers for a tracker, nested ones as `drops/empty`."""
    numbers: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            numbers |= {f"{name}/{inner}": number for inner, number in flat(value).items()}
        elif isinstance(value, (int, float)):
            numbers[name] = value
    return numbers


def per_teacher(evidence: Sequence[Evidence]) -> dict[str, dict[str, int]]:
    """Of a step with several teachers: each one's queries, replies, tokens that its replies speak about, and rejects."""
    counts: dict[str, Counter[str]] = {}
    for found in evidence:
        if found.teacher:
            count = counts.setdefault(found.teacher, Counter(queries=0, replies=0, tokens=0))
            replies = int(bool(found.ids)) if isinstance(found, TokenScores) else len(found.replies)
            count.update(queries=1, replies=replies, tokens=_width(found.query) if replies else 0)
            count.update({f"rejected {reason}": number for reason, number in found.rejected.items()})
    return {name: dict(count) for name, count in sorted(counts.items())}


def _width(query: Query) -> int:
    """Tokens that a query is about, at most."""
    if isinstance(query, ContinueQuery):
        return query.chunk.end - query.chunk.start
    return len(query.ids) if isinstance(query, ScoreQuery) else query.max_tokens


def by_teacher(teachers: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, Any]]:
    """A run's counts of each teacher, with its share of the tokens that any teacher spoke about."""
    tokens = sum(count.get("tokens", 0) for count in teachers.values())
    return {
        name: {**count, "share": count.get("tokens", 0) / tokens if tokens else 0.0} for name, count in teachers.items()
    }


def used(evidence: Sequence[Evidence]) -> Usage:
    """What a gather used in all."""
    return sum((found.usage for found in evidence), Usage())


def usage_json(usage: Usage) -> dict[str, Any]:
    """Usage as plain data, money to a millionth of a dollar."""
    return {**asdict(usage), "cost_usd": round(usage.cost_usd, 6)}


def figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation without its samples."""
    return {key: evaluation[key] for key in ("accuracy", "ci95", "n")}


def headline(row: Mapping[str, Any], record: Record, ledger: Ledger, accuracy: float | None) -> str:
    """What stands beside the progress bar; `accuracy` is the last that was measured."""
    tokens = record.usage.prompt_tokens + record.usage.completion_tokens
    measured = "" if accuracy is None else f"accuracy {accuracy:.1%}  "
    spent = f"{tokens / 1000:,.0f}k tokens  ${ledger.spent:.4f}"
    if ledger.budget_usd is not None:
        spent += f" of ${ledger.budget_usd:g}"
    return f"{measured}loss {row['loss']:.3f}  coverage {row['coverage']:.0%}  {spent}"


def reasons(record: Record) -> str:
    """Why there was no signal, commonest first."""
    counts: Counter[str] = record.drops + record.rejects
    return ", ".join(f"{reason}: {count}" for reason, count in counts.most_common())


def summary(
    config: RunConfig,
    record: Record,
    ledger: Ledger,
    status: str,
    parameters: int,
    signal: str,
    after: Evaluation | None = None,
) -> dict[str, Any]:
    """What `summary.json` holds. A run that stopped early has no accuracy after.

    `eval.correct` has a digit for each held-out problem, 1 where it was answered rightly, in the order of the task. The
    teacher's tokens and cost are those behind the weights; `spent_usd` is all that was paid, by the ledger.
    """
    method = config.method
    measured: dict[str, Any] = {"before": figures(record.before) if record.before else None}
    if after is not None and record.before:
        difference = paired_difference(record.before["correct"], after.correct, seed=config.seed)
        right = {"before": record.before["correct"], "after": after.correct}
        verdicts = {when: "".join(str(int(one)) for one in each) for when, each in right.items()}
        measured |= {"after": figures(after.to_json()), "difference": asdict(difference), "correct": verdicts}
    if record.teacher:
        measured["teacher"] = figures(record.teacher)
    return {
        "status": status,
        "method": method.name,
        "score": getattr(getattr(method, "score", None), "name", None),
        "signals": [signal.name for signal in getattr(method, "signals", [])],
        "seed": config.seed,
        "steps": record.step,
        "wall_seconds": round(record.wall_seconds, 2),
        "wait_share": record.wait_seconds / record.wall_seconds if record.wall_seconds else None,
        "lag": dict(record.lag),
        "eval": measured,
        "teacher": {
            "name": getattr(config.teacher, "model", config.teacher.type),
            **usage_json(record.usage),
            "spent_usd": round(ledger.spent, 6),
            "budget_usd": ledger.budget_usd,
            **({"each": by_teacher(record.teachers)} if len(record.teachers) > 1 else {}),
        },
        "signal": {"read": signal, "coverage": record.coverage_sum / record.step if record.step else 0.0},
        "drops": dict(record.drops),
        "rejects": dict(record.rejects),
        "student": {"path": config.student.path, "parameters": parameters},
    }
