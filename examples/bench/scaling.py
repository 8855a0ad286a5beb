"""The tables of docs/scaling.md: a step's memory, time and money on paper, from a 0.6B to a 70B student.

python examples/bench/scaling.py                     # print them
python examples/bench/scaling.py --write             # put them into the page
python examples/bench/scaling.py --measure FOLDER    # measure the inputs on a text-only run, into docs/results/scaling.json
"""

from __future__ import annotations

import argparse
import json
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml
from costs import LLAMA_70B, LLAMA_405B, QWEN3_06B, QWEN3_8B, QWEN3_17B, QWEN3_32B
from step_inputs import H100, H200, Load, Measured
from step_model import ROLLOUT_ROOM, Plan

from omniopd.methods.omniopd import OmniOPDConfig
from students.policy import LoraSettings

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "scaling.md"
INPUTS = ROOT / "docs" / "results" / "scaling.json"
PAIRS = ((QWEN3_06B, QWEN3_17B), (QWEN3_8B, QWEN3_32B), (QWEN3_32B, LLAMA_70B), (LLAMA_70B, LLAMA_405B))
RANK = LoraSettings().rank
DEAR = (2.50, 10.00)  # [assumed] USD per million tokens of a large closed model


def measure(run: Path) -> Measured:
    """The ratios of a finished run whose teacher went on from the student's text."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for line in lines if "queries" in (row := json.loads(line))]
    method = OmniOPDConfig(**yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["method"])
    replies = method.continuations * sum(row["queries"] for row in steps)
    written = sum(row["teacher_completion_tokens"] for row in steps)
    store = sqlite3.connect(f"{(run / 'answers.sqlite').absolute().as_uri()}?mode=ro", uri=True)
    (pages,), (size,) = (store.execute(f"PRAGMA {name}").fetchone() for name in ("page_count", "page_size"))
    store.close()
    return Measured(
        reply_share=written / (replies * method.reply_tokens),
        branch_share=sum(row["branch_tokens"] for row in steps) / written,
        reply_bytes=pages * size / replies,
    )


def plans(load: Load) -> list[Plan]:
    """The rows of the tables."""
    return [
        Plan(student, teacher, device, load, rank)
        for student, teacher in PAIRS
        for rank in (None, RANK)
        for device in (H100, H200)
    ]


def memory_table(rows: Sequence[Plan]) -> str:
    """GB on each of the GPUs that train."""
    parts = list(rows[0].memory(1))
    return _table(
        ("student", "trained", "GPUs", *parts, "together", "runs on", "a rollout server", "its rows at once"),
        (
            (
                *_name(plan),
                _gpus(plan.gpus, plan),
                *(_short(part / 1e9) for part in [*each.values(), sum(each.values())]),
                "none" if plan.gpus_today is None else f"{plan.gpus_today}",
                _gpus(plan.serving(plan.student, ROLLOUT_ROOM), plan),
                f"{plan.room:,}",
            )
            for plan in rows
            for each in [plan.memory(plan.gpus)]
        ),
    )


def time_table(rows: Sequence[Plan]) -> str:
    """Seconds of each stage and of a step."""
    return _table(
        (
            *("student", "trained", "GPUs", "rollout", "check", "text teacher", "update", "of it gathers", "push"),
            *("step", "`max_lag` ≥ 1", "or scored", "on GPUs"),
        ),
        (
            (
                *_name(plan),
                f"{_gpus(plan.gpus, plan)} + {plan.writers}",
                *map(_short, (plan.rollout, plan.checking, plan.asking, plan.update, plan.gathering, plan.push)),
                _short(plan.step(plan.asking, lagging=False)),
                _short(plan.step(plan.asking, lagging=True)),
                _short(plan.scoring),
                f"{plan.scorers}",
            )
            for plan in rows
        ),
    )


def money_table(load: Load) -> str:
    """What a step's evidence costs; the student's size does not matter."""
    sent, brought = load.teacher_tokens
    return _table(
        ("calls", "tokens in", "tokens out", "USD, small model", "USD, large model", "answer store grows by"),
        [
            (
                f"{load.calls:,}",
                f"{sent / 1e6:.2f} M",
                f"{brought / 1e6:.2f} M",
                f"{load.dollars():.2f}",
                f"{load.dollars(DEAR):.2f}",
                f"{load.store_bytes / 1e6:.0f} MB",
            )
        ],
    )


def tables(measured: Measured) -> dict[str, str]:
    """Every table of the page by the name of its mark."""
    load = Load(measured)
    rows = plans(load)
    return {"memory": memory_table(rows), "time": time_table(rows), "money": money_table(load)}


def written(page: str, found: dict[str, str]) -> str:
    """The page with each table between its marks."""
    for name, table in found.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, close, after = rest.partition(f"<!-- /{name} -->")
        if not (mark and close):
            raise ValueError(f"the page has no place for the table '{name}'")
        page = f"{before}{mark}{table}\n{close}{after}"
    return page


def load_measured() -> Measured:
    """The inputs that the page is made with."""
    return Measured(**json.loads(INPUTS.read_text(encoding="utf-8"))["measured"])


def _name(plan: Plan) -> tuple[str, str]:
    return plan.student.name, "all" if plan.lora_rank is None else f"LoRA {plan.lora_rank}"


def _gpus(count: int, plan: Plan) -> str:
    return f"{count} {plan.device.name}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--measure", type=Path, metavar="FOLDER", help="a run with a text-only teacher, as `make quickstart`'s"
    )
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    options = parser.parse_args()
    if options.measure:
        found = {
            "command": "python examples/bench/scaling.py --measure FOLDER",
            "measured": asdict(measure(options.measure)),
        }
        INPUTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    made = tables(load_measured())
    if options.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
    for name, table in made.items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
