"""How many of the CPU's threads an operation is worth. Small ones are faster on a single thread, which waits for nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SMALL_WEIGHT = 1 << 18  # entries of a matrix that a core's own cache holds
SMALL_PRODUCT = 1 << 22  # multiplications of it that take a core about 0.1 ms, not much more than threads need to meet

_lock = threading.Lock()
_inside = 0
_usual = 1


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
