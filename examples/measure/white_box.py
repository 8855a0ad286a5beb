"""What a signal is worth: one student under teachers of its own and of another tokenizer, and of text alone.

    python examples/measure/white_box.py [--steps 60] [--seeds 3] [--workers 2] [--only NAME ...]

Every run has the same student, prompts, order, rate and rollout seeds; only the `teacher:` and `method:` blocks change. The
sibling is the demo teacher's recipe with the student's own tokenizer. Each run is `omniopd train` in a process of its own
with one thread; finished ones are kept in runs/white_box, so the command can be stopped and called again. Writes
docs/results/white_box.json, the picture beside it, and the table of the page.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUNS, DOCS = ROOT / "runs" / "white_box", ROOT / "docs" / "results"
SIBLING = {"type": "transformers", "path": "examples/demo/sibling"}
OTHER = {"type": "transformers", "path": "examples/demo/teacher"}
TEXT = {"name": "omniopd", "chunks": 3, "chunk_tokens": 6, "continuations": 6}

# name: (which tokenizer the teacher has, teacher, method)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "OPD, sampled": ("the student's", SIBLING, {"name": "opd"}),
    "OPD, dense": ("the student's", SIBLING, {"name": "opd", "form": "dense"}),
    "DPCA": ("its own", OTHER, {"name": "dpca"}),
    "ALM": ("its own", OTHER, {"name": "alm"}),
    "BPM": ("its own", OTHER, {"name": "bpm"}),
    "GOLD": ("its own", OTHER, {"name": "gold"}),
    "ULD": ("its own", OTHER, {"name": "uld"}),
    "text only": ("its own", OTHER, TEXT),
}


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, float, int]]:
    """Every run, first seeds first, so that an early stop still leaves a whole table."""
    for seed in range(arguments.seeds):
        for name in VARIANTS:
            if not arguments.only or any(part in name for part in arguments.only):
                for rate in arguments.rates:
                    yield name, rate, seed


def folder(name: str, rate: float, seed: int, steps: int) -> Path:
    """Where a run is kept."""
    slug = "".join(c if c.isalnum() else "-" for c in name.lower())
    return RUNS / f"{slug}-{rate:g}-{steps}-{seed}"


def run(name: str, rate: float, seed: int, steps: int) -> dict[str, Any]:
    """One run, unless it is there already; returns its row."""
    output = folder(name, rate, seed, steps)
    tokenizer, teacher, method = VARIANTS[name]
    row = {"method": name, "teacher_tokenizer": tokenizer, "learning_rate": rate, "seed": seed}
    if not finished(output):
        shutil.rmtree(output, ignore_errors=True)  # an earlier call was stopped in the middle of it
        settings = {
            "student": {"path": "examples/demo/student", "max_new_tokens": 64},
            "teacher": teacher,
            "task": {"type": "arithmetic"},
            "method": method,
            "train": {"steps": steps, "prompts_per_step": 32, "learning_rate": rate, "save_every": steps},
            "eval": {"problems": 500, "every": 10, "every_problems": 200},
            "output": str(output),
            "seed": seed,
        }
        config = output.with_suffix(".yaml")
        config.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "omniopd.cli", "train", str(config)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {**row, "stopped": done.stderr.strip().splitlines()[-1]}
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps_log = [line for line in log if line["step"]]
    tokens, curve = 0, []
    for line in steps_log:
        tokens += line["teacher_prompt_tokens"] + line["teacher_completion_tokens"]
        if "eval" in line:
            curve.append({"step": line["step"], "teacher_tokens": tokens, "accuracy": line["eval"]["accuracy"]})
    measured = summary["eval"]
    curve = [
        {"step": 0, "teacher_tokens": 0, "accuracy": measured["before"]["accuracy"]},
        *curve,
        {"step": summary["steps"], "teacher_tokens": tokens, "accuracy": measured["after"]["accuracy"]},
    ]
    return {
        **row,
        "steps": summary["steps"],
        "before": measured["before"]["accuracy"],
        "after": measured["after"]["accuracy"],
        "difference": measured["difference"],
        "coverage": summary["signal"]["coverage"],
        "teacher_tokens": tokens,
        "seconds": summary["wall_seconds"],
        "seconds_a_step": statistics.median(
            line["seconds_rollout"] + line["seconds_evidence"] + line["seconds_update"] for line in steps_log
        ),
        "curve": curve,
    }


def finished(output: Path) -> bool:
    """Whether a folder holds a run that came to its end."""
    path = output / "summary.json"
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy after each run, mean gain, and the gain's share of the best same-tokenizer one."""
    done = sorted((row for row in rows if "after" in row), key=lambda r: (*place(r), r["seed"]))
    groups = [(key, list(group)) for key, group in groupby(done, key=place)]
    best = max((gain(group) for _, group in groups if group[0]["teacher_tokenizer"] != "its own"), default=0.0)
    lines = [
        "| method | teacher's tokenizer | rate | after, by seed (%) | gain | of the best OPD's gain | coverage | teacher tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for _, group in groups:
        first = group[0]
        after = " ".join(f"{100 * row['after']:.1f}" for row in group)
        tokens = statistics.fmean(row["teacher_tokens"] for row in group) / 1000
        share = f"{gain(group) / best:.0%}" if best > 0 else ""
        coverage = statistics.fmean(row["coverage"] for row in group)
        lines.append(
            f"| {first['method']} | {first['teacher_tokenizer']} | {first['learning_rate']:g} | {after} | {gain(group):+.1f} | "
            f"{share} | {coverage:.0%} | {tokens:,.0f} k |"
        )
    return "\n".join(lines)


def place(row: dict[str, Any]) -> tuple[int, float]:
    """Where a row belongs in the table."""
    return list(VARIANTS).index(row["method"]), row["learning_rate"]


def gain(group: Sequence[dict[str, Any]]) -> float:
    """Mean gain in points."""
    return 100 * statistics.fmean(row["after"] - row["before"] for row in group)


def main() -> None:
    """Make the runs, then the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--only", nargs="*", default=[], help="variants whose name contains one of these")
    parser.add_argument("--out", type=Path, default=DOCS / "white_box.json")
    arguments = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []

    def work(job: tuple[str, float, int]) -> None:
        row = run(*job, arguments.steps)
        rows.append(row)
        print(*job, row.get("stopped") or f"{row['before']:.1%} -> {row['after']:.1%}", flush=True)

    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(work, jobs(arguments)))
    rows.sort(key=lambda row: (*place(row), row["seed"]))
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
