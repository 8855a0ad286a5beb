"""The comparison on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from omniopd.compare.words import BRIEF, cells, failures, heads, reason, verdict


def print_comparison(found: Mapping[str, Any]) -> None:
    """A row for each method and control, and what could not be run."""
    console = Console()
    names = heads(found)
    table = Table(
        *(escape(names[place]) for place in BRIEF), title=f"{escape(found['config'])}, {len(found['seeds'])} seeds"
    )
    for variant in found["variants"]:
        if variant["finished"]:
            said = cells(variant)
            table.add_row(*(escape(said[place]) for place in BRIEF))
    console.print(table)
    for variant in found["variants"]:
        if not variant["finished"]:
            console.print(f"{variant['label']}: {reason(variant)}", highlight=False, markup=False, soft_wrap=True)
    for label, seed, why in failures(found):
        console.print(f"{label}, seed {seed}: {why}", highlight=False, markup=False, soft_wrap=True)
    console.print(verdict(found), highlight=False, markup=False)
