"""Which charts a run's metrics make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from omniopd.report.charts import COLOURS, Chart, Line
from omniopd.report.folder import mapping
from omniopd.report.formats import number

Rows = Sequence[Mapping[str, Any]]


def figures(
    metrics: Rows, evals: Sequence[tuple[int, Mapping[str, Any]]], teacher_accuracy: float | None
) -> dict[str, list[Chart]]:
    """The charts by section; those without a single number are left out. `evals` are the student's, by step."""
    steps = [row for row in metrics if set(row) - {"step", "eval"}]
    sections = {
        "Learning": [_accuracy(evals, teacher_accuracy), *_learning(steps)],
        "Signal": _signal(steps),
        "The student’s text": _text(steps),
        "Spend": [*_spend(steps), _lag(steps)],
    }
    kept = {name: [chart for chart in charts if chart.xs and not chart.empty] for name, charts in sections.items()}
    return {name: charts for name, charts in kept.items() if charts}


def totals(metrics: Rows, key: str) -> Counter[str]:
    """Counts by reason, summed over the steps."""
    total: Counter[str] = Counter()
    for row in metrics:
        total.update(reasons(row.get(key)))
    return total


def reasons(value: Any) -> Counter[str]:
    """A JSON object of counts; what isn't a positive number is left out."""
    counts = {str(reason): number(found) for reason, found in mapping(value).items()}
    return Counter({reason: int(found) for reason, found in counts.items() if found and found >= 1})


def _accuracy(found: Sequence[tuple[int, Mapping[str, Any]]], teacher: float | None) -> Chart:
    low, high = zip(*(_interval(entry) for _, entry in found), strict=True) if found else ((), ())
    line = Line("student", [_hundred(entry.get("accuracy")) for _, entry in found], low, high)
    return Chart(
        "Accuracy",
        "On held-out prompts, with its 95 % interval.",
        "%",
        [step for step, _ in found],
        [line],
        floor=0.0,
        ceiling=100.0,
        level=None if teacher is None else ("teacher", 100 * teacher),
    )


def _interval(entry: Mapping[str, Any]) -> tuple[float | None, float | None]:
    pair = entry.get("ci95")
    if not isinstance(pair, list) or len(pair) != 2:
        return None, None
    return _hundred(pair[0]), _hundred(pair[1])


def _hundred(share: Any) -> float | None:
    found = number(share)
    return None if found is None else 100 * found


def _learning(rows: Rows) -> list[Chart]:
    losses = {
        "loss": "loss",
        "value_loss": "on the student’s tokens",
        "branch_loss": "on the teacher’s tokens",
        "divergence_loss": "divergence from the teacher",
    }
    return [
        _over(rows, "Loss", "What the optimizer saw.", "nats", losses),
        _over(rows, "KL to the reference", "How far the student has moved.", "nats", {"kl": "KL"}, floor=0.0),
    ]


def _signal(rows: Rows) -> list[Chart]:
    agreement = {"mean_score": "mean score", "chance_floor": "chance floor"}
    shares = {"coverage": "coverage"}
    return [
        _over(
            rows, "Agreement", "Scores of the teacher’s replies; the floor is what chance scores.", "score", agreement
        ),
        _over(
            rows,
            "KL to the teacher",
            "KL(student || teacher) per token, estimated from the student’s own text.",
            "nats",
            {"reverse_kl_k1": "k1", "reverse_kl_k3": "k3"},
        ),
        _over(rows, "Coverage", "Response tokens on which the teacher spoke.", "%", shares, times=100, floor=0.0),
        _stack(rows, "Dropped", "Chunks or whole responses that gave no signal, by reason.", "a step", "drops"),
        _stack(rows, "Rejected", "Replies or tokens that were not used, by reason.", "a step", "rejects"),
        _over(
            rows,
            "Usable replies",
            "Evidence behind a chunk’s score.",
            "replies a chunk",
            {"n_eff": "replies"},
            floor=0.0,
        ),
        _over(
            rows,
            "Duplicates",
            "Replies that repeat another.",
            "%",
            {"duplicate_rate": "duplicates"},
            times=100,
            floor=0.0,
        ),
    ]


def _text(rows: Rows) -> list[Chart]:
    return [
        _over(rows, "Entropy", "Mean over the response’s tokens.", "nats", {"mean_entropy": "entropy"}, floor=0.0),
        _over(rows, "Length", "Mean length of a response.", "tokens", {"mean_length": "length"}, floor=0.0),
        _over(
            rows,
            "Finished",
            "Responses that ended by themselves.",
            "%",
            {"finished_share": "finished"},
            times=100,
            floor=0.0,
        ),
    ]


def _spend(rows: Rows) -> list[Chart]:
    tokens = {"teacher_prompt_tokens": "prompt", "teacher_completion_tokens": "completion"}
    stages = {"rollout": "rollouts", "wait": "waiting for the teacher", "update": "update"}
    rows = [{"seconds_wait": row.get("seconds_evidence"), **row} for row in rows]  # older runs did nothing meanwhile
    lines = [Line(name, [number(row.get(f"seconds_{key}")) for row in rows]) for key, name in stages.items()]
    return [
        _running(rows, "Teacher tokens", "Running total.", "tokens", tokens),
        _running(rows, "Cost", "Running total.", "US dollars", {"cost_usd": "cost"}),
        Chart("Time", "Where a step spends it.", "seconds a step", _steps(rows), _known(lines), kind="bars"),
    ]


def _lag(rows: Rows) -> Chart:
    """Nothing to see where no rollout lags."""
    chart = _stack(rows, "Lag", "Rollouts by the updates since they were written.", "a step", "lag")
    return replace(chart, lines=[]) if {line.name for line in chart.lines} <= {"0"} else chart


def _steps(rows: Rows) -> list[float]:
    return [float(row["step"]) for row in rows]


def _known(lines: Sequence[Line]) -> list[Line]:
    """Without the series that are silent or zero throughout: an all-zero line is only clutter in a legend."""
    return [line for line in lines if any(line.values)]


def _over(
    rows: Rows,
    title: str,
    note: str,
    unit: str,
    names: Mapping[str, str],
    times: float = 1.0,
    floor: float | None = None,
) -> Chart:
    """One line for each key. A chart of a single quantity is shown even where it is zero throughout."""
    lines = []
    for key, name in names.items():
        found = [number(row.get(key)) for row in rows]
        lines.append(Line(name, [None if value is None else times * value for value in found]))
    return Chart(title, note, unit, _steps(rows), _known(lines) if len(lines) > 1 else lines, floor=floor)


def _running(rows: Rows, title: str, note: str, unit: str, names: Mapping[str, str]) -> Chart:
    lines = [Line(name, list(accumulate(number(row.get(key)) or 0.0 for row in rows))) for key, name in names.items()]
    return Chart(title, note, unit, _steps(rows), _known(lines), floor=0.0, total=True)


def _stack(rows: Rows, title: str, note: str, unit: str, key: str) -> Chart:
    """Bars by reason, the most frequent below; where the colours run out, the rest are summed as "other"."""
    counts = [reasons(row.get(key)) for row in rows]
    ranked = [reason for reason, _ in totals(rows, key).most_common()]
    shown = ranked if len(ranked) <= COLOURS else ranked[: COLOURS - 1]
    lines = [Line(reason, [float(count[reason]) for count in counts]) for reason in shown]
    if len(shown) < len(ranked):
        rest = ranked[len(shown) :]
        lines.append(Line("other", [float(sum(count[reason] for reason in rest)) for count in counts]))
    return Chart(title, note, unit, _steps(rows), lines, kind="bars")
