"""How time and peak memory of the chunked reverse KL grow with the number of tokens and with the vocabulary.

    python examples/bench/growth.py [--device cuda --dtype bfloat16]     # minutes on two cores

Each point is measured in a process of its own (on CUDA in this one), dense beside it as long as it takes less than 8 GB.
Writes growth.json and growth-*.svg to docs/results/bench/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import Setting, machine, point
from plot import Points, loglog, slope
from rows import CASES, Shape

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results" / "bench"
CASE = "reverse KL"
ROWS = ("omniopd", "dense")
DENSE_BYTES = 8e9
HIDDEN = 512
TOKENS = [Shape(n, HIDDEN, 32768) for n in (512, 1024, 2048, 4096, 8192, 16384)]
VOCABULARY = [Shape(1024, HIDDEN, n) for n in (32768, 65536, 131072, 262144)]
QUANTITIES = {
    "seconds": ("time", "seconds", 1.0),
    "peak_bytes": ("memory", "peak memory over the inputs, GB", 1e9),
}


def grow(shapes: Sequence[Shape], setting: Setting, repeats: int) -> dict[str, list[dict[str, Any]]]:
    """The points of each row along one axis."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in ROWS:
        for shape in shapes:
            if CASES[CASE][row].fulls * shape.tokens * shape.vocab * 4 > DENSE_BYTES:
                continue
            print(f"{row}: {shape}", file=sys.stderr, flush=True)
            found.setdefault(row, []).append(point(CASE, row, shape, setting, repeats))
    return found


def slopes(found: dict[str, list[dict[str, Any]]], axis: str) -> dict[str, dict[str, float]]:
    """Exponents of growth, by row and quantity."""
    return {
        row: {quantity: slope(_along(points, axis, quantity, 1.0)) for quantity in QUANTITIES if points[0][quantity]}
        for row, points in found.items()
        if len(points) > 1
    }


def _along(points: Sequence[dict[str, Any]], axis: str, quantity: str, unit: float) -> Points:
    return [(each[axis], each[quantity] / unit) for each in points if each[quantity]]


def main() -> None:
    """Measure, fit, and write the JSON and the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the JSON and the plots")
    options = parser.parse_args()
    setting = Setting(device=options.device, dtype=options.dtype)
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"machine": machine(setting), "dtype": setting.dtype, "repeats": options.repeats}
    for axis, name, shapes in (("tokens", "tokens", TOKENS), ("vocab", "vocabulary", VOCABULARY)):
        found = grow(shapes, setting, options.repeats)
        result[name] = {"points": found, "slopes": slopes(found, axis)}
        for quantity, (short, label, unit) in QUANTITIES.items():
            series = {row: _along(points, axis, quantity, unit) for row, points in found.items() if points[0][quantity]}
            if series:
                svg = loglog(f"{short.capitalize()} against {name}", name, label, series)
                (options.out / f"growth-{short}-{name}.svg").write_text(svg, encoding="utf-8")
        print(f"{name}: {json.dumps(result[name]['slopes'])}")
    (options.out / "growth.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
