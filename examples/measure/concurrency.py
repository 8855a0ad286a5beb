"""What `concurrency: auto` makes of a server that tells its limit by nothing but refusals.

    python examples/measure/concurrency.py [--seconds 60] [--takes 64] [--latency 1]

Starts an HTTP server of its own on this machine, in a process of its own: it answers each call after the latency, takes so
many at once and refuses every other one at once, with status 429 and no `Retry-After`. Far more calls than it takes are
sent through `teachers.transport`. Writes docs/results/concurrency.json, .svg and .md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from teachers.pace import Pace
from teachers.transport import Transport
from teachers.wire import Call, KeyAuth, Verdict

DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"
SETTLE_S = 20  # the figures count from here on
WINDOW_S = 5
SHARE = 0.9


# The server


def serve(takes: int, latency_s: float, pipe: Connection) -> None:
    """Serve until told to stop; says its port first, and at the end when it answered and refused."""
    asyncio.run(_serve(takes, latency_s, pipe))


async def _serve(takes: int, latency_s: float, pipe: Connection) -> None:
    answered: list[float] = []
    refused: list[float] = []
    now = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal now
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
                if now >= takes:
                    refused.append(time.monotonic())
                    status = b"429 Too Many Requests"
                else:
                    now += 1
                    try:
                        await asyncio.sleep(latency_s)
                    finally:
                        now -= 1
                    answered.append(time.monotonic())
                    status = b"200 OK"
                writer.write(
                    b"HTTP/1.1 " + status + b"\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
                )
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the measurement is over
        finally:
            writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await asyncio.to_thread(pipe.recv)
    pipe.send((answered, refused))
    server.close()


# The client


@dataclass(frozen=True)
class Plain:
    """The `Wire` of that server."""

    base_url: str
    auth: KeyAuth | None = None

    def scrub(self, text: str) -> str:
        """There is no key."""
        return text

    def classify(self, status: int, payload: Any) -> Verdict | None:
        """429 is a throttle."""
        if status == 200:
            return None
        return Verdict("throttle" if status == 429 else "retry", f"HTTP {status}")


async def drive(pace: Pace, url: str, calls: int, seconds: float) -> int:
    """Send so many calls for so long; how many of them were given up."""
    transport = Transport(Plain(url), pace, timeout_s=60, max_attempts=6)
    dropped = 0

    async def one() -> None:
        nonlocal dropped
        outcome = await sender.send(Call(f"{url}/chat", {}), dict)
        dropped += outcome.value is None

    async with transport.session() as sender:
        tasks = [asyncio.create_task(one()) for _ in range(calls)]
        await asyncio.sleep(seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return dropped


def measure(takes: int, latency_s: float, seconds: int) -> dict[str, Any]:
    """One run, as written to concurrency.json."""
    pipe, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(takes, latency_s, theirs), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{pipe.recv()}/v1"
    start = time.monotonic()
    pace = Pace("auto", name="the server")
    best = takes / latency_s
    dropped = asyncio.run(drive(pace, url, int(1.2 * best * seconds), seconds))
    pipe.send("stop")
    answered, refused = ([when - start for when in times if when - start < seconds] for times in pipe.recv())
    server.join(10)
    late, late_refused = (sum(when >= SETTLE_S for when in times) for times in (answered, refused))
    return {
        "server": {"takes_at_once": takes, "latency_s": latency_s, "refusals": "429 at once, no Retry-After"},
        "machine": "two CPU cores",
        "seconds": seconds,
        "answers_per_second_possible": best,
        f"answers_per_second_after_{SETTLE_S}_s": round(late / (seconds - SETTLE_S), 2),
        f"refused_share_after_{SETTLE_S}_s": round(late_refused / (late + late_refused), 5),
        "reached_90_percent_after_s": reached(answered, SHARE * best, seconds),
        f"answers_per_second_in_the_first_{SETTLE_S}_s": round((len(answered) - late) / SETTLE_S, 2),
        f"refused_in_the_first_{SETTLE_S}_s": len(refused) - late_refused,
        f"refused_after_{SETTLE_S}_s": late_refused,
        "calls_given_up": dropped,
        "answers": per_second(answered, seconds),
        "refusals": per_second(refused, seconds),
        "limit": [[round(change.time - start, 3), change.limit, change.reason] for change in pace.history],
    }


def per_second(times: Iterable[float], seconds: int) -> list[int]:
    """How many fall into each second."""
    counts = [0] * seconds
    for when in times:
        counts[int(when)] += 1
    return counts


def reached(answered: Sequence[float], rate: float, seconds: int) -> int | None:
    """The first whole second after which no window of five seconds has fewer answers per second than that."""
    for start in range(seconds - WINDOW_S + 1):
        windows = range(start, seconds - WINDOW_S + 1)
        if all(sum(s <= when < s + WINDOW_S for when in answered) >= rate * WINDOW_S for s in windows):
            return start
    return None


# The picture

WIDTH, HEIGHT = 900, 500
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 92, 56


def picture(found: dict[str, Any]) -> str:
    """Answers and refusals per second, and the limit, as a standalone SVG."""
    takes, seconds = found["server"]["takes_at_once"], found["seconds"]
    top = 20 * math.ceil(1.05 * max(*found["answers"], *(limit for _, limit, _ in found["limit"])) / 20)

    def x(value: float) -> float:
        return round(LEFT + value / seconds * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(HEIGHT - BOTTOM - value / top * (HEIGHT - BOTTOM - TOP), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="14" fill="#222" role="img" '
        'aria-label="Answers per second, refusals per second and the limit on calls at once, over time">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="28" font-size="18" font-weight="600">concurrency: auto finds out what a server takes</text>',
        f'<text x="{LEFT}" y="50" fill="#555">The server takes {takes} calls at once, {found["server"]["latency_s"]:g} s '
        "each, and refuses every other one at once without a word.</text>",
    ]
    for value in range(0, top + 1, 20):
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}" stroke="#e4e4e4"/>',
            f'<text x="{LEFT - 10}" y="{y(value) + 5}" text-anchor="end">{value}</text>',
        ]
    for value in range(0, seconds + 1, 10):
        parts.append(f'<text x="{x(value)}" y="{HEIGHT - BOTTOM + 22}" text-anchor="middle">{value}</text>')
    parts.append(f'<text x="{x(seconds / 2)}" y="{HEIGHT - 12}" text-anchor="middle">seconds since the start</text>')
    width = x(1) - x(0)
    for second, count in enumerate(found["answers"]):
        parts.append(
            f'<rect x="{x(second) + 1:g}" y="{y(count)}" width="{width - 2:.1f}" height="{y(0) - y(count):.1f}" '
            'fill="#8db8e8"/>'
        )
    for second, count in enumerate(found["refusals"]):
        if count:
            parts += [
                f'<rect x="{x(second) + 1:g}" y="{y(count)}" width="{width - 2:.1f}" height="{y(0) - y(count):.1f}" '
                'fill="#c62f2f"/>',
                f'<text x="{x(second + 0.5)}" y="{y(count) - 6}" text-anchor="middle" fill="#a01f1f" font-weight="600" '
                f'stroke="#fff" stroke-width="3" paint-order="stroke">{count}</text>',
            ]
    parts.append(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(takes)}" y2="{y(takes)}" stroke="#222" stroke-dasharray="6 5"/>'
    )
    steps = [f"M{x(0)},{y(found['limit'][0][1])}"]
    for when, limit, _ in found["limit"][1:]:
        steps += [f"H{x(when)}", f"V{y(limit)}"]
    parts.append(f'<path d="{"".join(steps)}H{x(seconds)}" fill="none" stroke="#1b4f91" stroke-width="2.5"/>')
    parts += _legend(takes)
    return "\n".join([*parts, "</svg>", ""])


def _legend(takes: int) -> list[str]:
    entries = [
        ('<rect y="-10" width="16" height="12" fill="#8db8e8"/>', "answers per second", 190),
        ('<rect y="-10" width="16" height="12" fill="#c62f2f"/>', "refused calls per second", 220),
        ('<path d="M0,-4H18" stroke="#1b4f91" stroke-width="2.5"/>', "limit found", 140),
        ('<path d="M0,-4H18" stroke="#222" stroke-dasharray="6 5"/>', f"the server's limit, {takes}", 0),
    ]
    parts, left = [], LEFT
    for mark, name, width in entries:
        parts.append(f'<g transform="translate({left} 76)">{mark}<text x="25">{name}</text></g>')
        left += width
    return parts


PAGE = """# What `concurrency: auto` makes of a server's limit

A server on the same machine answers each call after {latency:g} s, takes {takes} at once, and refuses every other one at
once with status 429 and no `Retry-After`. It could give {best:g} answers per second. {calls} calls are put to it through
`teachers/transport.py` with `concurrency: auto`, which starts at 20 calls at once and knows nothing of the server.
{machine}, one command:

```bash
python examples/measure/concurrency.py
```

![Answers per second, refused calls per second and the limit over time](concurrency.svg)

| | measured | asked for |
|---|---|---|
| answers per second, {settle} s to {seconds} s | **{rate:.2f}** ({rate_share:.1%} of {best:g}) | at least {least:g} (90 %) |
| calls refused, {settle} s to {seconds} s | **{refused_share:.2%}** ({refused}) | at most 2 % |
| no window of {window} s below 90 % from | **{reached} s** on | 20 s |
| answers per second in the first {settle} s, the start included | {first:.2f} | |
| calls refused in the first {settle} s | {first_refused} | |
| calls given up | {dropped} | |

Of a burst that overshoots, the server refuses exactly those calls that are too many, so each refusal takes one off. From
then on one more is tried only after a quiet time (30 s, doubled each time that it is refused). The limit over time:

{story}.

Every second and every change of the limit: [concurrency.json](concurrency.json).
"""


def story(changes: Sequence[tuple[float, int, str]]) -> str:
    """The limit over time in words; of falls that follow one another, the last."""
    turns = [
        (when, limit)
        for index, (when, limit, _) in enumerate(changes)
        if index + 1 == len(changes) or changes[index + 1][1] > limit or index == 0 or changes[index - 1][1] < limit
    ]
    return ", ".join(f"{limit} at {when:.1f} s" for when, limit in turns)


def page(found: dict[str, Any]) -> str:
    """The page around the picture."""
    best = found["answers_per_second_possible"]
    rate = found[f"answers_per_second_after_{SETTLE_S}_s"]
    return PAGE.format(
        latency=found["server"]["latency_s"],
        takes=found["server"]["takes_at_once"],
        best=best,
        calls=f"{int(1.2 * best * found['seconds']):,}",
        machine=found["machine"][0].upper() + found["machine"][1:],
        settle=SETTLE_S,
        seconds=found["seconds"],
        rate=rate,
        rate_share=rate / best,
        least=SHARE * best,
        refused_share=found[f"refused_share_after_{SETTLE_S}_s"],
        refused=found[f"refused_after_{SETTLE_S}_s"],
        reached=found["reached_90_percent_after_s"],
        window=WINDOW_S,
        first=found[f"answers_per_second_in_the_first_{SETTLE_S}_s"],
        first_refused=found[f"refused_in_the_first_{SETTLE_S}_s"],
        dropped=found["calls_given_up"],
        story=story(found["limit"]),
    )


def main() -> None:
    """Measure, and write the three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--takes", type=int, default=64)
    parser.add_argument("--latency", type=float, default=1.0)
    options = parser.parse_args()
    found = measure(options.takes, options.latency, options.seconds)
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    (DOCS / "concurrency.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    (DOCS / "concurrency.svg").write_text(picture(found), encoding="utf-8")
    (DOCS / "concurrency.md").write_text(page(found), encoding="utf-8")
    print(f"{lines}\nwritten: docs/results/concurrency.json, .svg, .md")


if __name__ == "__main__":
    main()
