"""Wall time of `make quickstart`, before and after: an earlier commit's and this tree's run in turns.

    python examples/bench/quickstart_time.py [--before COMMIT] [--full] [--json NEW] [--compare OLD]

The earlier commit is unpacked into a temporary folder and run from there by the same Python. A run is the whole command, from
the start of the interpreter to its report, the demo teacher's server included, as `examples/quickstart.py` starts it. Rounds
alternate the order, so that a machine that slows down slows both; ratios are medians over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compare import add_options, described, finish

ROOT = Path(__file__).resolve().parents[2]
TIMES = {"seconds": "wall, s", "cpu_seconds": "CPU, s", "training_seconds": "steps, s"}
QUANTITIES = {**TIMES, "accuracy": "accuracy after"}


def unpack(commit: str, folder: Path) -> Path:
    """The tree of a commit of this repository.

    Raises:
        SystemExit: there is no such commit here.
    """
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit], capture_output=True, check=False)
    if packed.returncode:
        raise SystemExit(f"--before: {packed.stderr.decode().strip()}; name a commit of this repository's history")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def name_of(commit: str) -> str:
    """Its hash, with a mark where the working tree differs from it; empty outside a repository."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", *([] if commit else ["--dirty"])]
    told = subprocess.run([*command, *([commit] if commit else [])], capture_output=True, text=True, check=False)
    return told.stdout.strip()


def run(tree: Path, overrides: Sequence[str], output: Path) -> dict[str, float]:
    """One quickstart of a tree.

    Raises:
        SystemExit: it failed, or another tree's packages were imported.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    where = "import omniopd; print(omniopd.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tree, env=environment, capture_output=True, text=True)
    if not found.stdout.startswith(str(tree)):
        raise SystemExit(f"the quickstart of {tree} would import {found.stdout.strip() or found.stderr[-500:]}")
    command = [sys.executable, str(tree / "examples" / "quickstart.py"), *overrides, f"output={output}"]
    spent, began = _children(), time.perf_counter()
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"the quickstart of {tree} ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "cpu_seconds": _children() - spent,
        "training_seconds": summary["wall_seconds"],
        "accuracy": summary["eval"]["after"]["accuracy"],
    }


def bench(trees: Mapping[str, Path], overrides: Sequence[str], rounds: int, folder: Path) -> dict[str, list[Any]]:
    """Every run by side, in rounds."""
    found: dict[str, list[Any]] = {side: [] for side in trees}
    for turn in range(rounds):
        for side in trees if turn % 2 == 0 else reversed(list(trees)):
            print(f"round {turn + 1} of {rounds}: {side}", file=sys.stderr, flush=True)
            found[side].append(run(trees[side], overrides, folder / f"{side}-{turn}"))
    return found


def summary(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Medians of each side, and of the ratios after / before."""
    medians = {
        side: {name: statistics.median(each[name] for each in one) for name in QUANTITIES} for side, one in runs.items()
    }
    pairs = list(zip(runs.get("before", []), runs["after"], strict=False))
    ratios = {name: statistics.median(after[name] / before[name] for before, after in pairs) for name in TIMES if pairs}
    return {"medians": medians, "ratios": ratios, "runs": {side: list(one) for side, one in runs.items()}}


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a row for each side, and the ratios."""
    settings = " ".join(found["overrides"]) or "as it is"
    lines = [
        f"{described(found['machine'])}; quickstart {settings}; median of {found['rounds']} rounds.",
        "",
        f"| | {' | '.join(QUANTITIES.values())} |",
        "|---|" + "---|" * len(QUANTITIES),
    ]
    for side, medians in found["medians"].items():
        cells = " | ".join(f"{medians[name]:.3g}" for name in QUANTITIES)
        lines.append(f"| {side} ({found['commits'][side]}) | {cells} |")
    if found["ratios"]:
        ratios = " | ".join(f"{found['ratios'][name]:.2f}" for name in TIMES)
        lines.append(f"| after / before | {ratios} | |")
    return "\n".join([*lines, ""])


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """For `--compare`."""
    under = " ".join(found["overrides"]) or "full"
    return {
        f"quickstart {under}: {side}, {label}": medians[name]
        for side, medians in found["medians"].items()
        for name, label in QUANTITIES.items()
    }


def _children() -> float:
    """CPU seconds of all child processes that have ended, theirs included."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", metavar="COMMIT", help="what to hold this tree against; without it, it runs alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--problems", type=int, default=100, help="held-out problems, before and after")
    parser.add_argument("--full", action="store_true", help="the quickstart as it is, instead of steps and problems")
    add_options(parser)
    options = parser.parse_args()
    short = [f"train.steps={options.steps}", f"eval.problems={options.problems}", "eval.every=0", "eval.teacher=false"]
    overrides = [] if options.full else short
    with TemporaryDirectory() as name:
        folder = Path(name).resolve()
        earlier = {"before": unpack(options.before, folder / "tree")} if options.before else {}
        trees = {**earlier, "after": ROOT}
        runs = bench(trees, overrides, options.rounds, folder)
    from measuring import Setting, machine  # not before: torch takes memory that the runs may need

    found = {
        "machine": machine(Setting()),
        "commits": {side: name_of(options.before if side == "before" else "") for side in trees},
        "overrides": overrides,
        "rounds": options.rounds,
        **summary(runs),
    }
    finish(found, options, table, figures)


if __name__ == "__main__":
    main()
