"""The bytes that each token of a tokenizer spells: the common ground of tokenizer families.

Positions count bytes of a text in UTF-8. A token of no width spells nothing: a control token, or the space that some
SentencePiece models put before every text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Spelling:
    """A text with the tokens that spell it. `ends` [n] counts the bytes that the tokens up to each have spelled.

    `ends[i]` is None where token i ends inside a stretch of `text` that is not what the tokens say, byte for byte: bytes that
    make no character (`text` has a replacement character there), or text that a normaliser has changed. The last token
    of such a stretch has its end again; `broken` [n] is True for all of its tokens.
    """

    text: str
    ids: tuple[int, ...]
    ends: tuple[int | None, ...]
    broken: tuple[bool, ...]


class Vocabulary:
    """What a tokenizer's ids mean.

    Attributes:
        digest: equal for two tokenizers if, and only if, every id means the same in both (padded sizes do not count).
        size: ids from here on are padding of the model's output layer and mean nothing.
        controls: ids that spell nothing.
        lossy: why its tokens can't be laid over a text byte for byte; "" if they can.
    """

    digest: str
    size: int
    controls: frozenset[int]
    lossy: str

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the vocabulary of a fast tokenizer: byte-level BPE, SentencePiece with byte fallback, tiktoken-style."""
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.controls = frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
        self.lossy = ""
        entries = sorted(tokenizer.get_vocab().items())
        self.digest = hashlib.sha256(f"{entries}{sorted(self.controls)}".encode()).hexdigest()[:16]

    @cached_property
    def bytes_of(self) -> tuple[bytes, ...]:
        """[size] what each id spells amid others; b"" for control tokens.

        Raises:
            ConfigError: the vocabulary is lossy.
        """
        raise NotImplementedError

    def spell(self, ids: Sequence[int]) -> Spelling:
        """The text that ids spell, without the half character that a token limit may leave at its end.

        Tokens of that half character have the end None and are broken.

        Raises:
            ConfigError: the vocabulary is lossy.
        """
        raise NotImplementedError

    def cut(self, text: str) -> Spelling:
        """A plain text as the tokenizer cuts it; no text becomes a control token.

        Raises:
            ConfigError: the vocabulary is lossy.
        """
        raise NotImplementedError
