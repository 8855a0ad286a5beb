"""OmniOPD (Zhou et al. 2026, arXiv 2606.01476): text-only on-policy distillation by auditing uncertain chunks.

At the M places where the student was least certain, the teacher goes on N times from the student's own prefix. What it
writes is compared with what the student wrote, and becomes numbers on the student's tokens (`signals`). Every token that
no teacher spoke about is held to the initial student by an exact KL.

[second-hand] scheduler, smoothing, weight, anchor (sheet of the paper; Eq. 6-7 for the scheduler); [ours] validity and
n_eff rules, equal-length comparison, reductions, the signals `survival` and `continuation_likelihood`, the defaults.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from omniopd.branches import continuation_branch, retokenized
from omniopd.method import Method, StudentText
from omniopd.objective import Objective
from omniopd.registry import METHODS, SCORES, SIGNALS
from omniopd.sampling import named_seed
from omniopd.settings import tagged
from omniopd.types import Branch, Chunk, Continuations, ContinueQuery, Evidence, Query, Rollout, Signal
from omniopd.verification.audit import Audit, ChunkSignal, chance_floor, constant_values, judge_all, shuffled
from omniopd.verification.chunks import cut_chunk, random_starts, select_starts
from omniopd.verification.records import records
from omniopd.verification.weights import calibrated, n_min

SILENT = "silent"  # why a chunk is dropped whose replies are valid, but were cut before they said a whole token


class OmniOPDConfig(Objective):
    """Where to ask (M chunks of C tokens, N continuations each), how to compare, and which signals to draw from it."""

    name: Literal["omniopd"] = "omniopd"
    chunks: int = Field(default=10, ge=1, le=1000, description="M, audited chunks of a rollout")
    chunk_tokens: int = Field(
        default=50, ge=1, le=4096, description="C, student tokens of a chunk; under 40 is risky [paper]"
    )
    continuations: int = Field(default=10, ge=1, le=128, description="N, teacher continuations of a chunk")
    selector: Literal["entropy", "random"] = "entropy"
    lead: int = Field(
        default=1,
        ge=0,
        description="response tokens before the first place to audit: with nothing of the student's to go on from, a teacher "
        "answers in its own manner [ours]; the paper has 0",
    )
    score: tagged(SCORES) = Field(default="token_agreement", validate_default=True)  # type: ignore[valid-type]
    calibrate: bool = Field(default=False, description="measure similarity from the chance floor up")
    signals: list[tagged(SIGNALS)] = Field(  # type: ignore[valid-type]
        default=["continuation_likelihood"], validate_default=True, min_length=1
    )
    teacher_tokens: int | None = Field(
        default=None, ge=1, description="token limit of a continuation; default 1.5 C + 4"
    )
    placebo: Literal["none", "shuffle", "constant"] = Field(default="none", description="see `omniopd controls`")

    @field_validator("signals", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, dict)) else value

    @property
    def reply_tokens(self) -> int:
        """The teacher may need more tokens than the student for the same text; what is too long is cut off."""
        return self.teacher_tokens or int(1.5 * self.chunk_tokens) + 4


@METHODS.register("omniopd")
class OmniOPD(Method):
    """Audit uncertain chunks, ask the teacher to go on, and learn from the comparison."""

    Config: ClassVar[type[Objective]] = OmniOPDConfig
    paper = "2606.01476"
    neutral: ClassVar = "none: a teacher that returns text only has no log-ratio to give back"
    needs = frozenset({"continuation"})

    def __init__(self, config: OmniOPDConfig, text: StudentText, seed: int) -> None:
        super().__init__(config, text, seed)
        self.config = config
        self.reads_entropy = config.selector == "entropy"
        self.score = SCORES.build(config.score)
        self.signals = [SIGNALS.build(signal) for signal in config.signals]

    def ask(self, rollout: Rollout, row: int, step: int) -> list[Query]:
        """M continuation queries, ascending, so that nested prefixes meet a warm cache."""
        return [
            ContinueQuery(
                prompt=rollout.prompt,
                chunk=cut_chunk(rollout, row, start, self.config.chunk_tokens),
                n=self.config.continuations,
                max_tokens=self.config.reply_tokens,
                seed=named_seed(self.seed, "teacher", step, row, start) % 2**31,
            )
            for start in self._starts(rollout, row, step)
        ]

    def _starts(self, rollout: Rollout, row: int, step: int) -> list[int]:
        count, length, lead = self.config.chunks, self.config.chunk_tokens, self.config.lead
        if self.config.selector == "random":
            starts = random_starts(len(rollout) - lead, count, length, named_seed(self.seed, "chunks", step, row))
        else:
            starts = select_starts(rollout.entropy[lead:], count, length)
        return [start + lead for start in starts]

    def describe(self) -> str:
        """The signals with their score."""
        signals = " + ".join(signal.name for signal in self.config.signals)
        return f"{super().describe()}: {signals} (score {self.config.score.name})"

    def cautions(self) -> list[str]:
        short = self.config.chunk_tokens < 40
        note = f"method.chunk_tokens={self.config.chunk_tokens}: a published run collapsed at 25; fine for short answers only"
        return [*super().cautions(), *([note] if short else [])]

    def read(self, rollouts: Sequence[Rollout], evidence: Sequence[Evidence], step: int) -> Signal:
        """Compare, score and place: values on audited tokens, branches from what the teacher wrote."""
        answered = [e for e in evidence if isinstance(e, Continuations)]
        rejects = sum((Counter(found.rejected) for found in answered), Counter[str]())
        audits, dropped, floor = self._judge(rollouts, answered, step)
        if self.config.placebo == "shuffle":
            audits = shuffled(audits, named_seed(self.seed, "shuffle", step))
        read = [signal.read(audits) for signal in self.signals]
        dropped |= {audit.chunk: SILENT for i, audit in enumerate(audits) if not _heard(read, i)}
        if self.config.placebo == "constant":
            read = [constant_values(signals, [audit.chunk for audit in audits]) for signals in read]
        values, mask = self._place(rollouts, audits, read)
        branches = self._branches(rollouts, audits, read)
        return Signal(
            values_BT=values,
            mask_BT=mask,
            branches=tuple(branches),
            branch_scale=self._branch_scale(read),
            drops=Counter(dropped.values()),
            rejects=rejects,
            stats=_stats(audits, floor, branches, answered),
            audits=tuple(records(rollouts, answered, audits, dropped, values)),
        )

    def _judge(
        self, rollouts: Sequence[Rollout], answered: Sequence[Continuations], step: int
    ) -> tuple[list[Audit], dict[Chunk, str], float | None]:
        """Chunks with enough valid replies, as audits; the others with the reason; and what unrelated text would score."""
        chunks = [found.query.chunk for found in answered]
        replies = [found.replies for found in answered]
        prompt_ids = [found.query.prompt.id for found in answered]
        floor = chance_floor(chunks, replies, prompt_ids, self.score, named_seed(self.seed, "floor", step))
        audits, dropped = [], {}
        for found, verdict in zip(answered, judge_all(chunks, replies, self.score), strict=True):
            chunk = found.query.chunk
            if verdict.n_eff < n_min(found.query.n):
                dropped[chunk] = max(found.rejected, key=lambda reason: found.rejected[reason], default=SILENT)
                continue
            if self.config.calibrate and floor is not None:
                verdict = replace(verdict, scores=tuple(calibrated(phi, floor) for phi in verdict.scores))
            audits.append(Audit(chunk, rollouts[chunk.row].logprobs[chunk.start : chunk.end], verdict))
        return audits, dropped, floor

    def _place(
        self, rollouts: Sequence[Rollout], audits: Sequence[Audit], read: Sequence[Sequence[ChunkSignal]]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Per-token values, the signals added up with their weights, and where any of them spoke."""
        values = tuple(torch.zeros(len(rollout)) for rollout in rollouts)
        mask = tuple(torch.zeros(len(rollout), dtype=torch.bool) for rollout in rollouts)
        for config, signals in zip(self.config.signals, read, strict=True):
            for audit, signal in zip(audits, signals, strict=True):
                span = slice(audit.chunk.start, audit.chunk.end)
                spoke = torch.tensor(signal.mask)
                own = torch.tensor(signal.values).where(spoke, torch.zeros(()))
                values[audit.chunk.row][span] += config.weight * own
                mask[audit.chunk.row][span] |= spoke
        return values, mask

    def _branches(
        self, rollouts: Sequence[Rollout], audits: Sequence[Audit], read: Sequence[Sequence[ChunkSignal]]
    ) -> list[Branch]:
        branches = []
        for signals in read:
            for audit, signal in zip(audits, signals, strict=True):
                row = audit.chunk.row
                for reply, weight in signal.targets:
                    prefix = audit.chunk.prefix
                    branch = continuation_branch(rollouts[row], row, prefix, reply, weight, self.text)
                    if branch is not None:
                        branches.append(branch)
        return branches

    def _branch_scale(self, read: Sequence[Sequence[ChunkSignal]]) -> float:
        """The branches' term is a mean over their own tokens, so their signal's weight multiplies the whole of it."""
        pairs = zip(self.config.signals, read, strict=True)
        return math.fsum(config.weight for config, signals in pairs if any(signal.targets for signal in signals))


class PaperConfig(OmniOPDConfig):
    """The paper's settings [second-hand]: M=10, C=50, N=10, alpha=1, edit distance, one likelihood weight, beta=0.1."""

    name: Literal["omniopd/paper"] = "omniopd/paper"  # type: ignore[assignment]
    lead: int = 0
    score: tagged(SCORES) = Field(default="edit_distance", validate_default=True)  # type: ignore[valid-type]
    signals: list[tagged(SIGNALS)] = Field(  # type: ignore[valid-type]
        default=["likelihood_weight"], validate_default=True, min_length=1
    )


@METHODS.register("omniopd/paper")
class OmniOPDPaper(OmniOPD):
    """OmniOPD as published, as far as third-party readings tell."""

    Config: ClassVar[type[Objective]] = PaperConfig


def _heard(read: Sequence[Sequence[ChunkSignal]], index: int) -> bool:
    """Whether any signal made something of a chunk's replies."""
    return any(any(signals[index].mask) for signals in read)


def _mean(numbers: Sequence[float]) -> float | None:
    return fmean(numbers) if numbers else None


def _stats(
    audits: Sequence[Audit], floor: float | None, branches: Sequence[Branch], answered: Sequence[Continuations]
) -> dict[str, float | None]:
    """What a step's log says of its evidence."""
    texts = [[reply.text for reply in found.replies] for found in answered]
    drawn = sum(map(len, texts))
    return {
        "chunks": float(len(audits)),
        "mean_score": _mean([phi for audit in audits for phi in audit.verdict.scores]),
        "chance_floor": floor,
        "n_eff": _mean([float(len(audit.verdict.scores)) for audit in audits]),
        "duplicate_rate": 1 - sum(len(set(t)) for t in texts) / drawn if drawn else None,
        "zero_match_share": _mean([float(sum(audit.verdict.scores) == 0) for audit in audits]),
        "branch_tokens": float(sum(len(b.ids) - b.context for b in branches)),
        "retokenized_branches": float(retokenized(branches)),
    }
