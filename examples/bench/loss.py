"""Memory and time of the chunked losses beside the dense form, TRL's and Liger's, on the same inputs.

    python examples/bench/loss.py [--shape 4096,1024,151936] [--device cuda --dtype bfloat16] [--json NEW] [--compare OLD]

Peak memory first, on a CPU each row in a fresh process. Then, in this process: one pass of each row, whose loss and
gradients are held against dense, and rounds in which the rows take turns, so that a machine that slows down slows all.
The full shape needs 16 GB and takes about an hour on two cores; a row that would not fit is left out and says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from typing import Any

import torch
from compare import add_options, finish
from measuring import Pass, Setting, machine, memory, once, peak, seconds
from page import tables
from rows import CASES, Row, Shape

REFERENCE = "dense"
SHARE_OF_TOKENS = {"several terms": 4}  # dense keeps three models' logits there: of all tokens, 20 GB


def bench(shape: Shape, setting: Setting, repeats: int) -> dict[str, Any]:
    """Every case, as written to the JSON."""
    cases = []
    for case, rows in CASES.items():
        part = Shape(max(1, shape.tokens // SHARE_OF_TOKENS.get(case, 1)), shape.hidden, shape.vocab)
        cases.append({"name": case, "shape": asdict(part), "rows": measure(case, rows, part, setting, repeats)})
    return {
        "machine": machine(setting),
        "dtype": setting.dtype,
        "repeats": repeats,
        "seed": setting.seed,
        "cases": cases,
    }


def measure(case: str, rows: Mapping[str, Row], shape: Shape, setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """The rows of one case: peak, agreement with dense, seconds; or, in `why_not`, why a row has none of them."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in rows.items():
        _say(f"{case}: peak memory of {name}")
        found[name] = _peak(case, name, row, shape, setting)
    running = [name for name in rows if found[name]["why_not"] is None]

    inputs = setting.inputs(shape)
    reference: Pass | None = None
    for name in running:
        _say(f"{case}: loss and gradient of {name}")
        result = once(rows[name].loss, inputs)
        reference = result if name == REFERENCE else reference
        found[name] |= _agreement(result, reference)
        del result
    del reference

    times: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(repeats):
        _say(f"{case}: round {turn + 1} of {repeats}")
        for name in running if turn % 2 == 0 else reversed(running):
            times[name].append(seconds(rows[name].loss, inputs))
    for name in running:
        found[name] |= _ratios(found[name], times[name], found[REFERENCE], times.get(REFERENCE))
    return [{"name": name, **row} for name, row in found.items()]


def _peak(case: str, name: str, row: Row, shape: Shape, setting: Setting) -> dict[str, Any]:
    need = row.fulls * shape.tokens * shape.vocab * 4 + 4 * shape.vocab * shape.hidden * 4
    free = memory("MemAvailable")
    if setting.device == "cpu" and row.fulls and need > free:
        return {"peak_bytes": None, "why_not": f"needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"}
    try:
        return {"peak_bytes": peak(case, name, shape, setting), "why_not": None}
    except (BrokenProcessPool, torch.OutOfMemoryError):
        return {"peak_bytes": None, "why_not": "out of memory"}
    except Exception as error:
        if not row.foreign:
            raise
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return {"peak_bytes": None, "why_not": f"does not run on this device ({reason})"}


def _agreement(result: Pass, reference: Pass | None) -> dict[str, float | None]:
    """The loss, and its largest differences from dense; those of gradients as shares of dense's largest entry."""
    if reference is None:
        return {"loss": float(result.loss), "loss_difference": None, "gradient_difference": None}
    worst = max(
        float((own - theirs).abs().max() / theirs.abs().max())
        for own, theirs in ((result.hidden, reference.hidden), (result.weight, reference.weight))
    )
    difference = float((result.loss - reference.loss).abs())
    return {"loss": float(result.loss), "loss_difference": difference, "gradient_difference": worst}


def _ratios(
    row: Mapping[str, Any], times: list[float], reference: Mapping[str, Any], reference_times: list[float] | None
) -> dict[str, Any]:
    """Seconds and, where dense ran, ratios to it: of time the median over rounds, each within its round."""
    paired = [own / dense for own, dense in zip(times, reference_times or [], strict=False)]
    comparable = row["peak_bytes"] is not None and reference["peak_bytes"] is not None
    return {
        "seconds": statistics.median(times),
        "seconds_all": times,
        "time_ratio": statistics.median(paired) if paired else None,
        "memory_ratio": row["peak_bytes"] / reference["peak_bytes"] if comparable else None,
    }


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """For `--compare`: seconds and peak of each row that ran."""
    units = {"seconds": ("s", 1.0), "peak_bytes": ("GB", 1e9)}
    return {
        f"{case['name']}: {row['name']}, {Shape(**case['shape'])}, {found['dtype']}, {unit}": row[name] / size
        for case in found["cases"]
        for row in case["rows"]
        for name, (unit, size) in units.items()
        if row.get(name) is not None
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shape(text: str) -> Shape:
    sizes = [int(size) for size in text.split(",")]
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(text)
    return Shape(*sizes)


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", type=_shape, default="4096,1024,151936", metavar="TOKENS,HIDDEN,VOCAB")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of timed passes")
    parser.add_argument("--threads", type=int, default=0, help="of torch on a CPU; 0: as many as it takes")
    add_options(parser)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    setting = Setting(device=options.device, dtype=options.dtype, threads=options.threads)
    finish(bench(options.shape, setting, options.repeats), options, tables, figures)


if __name__ == "__main__":
    main()
