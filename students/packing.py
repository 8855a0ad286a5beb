"""Rollouts and the teacher's branches as rows for one forward pass: a rollout with its branches is a tree in one row.

A token sees its ancestors only, and whatever texts have in common from the prompt on is computed once: a branch shares the
rollout's tokens as far as it agrees with them, and its siblings' after that. Separate rows would compute all of it once per
branch. Models that can't take such a mask get a row per branch instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from omniopd.types import Branch, Rollout


@dataclass
class Row:
    """One row of a forward pass.

    `ids` and `parents` are [L]; token i continues token parents[i] (-1: none). `sites` are the predictions that matter:
    (index of the token that predicts, predicted id, index of the number it belongs to in the step's flat list of
    response positions; branch tokens count in a list of their own). `rollout` is the index of the rollout whose tokens the
    own sites are, all of them in order; None for a row of a branch alone.
    """

    ids: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    own_sites: list[tuple[int, int, int]] = field(default_factory=list)
    branch_sites: list[tuple[int, int, int]] = field(default_factory=list)
    rollout: int | None = None
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def append(self, token: int, parent: int) -> int:
        """The index of `token` behind `parent`, which is new only if it does not stand there yet."""
        index = self._children.setdefault((parent, token), len(self.ids))
        if index == len(self.ids):
            self.ids.append(token)
            self.parents.append(parent)
        return index

    @property
    def is_line(self) -> bool:
        return all(parent == i - 1 for i, parent in enumerate(self.parents))


def build_rows(rollouts: Sequence[Rollout], branches: Sequence[Branch], *, trees: bool) -> list[Row]:
    """Rows that hold every response token and every branch token of a step once.

    Own site numbers run over all response tokens in order, branch site numbers over all learned branch tokens in order.
    """
    rows = [
        _trunk(n, rollout, first) for n, (rollout, first) in enumerate(zip(rollouts, _starts(rollouts), strict=True))
    ]
    extra = []
    first = 0
    for branch in branches:
        rollout = rollouts[branch.row]
        if trees:
            row = rows[branch.row]
        else:
            row = _line([*rollout.prompt_ids, *rollout.ids[: branch.at]])
            extra.append(row)
        parent = len(rollout.prompt_ids) + branch.at - 1
        for offset, token in enumerate(branch.ids):
            if offset >= branch.context:
                row.branch_sites.append((parent, token, first + offset - branch.context))
            if offset + 1 < len(branch.ids):  # the last token predicts nothing
                parent = row.append(token, parent)
        first += len(branch.ids) - branch.context
    return [row for row in rows + extra if row.own_sites or row.branch_sites]


def _starts(rollouts: Sequence[Rollout]) -> Iterator[int]:
    total = 0
    for rollout in rollouts:
        yield total
        total += len(rollout)


def _trunk(number: int, rollout: Rollout, first: int) -> Row:
    row = _line([*rollout.prompt_ids, *rollout.ids])
    row.rollout = number
    before = len(rollout.prompt_ids) - 1
    row.own_sites = [(before + t, token, first + t) for t, token in enumerate(rollout.ids)]
    return row


def _line(ids: Sequence[int]) -> Row:
    row = Row()
    for token in ids:
        row.append(token, len(row.ids) - 1)
    return row


def micro_batches(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Rows of similar length together, at most `budget` padded tokens each (one row may exceed it alone)."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: len(row.ids), reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].ids) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def tensors(rows: Sequence[Row], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Model inputs of one micro-batch, padded on the right: ids, positions, and a mask (2-D where all rows are lines)."""
    width = max(len(row.ids) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    seen = np.zeros((len(rows), width, width), dtype=bool)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = row.ids
        positions[b, : len(row.ids)], seen[b, : len(row.ids), : len(row.ids)] = _ancestry(row.parents)
    inputs = {"input_ids": torch.from_numpy(ids).to(device), "position_ids": torch.from_numpy(positions).to(device)}
    if all(row.is_line for row in rows):
        inputs["attention_mask"] = (
            torch.tensor([[i < len(r.ids) for i in range(width)] for r in rows]).long().to(device)
        )
    else:
        seen |= np.eye(width, dtype=bool)  # padding sees itself, so that no row of the softmax is empty
        bias = torch.zeros(len(rows), 1, width, width, dtype=dtype)
        inputs["attention_mask"] = bias.masked_fill(torch.from_numpy(~seen)[:, None], torch.finfo(dtype).min).to(device)
    return inputs


def _ancestry(parents: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Depth [L] of each token, and which tokens it sees [L, L]: itself and its ancestors."""
    length = len(parents)
    trunk = next((i for i, parent in enumerate(parents) if parent != i - 1), length)
    depth = np.arange(length)
    seen = np.tri(length, dtype=bool)
    for i in range(trunk, length):
        depth[i] = depth[parents[i]] + 1
        seen[i] = seen[parents[i]]
        seen[i, i] = True
    return depth, seen
