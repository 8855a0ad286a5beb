"""What a task is: prompts to train on, held-out prompts to measure with, and a way to tell a right answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from omniopd.types import Prompt


class Task(Protocol):
    """A class in `evals/tasks/`, registered in `TASKS`, with a `Config` and a constructor that takes it.

    The two lists share no prompt, ids are unique within each, and the same config gives the same lists.
    """

    @property
    def train(self) -> Sequence[Prompt]:
        """What to train on; a plain attribute will do."""
        ...

    @property
    def heldout(self) -> Sequence[Prompt]:
        """What to measure with; may be empty."""
        ...

    def check(self, prompt: Prompt, text: str) -> bool | None:
        """Whether `text` answers the prompt rightly; None where that can't be decided: wrong when measured, and no verdict
        to learn from.

        Raises:
            ConfigError: the task has no reference answer to check against.
        """
        ...
