"""The past of the rows being sampled: keys and values with room ahead, and which of them a row may look at.

New tokens are written behind the old ones instead of copying them all, and of the rows that go on when others end only those
move that fill the holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

_takes_bias: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


class RoomyLayer(DynamicLayer):
    """A plain attention layer's keys and values [rows, heads, length, dim], views of rooms of full width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new tokens; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        length = before + key_states.shape[-2]
        if self._rooms is None:
            self._rooms = self._empty(key_states), self._empty(value_states)
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[:, :, before:length] = states
        self._show(length)
        return self._rooms[0][:, :, :length], self._rooms[1][:, :, :length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Copies of rows, as many as there are indices."""
        assert self.keys is not None and self.values is not None, "there is a prompt"
        length = self.get_seq_length()
        rooms = []
        for states in (self.keys, self.values):
            rows = states.index_select(0, beam_idx)
            room = self._empty(rows)
            room[:, :, :length] = rows
            rooms.append(room)
        self._rooms = rooms[0], rooms[1]
        self._show(length)

    def keep(self, kept: Sequence[int]) -> None:
        """As `keep_rows`."""
        assert self._rooms is not None, "there is a prompt"
        length = self.get_seq_length()
        moved = [(to, row) for to, row in enumerate(kept) if to != row]
        if moved:
            to, row = torch.tensor(moved, device=self._rooms[0].device).T
            for room in self._rooms:
                states = room[:, :, :length]
                states[to] = states[row]
        self._rooms = self._rooms[0][: len(kept)], self._rooms[1][: len(kept)]
        self._show(length)

    def _empty(self, like: Tensor) -> Tensor:
        return like.new_empty(*like.shape[:2], self.width, like.shape[-1])

    def _show(self, length: int) -> None:
        assert self._rooms is not None
        self.keys, self.values = (room[:, :, :length] for room in self._rooms)


def roomy_cache(model: PreTrainedModel, width: int) -> DynamicCache:
    """The model's own kind of cache, its plain attention layers with room for so many tokens in all."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(width) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def keep_rows(cache: DynamicCache, kept: Sequence[int], device: torch.device) -> None:
    """Leave these rows only, in this order; row `kept[i]` becomes row i. What stays in its place is not copied."""
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep(kept)
        else:
            layer.reorder_cache(torch.tensor(kept, device=device))  # type: ignore[arg-type]


def decoding_mask(model: PreTrainedModel, cache: DynamicCache, real: Tensor, width: int) -> Tensor | None:
    """What rows may look at when they write a token, for all lengths up to the width: the first so many of the last axis.

    A bias [rows, 1, 1, width], 0 or the lowest number, spares the library to make one for every token. Models that read a
    mask in their own way get [rows, width], 1 or 0. None where nothing is hidden.

    Args:
        real: [rows, length] of the prompts, 0 where there is padding.
    """
    if bool(real.all()):
        return None
    plain = all(isinstance(layer, RoomyLayer) for layer in cache.layers)
    seen = torch.nn.functional.pad(real, (0, width - real.shape[1]), value=1)
    return _bias(seen, model.dtype)[:, None, None] if plain and takes_bias(model) else seen


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(seen == 0, torch.finfo(dtype).min)


def takes_bias(model: PreTrainedModel) -> bool:
    """Whether a bias hides the past of a model of plain attention layers as a mask does; found by trying it, once."""
    if model not in _takes_bias:
        _takes_bias[model] = _tried(model)
    return _takes_bias[model]


@torch.no_grad()
def _tried(model: PreTrainedModel) -> bool:
    ids = torch.arange(2, 8, device=model.device)[None]
    real = (ids > 3).long()
    position = (real.cumsum(1) - 1).clamp(min=0)
    found = []
    try:
        for mask in (real, _bias(real, model.dtype)[:, None, None]):
            past = model(
                input_ids=ids[:, :-1], attention_mask=real[:, :-1], position_ids=position[:, :-1], use_cache=True
            ).past_key_values
            step = {"input_ids": ids[:, -1:], "position_ids": position[:, -1:], "past_key_values": past}
            found.append(model(**step, attention_mask=mask, use_cache=True).logits.float())
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return torch.allclose(found[0], found[1], atol=tolerance, rtol=tolerance)
