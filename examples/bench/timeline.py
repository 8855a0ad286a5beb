"""What pipelining hides: a teacher that takes two seconds for every call, without lag and with it.

    python examples/bench/timeline.py [--steps 14] [--lags 0 1 2] [--latency 2] [--takes 64] [--json NEW] [--compare OLD]

The teacher is a server of the example's own, in a process of its own: it says something made from a hash of the request after
the latency, and works on so many calls at once, others wait. The student is the demo student, the signal text only, and each
run is `omniopd train` in a process of its own with one thread. The runs differ in `train.max_lag` and in nothing else. Writes
docs/results/timeline.svg beside the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compare import add_options, described, finish

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "results" / "timeline.svg"
STAGES = ("rollout", "evidence", "update")
SETTLED = 3  # steps after which every run has found its rhythm
LIMIT = 1.15  # asked for: a step over its largest stage
Rows = Sequence[Mapping[str, Any]]


# The teacher


def reply(body: Mapping[str, Any]) -> dict[str, Any]:
    """Continuations made from a hash of the request."""
    choices = []
    for draw in range(body.get("n", 1)):
        name = json.dumps([body["messages"], body["seed"] + draw])
        digits = str(int(hashlib.sha256(name.encode()).hexdigest(), 16))
        choices.append({"message": {"content": f"{digits[0]}+{digits[1:3]}={digits[3]}"}, "finish_reason": "length"})
    used = {"prompt_tokens": 50, "completion_tokens": 8 * len(choices)}
    return {"model": "slow", "choices": choices, "usage": used}


async def serve(takes: int, latency_s: float, pipe: Connection) -> None:
    """Serve until told to stop; says its port first."""
    turn = asyncio.Semaphore(takes)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                async with turn:
                    await asyncio.sleep(latency_s)
                raw = json.dumps(reply(json.loads(body))).encode()
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw)
                writer.write(head + raw)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await asyncio.to_thread(pipe.recv)
    server.close()


def _serve(takes: int, latency_s: float, pipe: Connection) -> None:
    asyncio.run(serve(takes, latency_s, pipe))


@contextmanager
def slow_teacher(takes: int, latency_s: float) -> Iterator[str]:
    """The server in a process of its own; yields its address."""
    pipe, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(takes, latency_s, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{pipe.recv()}/v1"
    finally:
        pipe.send("stop")
        process.join(10)


# The runs


def config(options: argparse.Namespace, url: str, lag: int, output: Path) -> dict[str, Any]:
    """A run of text alone whose calls fill the teacher: 64 rollouts of three chunks each are three rounds of 64 calls."""
    return {
        "student": {"path": str(ROOT / "examples" / "demo" / "student"), "max_new_tokens": options.new_tokens},
        "teacher": {
            "type": "openai",
            "base_url": url,
            "model": "slow",
            "api_key_env": None,
            "continuation": "prefill",
            "concurrency": options.takes,
        },
        "task": {"type": "arithmetic"},
        "method": {"name": "omniopd", "chunks": options.chunks, "chunk_tokens": 6, "continuations": 2},
        "train": {
            "steps": options.steps,
            "prompts_per_step": options.prompts,
            "learning_rate": 1e-5,
            "save_every": options.steps,
            "max_lag": lag,
        },
        "eval": {"problems": 0},
        "output": str(output),
    }


def run(options: argparse.Namespace, url: str, lag: int, folder: Path) -> list[dict[str, Any]]:
    """The rows of one run's steps.

    Raises:
        SystemExit: it failed.
    """
    output, path = folder / f"lag-{lag}", folder / f"lag-{lag}.yaml"
    path.write_text(json.dumps(config(options, url, lag, output)), encoding="utf-8")  # JSON is YAML
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "omniopd.cli", "train", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"max_lag {lag}: {done.stderr.strip()}")
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = ("step", "queries", "lag", "spans")
    return [{name: row[name] for name in kept} for row in map(json.loads, lines)]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, as written to the JSON."""
    from measuring import Setting, machine  # loads torch, which the page does without

    with slow_teacher(options.takes, options.latency) as url, TemporaryDirectory() as folder:
        runs = {str(lag): run(options, url, lag, Path(folder)) for lag in options.lags}
    stages = stage_seconds(runs[str(min(options.lags))])
    return {
        "machine": {**machine(Setting()), "threads": 1},
        "server": {"latency_s": options.latency, "takes_at_once": options.takes},
        "run": {name: getattr(options, name) for name in ("steps", "prompts", "chunks", "new_tokens")},
        "stages": stages,
        "lags": {lag: figures_of(rows, stages) for lag, rows in runs.items()},
        "rows": runs,
    }


def settled(rows: Rows) -> Rows:
    """The steps of a run that has found its rhythm, without its last ones, beside which nothing more is begun."""
    last = max(int(lag) for row in rows for lag in row["lag"])
    return rows[SETTLED : len(rows) - last]


def stage_seconds(rows: Rows) -> dict[str, float]:
    """Median seconds of each stage."""
    spans = [row["spans"] for row in settled(rows)]
    return {stage: round(statistics.median(span[stage][1] - span[stage][0] for span in spans), 3) for stage in STAGES}


def figures_of(rows: Rows, stages: Mapping[str, float]) -> dict[str, Any]:
    """A run's step against the largest stage: of the run without lag (`stages`), and of its own."""
    ends = [row["spans"]["update"][1] for row in (rows[SETTLED - 1], *settled(rows))]
    step, own = (ends[-1] - ends[0]) / (len(ends) - 1), stage_seconds(rows)
    waits = [row["spans"]["wait"][1] - row["spans"]["wait"][0] for row in settled(rows)]
    return {
        "step_seconds": round(step, 3),
        "over_largest_stage": round(step / max(stages.values()), 3),
        "own_stages": own,
        "over_own_largest_stage": round(step / max(own.values()), 3),
        "wait_share": round(statistics.fmean(waits) / step, 3),
        "queries": round(statistics.fmean(row["queries"] for row in settled(rows)), 1),
    }


# What is said of them


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that two runs of this benchmark can be compared on."""
    size = f"{found['run']['prompts']} prompts, {found['server']['latency_s']:g} s latency"
    return {f"{size}, max_lag {lag}: s a step": each["step_seconds"] for lag, each in found["lags"].items()} | {
        f"{size}, max_lag {lag}: step / largest stage": each["over_largest_stage"]
        for lag, each in found["lags"].items()
    }


def table(found: Mapping[str, Any]) -> str:
    """Markdown: seconds of a step and of its stages at each lag."""
    server, size, stages = found["server"], found["run"], found["stages"]
    lines = [
        f"{described(found['machine'])}. The teacher takes {server['latency_s']:g} s for a call and works on "
        f"{server['takes_at_once']} at once; {size['prompts']} prompts a step, {size['chunks']} chunks each. Stages without "
        "lag: " + ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in stages.items()) + ".",
        "",
        "| max_lag | s a step | over the largest stage without lag | over its own largest stage | waiting for the teacher |",
        "|---|---|---|---|---|",
    ]
    for lag, each in found["lags"].items():
        lines.append(
            f"| {lag} | {each['step_seconds']:.2f} | **{each['over_largest_stage']:.2f}** "
            f"| {each['over_own_largest_stage']:.2f} | {each['wait_share']:.0%} |"
        )
    return "\n".join([*lines, "", "![Stages of six steps, without lag and with it](timeline.svg)", ""])


WIDTH, LEFT, RIGHT, TOP = 960, 92, 20, 66
BAR, GAP, HEAD = 22, 7, 40  # a bar's height, the space between two, the room above a panel
COLOURS = {"rollout": ("#1b4f91", "#6d9bd3"), "evidence": ("#b7791f", "#e3b566"), "update": ("#3c7d3c", "#86bd86")}
STEPS_SHOWN = 6


def picture(found: Mapping[str, Any]) -> str:
    """The stages of six steps at each lag, one panel above the other, over the same stretch of time, as a standalone SVG."""
    runs: Mapping[str, Rows] = found["rows"]
    seconds = max(_start(rows, SETTLED + STEPS_SHOWN) - _start(rows, SETTLED) for rows in runs.values())
    panel = HEAD + len(STAGES) * (BAR + GAP) + 8
    height = TOP + panel * len(runs) + 36
    server = found["server"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#222" role="img" '
        'aria-label="When each stage of some steps ran, without lag and with it">',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="{LEFT}" y="26" font-size="16" font-weight="600">What a step waits for</text>',
        f'<text x="{LEFT}" y="46" fill="#555">The teacher takes {server["latency_s"]:g} s for a call and works on '
        f"{server['takes_at_once']} at once. The numbers are steps.</text>",
    ]
    for place, (lag, rows) in enumerate(runs.items()):
        each = found["lags"][lag]
        said = f"max_lag {lag}: {each['step_seconds']:.2f} s a step, {each['over_largest_stage']:.2f} times the largest stage"
        parts += [f'<g transform="translate(0 {TOP + panel * place})">', *_panel(said, rows, int(lag), seconds), "</g>"]
    tick = next(size for size in (1, 2, 5, 10, 20, 50, 100) if seconds / size <= 12)
    for value in range(0, int(seconds) + 1, tick):
        parts.append(f'<text x="{_x(value, seconds)}" y="{height - 22}" text-anchor="middle">{value}</text>')
    parts.append(f'<text x="{_x(seconds / 2, seconds)}" y="{height - 5}" text-anchor="middle">seconds</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(said: str, rows: Rows, lag: int, seconds: float) -> Iterator[str]:
    """One run. Evidence of steps that overlap lies in lanes, one below the other."""
    first, bottom = _start(rows, SETTLED), HEAD + len(STAGES) * (BAR + GAP)
    yield f'<text x="{LEFT}" y="{HEAD - 12}" font-weight="600">{escape(said)}</text>'
    for place, stage in enumerate(STAGES):
        y, lanes = HEAD + place * (BAR + GAP), lag + 1 if stage == "evidence" else 1
        yield f'<text x="{LEFT - 10}" y="{y + BAR / 2 + 5}" text-anchor="end">{stage}</text>'
        yield f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{BAR}" fill="#f4f4f4"/>'
        for row in rows:
            start, end = (min(max(at - first, 0.0), seconds) for at in row["spans"][stage])
            if end <= start:
                continue
            x, width, thick = _x(start, seconds), _x(end, seconds) - _x(start, seconds), BAR / lanes
            top = y + row["step"] % lanes * thick
            yield (
                f'<rect x="{x}" y="{top:.1f}" width="{max(width, 1):.1f}" height="{thick:.1f}" '
                f'fill="{COLOURS[stage][row["step"] % 2]}"/>'
            )
            if width > 16:
                size = min(12.0, thick)
                yield (
                    f'<text x="{x + width / 2:.1f}" y="{top + thick / 2 + size * 0.36:.1f}" font-size="{size:g}" '
                    f'text-anchor="middle" fill="#fff">{row["step"]}</text>'
                )
    yield f'<path d="M{LEFT},{bottom}H{WIDTH - RIGHT}" stroke="#ccc"/>'


def _start(rows: Rows, place: int) -> float:
    """When the rollouts of that step began, counted from 0, or the run ended."""
    return float(rows[place]["spans"]["rollout"][0] if place < len(rows) else rows[-1]["spans"]["update"][1])


def _x(value: float, seconds: float) -> float:
    return round(LEFT + value / seconds * (WIDTH - LEFT - RIGHT), 1)


def main() -> None:
    """Measure, and write the picture and the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--takes", type=int, default=64)
    parser.add_argument("--latency", type=float, default=2.0)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    add_options(parser)
    options = parser.parse_args()
    found = measure(options)
    options.picture.write_text(picture(found), encoding="utf-8")
    finish(found, options, table, figures)


if __name__ == "__main__":
    main()
