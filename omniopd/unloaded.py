"""A student of which nothing is loaded but, perhaps, its tokenizer: enough to put a method together and see what it needs."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


class Unloaded:
    """A `StudentText` for methods that are not run. Without a vocabulary only constructors may look at it."""

    end_ids: frozenset[int] = frozenset()
    end_id = 0

    def __init__(self, vocabulary: Any = None) -> None:
        self.vocabulary = vocabulary

    def decode(self, ids: list[int]) -> NoReturn:
        raise RuntimeError("no student is loaded")

    def encode(self, text: str) -> NoReturn:
        raise RuntimeError("no student is loaded")

    def embeddings(self) -> Tensor:
        """Of no tokens."""
        return torch.zeros(0, 0)
