"""DPCA (Niu et al. 2026, arXiv 2606.09456): on-policy distillation from a teacher of another tokenizer.

Student and teacher cut the same text into different tokens. Where both have a boundary a chunk closes that spells the same
bytes on both sides; the difference of its two log-likelihoods is the chunk's advantage, dealt out over its student tokens.

`L_T` is the likelihood of the teacher's own tokenisation: a lower bound on the text's probability under the teacher.

[official code] chunks, limit of 6 tokens, `share`, clamp; [ours] byte spans (a hole costs only its chunk), credit without
quotients, the end of the turn by role. With one tokenizer on both sides and no clamp, this is `opd`, bit for bit.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.alignment import MAX_CHUNK_TOKENS, align_scores
from omniopd.credit import Credit, chunk_advantages, span_index
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.registry import METHODS
from omniopd.scored import Reading, Scored, ScoredObjective, heard_chunks, likelihoods, nats
from omniopd.types import Rollout, TokenScores


class DpcaConfig(ScoredObjective):
    """How large a chunk may be, and how its advantage is dealt out."""

    name: Literal["dpca"] = "dpca"
    credit: Credit = Field(
        default="share",
        description="share: by each token's part of the student's log-prob; uniform: equal parts; full: the whole to each",
    )
    clamp: float | None = Field(default=None, gt=0, description="largest advantage of a token, in nats; null: no limit")
    max_chunk_tokens: int = Field(
        default=MAX_CHUNK_TOKENS, ge=1, description="a chunk with more tokens on either side has no signal"
    )


@METHODS.register("dpca")
class Dpca(Scored):
    """Chunk advantages between tokenizers."""

    Config: ClassVar[type[Objective]] = DpcaConfig
    needs = frozenset({"score"})

    def __init__(self, config: DpcaConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config

    def place(self, rollout: Rollout, scores: TokenScores) -> Reading:
        """Align, chunk advantage, credit, clamp, in this order."""
        limit = self.config.max_chunk_tokens
        alignment = align_scores(rollout, scores, self.text.vocabulary, max_tokens=limit)
        chunks, holes = heard_chunks(rollout, scores, alignment)
        own, theirs = likelihoods(rollout, scores, chunks)
        index = span_index([(chunk.start, chunk.end) for chunk in chunks], len(rollout))
        mask, ratios = index < len(chunks), theirs - own
        values = chunk_advantages(nats(rollout.logprobs), ratios, index, self.config.credit)
        figures = {}
        if (most := self.config.clamp) is not None:
            figures["clamped_share"] = (values[mask].abs() > most).double()
            values = values.clamp(-most, most)
        return Reading(mask, values, holes, log_ratios=ratios, alignment=alignment, figures=figures)
