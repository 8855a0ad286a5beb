"""DPCA (Niu et al. 2026, arXiv 2606.09456): on-policy distillation from a teacher of another tokenizer.

Student and teacher cut the same text into different tokens. Where both have a boundary a chunk closes that spells the same
bytes on both sides; the difference of its two log-likelihoods is the chunk's advantage, dealt out over its student tokens.

`L_T` is the likelihood of the teacher's own tokenisation: a lower bound on the text's probability under the teacher. With
`openings`, the likeliest tokens at each place, it is told what the teacher gives the next bytes, whichever way it cuts them
(`omniopd.boundary`): then every token of the student's has a number of its own, and credit is no guess.

[official code] chunks, limit of 6 tokens, `share` (with `openings: 0` as published), clamp; [ours] `bytes`, byte spans (a
hole costs only its chunk), credit without quotients, the end of the turn by role. With one tokenizer on both sides and no
clamp, this is `opd`, bit for bit.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from omniopd.alignment import align_scores
from omniopd.credit import Credit, chunk_advantages, span_index
from omniopd.method import StudentText
from omniopd.objective import Objective
from omniopd.registry import METHODS
from omniopd.scored import ChunkObjective, Reading, Scored, by_bytes, heard_chunks, likelihoods, nats
from omniopd.types import Rollout, TokenScores


class DpcaConfig(ChunkObjective):
    """How large a chunk may be, and how its advantage is dealt out."""

    name: Literal["dpca"] = "dpca"
    credit: Literal["bytes"] | Credit = Field(
        default="bytes",
        description="bytes: each token has what the teacher gives its bytes [ours], share where no openings came; share: by "
        "its part of the student's log-prob [official code]; uniform: equal parts; full: the whole to each",
    )
    clamp: float | None = Field(default=None, gt=0, description="largest advantage of a token, in nats; null: no limit")


@METHODS.register("dpca")
class Dpca(Scored):
    """Chunk advantages between tokenizers."""

    Config: ClassVar[type[Objective]] = DpcaConfig
    paper = "2606.09456"
    neutral: ClassVar = {"openings": 0}
    needs = frozenset({"score"})
    top_setting = "method.openings"

    def __init__(self, config: DpcaConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config, self.top = config, config.openings

    def place(self, rollout: Rollout, scores: TokenScores) -> Reading:
        """Align, chunk advantage, credit, clamp, in this order."""
        limit = self.config.max_chunk_tokens
        alignment = align_scores(rollout, scores, self.text.vocabulary, max_tokens=limit)
        worth = by_bytes(rollout, scores, self.text.vocabulary)
        chunks, holes = heard_chunks(rollout, scores, alignment, worth)
        own, theirs = likelihoods(rollout, scores, chunks, worth)
        index = span_index([(chunk.start, chunk.end) for chunk in chunks], len(rollout))
        mask, ratios = index < len(chunks), theirs - own
        if worth is not None and self.config.credit == "bytes":
            values = (worth - nats(rollout.logprobs)).masked_fill(~mask, 0.0)
        else:
            rule: Credit = "share" if self.config.credit == "bytes" else self.config.credit
            values = chunk_advantages(nats(rollout.logprobs), ratios, index, rule)
        figures = {}
        if (most := self.config.clamp) is not None:
            figures["clamped_share"] = (values[mask].abs() > most).double()
            values = values.clamp(-most, most)
        return Reading(mask, values, holes, log_ratios=ratios, alignment=alignment, figures=figures)
