"""What the runs came to, as plain data: `compare.json`, from which the table and the page are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import fmean
from typing import Any

from evals.intervals import pooled_difference
from omniopd.compare.variants import Variant
from omniopd.config import RunConfig

Rows = Mapping[str, Mapping[int, Mapping[str, Any]]]
"""Runs by label and seed, see `runs.read`."""


def comparison(
    variants: Sequence[Variant],
    rows: Rows,
    refused: Mapping[str, str],
    base: RunConfig,
    seeds: Sequence[int],
    name: str,
    *,
    pairwise: bool = False,
) -> dict[str, Any]:
    """All runs, their means, and the differences between methods with their intervals.

    Each method is measured against the first, each control against the first too, and its method against it (`over_control`).
    `pairwise`: also each method against each other, some seconds' work for many of them.
    """
    baseline = variants[0].label
    found = []
    for variant in variants:
        runs = rows.get(variant.label, {})
        against = pooled(rows, baseline, variant.label, base.seed) if variant.label != baseline else None
        over = pooled(rows, variant.label, variant.of, base.seed) if variant.control else None
        found.append(
            {
                "label": variant.label,
                "control": variant.control,
                "of": variant.of,
                "settings": variant.settings,
                "refused": refused.get(variant.label, ""),
                **means(list(runs.values())),
                "against": against,
                "over_control": over,
                "runs": [{"seed": seed, **runs[seed]} for seed in seeds if seed in runs],
            }
        )
    return {
        "config": name,
        "output": str(base.output),
        "seeds": list(seeds),
        "baseline": baseline,
        "steps": base.train.steps,
        "problems": base.eval.problems,
        "on_the_way": base.eval.every_problems or base.eval.problems,
        "whole": all(
            one["refused"] or len([run for run in one["runs"] if run["status"] == "finished"]) == len(seeds)
            for one in found
        ),
        "variants": found,
        "pairs": pairs(rows, [one.label for one in variants if not one.control], base.seed) if pairwise else [],
    }


def pairs(rows: Rows, labels: Sequence[str], seed: int) -> list[dict[str, Any]]:
    """For each two methods with a finished seed in common, the accuracy of `label` less that of `than`, with its interval."""
    found = ((label, than, pooled(rows, than, label, seed)) for than, label in combinations(labels, 2))
    return [
        {"label": label, "than": than, **{key: difference[key] for key in ("mean", "low", "high")}}
        for label, than, difference in found
        if difference
    ]


def means(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a variant's finished runs: accuracy before and after, and what was spent. Empty where there is none."""
    done = [run for run in runs if run["status"] == "finished" and run["correct"]]
    if not done:
        return {"finished": 0, "before": None, "after": None, "spent": {}}
    return {
        "finished": len(done),
        "before": fmean(_share(run["correct"]["before"]) for run in done),
        "after": fmean(_share(run["correct"]["after"]) for run in done),
        "spent": {name: fmean(run["totals"][name] for run in done) for name in done[0]["totals"]},
    }


def pooled(rows: Rows, one: str, other: str, seed: int) -> dict[str, Any] | None:
    """The accuracy of `other` less that of `one` at the end, over the seeds that both have finished; None where none is."""
    mine, theirs = (_verdicts(rows.get(label, {})) for label in (one, other))
    if not (common := sorted(mine.keys() & theirs.keys())):
        return None
    before, after = ([verdicts[at] for at in common] for verdicts in (mine, theirs))
    each = [fmean(a) - fmean(b) for a, b in zip(after, before, strict=True)]
    return {**asdict(pooled_difference(before, after, seed)), "each": each, "problems": len(before[0])}


def beyond_noise(difference: Mapping[str, Any] | None) -> int:
    """1 or -1 where the interval leaves 0 out, by the side on which it lies."""
    if difference is None:
        return 0
    return int(difference["low"] > 0) - int(difference["high"] < 0)


def teacher_tokens(spent: Mapping[str, float]) -> float:
    """What the teacher has read and written."""
    return spent["teacher_read"] + spent["teacher_written"]


def gain_per_million(variant: Mapping[str, Any]) -> float | None:
    """Points of accuracy gained for a million of the teacher's tokens, read and written."""
    spent = variant["spent"]
    if not spent or not teacher_tokens(spent):
        return None
    return 100 * (variant["after"] - variant["before"]) / teacher_tokens(spent) * 1e6


def _verdicts(runs: Mapping[int, Mapping[str, Any]]) -> dict[int, list[bool]]:
    """By seed, whether each problem was answered rightly at the end."""
    finished = {seed: run["correct"].get("after") for seed, run in runs.items() if run["status"] == "finished"}
    return {seed: [digit == "1" for digit in digits] for seed, digits in finished.items() if digits}


def _share(digits: str) -> float:
    return digits.count("1") / len(digits)
