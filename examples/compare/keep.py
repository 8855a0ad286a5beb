"""Keep a comparison under docs/results/compare/, and print its table for docs/results/methods.md.

    python examples/compare/keep.py runs/compare/same_tokenizer runs/compare/text_only

Of each folder the page and the JSON are copied, under the folder's name.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omniopd.compare.words import cells, heads, reason, verdict

KEPT = Path(__file__).resolve().parents[2] / "docs" / "results" / "compare"


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of the comparison as Markdown: every variant, or why it did not run."""
    names = heads(found)
    yield f"| {' | '.join(names)} |"
    yield f"|{'---|' * len(names)}"
    for variant in found["variants"]:
        row = cells(variant) if variant["finished"] else [variant["label"], reason(variant)] + [""] * (len(names) - 2)
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"


def main() -> None:
    """See the module's words."""
    parser = argparse.ArgumentParser(description="Keep comparisons under docs/results/compare/.")
    parser.add_argument("folders", type=Path, nargs="+")
    KEPT.mkdir(parents=True, exist_ok=True)
    for folder in parser.parse_args().folders:
        for kind in ("json", "html"):
            shutil.copy(folder / f"compare.{kind}", KEPT / f"{folder.name}.{kind}")
        found = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
        print(f"## {folder.name}\n\n{verdict(found)}\n", *table(found), sep="\n", end="\n\n")


if __name__ == "__main__":
    main()
