"""A vocabulary that is just the bytes of its tokens, for tests that lay one over another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ToyVocabulary:
    """Stands for a `Vocabulary` and its tokenizer; the last id ends a turn."""

    bytes_of: tuple[bytes, ...]
    names: dict[int, str] = field(default_factory=dict)  # of ids in the tokenizer's own writing, where it matters

    def __post_init__(self) -> None:
        self.digest, self.size, self.lossy = repr(self.bytes_of), len(self.bytes_of), ""
        self.turn_ends = (self.size - 1,)
        self.controls = frozenset(self.turn_ends)
        self.tokenizer = self

    def convert_ids_to_tokens(self, id: int) -> str:
        return self.names.get(id, "")


def toy(*words: str | bytes, **settings: Any) -> Any:
    """A vocabulary of these tokens and the end of a turn."""
    return ToyVocabulary((*(w if isinstance(w, bytes) else w.encode() for w in words), b""), **settings)
