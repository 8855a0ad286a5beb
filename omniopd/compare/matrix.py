"""Each method against each other: a table of differences, the best method first."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from omniopd.compare.results import beyond_noise
from omniopd.compare.words import difference
from omniopd.report.formats import points

SIDES = {1: "above", -1: "below", 0: "level"}


def matrix(found: Mapping[str, Any]) -> str:
    """The table; "" as long as there are no pairs, which are worked out when all runs are done.

    A cell is the accuracy of its row less that of its column; its interval shows when it is pointed at.
    """
    pairs = {(one["label"], one["than"]): one for one in found["pairs"]}
    paired = {label for pair in pairs for label in pair}
    methods = [one for one in found["variants"] if one["label"] in paired]
    labels = [one["label"] for one in sorted(methods, key=lambda one: -one["after"])]
    if not labels:
        return ""
    head = "".join(f'<th scope="col" title="{escape(label)}">{i}</th>' for i, label in enumerate(labels, 1))
    rows = (
        f'<tr><th scope="row">{i} {escape(label)}</th>{"".join(_cell(pairs, label, than) for than in labels)}</tr>'
        for i, label in enumerate(labels, 1)
    )
    return f'<table class="pairs"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _cell(pairs: Mapping[tuple[str, str], Mapping[str, Any]], label: str, than: str) -> str:
    one, sign = (pairs.get((label, than)), 1) if (label, than) in pairs else (pairs.get((than, label)), -1)
    if one is None:
        return "<td></td>"
    low, high = sorted((sign * one["low"], sign * one["high"]))
    turned = {"mean": sign * one["mean"], "low": low, "high": high}
    said = escape(f"{label} less {than}: {difference(turned)}")
    return f'<td class="{SIDES[beyond_noise(turned)]}" title="{said}">{points(turned["mean"])}</td>'
