"""What is said of a comparison, on the page and on the terminal alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omniopd.compare.results import beyond_noise, gain_per_million
from omniopd.report.formats import MISSING, compact, duration, percent, points


def verdict(found: Mapping[str, Any]) -> str:
    """What beats the baseline beyond noise, and what stays below it."""
    methods = [one for one in found["variants"] if one["against"] and not one["control"]]
    if not methods:
        return f"There is nothing yet to measure against {found['baseline']}."
    names = {
        sign: "; ".join(one["label"] for one in methods if beyond_noise(one["against"]) == sign) for sign in (1, -1, 0)
    }
    said = [
        f"Beyond noise above {found['baseline']}: {names[1] or 'none'}.",
        f"Beyond noise below it: {names[-1] or 'none'}.",
        f"No clear difference: {names[0] or 'none'}.",
    ]
    return " ".join(said)


def notes(found: Mapping[str, Any]) -> Iterator[str]:
    """How the numbers are to be read."""
    compared = len([one for one in found["variants"] if one["against"]])
    yield (
        "Accuracy is that of greedy answers to the held-out problems after the last step, in the mean over the seeds. "
        "Differences are paired, run against run of the same seed and problem by problem; their 95 % intervals resample "
        "seeds and problems, each with replacement and independently of each other. With few seeds the spread between seeds "
        "is a rough guess."
    )
    if compared > 1:
        yield f"{compared} intervals are shown; of such intervals one in twenty leaves 0 out by chance alone."
    controls = {one["control"] for one in found["variants"]}
    if "shuffled" in controls:
        yield (
            "(shuffled) is the method with what it decides dealt out at random: masks and weights inside each rollout, "
            "verdicts, grades and dropped rollouts over the step, what the teacher said over the chunks of omniopd, answers "
            "and criteria over prompts. That is also the random choice at the same rate."
        )
    if "length" in controls:
        yield (
            f"(length) is {found['baseline']}, in the method's form, with rollouts cut to the tokens from which the method "
            "learns, where that writes or learns fewer than 90 % of the tokens."
        )
    if controls - {""}:
        yield "A method that does not beat its controls owes its gain to something else than its choice."
    if found["on_the_way"] != found["problems"]:
        yield f"On the way accuracy is measured on the first {found['on_the_way']} problems only."
    yield "Time is that of the steps, without evaluations; runs side by side slow each other down."


HEADS = (
    "run", "accuracy", "against {baseline}", "method less control", "by seed", "student tokens", "learned",
    "teacher tokens in + out", "points per M of these", "time",
)  # fmt: skip
BRIEF = (0, 1, 2, 3, 5, 7)  # columns for which a terminal has room


def heads(found: Mapping[str, Any]) -> list[str]:
    """The columns of the table."""
    return [head.format(baseline=found["baseline"]) for head in HEADS]


def cells(variant: Mapping[str, Any]) -> list[str]:
    """A variant's row, in the mean over the seeds."""
    spent = variant["spent"]
    after = [run["correct"]["after"] for run in variant["runs"] if run["correct"]]
    return [
        variant["label"],
        percent(variant["after"]),
        difference(variant["against"]),
        difference(variant["over_control"]),
        " ".join(f"{100 * digits.count('1') / len(digits):.1f}" for digits in after),
        compact(spent["student_tokens"]),
        compact(spent["trained_tokens"]),
        f"{compact(spent['teacher_read'])} + {compact(spent['teacher_written'])}",
        compact(gain_per_million(variant)),
        duration(spent["seconds"]),
    ]


def difference(found: Mapping[str, float] | None) -> str:
    """Points with their interval."""
    if found is None:
        return MISSING
    return f"{points(found['mean'])} ({points(found['low'])} to {points(found['high'])})"


def reason(variant: Mapping[str, Any]) -> str:
    """Why a variant has no finished run."""
    said = [run.get("reason") or run["status"] for run in variant["runs"]]
    return variant["refused"] or (said[0] if said else "not begun")


def failures(found: Mapping[str, Any]) -> Sequence[tuple[str, int, str]]:
    """Label, seed and reason of the runs that stopped, of methods that have others."""
    return [
        (one["label"], run["seed"], run["reason"])
        for one in found["variants"]
        for run in one["runs"]
        if one["finished"] and run.get("reason")
    ]
