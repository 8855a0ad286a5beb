"""Two tokenizers over one text: chunks that spell the same bytes on both sides.

Source: arXiv 2606.09456 (chunks between common boundaries [second-hand]); byte spans in place of decoded strings, two
integer pointers, holes that cost only their own chunk [ours].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
        return 1 - sum(self.holes.values()) / self.tokens if self.tokens else 0.0

    @property
    def one_to_one(self) -> float:
        """Share of the chunks that are one token on both sides."""
        single = sum(chunk.end - chunk.start == chunk.teacher_end - chunk.teacher_start == 1 for chunk in self.chunks)
        return single / len(self.chunks) if self.chunks else 0.0


def align(
    student: Sequence[int | None],
    teacher: Sequence[int | None],
    *,
    student_broken: Sequence[bool] = (),
    max_tokens: int = MAX_CHUNK_TOKENS,
) -> Alignment:
    """Minimal chunks from the cumulative byte ends of both sides, in O(n + m).

    A chunk closes wherever both sides have an end at the same byte. It has no signal if a token of it, on either side, ends
    inside a broken stretch, or if a token of no width stands in its midst. [ours]

    Args:
        student, teacher: `Spelling.ends` of the same text.
        student_broken: `Spelling.broken` of the student; such a token breaks its chunk.
        max_tokens: a chunk with more on either side has no signal.
    """
    broken = [end is None or flag for end, flag in zip(student, student_broken or [False] * len(student), strict=True)]
    mine, yours = _runs(student), _runs(teacher)
    idle, teacher_idle = _idle(mine, len(student)), _idle(yours, len(teacher))
    reasons = ["broken" if b else "control" if w else "unmatched" for b, w in zip(broken, idle, strict=True)]
    chunks: list[AlignedChunk] = []
    i = j = first = teacher_first = 0
    while i < len(mine) and j < len(yours):
        end, teacher_end = mine[i].end, yours[j].end
        i += end <= teacher_end
        j += teacher_end <= end
        if end != teacher_end:
            continue
        chunk = AlignedChunk(mine[first].start, mine[i - 1].stop, yours[teacher_first].start, yours[j - 1].stop)
        first, teacher_first = i, j
        if any(broken[chunk.start : chunk.end]) or None in teacher[chunk.teacher_start : chunk.teacher_end]:
            reason = "broken"
        elif any(idle[chunk.start : chunk.end]) or any(teacher_idle[chunk.teacher_start : chunk.teacher_end]):
            reason = "control"
        elif max(chunk.end - chunk.start, chunk.teacher_end - chunk.teacher_start) > max_tokens:
            reason = "too_long"
        else:
            reason = ""
            chunks.append(chunk)
        reasons[chunk.start : chunk.end] = [reason] * (chunk.end - chunk.start)
    if None in teacher[yours[teacher_first - 1].stop if teacher_first else 0 :]:
        reasons = ["broken" if reason == "unmatched" else reason for reason in reasons]
    return Alignment(tuple(chunks), Counter(filter(None, reasons)), len(student))


def align_scores(
    rollout: Rollout, scores: TokenScores, vocabulary: Vocabulary, *, max_tokens: int = MAX_CHUNK_TOKENS
) -> Alignment:
    """The chunks of a rollout and what a teacher scored of it.

    Where the teacher scored the rollout's own ids, every token is a chunk. Otherwise text is aligned by bytes, and the
    end of the response with the end of the teacher's turn (by role, since they spell nothing). Where the teacher's row is
    short, the tokens that it does not reach are unmatched.

    Args:
        vocabulary: the student's.

    Raises:
        ValueError: the scores are those of another text.
        ConfigError: the texts must be aligned and the student's vocabulary is lossy.
    """
    tokens = len(rollout.ids)
    if _scored_own_ids(rollout, scores, vocabulary):
        scored = len(scores.ids)
        own = tuple(AlignedChunk(t, t + 1, t, t + 1) for t in range(scored))
        return Alignment(own, Counter(unmatched=tokens - scored) if scored < tokens else {}, tokens)
    spelling = vocabulary.spell(rollout.ids)
    size = len(spelling.text.encode())
    if spelling.text != scores.query.text or max((end or 0 for end in scores.ends), default=0) > size:
        raise ValueError("these scores are of another text than the rollout's")
    body = tokens - scores.query.closes
    ended = scores.query.closes and _ends_turn(scores.ends, size)
    teacher = scores.ends[: len(scores.ends) - ended]
    text = align(spelling.ends[:body], teacher, student_broken=spelling.broken[:body], max_tokens=max_tokens)
    if not scores.query.closes:
        return text
    if not ended:
        return Alignment(text.chunks, Counter(text.holes) + Counter(unmatched=1), tokens)
    close = AlignedChunk(body, tokens, len(teacher), len(teacher) + 1)
    return Alignment((*text.chunks, close), text.holes, tokens)


class _Run(NamedTuple):
    """The fewest tokens [start, stop) in a row of which the last has an end, further on than the end before."""

    start: int
    stop: int
    end: int


def _runs(ends: Sequence[int | None]) -> list[_Run]:
    """Tokens that spell something; those of no width, and those after the last end, are in no run."""
    runs: list[_Run] = []
    start = at = 0
    for i, end in enumerate(ends):
        if end is None:
            continue
        if end > at:
            runs.append(_Run(start, i + 1, end))
            at = end
        start = i + 1
    return runs


def _idle(runs: Sequence[_Run], tokens: int) -> list[bool]:
    """[tokens] which are in no run."""
    idle = [True] * tokens
    for run in runs:
        idle[run.start : run.stop] = [False] * (run.stop - run.start)
    return idle


def _scored_own_ids(rollout: Rollout, scores: TokenScores, vocabulary: Vocabulary) -> bool:
    """Whether the tokens are the rollout's own. A replay lacks the teacher's vocabulary; there the ends tell."""
    if scores.ids != rollout.ids[: len(scores.ids)]:
        return False
    if scores.vocabulary is not None:
        return scores.vocabulary.digest == vocabulary.digest
    return bool(vocabulary.lossy) or scores.ends == vocabulary.spell(rollout.ids).ends[: len(scores.ids)]


def _ends_turn(ends: Sequence[int | None], size: int) -> bool:
    """Whether the last token spells nothing after the whole text: a row that was cut off early lacks it."""
    return bool(ends) and ends[-1] == size and (ends[-2] in (size, None) if len(ends) > 1 else size == 0)
