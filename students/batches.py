"""Micro-batches: rows below one another where they are of one length, else behind one another, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from students.packing import Row

WIDTHS = (*(1 + eighth / 8 for eighth in range(9)), 3.0, 4.0)  # of bins that are tried, in lengths of the longest row


@dataclass(frozen=True)
class Batch:
    """One forward pass: `rows` and, for each, (its bin, its first column there). Bins are padded on the right to `width`."""

    rows: Sequence[Row]
    places: Sequence[tuple[int, int]]
    bins: int
    width: int

    @classmethod
    def of(cls, bins: Sequence[Sequence[Row]]) -> Batch:
        """Rows behind one another in each bin."""
        rows: list[Row] = []
        places: list[tuple[int, int]] = []
        for number, held in enumerate(bins):
            rows += held
            places += [(number, column) for column in accumulate(map(len, held[:-1]), initial=0)]
        return cls(rows, places, len(bins), max(map(_fill, bins)))

    @property
    def masked(self) -> bool:
        """Whether a mask [width, width] of each bin is needed: not where each holds one line, whose padding comes last."""
        return len(self.rows) > self.bins or not all(row.is_line for row in self.rows)

    @property
    def padding(self) -> int:
        """Tokens that are computed for nothing."""
        return self.bins * self.width - sum(map(len, self.rows))

    def own_sites(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the predictions of response tokens, row after row: the place among all tokens of the one that predicts, bin
        after bin; the predicted id; its number. [n] each."""
        own = [(row.own, at * self.width + column) for row, (at, column) in zip(self.rows, self.places, strict=True)]
        places = [np.arange(len(one.ids)) + (start + one.start) for one, start in own if one]
        numbers = [np.arange(len(one.ids)) + one.first for one, _ in own if one]
        ids = [np.array(one.ids) for one, _ in own if one]
        flat = (np.concatenate([*parts, np.zeros(0, dtype=np.int64)]) for parts in (places, ids, numbers))
        return tuple(map(torch.from_numpy, flat))  # type: ignore[return-value]

    def work(self, hidden: int) -> float:
        """What a forward pass costs, up to a factor, in a model of that hidden size. [ours]

        A layer's matrices have about `12 hidden**2` numbers, attention between all tokens of a bin costs
        `2 hidden width` multiplications a token, and half of that without a mask, where what is ahead is not computed.
        """
        return self.bins * self.width * (6 * hidden + self.width * (1.0 if self.masked else 0.5))


def blank_batch(token: int) -> Batch:
    """A batch that predicts nothing, for a process that has none while others have some."""
    return Batch.of([[Row([token])]])


def micro_batches(rows: Sequence[Row], budget: int, *, forests: bool = False, hidden: int = 1) -> list[Batch]:
    """All rows in batches of at most `budget` padded tokens each (a row that is longer has one of its own).

    Either rows of similar length stand below one another, or, in `forests`, bins of one of a few widths are filled: the row
    that is longest goes first, into the first bin with room for it. What takes the least `Batch.work` is taken.

    Args:
        forests: whether the model takes masks of trees.
        hidden: the model's hidden size.
    """
    if not rows:
        return []
    order = sorted(rows, key=len, reverse=True)
    plans = [_batches([[row] for row in order], budget)]
    if forests:
        widths = sorted({min(int(share * len(order[0])), budget) for share in WIDTHS})
        plans += [_batches(_bins(order, width), budget) for width in widths if width >= len(order[0])]
    return min(plans, key=lambda batches: sum(batch.work(hidden) for batch in batches))


def _bins(order: Sequence[Row], width: int) -> list[list[Row]]:
    """First-fit: each row in the first bin that has room for it."""
    bins: list[list[Row]] = []
    rooms: list[int] = []
    for row in order:
        length = len(row)
        for number, room in enumerate(rooms):
            if room >= length:
                bins[number].append(row)
                rooms[number] -= length
                break
        else:
            bins.append([row])
            rooms.append(width - length)
    return bins


def _batches(bins: Sequence[list[Row]], budget: int) -> list[Batch]:
    """Bins of similar fill together."""
    groups: list[list[list[Row]]] = []
    for held in sorted(bins, key=_fill, reverse=True):
        if groups and (len(groups[-1]) + 1) * _fill(groups[-1][0]) <= budget:
            groups[-1].append(held)
        else:
            groups.append([held])
    return [Batch.of(group) for group in groups]


def _fill(held: Sequence[Row]) -> int:
    return sum(map(len, held))


def tensors(batch: Batch, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Model inputs: ids and positions [bins, width], and a mask [bins, 1, width, width] to be added where one is needed.

    Without a mask, every token sees those before it in its bin: a line, and behind it padding that nobody reads.
    """
    shape = batch.bins, batch.width
    ids = np.zeros(shape, dtype=np.int64)
    positions, enter = np.tile(np.arange(batch.width), (2, batch.bins, 1))
    leave = enter + 1  # padding sees itself, so that no row of the softmax is empty
    for row, (number, column) in zip(batch.rows, batch.places, strict=True):
        here = number, slice(column, column + len(row))
        ids[here] = row.ids
        if batch.masked:
            depth, opened, closed = row.spans()
            positions[here], enter[here], leave[here] = depth, column + opened, column + closed
    inputs = {"input_ids": ids, "position_ids": positions}
    moved = {name: torch.from_numpy(numbers).to(device) for name, numbers in inputs.items()}
    if batch.masked:
        entered, left = (torch.from_numpy(numbers).to(device) for numbers in (enter, leave))
        now = entered[:, :, None]
        seen = (entered[:, None] <= now) & (now < left[:, None])
        bias = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
        moved["attention_mask"] = bias[:, None]
    return moved
