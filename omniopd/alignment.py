"""Two tokenizers over one text: chunks that spell the same bytes on both sides.

Source: arXiv 2606.09456 (chunks between common boundaries [second-hand]); byte spans in place of decoded strings, two
integer pointers, holes that cost only their own chunk [ours].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omniopd.types import Rollout, TokenScores
from omniopd.vocabulary import Vocabulary

MAX_CHUNK_TOKENS = 6  # [official code]


@dataclass(frozen=True, slots=True)
class AlignedChunk:
    """Student tokens [start, end) and teacher tokens [teacher_start, teacher_end) that spell the same bytes."""

    start: int
    end: int
    teacher_start: int
    teacher_end: int


@dataclass(frozen=True, slots=True)
class Alignment:
    """The chunks of one response in order; tokens in none of them have no counterpart (sentinels).

    `holes` counts the student's tokens without a chunk by reason: `broken`, `too_long`, `unmatched`, `control`.
    """

    chunks: tuple[AlignedChunk, ...]
    holes: Mapping[str, int]
    tokens: int  # of the student

    @property
    def coverage(self) -> float:
        """Share of the student's tokens that are in a chunk."""
        raise NotImplementedError

    @property
    def one_to_one(self) -> float:
        """Share of the chunks that are one token on both sides."""
        raise NotImplementedError


def align(
    student: Sequence[int | None],
    teacher: Sequence[int | None],
    *,
    student_broken: Sequence[bool] = (),
    max_tokens: int = MAX_CHUNK_TOKENS,
) -> Alignment:
    """Minimal chunks from the cumulative byte ends of both sides, in O(n + m).

    A chunk closes wherever both sides have an end at the same byte. [ours]

    Args:
        student, teacher: `Spelling.ends` of the same text.
        max_tokens: a chunk with more on either side has no signal.
    """
    raise NotImplementedError


def align_scores(
    rollout: Rollout, scores: TokenScores, vocabulary: Vocabulary, *, max_tokens: int = MAX_CHUNK_TOKENS
) -> Alignment:
    """The chunks of a rollout and what a teacher scored of it.

    Where the teacher scored the rollout's own ids, every token is a chunk. Otherwise text is aligned by bytes, and the
    end of the response with the end of the teacher's turn (by role, since they spell nothing).

    Args:
        vocabulary: the student's.
    """
    raise NotImplementedError
