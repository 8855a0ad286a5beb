"""Methods and parts on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from omniopd.catalogue.entries import Entry
from omniopd.catalogue.settings import Option, as_yaml


def print_methods(methods: Sequence[Entry], parts: Sequence[Entry]) -> None:
    """All of them, a line each."""
    console = Console()
    table = Table("method", "what it is", "slots", "needs", "text only", "paper", title="methods")
    for one in methods:
        row = (one.name, one.title, ", ".join(one.slots), ", ".join(one.needs), one.text_only, one.paper)
        table.add_row(*map(escape, row))
    console.print(table)
    table = Table("part", "what it does", "acts at", "slots", "needs", "text only", title="parts")
    for one in parts:
        place = (one.name, one.title, one.order, ", ".join(one.slots), ", ".join(one.needs), one.text_only)
        table.add_row(*map(escape, place))
    console.print(table)
    console.print("omniopd methods NAME says more about any of these", highlight=False)


def print_entry(one: Entry, parts: Sequence[Entry]) -> None:
    """One method with the parts that it brings, or one part."""
    console = Console()
    console.print(
        f"[bold]{escape(one.name)}[/bold], a {one.kind}{f' over {one.base}' if one.base else ''}: {escape(one.title)}"
    )
    console.print(f"\n{escape(one.text)}\n", highlight=False, soft_wrap=True)
    facts = {
        "paper": f"arXiv {one.paper}" if one.paper else "",
        "slots": ", ".join(one.slots),
        "acts at": one.order,
        "needs": ", ".join(one.needs) or "nothing more than the method that it is part of",
        "text-only teacher": one.text_only,
        "neutral": one.neutral if isinstance(one.neutral, str) else as_yaml(dict(one.neutral)),
        "code": one.place,
        **{f"not with {other}": mend for other, mend in one.refuses.items()},
        **{f"beware of {other}": why for other, why in one.warns.items()},
    }
    for name, value in facts.items():
        if value:
            console.print(f"{name}: {escape(value)}", highlight=False, soft_wrap=True)
    console.print(_options(f"options of {one.name}", one.options))
    for part in parts:
        console.print(f"\n[bold]{escape(part.name)}[/bold], its part: {escape(part.title)}")
        console.print(f"\n{escape(part.text)}\n", highlight=False, soft_wrap=True)
        console.print(_options(f"options of {part.name}", part.options))


def _options(title: str, options: Sequence[Option]) -> Table:
    table = Table("setting", "default", "may be", "", title=escape(title), title_justify="left")
    for one in options:
        table.add_row(*map(escape, (one.name, one.default, one.allowed, one.description)))
    return table
