"""How far into the student's text the teacher still finds the answer, by which a horizon is chosen (ESR, arXiv 2605.27028).

The teacher goes on from the first N tokens of what the student wrote, and the task's verifier judges the whole text. One that
is no longer than N is judged as it is. So the curve runs from the teacher's own accuracy, at 0, to the student's; a horizon
ends before it falls [ours]. Nothing but text is asked of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from omniopd.method import Check
from omniopd.sampling import named_seed
from omniopd.types import Continuations, ContinueQuery, Rollout
from omniopd.verification.chunks import cut_chunk


@dataclass(frozen=True)
class Decay:
    """Accuracy of texts whose first tokens are the student's; None where none could be judged.

    `continued` texts were ended by the teacher, `whole` ones by the student; `unknown` ones have no verdict, because nothing
    valid came or the verifier could not decide, and are not in the accuracy.
    """

    tokens: int
    accuracy: float | None
    continued: int
    whole: int
    unknown: int


def decay_queries(rollouts: Sequence[Rollout], cuts: Sequence[int], max_tokens: int, seed: int) -> list[ContinueQuery]:
    """One continuation of each rollout from each cut that is inside it."""
    return [
        ContinueQuery(
            prompt=rollout.prompt,
            chunk=cut_chunk(rollout, row, cut, len(rollout) - cut),
            n=1,
            max_tokens=max_tokens,
            seed=named_seed(seed, "decay", row, cut) % 2**31,
        )
        for cut in cuts
        for row, rollout in enumerate(rollouts)
        if cut < len(rollout)
    ]


def decay_curve(
    rollouts: Sequence[Rollout], cuts: Sequence[int], found: Sequence[Continuations], check: Check
) -> list[Decay]:
    """The accuracy at each cut, from the evidence of `decay_queries`. A text that was cut is judged as it is."""
    curve = []
    for cut in cuts:
        asked = [one for one in found if one.query.chunk.start == cut]
        continued = [(rollouts[one.query.row], one.query.chunk.prefix, reply) for one in asked for reply in one.replies]
        whole = [rollout for rollout in rollouts if len(rollout) <= cut]
        texts = [(rollout, prefix + reply.text) for rollout, prefix, reply in continued]
        texts += [(rollout, rollout.text) for rollout in whole]
        verdicts = [check(rollout.prompt, text) for rollout, text in texts]
        known = [verdict for verdict in verdicts if verdict is not None]
        curve.append(
            Decay(
                tokens=cut,
                accuracy=sum(known) / len(known) if known else None,
                continued=len(continued),
                whole=len(whole),
                unknown=len(rollouts) - len(known),
            )
        )
    return curve
