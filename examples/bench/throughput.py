"""docs/results/throughput.md: whole steps and whole runs, from the JSON files that their benchmarks write."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

# Each benchmark with its heading and what is to be known about it; its module has the `table` of its JSON.
SECTIONS = {
    "steps": (
        "Against TRL's trainer",
        "Whole training steps of ours and of TRL's `DistillationTrainer`: the same weights, prompts, batch, completion "
        "length, optimizer and type. Each side is a process of its own; they take turns in blocks of steps. At this size a "
        "token of a rollout costs either side the library's own Python and dozens of small operations a layer, whatever "
        "the loop around them does, and more than half of the update is matrix products that both make: there is little "
        "to win. Ours takes less processor time, but its parts on a single thread leave the second core idle. The system "
        "message is new to the student, so both begin near nothing.",
    ),
    "steps-128": (
        "Against TRL's trainer, 128 prompts a step",
        'The same with four times the prompts (`make bench-steps BENCH="--prompts 128 --rounds 3 --block 3"`): TRL keeps '
        "the logits and states of all of them, ours those of a micro-batch.",
    ),
    "timeline": (
        "A teacher that takes two seconds",
        "A server answers every call after 2 s and works on 64 at once. What a step takes, over the largest of its stages, "
        "without lag and with it. Two continuations a chunk: with four, on a machine that was busy with other work, a first "
        "try at a lag of one took 1.28 times the largest stage, most of it updates.",
    ),
    "quickstart_time": (
        "The quickstart",
        "The whole command, of an earlier commit and of this tree, in rounds that alternate the order; ratios are medians "
        "of the ratios within a round.",
    ),
    "gpu": (
        "On a GPU",
        "Each stage against its floor: a rollout reads all matrices and every row's past for each token, at the bandwidth "
        "of a copy; scoring and update multiply at the rate of a square matrix product. Random weights in the shapes of "
        "Qwen3. A run of a size for CPUs is in the tests.",
    ),
}

PAGE = """# Steps and runs

How long training takes, beside others and beside what it took. The losses alone are on [their own page](bench.md); what
follows from shapes and data sheets for larger students is in [scaling](../scaling.md).

```bash
make bench                                        # losses, steps, timeline, quickstart: an hour or two on two cores
make bench-steps                                  # one of them alone, written to docs/results/bench/steps.json
make bench-steps BENCH="--rounds 3"               # with flags of its own, only printed
make bench COMPARE=docs/results/bench             # all of them, with ratios to the figures that are there now
make bench-gpu                                    # where there is a GPU
python examples/bench/page.py                     # this page from the JSON files
```

"""


def load(folder: Path) -> dict[str, Any]:
    """Figures by benchmark, of those that have been run."""
    return {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in SECTIONS
        if (path := folder / f"{name}.json").exists()
    }


def page(found: Mapping[str, Any]) -> str:
    """The page; a benchmark without figures says so."""
    return PAGE + "\n".join(_section(name, found.get(name)) for name in SECTIONS)


def _section(name: str, found: Mapping[str, Any] | None) -> str:
    title, about = SECTIONS[name]
    if found is None:
        body = f"Not measured yet: `make bench-{name}`.\n"
    else:
        table = importlib.import_module(name.partition("-")[0]).table(found).rstrip()
        body = f"{table}\n\nEvery figure: [{name}.json](bench/{name}.json).\n"
    return f"## {title}\n\n{fill(about, 120)}\n\n{body}"
