"""The comparison as one HTML file that needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import yaml

from omniopd.compare.matrix import matrix
from omniopd.compare.panels import legend, panels
from omniopd.compare.results import beyond_noise
from omniopd.compare.words import HEADS, cells, heads, notes, reason, verdict
from omniopd.report.page import policy, put, resource

AXES = (
    ("step", "steps"),
    ("seconds", "seconds"),
    ("student_tokens", "tokens that the student wrote"),
    ("teacher_tokens", "tokens that the teacher read and wrote"),
)


def write_page(found: Mapping[str, Any], path: Path) -> None:
    """Write the page of a comparison, whole or not.

    Raises:
        RunError: it can't be written.
    """
    put(path, render(found))


def render(found: Mapping[str, Any]) -> str:
    """The page as text, from what `compare.json` holds."""
    style = resource("style.css") + (files("omniopd.compare") / "page.css").read_text(encoding="utf-8")
    template = Template((files("omniopd.compare") / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        csp=policy(style),
        style=style,
        name=escape(found["config"]),
        verdict=escape(verdict(found)),
        status=""
        if found["whole"]
        else '<p class="status">Not all runs are finished; this is what there is so far.</p>',
        table=_table(found),
        notes="".join(f"<p>{escape(note)}</p>" for note in notes(found)),
        pairs=matrix(found) or '<p class="none">Worked out when all runs are done.</p>',
        legend=legend(found["baseline"], [one["control"] for one in found["variants"] if one["control"]]),
        charts=_charts(found) or '<p class="none">There are no evaluations to draw yet.</p>',
        settings=escape(_settings(found)),
    )


def _table(found: Mapping[str, Any]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads(found))
    rows = "".join(_row(one) for one in found["variants"])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _row(variant: Mapping[str, Any]) -> str:
    kind = ' class="control"' if variant["control"] else ""
    label = f'<tr{kind}><th scope="row">{escape(variant["label"])}</th>'
    if not variant["finished"]:
        return f'{label}<td class="reason" colspan="{len(HEADS) - 1}">{escape(reason(variant))}</td></tr>'
    clear = {2: beyond_noise(variant["against"]), 3: beyond_noise(variant["over_control"])}
    filled = (
        f'<td class="{"clear" if clear.get(place) else "plain"}">{escape(cell)}</td>'
        for place, cell in enumerate(cells(variant))
        if place
    )
    return f"{label}{''.join(filled)}</tr>"


def _charts(found: Mapping[str, Any]) -> str:
    drawn = [(unit, panels(found, against, unit)) for against, unit in AXES]
    return "".join(f"<h3>By {escape(unit)}</h3>{body}" for unit, body in drawn if body)


def _settings(found: Mapping[str, Any]) -> str:
    tree = {one["label"]: one["settings"] for one in found["variants"]}
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
