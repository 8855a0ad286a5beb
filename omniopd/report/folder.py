"""Reads a run folder: whatever a run that may have stopped at any moment has left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from omniopd.errors import RunError
from omniopd.report.formats import number

MAX_ROLLOUTS = 400
MAX_AUDIT_BYTES = 24 * 2**20  # a browser still opens this at once


@dataclass(frozen=True, slots=True)
class RunFolder:
    """What a run wrote. `rollouts` are spread evenly over the `rollouts_total` that audits.jsonl holds.

    `unreadable` counts, by file, the lines that were cut off in the middle.
    """

    name: str
    summary: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]
    config: str
    manifest: str
    rollouts: tuple[Mapping[str, Any], ...]
    rollouts_total: int
    unreadable: Mapping[str, int]


def read_run(run_dir: Path) -> RunFolder:
    """Read the folder of a run. Only metrics.jsonl has to be there.

    Raises:
        RunError: the folder or its metrics are missing, or a file can't be read.
    """
    if not run_dir.is_dir():
        raise RunError(f"{run_dir}: no such run folder")
    if not (run_dir / "metrics.jsonl").is_file():
        raise RunError(f"{run_dir / 'metrics.jsonl'} is missing: not a run folder, or the run stopped before its start")
    unreadable: dict[str, int] = {}
    try:
        metrics = _metrics(run_dir / "metrics.jsonl", unreadable)
        rollouts, total = _rollouts(run_dir / "audits.jsonl", unreadable)
        return RunFolder(
            name=run_dir.resolve().name,
            summary=_summary(run_dir / "summary.json"),
            metrics=metrics,
            config=_text(run_dir / "config.yaml"),
            manifest=_text(run_dir / "manifest.json"),
            rollouts=rollouts,
            rollouts_total=total,
            unreadable={name: lines for name, lines in unreadable.items() if lines},
        )
    except OSError as error:
        raise RunError(f"{error.filename or run_dir}: can't be read ({error.strerror})") from error


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _summary(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return mapping(json.loads(_text(path)))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not JSON ({error}): delete it to see the rest of the run") from error


def _record(line: bytes) -> Mapping[str, Any] | None:
    """One line of JSONL, or None where a killed process left half a line."""
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _metrics(path: Path, unreadable: dict[str, int]) -> tuple[Mapping[str, Any], ...]:
    """One row per step, in order. A resumed run repeats the steps since its checkpoint: the last word counts."""
    by_step: dict[int, dict[str, Any]] = {}
    with path.open("rb") as file:
        for _, line in _lines(file):
            row = _record(line)
            step = number(row.get("step")) if row else None
            if row is None or step is None:
                unreadable[path.name] = unreadable.get(path.name, 0) + 1
                continue
            by_step.setdefault(int(step), {}).update({**row, "step": int(step)})
    return tuple(by_step[step] for step in sorted(by_step))


def _rollouts(path: Path, unreadable: dict[str, int]) -> tuple[tuple[Mapping[str, Any], ...], int]:
    """At most MAX_ROLLOUTS rows, spread evenly, and how many there are. Reads twice to hold only those in memory."""
    if not path.is_file():
        return (), 0
    with path.open("rb") as file:
        spans = [(start, len(line)) for start, line in _lines(file)]
        wanted = _spread(len(spans), _room(spans))
        found = [_record(_read(file, *spans[index])) for index in wanted]
    unreadable[path.name] = found.count(None)
    return tuple(row for row in found if row is not None), len(spans)


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    start = 0
    for line in file:
        if line.strip():
            yield start, line
        start += len(line)


def _read(file: BinaryIO, start: int, length: int) -> bytes:
    file.seek(start)
    return file.read(length)


def _room(spans: list[tuple[int, int]]) -> int:
    """How many rollouts of average length the page has room for."""
    size = sum(length for _, length in spans)
    return MAX_ROLLOUTS if size == 0 else max(1, min(MAX_ROLLOUTS, MAX_AUDIT_BYTES * len(spans) // size))


def _spread(total: int, limit: int) -> list[int]:
    """`limit` indices out of `total`, evenly spaced, the first and the last among them."""
    if total <= limit:
        return list(range(total))
    if limit == 1:
        return [total - 1]
    return [index * (total - 1) // (limit - 1) for index in range(limit)]
