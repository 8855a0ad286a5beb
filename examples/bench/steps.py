"""Whole training steps of ours beside TRL's DistillationTrainer: seconds, memory, and accuracy reached per second.

    python examples/bench/steps.py [--rounds 7] [--block 5] [--json NEW] [--compare OLD]

The same on both sides: the weights of student and teacher, prompts and their order, prompts a step, the limit of new tokens,
the chat template, temperature 1 and no cut of the distribution, dense reverse KL over the whole vocabulary as a mean over the
step's tokens, AdamW with its betas, rate, no decay, the gradient's clip, fp32, sdpa, the number of threads. Student and
teacher both read the brief as a system message, since TRL shows both the same tokens. No side logs to a tracker, measures or
saves between the steps; ours writes its row of the run's log.

What differs: each side's own sampling, random numbers and loop. TRL uses its fused AdamW, its default, and gets the whole step
as one micro-batch without recomputation, its fastest setting here.

Each side is a process of its own (`sides.py`). They take turns in blocks of steps, the order changing from round to round, so
that a machine that slows down slows both; the first block is warm-up. Accuracy is that of the weights after each block, measured
afterwards by our greedy evaluator on the same held-out problems, for both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from sides import SIDES, Plan, config

ROOT = Path(__file__).resolve().parents[2]
BRIEF = "Answer in equations only."
OURS, THEIRS = SIDES


class Side:
    """A process that trains in turns."""

    def __init__(self, name: str, folder: Path, threads: int) -> None:
        self.name, self.blocks = name, list[dict[str, Any]]()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(Path(__file__).with_name("sides.py")), name, str(folder)]
        with (folder / f"{name}.err").open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.errors = folder / f"{name}.err"

    def train(self, steps: int) -> None:
        """One turn.

        Raises:
            SystemExit: the process has ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(steps, file=self.process.stdin, flush=True)
            self.blocks.append(json.loads(self.process.stdout.readline()))
        except (BrokenPipeError, json.JSONDecodeError):
            raise SystemExit(f"{self.name} has stopped:\n{self.errors.read_text(encoding='utf-8')[-2000:]}") from None

    def close(self) -> None:
        """End the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


@contextmanager
def sides(folder: Path, threads: int) -> Iterator[list[Side]]:
    """Both processes."""
    both = [Side(name, folder, threads) for name in SIDES]
    try:
        yield both
    finally:
        for side in both:
            side.close()


def bench(plan: Plan, rounds: int, block: int, problems: int) -> dict[str, Any]:
    """Train both sides and measure what came of it, as written to the JSON."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = prepare(plan, folder)
        with sides(folder, plan.threads) as both:
            for turn in range(rounds + 1):
                _say(f"round {turn} of {rounds}" if turn else "warm-up")
                for side in both if turn % 2 == 0 else reversed(both):
                    side.train(block)
        _say("accuracy")
        before = accuracy(run, None, problems)
        found = {side.name: figures(side, before, [accuracy(run, b["weights"], problems) for b in side.blocks]) for side in both}
    from measuring import Setting, machine

    return {
        "machine": machine(Setting(threads=plan.threads)) | {"threads": plan.threads},
        "dtype": "float32",
        "repeats": rounds,
        "block": block,
        "problems": problems,
        "plan": {name: getattr(plan, name) for name in ("prompts", "tokens", "rate", "seed")},
        "accuracy_before": before,
        "sides": found,
        "ratios": ratios(found[OURS], found[THEIRS]),
    }


def prepare(plan: Plan, folder: Path) -> Any:
    """Write what both sides read. Returns a run of ours that measures accuracy, and that knows the prompts' order."""
    from evals.tasks.arithmetic import Arithmetic
    from omniopd.config import load_config
    from omniopd.run import Run

    task = Arithmetic(Arithmetic.Config(train_size=plan.steps * plan.prompts))
    for name, prompts in (("train", task.train), ("heldout", task.heldout)):
        _write(folder / f"{name}.jsonl", [{"prompt": p.messages[0].content, "answer": p.reference} for p in prompts])
    run = Run(load_config({**config(plan, folder), "eval": {}}))
    order = [prompt for step in range(1, plan.steps + 1) for prompt in run.prompts(step)]
    _write(folder / "order.jsonl", [{"prompt": prompt.messages[-1].content} for prompt in order])
    plan.write(folder)
    return run


def accuracy(run: Any, weights: str | None, problems: int) -> float:
    """Greedy accuracy of a student's saved weights; of the initial ones for None."""
    from transformers import AutoModelForCausalLM

    if weights is not None:
        state = AutoModelForCausalLM.from_pretrained(weights, dtype="float32").state_dict()
        run.policy.model.load_state_dict(state)
    run.heldout = run.task.heldout[:problems]
    return float(run.evaluate("").accuracy)


def figures(side: Side, before: float, accuracies: Sequence[float]) -> dict[str, Any]:
    """What a side took. The first block is warm-up, and counts for the accuracy per second only."""
    blocks = [each["block"] for each in side.blocks]
    measured = {name: [value for block in blocks[1:] for value in block[name]] for name in blocks[0]}
    spent = list(accumulate(sum(block["seconds"]) for block in blocks))
    last = side.blocks[-1]
    return {
        "seconds": statistics.median(measured["seconds"]),
        "cpu_seconds": statistics.median(measured["cpu_seconds"]),
        "rollout_seconds": statistics.median(measured["rollout_seconds"]),
        "tokens": statistics.mean(measured["tokens"]),
        "steps": len(measured["seconds"]),
        "peak_bytes": last["peak_bytes"],
        "imports_bytes": last["imports_bytes"],
        "added_bytes": last["peak_bytes"] - last["imports_bytes"],
        "accuracy": accuracies[-1],
        "gain_per_second": (accuracies[-1] - before) / spent[-1],
        "curve": [{"seconds": s, "accuracy": a} for s, a in zip(spent, accuracies, strict=True)],
        "seconds_all": measured["seconds"],
        "cpu_seconds_all": measured["cpu_seconds"],
        "losses": [loss for block in blocks for loss in block["losses"]],
    }


def ratios(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, float | None]:
    """How many times as fast ours is, and its share of their memory."""
    return {
        "speed": theirs["seconds"] / ours["seconds"],
        "speed_cpu": theirs["cpu_seconds"] / ours["cpu_seconds"],
        "speed_rollout": theirs["rollout_seconds"] / ours["rollout_seconds"],
        "peak": ours["peak_bytes"] / theirs["peak_bytes"],
        "added": ours["added_bytes"] / theirs["added_bytes"],
        "gain_per_second": ours["gain_per_second"] / theirs["gain_per_second"] if theirs["gain_per_second"] > 0 else None,
    }


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a row for each side."""
    lines = [
        "| | s a step | CPU s | rollout s | rest s | peak, MB | without imports, MB | tokens a step | accuracy | points / min |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, side in found["sides"].items():
        cells = [
            f"{side['seconds']:.3f}",
            f"{side['cpu_seconds']:.3f}",
            f"{side['rollout_seconds']:.3f}",
            f"{side['seconds'] - side['rollout_seconds']:.3f}",
            f"{side['peak_bytes'] / 1e6:.0f}",
            f"{side['added_bytes'] / 1e6:.0f}",
            f"{side['tokens']:.0f}",
            f"{found['accuracy_before']:.1%} → {side['accuracy']:.1%}",
            f"{6000 * side['gain_per_second']:.1f}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    ratio = {name: "" if value is None else f"{value:.2f}" for name, value in found["ratios"].items()}
    lines += [
        "",
        f"Ours is {ratio['speed']} times as fast ({ratio['speed_cpu']} by CPU time), takes {ratio['peak']} of the memory "
        f"({ratio['added']} without the imports) and gains {ratio['gain_per_second']} times as much accuracy a second.",
    ]
    return "\n".join(lines)


def comparison(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Two runs side by side, new over old."""
    lines = ["| | s before | s now | now / before | MB before | MB now | now / before |", "|---|---|---|---|---|---|---|"]
    for name, side in new["sides"].items():
        earlier = old["sides"][name]
        pairs = [(earlier["seconds"], side["seconds"], 1.0), (earlier["peak_bytes"], side["peak_bytes"], 1e6)]
        cells = [f"{a / unit:.3g} | {b / unit:.3g} | {b / a:.2f}" for a, b, unit in pairs]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="measured blocks of each side")
    parser.add_argument("--block", type=int, default=5, help="steps of a block")
    parser.add_argument("--prompts", type=int, default=32, help="prompts a step")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--problems", type=int, default=200, help="held-out problems")
    parser.add_argument("--student", default="examples/demo/student")
    parser.add_argument("--teacher", default="examples/demo/sibling", help="of the student's tokenizer")
    parser.add_argument("--json", type=Path, metavar="NEW.json", help="write every figure there")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="print ratios to an earlier run")
    options = parser.parse_args()
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(options.compare.read_text(encoding="utf-8")) if options.compare else None
    plan = Plan(
        student=options.student,
        teacher=options.teacher,
        brief=BRIEF,
        prompts=options.prompts,
        tokens=options.tokens,
        steps=(options.rounds + 1) * options.block + 1,  # the last one is never taken: the process ends before
        rate=3e-4,
        threads=options.threads,
        seed=0,
    )
    found = bench(plan, options.rounds, options.block, options.problems)
    print(table(found))
    if earlier:
        print(comparison(earlier, found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        _say(f"written: {options.json}")


if __name__ == "__main__":
    main()
