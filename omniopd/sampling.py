"""Seeded batched sampling from a causal language model, for rollouts, evaluation and teachers of local weights.

Each draw has a random stream of its own, seeded by name, so what a row becomes does not depend on its neighbours, on the
batch it was put in or on how often something was sampled before. The prompt is computed once for all its draws, and
finished rows leave the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from omniopd.errors import OmniError
from omniopd.types import Finish


def named_seed(*name: object) -> int:
    """A 63-bit seed from a name such as (run seed, "rollout", step, row): the same on every machine and in any order."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, name)).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Request:
    """Continue `prompt_ids` `draws` times. `temperature` 0 takes the likeliest token.

    Draw d is the first draw of the same request with `seed + d`, so that it does not matter how draws are shared out
    among calls. `top` asks for so many of the likeliest tokens at every place.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    draws: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top: int = 0


@dataclass(frozen=True, slots=True)
class Draw:
    """What was drawn: `ids`, `logprobs`, `entropy` are [T], end token included; see `omniopd.types.Rollout`.

    `top` is [T][K], where it was asked for: the likeliest tokens at each place, best first, as (id, log-prob at
    temperature 1).
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropy: tuple[float, ...]
    finish: Finish
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a response: the generation config's, and the tokenizer's; empty where neither names one."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset({*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None})


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    requests: Sequence[Request],
    end_ids: Collection[int],
    *,
    batch_tokens: int = 65_536,
    ended: Callable[[int, list[Draw]], None] | None = None,
) -> list[list[Draw]]:
    """Draw from the model; `result[i][d]` is draw d of request i.

    Args:
        end_ids: ids that end a response.
        batch_tokens: bound on rows times width of one batch, hence on memory.
        ended: hears of request i, with its draws, when the last of them has ended.

    Raises:
        OmniError: the model does not keep its past in the library's cache.
    """
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
    drawn: dict[int, list[Draw]] = {}
    for batch in _batches(order, requests, batch_tokens):
        for i, draws in zip(batch, _sample_batch(model, [requests[i] for i in batch], end_ids), strict=True):
            drawn[i] = draws
            if ended is not None:
                ended(i, draws)
    return [drawn[i] for i in range(len(requests))]


def _batches(order: list[int], requests: Sequence[Request], batch_tokens: int) -> Iterator[list[int]]:
    """Cut requests, sorted by length, where the next one would make the padded batch too large."""
    batch: list[int] = []
    rows = width = 0
    for i in order:
        request = requests[i]
        wider = max(width, len(request.prompt_ids) + request.max_new_tokens)
        if batch and (rows + request.draws) * wider > batch_tokens:
            yield batch
            batch, rows, wider = [], 0, len(request.prompt_ids) + request.max_new_tokens
        batch.append(i)
        rows, width = rows + request.draws, wider
    if batch:
        yield batch


def _sample_batch(model: PreTrainedModel, requests: list[Request], end_ids: Collection[int]) -> list[list[Draw]]:
    device = model.device
    width = max(len(r.prompt_ids) for r in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros(len(requests), width, dtype=torch.long)
    for i, request in enumerate(requests):  # padded on the left: every row's next token stands in the last column
        ids[i, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
        mask[i, width - len(request.prompt_ids) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        past_key_values=_roomy_cache(model),
    )
    repeats = torch.tensor([r.draws for r in requests], device=device)
    row_of = torch.arange(len(requests), device=device).repeat_interleave(repeats)
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise OmniError(
            f"{type(model).__name__} keeps no standard cache to sample with; choose one with attention layers"
        )
    if len(row_of) > len(requests):
        cache.reorder_cache(row_of)
    state = _Rows(requests, row_of.tolist(), frozenset(end_ids), device)
    logits, mask, position = out.logits[:, -1].float()[row_of], mask[row_of], positions[row_of, -1]
    while True:
        tokens = state.choose(logits)
        kept = state.keep()
        if kept is not None:  # some rows ended: carry on with the others
            if not len(kept):
                return state.draws(len(requests))
            cache.reorder_cache(kept)
            tokens, mask, position = tokens[kept], mask[kept], position[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = position + 1
        out = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position[:, None],
            use_cache=True,
            past_key_values=cache,
        )
        logits = out.logits[:, -1].float()


class _RoomyLayer(DynamicLayer):
    """A cache layer with room ahead: a new token is written behind the old ones instead of copying them all."""

    AHEAD = 64
    _rooms: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        assert self.keys is not None and self.values is not None  # initialized above
        length = before + key_states.shape[-2]
        if self._rooms is None or self._rooms[0].shape[-2] < length:
            self._rooms = (_room(key_states, length + self.AHEAD), _room(value_states, length + self.AHEAD))
            if before:
                self._rooms[0][..., :before, :] = self.keys
                self._rooms[1][..., :before, :] = self.values
        self._rooms[0][..., before:length, :] = key_states
        self._rooms[1][..., before:length, :] = value_states
        self.keys, self.values = (room[..., :length, :] for room in self._rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._rooms = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)  # type: ignore[arg-type]


def _room(like: torch.Tensor, length: int) -> torch.Tensor:
    return like.new_empty(*like.shape[:-2], length, like.shape[-1])


def _roomy_cache(model: PreTrainedModel) -> DynamicCache:
    """The model's own kind of cache, its plain attention layers with room ahead."""
    cache = DynamicCache(config=model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _Rows:
    """The rows being drawn: their random streams, what they have drawn so far, and which are still alive."""

    def __init__(
        self, requests: list[Request], row_of: list[int], end_ids: frozenset[int], device: torch.device
    ) -> None:
        self.request_of = row_of
        self.end_ids = end_ids
        self.limits = [requests[r].max_new_tokens for r in row_of]
        counter: dict[int, int] = {}
        streams = []
        longest = max(self.limits)
        for r in row_of:
            draw = counter[r] = counter.get(r, -1) + 1
            generator = torch.Generator().manual_seed(named_seed(requests[r].seed + draw, 0))
            streams.append(torch.rand(requests[r].max_new_tokens, generator=generator, dtype=torch.float64))
        self.uniform = torch.stack([torch.nn.functional.pad(u, (0, longest - len(u))) for u in streams]).to(device)
        self.temperature = torch.tensor([requests[r].temperature for r in row_of], device=device)
        self.top_p = torch.tensor([requests[r].top_p for r in row_of], device=device)
        self.top = [requests[r].top for r in row_of]
        self.alive = list(range(len(row_of)))
        self.written: list[list[tuple[int, float, float]]] = [[] for _ in row_of]
        self.likeliest: list[list[tuple[tuple[int, float], ...]]] = [[] for _ in row_of]
        self.finish: list[Finish] = ["length"] * len(row_of)
        self.ended: list[bool] = []

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """The next token of every living row, by inverting its cumulative distribution at its own random number."""
        alive = torch.tensor(self.alive, device=logits.device)
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).nan_to_num(0.0).sum(-1)  # 0 * -inf is 0 here: p log p -> 0
        temperature, top_p = self.temperature[alive], self.top_p[alive]
        if bool((temperature == 0).all()):
            tokens = logits.argmax(-1)
        else:
            probs = (logits / temperature.clamp(min=1e-6)[:, None]).softmax(-1).double()
            if bool((top_p < 1).any()):
                probs = _nucleus(probs, top_p.double())
            cumulative = probs.cumsum(-1)
            u = self.uniform[alive, len(self.written[self.alive[0]])] * cumulative[:, -1]
            tokens = torch.searchsorted(cumulative, u[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
            tokens = torch.where(temperature == 0, logits.argmax(-1), tokens)
        self._note_likeliest(logp)
        chosen = logp.gather(1, tokens[:, None])[:, 0]
        self.ended = []
        for row, token, lp, h in zip(self.alive, tokens.tolist(), chosen.tolist(), entropy.tolist(), strict=True):
            self.written[row].append((token, lp, h))
            if token in self.end_ids:
                self.finish[row] = "stop"
            self.ended.append(token in self.end_ids or len(self.written[row]) >= self.limits[row])
        return tokens

    def _note_likeliest(self, logp: torch.Tensor) -> None:
        """The alternatives at the present place, for the rows that asked for them. logp: [living rows, V]."""
        most = min(max(self.top[row] for row in self.alive), logp.shape[-1])
        if most == 0:
            return
        values, ids = logp.topk(most, -1)
        for row, row_ids, row_values in zip(self.alive, ids.tolist(), values.tolist(), strict=True):
            if top := self.top[row]:
                self.likeliest[row].append(tuple(zip(row_ids[:top], row_values[:top], strict=True)))

    def keep(self) -> torch.Tensor | None:
        """Indices, within the living rows, of those that go on; None if all do."""
        if not any(self.ended):
            return None
        kept = [i for i, ended in enumerate(self.ended) if not ended]
        self.alive = [self.alive[i] for i in kept]
        return torch.tensor(kept, dtype=torch.long, device=self.uniform.device)

    def draws(self, requests: int) -> list[list[Draw]]:
        grouped: list[list[Draw]] = [[] for _ in range(requests)]
        for row, request in enumerate(self.request_of):
            ids, logprobs, entropy = zip(*self.written[row], strict=True)
            grouped[request].append(Draw(ids, logprobs, entropy, self.finish[row], tuple(self.likeliest[row])))
        return grouped


def _nucleus(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of likeliest tokens whose mass reaches top_p; the likeliest always stays."""
    ordered, index = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p[:, None]
    return probs.scatter(1, index, ordered.masked_fill(outside, 0.0))
