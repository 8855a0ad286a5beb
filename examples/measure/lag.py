"""What a lag costs in accuracy: the quickstart without lag, and with rollouts that are one and two updates old.

    python examples/measure/lag.py [--signals NAME ...] [--lags 0 1 2] [--seeds 3] [--steps 100] [--workers 2]

Each run is `omniopd train examples/quickstart.yaml` with `train.max_lag`, `seed` and the signal set, in a process of its own
with one thread, against the demo teacher in another. The quickstart's signal, continuation_likelihood, learns from the
teacher's tokens alone, which no older weights wrote; survival has values on the student's own tokens, and so importance
ratios. Finished runs are kept in runs/lag, so the command can be stopped and called again. Writes docs/results/lag.json, and
prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from queue import Queue
from typing import Any

from teachers.local import local_server

ROOT = Path(__file__).resolve().parents[2]
RUNS, DOCS = ROOT / "runs" / "lag", ROOT / "docs" / "results"
RATIOS = ("ratio_mean", "ratio_max", "ratio_truncated")
Row = Mapping[str, Any]


def run(signal: str, lag: int, seed: int, steps: int, url: str) -> dict[str, Any]:
    """One run, unless it is there already; returns its row, or why it stopped."""
    row: dict[str, Any] = {"signal": signal, "max_lag": lag, "seed": seed}
    output = RUNS / f"{signal}-{steps}-{lag}-{seed}"
    summary = output / "summary.json"
    if not (summary.exists() and json.loads(summary.read_text(encoding="utf-8"))["status"] == "finished"):
        shutil.rmtree(output, ignore_errors=True)  # an earlier call was stopped in the middle of it
        settings = [f"train.max_lag={lag}", f"train.steps={steps}", f"seed={seed}", f"output={output}"]
        settings.append(f"method.signals=[{signal}]")
        settings += [f"teacher.base_url={url}", "eval.teacher=false", "train.save_every=1000"]
        command = [sys.executable, "-m", "omniopd.cli", "train", "examples/quickstart.yaml", *settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {**row, "stopped": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    found = json.loads(summary.read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [line for line in log if line["step"]]
    return {
        **row,
        "steps": found["steps"],
        "before": found["eval"]["before"]["accuracy"],
        "after": found["eval"]["after"]["accuracy"],
        "problems": found["eval"]["after"]["n"],
        "difference": found["eval"]["difference"],
        "lag": found["lag"],
        "seconds_a_step": found["wall_seconds"] / found["steps"],
        "wait_share": found["wait_share"],
        "curve": [[line["step"], line["eval"]["accuracy"]] for line in log if "eval" in line],
        **{name: mean_of(name, logged) for name in RATIOS},
    }


def mean_of(name: str, rows: Sequence[Row]) -> float | None:
    """The mean of a number that some rows have."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def against(rows: Sequence[Row], plain: Sequence[Row]) -> tuple[float, float]:
    """Mean difference in points to the runs without lag, and half of its 95 % interval.

    The interval counts the held-out problems alone, as if each run had its own; seeds add to it.
    """
    sides = [[row["after"] for row in side] for side in (rows, plain)]
    variance = sum(
        row["after"] * (1 - row["after"]) / row["problems"] / len(side) ** 2 for side in (rows, plain) for row in side
    )
    return 100 * (statistics.fmean(sides[0]) - statistics.fmean(sides[1])), 196 * variance**0.5


def table(rows: Sequence[Row]) -> str:
    """Markdown: accuracy after each run, the difference to none, the ratios that were used, and the time of a step."""
    lines = [
        "| signal | max_lag | after, by seed (%) | mean | against 0, points | mean ratio | largest of a step | cut "
        "| s a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["signal"], row["max_lag"]), []).append(row)
    for (signal, lag), group in sorted(groups.items()):
        plain = groups.get((signal, 0), [])
        each = " ".join(f"{100 * row['after']:.1f}" for row in group)
        mean, seconds = (statistics.fmean(row[name] for row in group) for name in ("after", "seconds_a_step"))
        gap = "{:+.1f} ± {:.1f}".format(*against(group, plain)) if lag and plain else ""
        ratio, largest, cut = (mean_of(name, group) for name in RATIOS)
        ratios = ["" if ratio is None else f"{ratio:.3f}", "" if largest is None else f"{largest:.2f}"]
        lines.append(
            f"| {signal} | {lag} | {each} | {100 * mean:.1f} | {gap} | {ratios[0]} | {ratios[1]} "
            f"| {'' if cut is None else f'{cut:.2%}'} | {seconds:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Make the runs, then the file and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--signals", nargs="+", default=["continuation_likelihood"])
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=DOCS / "lag.json")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    RUNS.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        free: Queue[str] = Queue()
        for _ in range(arguments.workers):
            free.put(stack.enter_context(local_server(ROOT / "examples" / "demo" / "teacher")))
        pool = stack.enter_context(ThreadPoolExecutor(arguments.workers))

        def work(job: tuple[int, str, int]) -> None:
            seed, signal, lag = job
            url = free.get()
            try:
                rows.append(row := run(signal, lag, seed, arguments.steps, url))
            finally:
                free.put(url)
            outcome = row.get("stopped") or f"{row['before']:.1%} -> {row['after']:.1%}"
            print(f"{signal} max_lag {lag} seed {seed}: {outcome}", flush=True)

        # first seeds first, so that an early stop still leaves a whole table
        list(pool.map(work, product(range(arguments.seeds), arguments.signals, arguments.lags)))
    rows = sorted((row for row in rows if "after" in row), key=lambda row: (row["signal"], row["max_lag"], row["seed"]))
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
