"""What a run came to, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omniopd.report.folder import mapping
from omniopd.report.formats import count, number, percent, points

Eval = Mapping[str, Any]


def evaluations(summary: Mapping[str, Any]) -> dict[str, Eval]:
    """`before`, `after`, `difference` and `teacher`, each possibly empty."""
    named = mapping(summary.get("eval"))
    return {key: mapping(named.get(key)) for key in ("before", "after", "difference", "teacher")}


def course(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[tuple[int, Eval]]:
    """Every evaluation of the student with its step: those on the way are in the metrics, the last in the summary."""
    found = {row["step"]: mapping(row["eval"]) for row in metrics if mapping(row.get("eval"))}
    evals = evaluations(summary)
    if evals["before"]:
        found.setdefault(0, evals["before"])
    steps = number(summary.get("steps"))
    if evals["after"] and steps:
        found[int(steps)] = evals["after"]
    return sorted(found.items())


def sentence(evals: Mapping[str, Eval], way: Sequence[tuple[int, Eval]]) -> str:
    """Accuracy before and after with intervals, and whether the difference is clear.

    A run that stopped early has no accuracy after it, but perhaps one from the way, on some of the prompts.
    """
    first, last = evals["before"], evals["after"]
    if not first and not last and way and way[0][0] == 0:
        first = way[0][1]
    before, after = number(first.get("accuracy")), number(last.get("accuracy"))
    if before is None and after is None:
        return "This run holds no evaluation, so there is nothing to say about accuracy."
    if after is None:
        return f"Accuracy before training was {accuracy(first)}; {_latest(way)}."
    if before is None:
        return f"Accuracy after training is {accuracy(last)}; there is no evaluation before it."
    verb, difference = _change(before, after, evals["difference"])
    return f"Accuracy {verb} from {accuracy(first)} to {accuracy(last)}: {difference}."


def accuracy(entry: Eval) -> str:
    """50.3 % (44.7 to 56.0), the interval only where it is known."""
    pair = entry.get("ci95")
    ends = [number(end) for end in pair] if isinstance(pair, list) and len(pair) == 2 else []
    known = [f"{100 * end:.1f}" for end in ends if end is not None]
    return percent(entry.get("accuracy")) + (f" ({known[0]} to {known[1]})" if len(known) == 2 else "")


def _latest(way: Sequence[tuple[int, Eval]]) -> str:
    later = [(step, entry) for step, entry in way if step > 0 and number(entry.get("accuracy")) is not None]
    if not later:
        return "there is no later evaluation"
    step, entry = later[-1]
    return f"the latest evaluation, at step {step:,} on {count(entry.get('n'))} prompts, gives {accuracy(entry)}"


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
