"""The teacher's text in the student's tokens: where it leaves a rollout, and what follows."""

from __future__ import annotations

from collections.abc import Sequence

from omniopd.method import StudentText
from omniopd.types import Branch, Reply, Rollout


def continuation_branch(
    rollout: Rollout, row: int, prefix: str, reply: Reply, weight: float, text: StudentText
) -> Branch | None:
    """The branch that a teacher's continuation of `prefix` makes on a rollout that opens with `prefix`.

    The whole text is tokenized at once, so that the continuation is cut as the student would cut it. While that gives the
    rollout's own ids, the branch shares them; where it does not, the rest of the prefix is repeated as context. A reply
    that the token limit cut may end inside a word: its last token is left out. One that ended by itself teaches the end.

    Returns:
        None if nothing is left to learn.
    """
    ids, spans = text.encode(prefix + reply.text)
    shared = 0
    while (
        shared < min(len(ids), len(rollout.ids))
        and ids[shared] == rollout.ids[shared]
        and spans[shared][1] <= len(prefix)
        and rollout.ends[shared] <= len(prefix)
    ):
        shared += 1
    first_learned = next((i for i, (_, end) in enumerate(spans) if end > len(prefix)), len(ids))
    tail = ids[shared:]
    context = max(0, first_learned - shared)
    if reply.finish == "stop":
        tail = [*tail, text.end_id]
    elif len(tail) - context > 1:
        tail = tail[:-1]
    if len(tail) <= context:
        return None
    return Branch(row=row, at=shared, ids=tuple(tail), weight=weight, context=context)


def answer_ids(reply: Reply, text: StudentText) -> tuple[int, ...]:
    """A whole answer of the teacher's in the student's tokens: with its end, or, where the limit cut it, without the last
    token, which may stop inside a word."""
    ids, _ = text.encode(reply.text)
    return (*ids, text.end_id) if reply.finish == "stop" else tuple(ids[:-1])


def retokenized(branches: Sequence[Branch]) -> int:
    """How many branches had to repeat a part of their prefix (trap R4: a route that retokenizes reports it)."""
    return sum(branch.context > 0 for branch in branches)
