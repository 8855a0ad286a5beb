"""Puts the report together: one HTML file that needs no network, and runs nothing but its own script."""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from omniopd.errors import RunError
from omniopd.report.charts import draw
from omniopd.report.figures import figures, reasons, totals
from omniopd.report.folder import RunFolder, mapping, read_run
from omniopd.report.formats import MISSING, compact, count, duration, money, number, percent
from omniopd.report.records import island, rollout_record, score_range
from omniopd.report.verdict import course, evaluations, sentence


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a run, finished or not, and return its path.

    Raises:
        RunError: the folder or its metrics.jsonl is missing, or a file can't be read or written.
    """
    path = Path(run_dir) / "report.html"
    put(path, render(read_run(Path(run_dir))))
    return path


def put(path: Path, html: str) -> None:
    """Write a page whole, so that a reader never sees half of it.

    Raises:
        RunError: it can't be written.
    """
    draft = path.with_suffix(".html.tmp")
    try:
        draft.write_bytes(html.encode("utf-8", errors="replace"))
        os.replace(draft, path)
    except OSError as error:
        raise RunError(f"{path}: can't be written ({error.strerror})") from error


def render(run: RunFolder) -> str:
    """The page as text. The same folder always gives the same page."""
    style, script = resource("style.css"), resource("viewer.js")
    evals, way = evaluations(run.summary), course(run.summary, run.metrics)
    return Template(resource("page.html")).substitute(
        csp=policy(style, script),
        style=style,
        script=script,
        name=escape(run.name),
        about=_about(run.summary),
        status=_status(run),
        verdict=escape(sentence(evals, way)),
        numbers=_numbers(run, evals),
        charts=_charts(run, way, number(evals["teacher"].get("accuracy"))),
        reasons=_reasons(run),
        audit_note=escape(_audit_note(run)),
        data=_data(run),
        config=_details("Resolved configuration", "config.yaml", run.config),
        manifest=_details("Manifest: versions and teacher", "manifest.json", run.manifest),
    )


def resource(name: str) -> str:
    """A file of this package."""
    return (files("omniopd.report") / name).read_text(encoding="utf-8")


def policy(style: str, script: str = "") -> str:
    """Content security policy: our own style and script by their hash, nothing else, nothing from anywhere."""
    scripts = f"script-src '{_hash(script)}'; " if script else ""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; {scripts}img-src data:; base-uri 'none'; form-action 'none'"
    )


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _about(summary: Mapping[str, Any]) -> str:
    """Method, score, signals, teacher, student: what this run was."""
    signals = summary.get("signals")
    student, parameters = mapping(summary.get("student")), number(mapping(summary.get("student")).get("parameters"))
    size = "" if parameters is None else f" ({compact(parameters)} parameters)"
    parts = {
        "Method": summary.get("method"),
        "Score": summary.get("score"),
        "Signals": ", ".join(map(str, signals)) if isinstance(signals, list) else signals,
        "Signal": None if signals else mapping(summary.get("signal")).get("read"),
        "Teacher": mapping(summary.get("teacher")).get("name"),
        "Student": f"{student['path']}{size}" if student.get("path") else None,
        "Seed": summary.get("seed"),
    }
    known = {name: value for name, value in parts.items() if value not in (None, "")}
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in known.items())
    return f'<dl class="about">{items}</dl>' if items else ""


def _status(run: RunFolder) -> str:
    """A line where the run is not a finished one, or where its files have holes."""
    lines = []
    status = run.summary.get("status")
    last = run.metrics[-1]["step"] if run.metrics else 0
    if not run.summary:
        lines.append(
            f"No summary.json: the run is still going or was stopped. The last recorded step is {count(last)}."
        )
    elif status not in (None, "finished"):
        lines.append(f"This run was not finished: {status} after step {count(last)}.")
    if not run.metrics:
        lines.append("No step has been recorded.")
    lines += [f"Left out {total} unreadable line(s) of {name}." for name, total in run.unreadable.items()]
    return "".join(f'<p class="status">{escape(line)}</p>' for line in lines)


def _numbers(run: RunFolder, evals: Mapping[str, Mapping[str, Any]]) -> str:
    """The key numbers; those nobody recorded are left out."""
    used = {key: _used(run, key) for key in ("calls", "cached_calls", "prompt_tokens", "completion_tokens", "cost_usd")}
    steps = number(run.summary.get("steps")) or (run.metrics[-1]["step"] if run.metrics else None)
    coverage = number(mapping(run.summary.get("signal")).get("coverage"))
    waited = percent(number(run.summary.get("wait_share")))
    tiles = [
        ("Steps", count(steps), ""),
        ("Teacher calls", count(used["calls"]), f"and {count(used['cached_calls'])} from the store"),
        (
            "Teacher tokens",
            _tokens(used),
            f"{compact(used['prompt_tokens'])} in, {compact(used['completion_tokens'])} out",
        ),
        ("Cost", money(used["cost_usd"]), "at the configured prices"),
        (
            "Wall time",
            duration(run.summary.get("wall_seconds")),
            "" if waited == MISSING else f"{waited} of it waiting for the teacher",
        ),
        ("Coverage", percent(coverage), "of response tokens the teacher spoke on"),
        ("Held-out prompts", count(evals["after"].get("n", evals["before"].get("n"))), ""),
        ("Teacher’s accuracy", percent(evals["teacher"].get("accuracy")), "on the same prompts"),
    ]
    return "".join(
        f"<div><dt>{label}</dt><dd>{escape(value)}{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for label, value, note in tiles
        if value != MISSING
    )


def _used(run: RunFolder, key: str) -> float | None:
    """What the teacher's calls used: the summary's word, or the sum over the steps of a run that has none."""
    told = number(mapping(run.summary.get("teacher")).get(key))
    column = key if key == "cost_usd" else f"teacher_{key}"
    found = [value for row in run.metrics if (value := number(row.get(column))) is not None]
    return told if told is not None else sum(found) if found else None


def _tokens(used: Mapping[str, float | None]) -> str:
    parts = [value for key in ("prompt_tokens", "completion_tokens") if (value := used[key]) is not None]
    return compact(sum(parts)) if parts else MISSING


def _charts(run: RunFolder, way: Sequence[tuple[int, Mapping[str, Any]]], teacher: float | None) -> str:
    sections = figures(run.metrics, way, teacher)
    if not sections:
        return '<p class="none">There are no steps to draw yet.</p>'
    return "".join(
        f'<h3>{escape(title)}</h3><div class="charts">{"".join(draw(chart) for chart in charts)}</div>'
        for title, charts in sections.items()
    )


def _reasons(run: RunFolder) -> str:
    tables = []
    for key, title, what in (
        ("drops", "Dropped chunks or responses", "chunks or responses"),
        ("rejects", "Rejected replies or tokens", "replies or tokens"),
    ):
        counts = reasons(run.summary.get(key)) if key in run.summary else totals(run.metrics, key)
        tables.append(_table(title, what, counts))
    return "".join(tables)


def _table(title: str, what: str, counts: Counter[str]) -> str:
    if not counts:
        return f'<div><h3>{title}</h3><p class="none">No {what} were lost.</p></div>'
    rows = "".join(
        f'<tr><th scope="row">{escape(reason)}</th><td>{count(found)}</td>'
        f"<td>{percent(found / counts.total())}</td></tr>"
        for reason, found in counts.most_common()
    )
    return (
        f'<div><h3>{title}</h3><table><thead><tr><th scope="col">Reason</th><th scope="col">{what.capitalize()}</th>'
        f'<th scope="col">Share</th></tr></thead><tbody>{rows}</tbody>'
        f'<tfoot><tr><th scope="row">Total</th><td>{count(counts.total())}</td><td></td></tr></tfoot></table></div>'
    )


def _audit_note(run: RunFolder) -> str:
    shown, total = len(run.rollouts), run.rollouts_total
    if not shown:
        return "This run kept no audited rollouts."
    if shown == total:
        return f"All {count(total)} rollouts that the run kept."
    left_out = count(total - shown)
    return f"{count(shown)} of the {count(total)} rollouts that the run kept, spread evenly; {left_out} left out."


def _data(run: RunFolder) -> str:
    records = [rollout_record(row) for row in run.rollouts]
    low, high = score_range(records)
    return island({"scale": {"low": low, "high": high}, "rollouts": records})


def _details(title: str, file: str, text: str) -> str:
    if not text.strip():
        return f'<p class="none">{title}: there is no {file} in this folder.</p>'
    return f"<details><summary>{title} <small>{file}</small></summary><pre>{escape(text)}</pre></details>"
