"""How a row is measured: forward and backward of one loss, its seconds, its peak of memory, the machine it ran on.

Peak memory is what a pass needs on top of its inputs; the gradients that it leaves behind count. On CUDA the allocator
knows it. On a CPU it is the kernel's own high-water mark of a process that does nothing else (`VmHWM`, Linux): other
losses would leave their pages behind, and a thread that samples could miss the peak.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rows import CASES, Inputs, Loss, Shape, make_inputs
from torch import Tensor

TINY = Shape(tokens=32, hidden=16, vocab=64)  # loads libraries and threads, and takes no memory to speak of


@dataclass(frozen=True)
class Setting:
    """On what, and in which type, a benchmark runs; a process of its own is given this and nothing else."""

    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0
    threads: int = 0  # 0: as many as torch takes

    def inputs(self, shape: Shape) -> Inputs:
        """The same inputs for every row of a shape."""
        return make_inputs(shape, torch.device(self.device), getattr(torch, self.dtype), self.seed)


@dataclass(frozen=True)
class Pass:
    """One forward and backward: the loss, and its gradient to the hidden states and to the head's weight."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor


def once(loss: Loss, inputs: Inputs) -> Pass:
    """Forward and backward, with gradients of its own."""
    inputs.hidden.grad = inputs.head.weight.grad = None
    value = loss(inputs)
    value.backward()
    hidden, weight = inputs.hidden.grad, inputs.head.weight.grad
    inputs.hidden.grad = inputs.head.weight.grad = None
    assert hidden is not None and weight is not None, "a loss must have gradients to the hidden states and the head"
    return Pass(value.detach(), hidden, weight)


def seconds(loss: Loss, inputs: Inputs) -> float:
    """Seconds of one forward and backward."""
    gc.collect()
    _wait(inputs)
    start = time.perf_counter()
    once(loss, inputs)
    _wait(inputs)
    return time.perf_counter() - start


def peak(case: str, row: str, shape: Shape, setting: Setting) -> int | None:
    """Most bytes at once that a pass takes on top of its inputs; None where this system does not tell."""
    if setting.device == "cpu":
        return _alone(_cpu_peak, case, row, shape, setting) if Path("/proc/self/status").exists() else None
    loss, inputs = CASES[case][row].loss, setting.inputs(shape)
    once(loss, inputs)  # compiles what is compiled
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once(loss, inputs)
    return torch.cuda.max_memory_allocated() - before


def point(case: str, row: str, shape: Shape, setting: Setting, repeats: int) -> dict[str, Any]:
    """Peak and median seconds of one row at one shape, on a CPU in a process of its own."""
    bytes_at_once = peak(case, row, shape, setting)
    alone = _alone if setting.device == "cpu" else _here
    times = alone(_times, case, row, shape, setting, repeats)
    return {**asdict(shape), "peak_bytes": bytes_at_once, "seconds": statistics.median(times), "seconds_all": times}


def machine(setting: Setting) -> dict[str, Any]:
    """What the figures depend on: device, cores, threads, versions. Nothing that names the machine."""
    packages = {}
    for name in ("trl", "liger-kernel", "triton"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    cuda = setting.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if cuda else _cpu(),
        "memory_gb": round(
            torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else memory("MemTotal") / 1e9
        ),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
    }


def memory(name: str) -> float:
    """A line of /proc/meminfo in bytes; infinite where there is none."""
    return _proc("/proc/meminfo", name, missing=float("inf"))


def _cpu_peak(case: str, row: str, shape: Shape, setting: Setting) -> int:
    loss = _warm(case, row, setting)
    inputs = setting.inputs(shape)
    gc.collect()
    before = _proc("/proc/self/status", "VmRSS")
    once(loss, inputs)
    return int(_proc("/proc/self/status", "VmHWM") - before)


def _times(case: str, row: str, shape: Shape, setting: Setting, repeats: int) -> list[float]:
    loss = _warm(case, row, setting)
    inputs = setting.inputs(shape)
    once(loss, inputs)
    return [seconds(loss, inputs) for _ in range(repeats)]


def _warm(case: str, row: str, setting: Setting) -> Loss:
    if setting.threads:
        torch.set_num_threads(setting.threads)
    loss = CASES[case][row].loss
    once(loss, setting.inputs(TINY))
    return loss


def _alone(function: Any, *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def _here(function: Any, *args: Any) -> Any:
    return function(*args)


def _wait(inputs: Inputs) -> None:
    if inputs.hidden.is_cuda:
        torch.cuda.synchronize()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _proc(path: str, name: str, missing: float = 0.0) -> float:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return missing
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), missing)
