"""What a run came to, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omniopd.report.folder import mapping
from omniopd.report.formats import number, percent, points

Eval = Mapping[str, Any]


def evaluations(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Eval]:
    """`before`, `after`, `difference` and `teacher`, each possibly empty.

    A run that stopped early wrote no summary: its first and last evaluations are among the metrics.
    """
    named = mapping(summary.get("eval"))
    found = {key: mapping(named.get(key)) for key in ("before", "after", "difference", "teacher")}
    rows = [row for row in metrics if mapping(row.get("eval"))]
    if not found["before"] and not found["after"] and rows:
        found["before"] = mapping(rows[0]["eval"])
        found["after"] = mapping(rows[-1]["eval"]) if len(rows) > 1 else {}
    return found


def sentence(evals: Mapping[str, Eval]) -> str:
    """Accuracy before and after with intervals, and whether the difference is clear."""
    before, after = number(evals["before"].get("accuracy")), number(evals["after"].get("accuracy"))
    if before is None and after is None:
        return "This run holds no evaluation, so there is nothing to say about accuracy."
    if after is None:
        return f"Accuracy before training was {accuracy(evals['before'])}; there is no later evaluation."
    if before is None:
        return f"Accuracy after training is {accuracy(evals['after'])}; there is no evaluation before it."
    verb, difference = _change(before, after, evals["difference"])
    return f"Accuracy {verb} from {accuracy(evals['before'])} to {accuracy(evals['after'])}: {difference}."


def accuracy(entry: Eval) -> str:
    """50.3 % (44.7 to 56.0), the interval only where it is known."""
    pair = entry.get("ci95")
    ends = [number(end) for end in pair] if isinstance(pair, list) and len(pair) == 2 else []
    known = [f"{100 * end:.1f}" for end in ends if end is not None]
    return percent(entry.get("accuracy")) + (f" ({known[0]} to {known[1]})" if len(known) == 2 else "")


def _change(before: float, after: float, difference: Eval) -> tuple[str, str]:
    """The verb and the difference. Only an interval that leaves out zero allows a word like "rose"."""
    mean, low, high = (number(difference.get(key)) for key in ("mean", "low", "high"))
    text = f"{points(after - before if mean is None else mean)} points"
    if low is None or high is None:
        return "went", f"{text}, with no interval known"
    text += f", 95 % interval {points(low)} to {points(high)}"
    if low > 0:
        return "rose", text
    if high < 0:
        return "fell", text
    return "went", f"no clear change ({text})"
