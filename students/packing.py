"""Rollouts and the teacher's branches as rows: a rollout with its branches is a tree.

A token sees its ancestors only, and whatever texts have in common from the prompt on is computed once: a branch shares the
rollout's tokens as far as it agrees with them, and its siblings' after that. Separate rows would compute all of it once per
branch. Models that can't take the mask this needs get a row per branch instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from omniopd.types import Branch, Rollout

Ints = np.ndarray


@dataclass(frozen=True, slots=True)
class Own:
    """A rollout's response in a row: `ids[t]` is predicted at index `start + t`; it is number `first + t` of the step's."""

    rollout: int
    ids: Sequence[int]
    start: int
    first: int


@dataclass
class Row:
    """A tree of tokens: a line, and what hangs on it.

    `ids` and `parents` are [L]; token i continues token parents[i] (-1: none). `own` are the response tokens on the line,
    None in a row of a branch alone. `branch_sites` are predictions of branches: (index of the token that predicts, predicted
    id, number in the step's flat list of learned branch tokens).
    """

    ids: list[int]
    own: Own | None = None
    branch_sites: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.line = len(self.ids)
        self.parents = list(range(-1, self.line - 1))
        self._children: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def append(self, token: int, parent: int) -> int:
        """The index of `token` behind `parent`, which is new only if it does not stand there yet."""
        if parent + 1 < self.line and self.ids[parent + 1] == token:
            return parent + 1
        index = self._children.setdefault((parent, token), len(self))
        if index == len(self):
            self.line += self.is_line and parent == index - 1
            self.ids.append(token)
            self.parents.append(parent)
        return index

    @property
    def is_line(self) -> bool:
        return self.line == len(self.ids)

    def spans(self) -> tuple[Ints, Ints, Ints]:
        """Depth [L] of each token; and [enter, leave) [L]: token i sees j just if `enter[j] <= enter[i] < leave[j]`.

        `enter` counts tokens in depth-first order, `leave` is the first count behind a token's descendants.
        """
        length = len(self)
        if self.is_line:
            places = np.arange(length)
            return places, places, np.full(length, length)
        depth, enter, free, size = [0] * length, [0] * length, [1] * length, [1] * length
        for i in range(length - 1, 0, -1):
            size[self.parents[i]] += size[i]
        for i in range(1, length):  # free: the next count behind a token and those of its children that have theirs
            parent = self.parents[i]
            depth[i], enter[i] = depth[parent] + 1, free[parent]
            free[parent] += size[i]
            free[i] = enter[i] + 1
        return np.array(depth), np.array(enter), np.array(enter) + np.array(size)


def build_rows(
    rollouts: Sequence[Rollout], branches: Sequence[Branch], *, trees: bool, only: Collection[int] | None = None
) -> list[Row]:
    """Rows that predict every response token and every learned branch token of a step once.

    Numbers run over all response tokens in order, those of branches over all learned branch tokens in order.

    Args:
        only: rollouts whose tokens, and whose branches', are wanted; the numbers stay those of the whole step.
    """
    wanted = range(len(rollouts)) if only is None else only
    firsts = accumulate(map(len, rollouts), initial=0)
    rows = {
        n: _trunk(n, rollout, first)
        for n, (rollout, first) in enumerate(zip(rollouts, firsts, strict=False))
        if n in wanted
    }
    extra = []
    first = 0
    for branch in branches:
        start, first = first, first + len(branch.ids) - branch.context
        if branch.row not in wanted:
            continue
        rollout = rollouts[branch.row]
        if trees:
            row = rows[branch.row]
        else:
            row = Row([*rollout.prompt_ids, *rollout.ids[: branch.at]])
            extra.append(row)
        parent = len(rollout.prompt_ids) + branch.at - 1
        for offset, token in enumerate(branch.ids):
            if offset >= branch.context:
                row.branch_sites.append((parent, token, start + offset - branch.context))
            if offset + 1 < len(branch.ids):  # the last token predicts nothing
                parent = row.append(token, parent)
    return [row for row in [*rows.values(), *extra] if row.own or row.branch_sites]


def _trunk(number: int, rollout: Rollout, first: int) -> Row:
    own = Own(number, rollout.ids, len(rollout.prompt_ids) - 1, first) if rollout.ids else None
    return Row([*rollout.prompt_ids, *rollout.ids], own)
