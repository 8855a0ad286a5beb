"""How near the forecast of a run comes to what it really uses: three configs, probed, forecast, trained, compared.

    python examples/measure/forecast.py        # minutes on two cores

Writes docs/results/forecast.json and docs/results/forecast.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: models this small run fastest so

from omniopd.config import load_config
from omniopd.plan import forecast, known_of
from omniopd.probing import probe_run
from omniopd.progress import Progress
from omniopd.run import Run
from omniopd.store import Store
from teachers.local import local_server

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "forecast"
DOCS = ROOT / "docs" / "results"
BOUND = 0.10
STEPS = 20
CONFIGS = {
    "quickstart": [],
    "longer chunks, a call for each draw, a terse teacher": [
        "method={name: omniopd, chunks: 2, chunk_tokens: 10, continuations: 4}",
        "teacher.n=false",
        "teacher.system=Answer in equations only.",
    ],
    "seqkd": ["method={name: seqkd, answer_tokens: 160}"],
}


def measure(name: str, overrides: list[str], url: str, seed: int) -> dict[str, Any]:
    """One config, as written to forecast.json."""
    output = RUNS / name.split(",")[0].replace(" ", "-")
    shutil.rmtree(output, ignore_errors=True)
    common = [f"teacher.base_url={url}", f"train.steps={STEPS}", "train.save_every=1000", f"seed={seed}"]
    common += ["eval.problems=0", "eval.every=0", "eval.teacher=false", f"output={output}"]
    config = load_config(ROOT / "examples" / "quickstart.yaml", [*common, *overrides])
    progress = Progress()
    estimated = forecast(Run(config)).expected
    asyncio.run(probe_run(Run(config, progress)))
    price, record = known_of(Run(config))
    measured = forecast(Run(config), record)
    assert measured.measured, "the probe has just made a pilot of this very run"
    Run(config, progress).train()
    store = Store(config.store_path)
    calls = [call for call in store.calls() if call["purpose"] != "probe"]
    store.close()
    told = {"calls": len(calls)}
    told |= {name: sum(call[name] for call in calls) for name in ("prompt_tokens", "completion_tokens", "cost_usd")}

    def row(usage: Any) -> dict[str, Any]:
        return {
            "calls": usage.calls,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cost_usd": price.cost(usage) if price else None,
        }

    return {
        "config": name,
        "overrides": overrides,
        "pilot": record["pilot"] if record else None,
        "estimated": row(estimated),
        "measured": row(measured.expected),
        "actual": told,
    }


def off(row: dict[str, Any], source: str, what: str) -> float:
    """The error of a forecast, as a share of what was really used."""
    return float(row[source][what] / row["actual"][what] - 1)


def page(rows: list[dict[str, Any]]) -> str:
    """Markdown: what each run was said to use, before and after its probe, and what it used."""
    lines = [
        "| config | | calls | tokens in | tokens out | price |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        for source, label in (("estimated", "before a probe"), ("measured", "after it"), ("actual", "**the run**")):
            cells = [f"{row[source][what]:,}" for what in ("calls", "prompt_tokens", "completion_tokens")]
            cells.append(f"${row[source]['cost_usd']:.4f}")
            if source != "actual":
                errors = [
                    off(row, source, what) for what in ("calls", "prompt_tokens", "completion_tokens", "cost_usd")
                ]
                cells = [f"{cell} ({error:+.1%})" for cell, error in zip(cells, errors, strict=True)]
            lines.append(f"| {row['config'] if source == 'estimated' else ''} | {label} | {' | '.join(cells)} |")
    worst = max(abs(off(row, "measured", what)) for row in rows for what in ("prompt_tokens", "completion_tokens"))
    return PAGE.format(
        table="\n".join(lines), worst=worst, bound=BOUND, steps=STEPS, held="holds" if worst <= BOUND else "is missed"
    )


PAGE = """# How near the forecast comes

`omniopd train CONFIG --dry-run` says what a run will use: counted with the student's tokenizer before a probe, scaled up
from the pilot's real usage after one. Three runs of {steps} steps of 32 prompts against the demo teacher, served on the same
machine; the settings are those of `examples/quickstart.yaml` but for what the config's name says. One command:

```bash
python examples/measure/forecast.py
```

{table}

Asked for: after a probe, tokens in and out within {bound:.0%} of the run's. The worst is {worst:.1%}, so the line {held}.
A pilot is a sample: 64 queries here, or the 32 answers of a step. And a forecast can't know what the student becomes: it is
made from what the untrained one writes, and a student that learns to write more is asked about more. Numbers and settings:
[forecast.json](forecast.json).
"""


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="another than 0 writes nothing")
    parser.add_argument("--only", help="a config whose name contains this; writes nothing")
    arguments = parser.parse_args()
    only, seed = arguments.only, arguments.seed
    rows = []
    with local_server(ROOT / "examples" / "demo" / "teacher") as url:
        for name, overrides in CONFIGS.items():
            if only is None or only in name:
                rows.append(measure(name, overrides, url, seed))
                print(json.dumps(rows[-1], indent=1), flush=True)
    if only is None and seed == 0:
        (DOCS / "forecast.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        (DOCS / "forecast.md").write_text(page(rows), encoding="utf-8")
    print(page(rows))


if __name__ == "__main__":
    main()
