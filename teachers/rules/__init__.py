"""Rules that the teacher type `scripted` answers by, one file each; a package of somebody else's adds its own by the entry
point group `omniopd.rules`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from omniopd.types import Message


class Rule(Protocol):
    """A class that is made without arguments.

    Attributes:
        version: raise it with any change of what is answered: it is part of the teacher's fingerprint.
    """

    version: ClassVar[int]

    def answer(self, messages: Sequence[Message], seed: int) -> str:
        """The answer to a chat; the same messages and seed give the same answer. "" is no answer."""
        ...
