"""What a device does here, and how long each stage of a step takes at least.

A token step of the rollout reads every matrix and the past of every row once, at the bandwidth of a copy; prefill, scoring
and update do their multiplications at the rate of a square matrix product. Recomputation is not in a floor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from costs import Transformer, response_context
from measuring import Setting


class Stopwatch:
    """Seconds of each stage, the device's queue emptied at both ends."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The stage lasts as long as the block."""
        self.wait()
        began = time.perf_counter()
        yield
        self.wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def rates(setting: Setting) -> dict[str, float]:
    """What the device does here: bytes a second of a copy, read and written, and FLOP/s of a square matrix product."""
    large = setting.device == "cuda"
    numbers, side = (2**29, 8192) if large else (2**24, 1024)
    make: dict[str, Any] = {"device": setting.device, "dtype": getattr(torch, setting.dtype)}
    source, target = torch.ones(numbers, **make), torch.ones(numbers, **make)
    matrix = torch.randn(side, side, **make)
    copy = _fastest(lambda: target.copy_(source), setting.device)
    product = _fastest(lambda: matrix @ matrix, setting.device)
    return {"bytes_per_second": 2 * source.nbytes / copy, "flops_per_second": 2 * side**3 / product}


def _fastest(work: Callable[[], object], device: str, repeats: int = 10) -> float:
    watch = Stopwatch(device)
    for _ in range(repeats):
        with watch.stage(""):
            work()
    return min(watch.seconds[""])


def floors(
    shapes: tuple[Transformer, Transformer],
    rows: int,
    prompt: float,
    response: int,
    width: int,
    rate: Mapping[str, float],
) -> dict[str, float]:
    """Seconds that each stage takes at least; prompts have so many tokens on average."""
    student, teacher = shapes
    bandwidth, flops = rate["bytes_per_second"], rate["flops_per_second"]
    context = response_context(prompt, response)
    written = rows * response

    def forward(shape: Transformer, predicted: float) -> float:
        prompts = shape.forward_flops(rows * prompt, (prompt + 1) / 2, 0)
        return prompts + shape.forward_flops(written, context, predicted)

    prefill = student.forward_flops(rows * prompt, (prompt + 1) / 2, rows)
    teacher_head = 2 * teacher.head * written
    return {
        "rollout": response * student.decode_bytes(rows, context, width) / bandwidth + prefill / flops,
        "evidence": forward(teacher, 0) / flops,
        "update": (3 * forward(student, written) + teacher_head) / flops,
    }
