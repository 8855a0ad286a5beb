"""What methods share that learn from a teacher's scores of the student's own text (`TokenScores`).

Each response is one query. A method lays the scores on the response's tokens (`Scored.place`); everything around that is
here: asking, holes and their reasons, the numbers of the step's log, records for the report.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from omniopd.alignment import MAX_CHUNK_TOKENS, AlignedChunk, Alignment, align_scores
from omniopd.boundary import byte_scores
from omniopd.credit import span_index, span_sums, spread
from omniopd.method import Method, StudentText
from omniopd.objective import Anchor, Objective
from omniopd.scored_records import record
from omniopd.types import Capabilities, Evidence, Query, Rollout, ScoreQuery, Signal, Target, TokenScores
from omniopd.vocabulary import Vocabulary

MISSING, INFINITE = "missing", "infinite"  # a log-prob that did not come, one that says "impossible"
GIVEN = (
    "given"  # a token that the student did not draw, which has no log-ratio; the teacher spoke about it all the same
)
RETOKENIZED = "retokenized"  # one vocabulary, but the teacher scored other ids than those that were sent (trap R4)
NOT_FINITE_SHARE = 0.01  # of a step's tokens; more of them deserves a word in the log

log = logging.getLogger(__name__)


class ScoredObjective(Objective):
    """Settings of every method that reads scores: no anchor, since the teacher speaks about nearly every token."""

    anchor: Anchor = Anchor(beta=0, allow_none=True)
    min_coverage: float = Field(
        default=0.5, ge=0, le=1, description="share of tokens that the teacher must speak about, or the run stops"
    )


class ChunkObjective(ScoredObjective):
    """Settings of the methods that compare chunks of tokens by their log-likelihoods."""

    max_chunk_tokens: int = Field(
        default=MAX_CHUNK_TOKENS, ge=1, description="a chunk with more tokens on either side has no signal"
    )
    openings: int = Field(
        default=20,
        ge=0,
        description="likeliest tokens asked for at each place, to tell what the teacher gives the next bytes however it cuts "
        "them (omniopd/boundary.py) [ours]; 0 takes its tokens at their word, as published",
    )


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What the scores of one response say of its T tokens.

    Attributes:
        mask: [T] bool, True where there is a signal.
        values: [T], what multiplies -log p; 0 outside the mask, and everywhere if `target` carries the signal.
        holes: tokens outside the mask, counted by reason; none goes without.
        log_ratios: [C] `log q - log p` of the chunks (or tokens) that were heard, in nats; for the log.
        figures: further numbers of tokens or chunks, of any length; the log has the mean of each.

    Raises:
        ValueError: lengths differ, or a hole has no reason.
    """

    mask: Tensor
    values: Tensor
    holes: Mapping[str, int]
    target: Target | None = None
    log_ratios: Tensor = field(default_factory=lambda: torch.zeros(0))
    alignment: Alignment | None = None
    figures: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mask.shape != self.values.shape or int((~self.mask).sum()) != sum(self.holes.values()):
            raise ValueError(f"{tuple(self.mask.shape)} mask, {tuple(self.values.shape)} values, holes {self.holes}")

    @classmethod
    def silent(cls, tokens: int, reason: str) -> Reading:
        """Nothing is known of a response."""
        return cls(torch.zeros(tokens, dtype=torch.bool), torch.zeros(tokens), Counter({reason: tokens}))

    @property
    def heard(self) -> bool:
        """Whether any token has a signal."""
        return bool(self.mask.any())

    @property
    def main_hole(self) -> str:
        """The commonest reason of tokens without a signal."""
        return max(self.holes, key=lambda reason: self.holes[reason])


class Scored(Method):
    """Base of the methods that read scores. A subclass says what to ask besides log-probs, and places the answer."""

    top = 0  # likeliest tokens to ask for at each place
    top_setting = "method.k"  # where that number comes from
    whole = False  # whether to ask for whole distributions

    def __init__(self, config: ScoredObjective, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.min_coverage = config.min_coverage

    @abstractmethod
    def place(self, rollout: Rollout, scores: TokenScores) -> Reading:
        """Scores on a response's tokens; `scores` has tokens, and `rollout` too."""

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """One query if the response has tokens."""
        return [self.query(rollout, row)] if len(rollout) else []

    def query(self, rollout: Rollout, row: int) -> ScoreQuery:
        """What do you give each token of this response?"""
        return score_query(rollout, row, self.text.vocabulary, top=self.top, whole=self.whole)

    def read(self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], step: int) -> Signal:
        """Scores as numbers on tokens. A response of which no token is heard is a drop, a token without signal a reject."""
        answered = {found.query.row: found for found in evidence if isinstance(found, TokenScores)}
        readings = {row: self._reading(rollouts[row], found) for row, found in sorted(answered.items())}
        unasked = [Reading.silent(len(rollout), "unasked") for rollout in rollouts]
        placed = [readings.get(row, nothing) for row, nothing in enumerate(unasked)]
        rejects = sum((Counter(reading.holes) for reading in readings.values()), Counter[str]())
        _warn_of_numbers(rejects, sum(map(len, rollouts)))
        return Signal(
            values_BT=tuple(reading.values.float() for reading in placed),
            mask_BT=tuple(reading.mask for reading in placed),
            targets=tuple(reading.target for reading in placed) if any(r.target is not None for r in placed) else (),
            drops=Counter(reading.main_hole for reading in readings.values() if not reading.heard),
            rejects=rejects,
            stats=_stats([reading for reading in readings.values() if reading.heard]),
            audits=tuple(record(rollouts[row], reading) for row, reading in readings.items()),
            spoken=sum(int(reading.mask.sum()) for reading in placed) + rejects[GIVEN] if rejects[GIVEN] else None,
        )

    def lacking(self, offered: Capabilities) -> list[str]:
        """As of every method; and a tokenizer that can't be laid over text by bytes needs a teacher of the same."""
        own = self.text.vocabulary
        few = offered.score and offered.topk < self.top and (offered.topk or "topk" not in self.needs)
        apart = "same tokenizer" not in self.needs and own.lossy and offered.vocabulary != own.digest
        wanted = f"the {self.top} likeliest tokens of given text (it has {offered.topk}: lower {self.top_setting})"
        return [
            *super().lacking(offered),
            *([wanted] if few else []),
            *([f"the student's own tokenizer ({own.lossy})"] if apart else []),
        ]

    def cautions(self) -> list[str]:
        """None about a missing anchor: the teacher speaks about nearly every token."""
        return []

    def _reading(self, rollout: Rollout, scores: TokenScores) -> Reading:
        if scores.rejected or not scores.ids:
            return Reading.silent(len(rollout), next(iter(scores.rejected), MISSING))
        return self.place(rollout, scores)


def score_query(rollout: Rollout, row: int, vocabulary: Vocabulary, *, top: int = 0, whole: bool = False) -> ScoreQuery:
    """What do you give each token of this response? `vocabulary` is the student's."""
    return ScoreQuery(
        prompt=rollout.prompt,
        row=row,
        ids=rollout.ids,
        vocabulary=vocabulary.digest,
        text=rollout.text if vocabulary.lossy else vocabulary.spell(rollout.ids).text,
        closes=rollout.finish == "stop",
        top=top,
        whole=whole,
    )


def nats(logprobs: Sequence[float]) -> Tensor:
    """Log-probs as a tensor. All arithmetic on them is in float64 and rounded once, by `Scored.read`: so a weight that is
    exactly 1 leaves `log q - log p` as it was, to the last bit."""
    return torch.tensor(logprobs, dtype=torch.float64)


def finite(logprobs: Tensor) -> tuple[Tensor, Counter[str]]:
    """Which of the teacher's log-probs [n] are numbers, and why the others are not."""
    missing = logprobs.isnan()
    infinite = logprobs.isinf()
    return ~missing & ~infinite, Counter({MISSING: int(missing.sum()), INFINITE: int(infinite.sum())})


def likelihoods(
    rollout: Rollout, scores: TokenScores, chunks: Sequence[AlignedChunk], worth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`L_S` and `L_T`, each [C]: log-likelihoods of aligned chunks in nats; not finite where one of the teacher's is not.

    `L_T` is that of the teacher's tokens, or of the bytes if the `worth` [T] of each student token is given (`by_bytes`).
    """
    own = span_index([(chunk.start, chunk.end) for chunk in chunks], len(rollout))
    count = len(chunks)
    if worth is not None:
        return span_sums(nats(rollout.logprobs), own, count), span_sums(worth, own, count)
    theirs = span_index([(chunk.teacher_start, chunk.teacher_end) for chunk in chunks], len(scores.ids))
    return span_sums(nats(rollout.logprobs), own, count), span_sums(nats(scores.logprobs), theirs, count)


def heard_chunks(
    rollout: Rollout, scores: TokenScores, alignment: Alignment, worth: Tensor | None = None
) -> tuple[tuple[AlignedChunk, ...], Counter[str]]:
    """The chunks of which every log-prob is a number, and the student's tokens in none of them, counted by reason."""
    _, teacher = likelihoods(rollout, scores, alignment.chunks, worth)
    holes, heard = Counter(alignment.holes), []
    for chunk, total in zip(alignment.chunks, teacher.tolist(), strict=True):
        if abs(total) < float("inf"):  # false for nan, too
            heard.append(chunk)
        else:
            holes[MISSING if total != total else INFINITE] += chunk.end - chunk.start
    return tuple(heard), holes


def chunk_ratios(
    rollout: Rollout, scores: TokenScores, vocabulary: Vocabulary, objective: Objective
) -> tuple[Tensor, Tensor]:
    """`L_T - L_S` in nats of the chunk that each token is in, [T], nan in none; and the place of its first token, [T].

    Where the teacher scored the student's own tokens, each is a chunk.

    Args:
        vocabulary: the student's.
        objective: whose `max_chunk_tokens` holds, if it has one.
    """
    if scores.ids == rollout.ids:
        return nats(scores.logprobs) - nats(rollout.logprobs), torch.arange(len(rollout))
    longest = objective.max_chunk_tokens if isinstance(objective, ChunkObjective) else MAX_CHUNK_TOKENS
    alignment = align_scores(rollout, scores, vocabulary, max_tokens=longest)
    worth = by_bytes(rollout, scores, vocabulary)
    chunks, _ = heard_chunks(rollout, scores, alignment, worth)
    own, theirs = likelihoods(rollout, scores, chunks, worth)
    index = span_index([(chunk.start, chunk.end) for chunk in chunks], len(rollout))
    starts = torch.tensor([chunk.start for chunk in chunks], dtype=torch.long)
    return spread(theirs - own, index).where(index < len(chunks), torch.nan), spread(starts, index)


def by_bytes(rollout: Rollout, scores: TokenScores, vocabulary: Vocabulary) -> Tensor | None:
    """What the teacher gives the bytes of each of the student's tokens, [T] in nats; None where no openings came.

    Args:
        vocabulary: the student's.
    """
    if not scores.openings:
        return None
    ends = vocabulary.spell(rollout.ids).ends
    return nats(byte_scores(ends, scores, closes=scores.query.closes))


def _warn_of_numbers(holes: Mapping[str, int], tokens: int) -> None:
    """Say so if many of a step's log-probs are no numbers."""
    count = holes.get(MISSING, 0) + holes.get(INFINITE, 0)
    if count > NOT_FINITE_SHARE * tokens:
        log.warning("the teacher's log-probs are missing or infinite at %d of %d tokens", count, tokens)


def _stats(readings: Sequence[Reading]) -> dict[str, float | None]:
    """The log's numbers of the responses that were heard.

    `reverse_kl_k1` and `reverse_kl_k3` estimate `KL(student || teacher)` per token, in nats, from the student's own text;
    alignment is said of methods that align.
    """
    tokens = sum(int(reading.mask.sum()) for reading in readings)
    ratios = _joined([reading.log_ratios for reading in readings])
    valued = _joined([reading.values[reading.mask] for reading in readings if reading.target is None])
    figures = {name: _joined([r.figures[name] for r in readings if name in r.figures]) for name in _names(readings)}
    return {
        "responses": float(len(readings)),
        "mean_advantage": _mean(valued),
        "reverse_kl_k1": -float(ratios.sum()) / tokens if len(ratios) else None,
        "reverse_kl_k3": float((ratios.exp() - 1 - ratios).sum()) / tokens if len(ratios) else None,
        **_alignment_stats([reading.alignment for reading in readings if reading.alignment is not None]),
        **{name: _mean(numbers) for name, numbers in figures.items()},
    }


def _alignment_stats(alignments: Sequence[Alignment]) -> dict[str, float | None]:
    if not alignments:
        return {}
    chunks = [chunk for alignment in alignments for chunk in alignment.chunks]
    sizes = [(chunk.end - chunk.start, chunk.teacher_end - chunk.teacher_start) for chunk in chunks]
    return {
        "aligned_share": sum(own for own, _ in sizes) / sum(alignment.tokens for alignment in alignments),
        "one_to_one_share": sizes.count((1, 1)) / len(sizes) if sizes else None,
        "largest_chunk": float(max(map(max, sizes), default=0)),
    }


def _names(readings: Sequence[Reading]) -> list[str]:
    return list(dict.fromkeys(name for reading in readings for name in reading.figures))


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.detach().double() for part in parts]) if parts else torch.zeros(0)


def _mean(numbers: Tensor) -> float | None:
    return float(numbers.mean()) if len(numbers) else None
