"""What all benchmarks share: where figures are written, and how they are held against an earlier run's.

A benchmark's JSON has `machine` at its top (`measuring.machine`). Its `figures` name numbers by what was measured, under
which settings, in which unit: numbers of one name can be compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--json` and `--compare`; a folder that is missing is made, and an earlier run read, before anything is measured."""
    parser.add_argument("--json", type=_place, metavar="NEW.json", help="write every figure there")
    parser.add_argument("--compare", type=_earlier, metavar="OLD.json", help="print ratios to an earlier run")


def finish(
    found: Found,
    options: argparse.Namespace,
    table: Callable[[Found], str],
    figures: Callable[[Found], dict[str, float]],
) -> None:
    """Print the table, and what `add_options` offers."""
    print(table(found))
    if options.compare:
        print(comparison(options.compare, found, figures))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"written: {options.json}", file=sys.stderr)


def comparison(old: Found, new: Found, figures: Callable[[Found], dict[str, float]]) -> str:
    """Markdown: the figures that both runs have side by side, and how many only one of them has."""
    before, now = figures(old), figures(new)
    common = [name for name in now if name in before]
    lines = [f"Against: {described(old['machine'])}", ""]
    if common:
        lines += ["| | before | now | now / before |", "|---|---|---|---|"]
    for name in common:
        ratio = f"{now[name] / before[name]:.2f}" if before[name] else ""
        lines.append(f"| {name} | {before[name]:.3g} | {now[name]:.3g} | {ratio} |")
    if alone := len(before) + len(now) - 2 * len(common):
        told = f"In one of the two runs only: {alone} figures, of another shape or setting, or that did not run."
        lines += ["", told] if common else [told]
    return "\n".join([*lines, ""])


def described(facts: Mapping[str, Any]) -> str:
    """A machine in a line."""
    where = facts["device"] if facts["device"] != facts["cpu"] else f"{facts['cpu']}, {facts['threads']} threads"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "trl", "liger-kernel") if facts.get(name))
    return f"{where}, {facts['memory_gb']} GB; {versions}"


def _place(text: str) -> Path:
    path = Path(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _earlier(text: str) -> Any:
    try:
        return json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' is no JSON of an earlier run: {error}") from None
