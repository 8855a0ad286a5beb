"""The processes of a run, as the rest of the project needs them: shares of a list, and what is common to all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


class Ranks:
    """This process among those of the run. Every method but `mine` is called by all of them at the same place, or by none.

    Attributes:
        index: 0, 1, ...
        count: how many there are.
    """

    index = 0
    count = 1

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.index == 0

    def mine(self, items: Sequence[T]) -> list[tuple[int, T]]:
        """This process's share of a list that all have, every `count`-th item, with its places."""
        return [(place, items[place]) for place in range(self.index, len(items), self.count)]

    def all(self, part: T) -> list[T]:
        """What every process has here, in their order; each `part` can be pickled."""
        return [part]

    def most(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return number

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of all processes' tensors."""
        return numbers
