"""In which thread a device's work is done, and how many of the CPU's threads an operation is worth.

On a CPU all models of this process compute in one and the same thread. Each Python thread that computes has helper threads of
its own; more helpers than cores go to sleep after every operation and have to be woken for the next, which costs small
models a third of their speed. Small products take no helpers at all: one thread waits for nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar, TypeVarTuple

import torch
from torch import nn

SMALL_WEIGHT = 1 << 18  # entries of a matrix that a core's own cache holds
SMALL_PRODUCT = 1 << 22  # multiplications of it that take a core about 0.1 ms, not much more than threads need to meet

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_lock = threading.Lock()
_inside = 0
_usual = 1
_on_cpu: ThreadPoolExecutor | None = None


class DeviceThread:
    """A thread for the work on one device, in order. Those of a CPU are one: what they do is done in turn."""

    def __init__(self, device: str, enter: Callable[[], None] | None = None) -> None:
        """`device` is its type; `enter` is called in a thread of its own before anything else."""
        global _on_cpu
        with _lock:
            if device == "cpu":
                if _on_cpu is None:
                    threads = _usual if _inside else torch.get_num_threads()  # not as whoever samples just now
                    _on_cpu = ThreadPoolExecutor(1, "cpu", torch.set_num_threads, (threads,))
                self._executor, self._own = _on_cpu, False
            else:
                self._executor, self._own = ThreadPoolExecutor(1, device, enter or (lambda: None)), True
        self._closed = False

    def submit(self, work: Callable[[*Ts], T], *args: *Ts) -> Future[T]:
        """Do it after what was submitted before.

        Raises:
            RuntimeError: closed before.
        """
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        return self._executor.submit(work, *args)

    def close(self) -> None:
        """Take no more, and wait for the work under way; a thread of its own ends."""
        self._closed = True
        if self._own:
            self._executor.shutdown()
        else:
            self._executor.submit(lambda: None).result()


def small_products(model: nn.Module, rows: int) -> bool:
    """Whether one token for each of so many rows takes only small matrix products, on a CPU.

    Settled by the sizes alone and never by a clock: how many threads share a sum decides its rounding, and a run that is
    repeated must round as before.
    """
    sizes = [p.numel() for p in model.parameters() if p.dim() == 2]
    mean = sum(sizes) / max(1, len(sizes))
    return next(model.parameters()).device.type == "cpu" and mean <= SMALL_WEIGHT and rows * mean <= SMALL_PRODUCT


@contextmanager
def one_thread(on: bool = True) -> Iterator[None]:
    """Operations take a single thread inside, as many as before afterwards; nothing changes unless `on`."""
    global _inside, _usual
    if not on:
        yield
        return
    with _lock:  # several threads may be inside at once: the number is theirs all
        if not _inside:
            _usual = torch.get_num_threads()
        _inside += 1
    torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
        torch.set_num_threads(_usual)
