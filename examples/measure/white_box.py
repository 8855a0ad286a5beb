"""What a signal is worth: one student under teachers of its own and of another tokenizer, and of text alone.

    python examples/measure/white_box.py [--steps 40] [--seeds 3] [--workers 2] [--only NAME ...]

Every run has the same student, prompts, order, rate and rollout seeds; only the `teacher:` and `method:` blocks change. The
sibling is the demo teacher's recipe with the student's own tokenizer, the cousin the recipe with numbers as single tokens.
Each run is `omniopd train` in a process of its own with one thread; finished ones are kept in runs/white_box, so the command
can be stopped and called again. Writes docs/results/white_box.json with its picture, and prints the page's table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from lines import Point, panels

ROOT = Path(__file__).resolve().parents[2]
RUNS, DOCS = ROOT / "runs" / "white_box", ROOT / "docs" / "results"
STUDENT = "examples/demo/student"
BRIEF = (
    "Answer in equations only."  # the teachers write as the student does: what is compared is tokenizers, not manners
)
TEXT = {"name": "omniopd", "chunks": 3, "chunk_tokens": 6, "continuations": 6}
PUBLISHED = {
    "dpca": {"openings": 0},
    "alm": {"openings": 0},
    "bpm": {"boundary": False},
}  # the teacher's token at its word
ACROSS = {name.upper(): {"name": name} for name in ("dpca", "alm", "bpm", "gold", "uld")}

# Each teacher of examples/demo with the methods that are tried on it, named as in the table.
TEACHERS: dict[str, dict[str, dict[str, Any]]] = {
    "sibling": {"OPD, sampled": {"name": "opd"}, "OPD, dense": {"name": "opd", "form": "dense"}},
    "cousin": {
        **ACROSS,
        "text only": TEXT,
        **{f"{name.upper()}, published": {"name": name, **settings} for name, settings in PUBLISHED.items()},
    },
    "teacher": {**ACROSS, "text only": TEXT},
}
SAME = "sibling"  # the one with the student's tokenizer


@dataclass(frozen=True, order=True)
class Job:
    """One run: a method of `TEACHERS`, a rate, a seed."""

    seed: int
    teacher: str
    method: str
    rate: float
    steps: int

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        slug = "".join(c if c.isalnum() else "-" for c in self.method.lower())
        return RUNS / f"{self.teacher}-{slug}-{self.rate:g}-{self.steps}-{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether it has come to its end."""
        path = self.folder / "summary.json"
        return path.exists() and json.loads(path.read_text(encoding="utf-8"))["status"] == "finished"

    @property
    def place(self) -> tuple[int, int, float]:
        """Where its row belongs in the table."""
        return (
            list(TEACHERS).index(self.teacher),
            list(TEACHERS[self.teacher]).index(self.method),
            self.rate,
        )

    def config(self) -> dict[str, Any]:
        """The run's configuration. Only the blocks `teacher:` and `method:` differ between two methods of one seed."""
        return {
            "student": {"path": STUDENT, "max_new_tokens": 64},
            "teacher": {"type": "transformers", "path": f"examples/demo/{self.teacher}", "system": BRIEF},
            "task": {"type": "arithmetic"},
            "method": TEACHERS[self.teacher][self.method],
            "train": {
                "steps": self.steps,
                "prompts_per_step": 32,
                "learning_rate": self.rate,
                "save_every": self.steps,
            },
            "eval": {"problems": 500, "every": 10, "every_problems": 200},
            "output": str(self.folder),
            "seed": self.seed,
        }


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """Every run, first seeds first, so that an early stop still leaves a whole table."""
    return [
        job
        for seed in range(arguments.seeds)
        for teacher in arguments.teachers
        for method in TEACHERS[teacher]
        for rate in arguments.rates
        if not arguments.only or any(part in method for part in arguments.only)
        if (job := Job(seed, teacher, method, rate, arguments.steps)).finished or not arguments.finished
    ]


def run(job: Job) -> dict[str, Any]:
    """One run, unless it is there already; returns its row, or why it stopped."""
    row = {"teacher": job.teacher, "method": job.method, "learning_rate": job.rate, "seed": job.seed}
    if not job.finished:
        shutil.rmtree(job.folder, ignore_errors=True)  # an earlier call was stopped in the middle of it
        config = job.folder.with_suffix(".yaml")
        config.write_text(json.dumps(job.config()), encoding="utf-8")  # JSON is YAML
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "omniopd.cli", "train", str(config)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {**row, "stopped": done.stderr.strip().splitlines()[-1]}
    summary = json.loads((job.folder / "summary.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, measured = [line for line in log if line["step"]], summary["eval"]
    tokens = list(accumulate(line["teacher_prompt_tokens"] + line["teacher_completion_tokens"] for line in steps))
    curve = [(0, 0, measured["before"]["accuracy"])]
    curve += [
        (line["step"], read, line["eval"]["accuracy"])
        for line, read in zip(steps, tokens, strict=True)
        if "eval" in line
    ]
    curve.append((job.steps, tokens[-1], measured["after"]["accuracy"]))
    return {
        **row,
        "steps": job.steps,
        "before": measured["before"]["accuracy"],
        "after": measured["after"]["accuracy"],
        "difference": measured["difference"],
        "coverage": summary["signal"]["coverage"],
        "one_to_one_share": mean_of("one_to_one_share", steps),
        "teacher_tokens": tokens[-1],
        "seconds_a_step": statistics.median(
            line["seconds_rollout"] + line["seconds_evidence"] + line["seconds_update"] for line in steps
        ),
        "curve": [{"step": step, "teacher_tokens": read, "accuracy": accuracy} for step, read, accuracy in curve],
    }


def mean_of(name: str, steps: Sequence[dict[str, Any]]) -> float | None:
    """The mean of a number that some steps' rows have."""
    values = [line[name] for line in steps if line.get(name) is not None]
    return statistics.fmean(values) if values else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy after each run, mean gain, and its share of the best that a teacher of the same tokenizer gave."""
    groups = [
        list(group) for _, group in groupby(rows, key=lambda row: (row["teacher"], row["method"], row["learning_rate"]))
    ]
    best = max((gain(group) for group in groups if group[0]["teacher"] == SAME), default=0.0)
    lines = [
        "| teacher | method | rate | after, by seed (%) | gain | of OPD's | 1:1 | coverage | teacher tokens | s a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in groups:
        first = group[0]
        after = " ".join(f"{100 * row['after']:.1f}" for row in group)
        tokens, seconds, coverage = (
            statistics.fmean(row[name] for row in group) for name in ("teacher_tokens", "seconds_a_step", "coverage")
        )
        single = "" if first["one_to_one_share"] is None else f"{first['one_to_one_share']:.0%}"
        share = f"{gain(group) / best:.0%}" if best > 0 else ""
        lines.append(
            f"| {first['teacher']} | {first['method']} | {first['learning_rate']:g} | {after} | {gain(group):+.1f} | {share} "
            f"| {single} | {coverage:.0%} | {tokens / 1000:,.0f} k | {seconds:.2f} |"
        )
    return "\n".join(lines)


def curves(rows: Sequence[dict[str, Any]], teachers: Sequence[str], x: str) -> dict[str, list[Point]]:
    """Of each method of these teachers its accuracy, in percent, at the x of the first seed; a value per seed."""
    lines: dict[str, list[Point]] = {}
    groups = groupby(rows, key=lambda row: (row["teacher"], row["method"], row["learning_rate"]))
    for (teacher, method, _), group in groups:
        runs = [row["curve"] for row in group]
        if teacher in teachers:
            lines[method] = [
                (places[0][x] / (1000 if x == "teacher_tokens" else 1), [100 * place["accuracy"] for place in places])
                for places in zip(*runs, strict=True)
            ]
    return lines


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy over steps under each teacher of another tokenizer, and over teacher tokens, beside the same tokenizer's."""
    shown = [teacher for teacher in TEACHERS if teacher != SAME and any(row["teacher"] == teacher for row in rows)]
    panel = [(f"{name} and {SAME}", "steps", curves(rows, (SAME, name), "step")) for name in shown]
    tokens = curves(rows, (SAME, shown[-1]), "teacher_tokens")
    return panels("accuracy", [*panel, (f"{shown[-1]} and {SAME}", "thousand teacher tokens", tokens)])


def gain(group: Sequence[dict[str, Any]]) -> float:
    """Mean gain in points."""
    return 100 * statistics.fmean(row["after"] - row["before"] for row in group)


def main() -> None:
    """Make the runs, then the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-4])
    parser.add_argument("--teachers", nargs="+", choices=list(TEACHERS), default=list(TEACHERS))
    parser.add_argument("--only", nargs="*", default=[], help="methods whose name contains one of these")
    parser.add_argument("--finished", action="store_true", help="run nothing: the files of the runs that there are")
    parser.add_argument("--out", type=Path, default=DOCS / "white_box.json")
    arguments = parser.parse_args()
    RUNS.mkdir(parents=True, exist_ok=True)
    found: dict[Job, dict[str, Any]] = {}

    def work(job: Job) -> None:
        found[job] = row = run(job)
        outcome = row.get("stopped") or f"{row['before']:.1%} -> {row['after']:.1%}"
        print(f"{job.teacher} {job.method} {job.rate:g} seed {job.seed}: {outcome}", flush=True)

    with ThreadPoolExecutor(arguments.workers) as pool:
        list(pool.map(work, jobs(arguments)))
    rows = [found[job] for job in sorted(found, key=lambda job: (job.place, job.seed)) if "after" in found[job]]
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".svg").write_text(picture(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
