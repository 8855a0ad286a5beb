"""The same weights as a scoring teacher through two doors: in this process, and behind a vLLM server.

    python examples/measure/served_scores.py [--steps 30] [--seed 0]

Each method runs once through each door, with the same student, prompts and rollout seeds. The first step's loss is that of
the same weights on the same rollouts, so there the doors can be compared; later the students drift apart by rounding.
`make contract` installs vLLM. Writes docs/results/served_scores.json and prints its table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUNS, DOCS = ROOT / "runs" / "served_scores", ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT / "tests" / "contract"))

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "opd, sampled": ("sibling", {"name": "opd"}),
    "opd, dense on the teacher's 20 likeliest": (
        "sibling",
        {"name": "opd", "form": "dense", "support": "teacher", "k": 20},
    ),
    "dpca": ("teacher", {"name": "dpca"}),
}


@contextmanager
def in_process(folder: str) -> Iterator[dict[str, Any]]:
    """The weights in this process."""
    yield {"type": "transformers", "path": folder}


@contextmanager
def served(folder: str) -> Iterator[dict[str, Any]]:
    """The same behind vLLM."""
    import servers

    with servers.vllm(ROOT / folder) as url:
        yield {"type": "vllm", "base_url": f"{url}/v1", "model": "demo", "tokenizer": folder}


def run(teacher: dict[str, Any], method: dict[str, Any], output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run; its first loss, its accuracies and what a step took."""
    config = {
        "student": {"path": "examples/demo/student", "max_new_tokens": 64},
        "teacher": teacher,
        "task": {"type": "arithmetic"},
        "method": method,
        "train": {"steps": arguments.steps, "prompts_per_step": 32, "learning_rate": 3e-4},
        "eval": {"problems": 500},
        "output": str(output),
        "seed": arguments.seed,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "omniopd.cli", "train", str(path)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in log if line["step"]]
    measured = json.loads((output / "summary.json").read_text(encoding="utf-8"))["eval"]
    return {
        "first_loss": steps[0]["loss"],
        "before": measured["before"]["accuracy"],
        "after": measured["after"]["accuracy"],
        "coverage": min(line["coverage"] for line in steps),
        "seconds_evidence": sorted(line["seconds_evidence"] for line in steps)[len(steps) // 2],
    }


def main() -> None:
    """Run every method through both doors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = []
    print("| method | door | first loss | apart | before | after | evidence, s a step |\n|---|---|---|---|---|---|---|")
    for name, (teacher, method) in METHODS.items():
        first = None
        for door, open_door in (("in process", in_process), ("vLLM server", served)):
            output = RUNS / f"{method['name']}-{method.get('form', 'sampled')}-{door.split()[0]}-{os.getpid()}"
            with open_door(f"examples/demo/{teacher}") as settings:
                row = run(settings, method, output, arguments)
            first = row["first_loss"] if first is None else first
            rows.append({"method": name, "door": door, **row, "apart": abs(row["first_loss"] - first)})
            print(
                f"| {name} | {door} | {row['first_loss']:.6f} | {rows[-1]['apart']:.1e} | {row['before']:.1%} | "
                f"{row['after']:.1%} | {row['seconds_evidence']:.2f} |",
                flush=True,
            )
    (DOCS / "served_scores.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
