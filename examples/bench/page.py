"""The pages of the benchmarks, from docs/results/bench/*.json.

python examples/bench/page.py      # docs/results/bench.md (losses) and docs/results/throughput.md (steps and runs)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import throughput
from compare import described

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
MISSING = ""
MOST_MEMORY, MOST_TIME = 0.15, 1.2  # asked for, as shares of dense

PAGE = """# Memory and time of the losses

A divergence over the whole vocabulary needs the logits of both models. Dense, they are the largest tensors of a step:
4,096 tokens over 151,936 ids in fp32 are 2.5 GB, and there are five such tensors at the peak. `omniopd/losses/chunked.py`
makes them for a slice of about 128 MiB at a time, computes every term of the loss and its gradient from it, and forgets it.

```bash
make bench-loss                                                # the full shape, written to docs/results/bench/loss.json
make bench BENCH="--shape 512,256,16384"                       # a quick look, only printed
make bench BENCH="--device cuda --dtype bfloat16 --json docs/results/bench/loss-cuda.json"
make bench BENCH="--compare docs/results/bench/loss.json"      # ratios to an earlier run
python examples/bench/growth.py && python examples/bench/page.py   # growth, and this page from the JSON files
```

What is measured is one forward and one backward with the gradient to the hidden states *and* the head's weight, all rows on
the same inputs. *Peak memory* is what that takes on top of the inputs, the gradients included; on a CPU it is the kernel's
high-water mark of a fresh process for each row, on CUDA the allocator's. *Seconds* are medians of rounds in which the rows
take turns; their ratio is the median of the ratios within a round. *Differs by*: the largest absolute difference of the
loss from dense, and of any entry of the gradients as a share of dense's largest.

- **dense**: `log_softmax` of both models' logits in full, `sum p (log p - log q)`, mean over the tokens.
- **omniopd**: the teacher as hidden states and head (`FullTarget`), over slices. For *several terms* the same pass adds an
  advantage times `log p` of the student's own tokens, and an anchor to a reference model: three models' logits.
- **TRL**: `ChunkedDivergenceFunction` with `beta=1`, as `DistillationTrainer` calls it. It also gives the student's entropy,
  makes all logits twice, and is written for a GPU: off CUDA its tiles of 4,096 tokens by 32,768 ids run in plain torch.
- **Liger, torch**: `LigerFusedLinearJSDLoss`, no hard loss, slices of 1,024 tokens as by default; compiled on CUDA only.
- **Liger, Triton**: `LigerFusedLinearJSD`, the same over a Triton kernel, which needs a GPU.

{tables}
## Growth

{growth}
## Reading

{reading}
"""


def tables(found: Mapping[str, Any]) -> str:
    """A table for each case, under the machine that it was measured on."""
    return "\n".join([_conditions(found), "", *(line for case in found["cases"] for line in _case(case))])


def _conditions(found: Mapping[str, Any]) -> str:
    return f"{described(found['machine'])}; {found['dtype']}; median of {found['repeats']} rounds."


def _case(case: Mapping[str, Any]) -> list[str]:
    shape = case["shape"]
    return [
        f"**{case['name']}**: {shape['tokens']:,} tokens, hidden {shape['hidden']:,}, vocabulary {shape['vocab']:,}",
        "",
        "| | peak memory, GB | of dense | seconds | of dense | loss differs by | gradient differs by |",
        "|---|---|---|---|---|---|---|",
        *(_row(row) for row in case["rows"]),
        "",
    ]


def _row(row: Mapping[str, Any]) -> str:
    if row["why_not"]:
        return f"| {row['name']} | {row['why_not']} | | | | | |"
    cells = [
        _number(row["peak_bytes"], "{:.2f}", 1e9),
        _number(row["memory_ratio"], "{:.3f}"),
        _number(row["seconds"], "{:.3g}"),
        _number(row["time_ratio"], "{:.2f}"),
        _number(row["loss_difference"], "{:.1e}"),
        _number(row["gradient_difference"], "{:.1e}"),
    ]
    return f"| {row['name']} | {' | '.join(cells)} |"


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return MISSING if value is None else form.format(value / unit)


def page(found: Mapping[str, Mapping[str, Any]], growth: Mapping[str, Any] | None) -> str:
    """bench.md: `found` are runs of loss.py by the name of their file."""
    parts = [
        f"## {_title(each)}\n\n{tables(each)}\nEvery figure: [{name}](bench/{name}).\n" for name, each in found.items()
    ]
    return PAGE.format(tables="\n".join(parts), growth=_growth(growth), reading="\n".join(_reading(found)))


def _title(found: Mapping[str, Any]) -> str:
    shape = found["cases"][0]["shape"]
    return f"{shape['tokens']:,} tokens, vocabulary {shape['vocab']:,}, {found['dtype']}, {found['machine']['device']}"


def _growth(growth: Mapping[str, Any] | None) -> str:
    if growth is None:
        return "Not measured yet.\n"
    lines = [
        f"Reverse KL in {growth['dtype']} on {growth['machine']['device']}, hidden {_hidden(growth)}: over the tokens at a",
        "vocabulary of 32,768, over the vocabulary at 1,024 tokens; dense as long as it takes less than 8 GB.",
        "",
        "| | time over tokens | memory over tokens | time over vocabulary | memory over vocabulary |",
        "|---|---|---|---|---|",
    ]
    for row in growth["tokens"]["slopes"]:
        cells = [
            _number(growth[axis]["slopes"].get(row, {}).get(quantity), "{:.2f}")
            for axis in ("tokens", "vocabulary")
            for quantity in ("seconds", "peak_bytes")
        ]
        lines.append(f"| {row}, slope | {' | '.join(cells)} |")
    pictures = [
        f"![{quantity} against {axis}](bench/growth-{quantity}-{axis}.svg)"
        for axis in ("tokens", "vocabulary")
        for quantity in ("time", "memory")
    ]
    return "\n".join([*lines, "", *pictures, "", "Every point: [growth.json](bench/growth.json).", ""])


def _hidden(growth: Mapping[str, Any]) -> int:
    return int(growth["tokens"]["points"]["omniopd"][0]["hidden"])


def _reading(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The verdict on what is asked for, and what was not run."""
    lines = [f"Asked for: at most {MOST_MEMORY} of dense's peak memory and at most {MOST_TIME} of its time.", ""]
    for each in found.values():
        for case in each["cases"]:
            row = next(row for row in case["rows"] if row["name"] == "omniopd")
            if row["time_ratio"] is None or row["memory_ratio"] is None:
                continue
            holds = row["memory_ratio"] <= MOST_MEMORY and row["time_ratio"] <= MOST_TIME
            lines.append(
                f"- {_title(each)}, {case['name']} ({case['shape']['tokens']:,} tokens): memory {row['memory_ratio']:.3f}, "
                f"time {row['time_ratio']:.2f}: {'holds' if holds else '**does not hold**'}."
            )
    if not any(each["machine"]["device"] != each["machine"]["cpu"] for each in found.values()):
        lines += [
            "",
            "The gradient of the head's weight alone is 0.62 GB at the full vocabulary, whatever the number of tokens: with "
            "a quarter of them, as *several terms* has, it is a third of what is left.",
            "",
            "No GPU was at hand: nothing here says how the rows compare on one, and the two libraries are made for one.",
        ]
    return lines


def main() -> None:
    """Write the pages."""
    folder = DOCS / "bench"
    found = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("loss*.json"))}
    growth = folder / "growth.json"
    known = json.loads(growth.read_text(encoding="utf-8")) if growth.exists() else None
    (DOCS / "bench.md").write_text(page(found, known), encoding="utf-8")
    (DOCS / "throughput.md").write_text(throughput.page(throughput.load(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
