"""What methods share that hold the student's distributions against those of a teacher of another tokenizer.

The response is cut where both sides have a boundary (`omniopd.alignment`), and the teacher's vocabulary is laid over the
student's (`omniopd.vocabulary_map`). A method says what it makes of the chunks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from omniopd.alignment import MAX_CHUNK_TOKENS, AlignedChunk, align_scores
from omniopd.method import StudentText
from omniopd.scored import MISSING, RETOKENIZED, Reading, Scored, ScoredObjective, heard_chunks
from omniopd.types import Distributions, Rollout, TokenScores
from omniopd.vocabulary_map import VocabularyMap, vocabulary_map

SPELLING = "spelling"  # tokens of one chunk that spell other bytes than the teacher's, as by a space before the text


class MappedObjective(ScoredObjective):
    """How large a chunk may be."""

    max_chunk_tokens: int = Field(
        default=MAX_CHUNK_TOKENS, ge=1, description="a chunk with more tokens on either side has no signal"
    )


@dataclass(frozen=True, slots=True)
class Spelled:
    """An aligned chunk with the bytes of each of its tokens, which are the same in all on both sides."""

    chunk: AlignedChunk
    student: tuple[bytes, ...]
    teacher: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Laid:
    """A response with its scores laid on it: the chunks that were heard, and the tokens in none of them by reason."""

    rollout: Rollout
    scores: TokenScores
    distributions: Distributions
    words: VocabularyMap
    heard: Sequence[Spelled]
    holes: Counter[str]


class Mapped(Scored):
    """Base of the methods that read whole distributions over another vocabulary."""

    needs = frozenset({"score", "logits"})
    whole = True

    def __init__(self, config: MappedObjective, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.max_chunk_tokens = config.max_chunk_tokens

    @abstractmethod
    def lay(self, laid: Laid) -> Reading:
        """What the method makes of the chunks."""

    def place(self, rollout: Rollout, scores: TokenScores) -> Reading:
        """Align, and keep the chunks that spell the same on both sides.

        Raises:
            ConfigError: a vocabulary is lossy.
        """
        if scores.distributions is None or scores.vocabulary is None:
            return Reading.silent(len(rollout), MISSING)
        words = vocabulary_map(scores.vocabulary, self.text.vocabulary, self.text.end_id)
        if words.identity and scores.ids != rollout.ids:
            return Reading.silent(len(rollout), RETOKENIZED)
        alignment = align_scores(rollout, scores, self.text.vocabulary, max_tokens=self.max_chunk_tokens)
        chunks, holes = heard_chunks(rollout, scores, alignment)
        ours, theirs = self.text.vocabulary.bytes_of, scores.vocabulary.bytes_of
        heard = []
        for chunk in chunks:
            student = tuple(ours[id] for id in rollout.ids[chunk.start : chunk.end])
            teacher = tuple(theirs[id] for id in scores.ids[chunk.teacher_start : chunk.teacher_end])
            if b"".join(student) == b"".join(teacher):
                heard.append(Spelled(chunk, student, teacher))
            else:
                holes[SPELLING] += len(student)
        laid = Laid(rollout, scores, scores.distributions, words, heard, holes)
        return replace(self.lay(laid), alignment=alignment)
