"""Learn the teacher's continuations from the student's own prefix: forward KL where the student went. [ours]"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from omniopd.registry import SIGNALS
from omniopd.signals import SignalConfig
from omniopd.types import Reply
from omniopd.verification.audit import Audit, ChunkSignal
from omniopd.verification.text import reached


@SIGNALS.register("continuation_likelihood")
class ContinuationLikelihood:
    """`L = - sum_i log p(r_i | x, prefix)`, over the valid continuations r_i, duplicates merged with their counts.

    Its expectation is KL(teacher || student) at prefixes that the student wrote, plus a constant. It also teaches what
    the student gives no probability to, which reweighting its own tokens cannot. The chunk's own tokens carry no value,
    but count as audited: the teacher spoke there, so the anchor does not hold them.
    """

    class Config(SignalConfig):
        """No options."""

        name: Literal["continuation_likelihood"] = "continuation_likelihood"

    def __init__(self, config: Config) -> None:
        self.config = config

    def read(self, audits: Sequence[Audit]) -> list[ChunkSignal]:
        """Texts with counts for weights, so that each reply of the step weighs the same."""
        return [_read(audit) for audit in audits]


def _read(audit: Audit) -> ChunkSignal:
    texts = Counter(Reply(reached(reply), reply.finish) for reply in audit.verdict.replies)
    targets = tuple((reply, float(count)) for reply, count in texts.items() if reply.text)
    tokens = len(audit.logp)
    return ChunkSignal((0.0,) * tokens, (bool(targets),) * tokens, targets)
