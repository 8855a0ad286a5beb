"""ALM (arXiv 2503.20083) on the student's own text: chunk likelihoods of two tokenizers, matched by a differentiable loss.

The sibling of `dpca` that is no policy gradient: where that credits a chunk with `L_T - L_S`, whose expectation is a reverse
KL, this lowers a divergence of the chunk's likelihood on both sides (`omniopd/losses/alm.py`). With one update per batch the
loss's gradient is that of one number per chunk on each of its tokens, taken at the log-probs that the sampler recorded.

[official code] binarised likelihoods, tau = 100, chunks of equal weight, words; [ours] the student's own text
in place of a data set, the numbers in closed form, the end of the turn by role. Not here: the boundary-bias threshold of the
official code and its probability of a following space, which need the teacher's whole distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from omniopd.alignment import AlignedChunk, align_scores
from omniopd.credit import span_index, spread
from omniopd.losses.alm import TAU, alm_loss, alm_slope
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.registry import METHODS
from omniopd.scored import ChunkObjective, Reading, Scored, by_bytes, heard_chunks, likelihoods
from omniopd.types import Rollout, TokenScores
from omniopd.vocabulary import Spelling


class AlmConfig(ChunkObjective):
    """Which chunks are compared, and how."""

    name: Literal["alm"] = "alm"
    tau: float = Field(default=TAU, gt=0, description="temperature of the chunks' likelihoods")
    chunks: Literal["minimal", "words"] = Field(
        default="minimal", description="minimal: between all common boundaries; words: merged up to the next space"
    )


@METHODS.register("alm")
class Alm(Scored):
    """Binarised chunk likelihoods between tokenizers."""

    Config: ClassVar[type[Objective]] = AlmConfig
    paper = "2503.20083"
    neutral: ClassVar = (
        "none: a loss on the difference of chunk likelihoods, whose gradient is not that of the reverse KL"
    )
    needs = frozenset({"score"})
    top_setting = "method.openings"

    def __init__(self, config: AlmConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config, self.top = config, config.openings

    def place(self, rollout: Rollout, scores: TokenScores) -> Reading:
        """Align, merge, compare: the loss's slope on each token of a chunk."""
        config, vocabulary = self.config, self.text.vocabulary
        alignment = align_scores(rollout, scores, vocabulary, max_tokens=config.max_chunk_tokens)
        worth = by_bytes(rollout, scores, self.text.vocabulary)
        chunks, holes = heard_chunks(rollout, scores, alignment, worth)
        if config.chunks == "words":
            chunks = words(chunks, vocabulary.spell(rollout.ids))
        own, theirs = likelihoods(rollout, scores, chunks, worth)
        index = span_index([(chunk.start, chunk.end) for chunk in chunks], len(rollout))
        values = spread(alm_slope(own, theirs, config.tau), index)
        figures = {"alm_loss": alm_loss(own, theirs, config.tau)}
        return Reading(
            index < len(chunks), values, holes, log_ratios=theirs - own, alignment=alignment, figures=figures
        )


def words(chunks: Sequence[AlignedChunk], spelling: Spelling) -> tuple[AlignedChunk, ...]:
    """Neighbouring chunks merged until the next one starts with a space, on both sides since they spell the same bytes.

    Args:
        spelling: the student's, whose tokens the chunks count.
    """
    text, merged = spelling.text.encode(), list[AlignedChunk]()
    for chunk in chunks:
        opens = spelling.ends[chunk.start - 1] if chunk.start else 0
        last = merged[-1] if merged else None
        adjoins = last is not None and (last.end, last.teacher_end) == (chunk.start, chunk.teacher_start)
        if last is None or not adjoins or opens is None or text[opens : opens + 1] in (b" ", b""):
            merged.append(chunk)
        else:
            merged[-1] = AlignedChunk(last.start, chunk.end, last.teacher_start, chunk.teacher_end)
    return tuple(merged)
