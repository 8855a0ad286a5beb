"""Drawing the next token of every row: random streams by name, exact numbers, and what each row has come to.

A row's draw inverts its cumulative distribution at its own random number, so that it depends on nothing but its name and the
model's probabilities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omniopd.types import Finish


def named_seed(*name: object) -> int:
    """A 63-bit seed from a name such as (run seed, "rollout", step, row): the same on every machine and in any order."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, name)).encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, slots=True)
class Request:
    """Continue `prompt_ids` `draws` times. `temperature` 0 takes the likeliest token.

    Draw d is the first draw of the same request with `seed + d`, so that it does not matter how draws are shared out
    among calls. `top` asks for so many of the likeliest tokens at every place. `guide_ids` are the prompt as read by the
    teacher that bends the distribution (`omniopd.blending`), if one does.
    """

    prompt_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    draws: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top: int = 0
    guide_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Draw:
    """What was drawn: `ids`, `logprobs`, `entropy` are [T], end token included; see `omniopd.types.Rollout`.

    `top` is [T][K], where it was asked for: the likeliest tokens at each place, best first, as (id, log-prob at
    temperature 1). `facts` are further numbers [T] by name.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropy: tuple[float, ...]
    finish: Finish
    top: tuple[tuple[tuple[int, float], ...], ...] = ()
    facts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


Ended = Callable[[int, list[Draw]], None]
"""Hears of request i, with its draws, when the last of them has ended."""


class Rows:
    """The rows being drawn, R of them: a row for each draw of each request, in order.

    `request_of` [R] says whose draw a row is. `alive` are the rows still being written, in the order in which their logits
    are given. The device is waited for once a token, to know which rows have ended, and once more for those rows' numbers.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        end_ids: Collection[int],
        vocabulary: int,
        device: torch.device,
        ended: Ended,
    ) -> None:
        self.requests, self.end_ids, self.ended = requests, frozenset(end_ids), ended
        self.request_of = [i for i, request in enumerate(requests) for _ in range(request.draws)]
        own = [requests[i] for i in self.request_of]
        longest = max(request.max_new_tokens for request in own)
        streams = [_stream(request, draw, longest) for request in requests for draw in range(request.draws)]
        self.uniform = torch.stack(streams, dim=1).to(device)  # [longest, R]
        self.temperature = torch.tensor([r.temperature for r in own], device=device)
        self.top_p = torch.tensor([r.top_p for r in own], device=device, dtype=torch.float64)
        self.greedy = all(r.temperature == 0 for r in own)
        self.tempered = any(r.temperature != 1 for r in own)
        self.cut = any(r.top_p < 1 for r in own)
        most = min(max(r.top for r in own), vocabulary)
        self.numbers = torch.empty(2, longest, len(own), device=device)  # log-prob and entropy of each token
        self.likeliest = torch.empty(longest, len(own), most, dtype=torch.long, device=device)
        self.likely = torch.empty(longest, len(own), most, device=device)
        self.facts: dict[str, Tensor] = {}  # each [longest, R]
        self.ids: list[list[int]] = [[] for _ in own]
        self.alive = list(range(len(own)))
        self.at = torch.arange(len(own), device=device)  # `alive` on the device
        self.length = 0  # tokens that the living rows have
        self._draws: dict[int, Draw] = {}

    def choose(self, logits: Tensor) -> Tensor:
        """The next token [living rows] of every living row, of its logits [living rows, V] in fp32."""
        logp = logits.log_softmax(-1)
        probs = logp.exp()
        entropy = -(probs * logp).nan_to_num(0.0).sum(-1)  # 0 * -inf is 0 here: p log p -> 0
        tokens = logits.argmax(-1) if self.greedy else self._drawn(logits, probs)
        self.numbers[0, self.length, self.at] = logp.gather(1, tokens[:, None])[:, 0]
        self.numbers[1, self.length, self.at] = entropy
        if most := self.likely.shape[-1]:
            self.likely[self.length, self.at], self.likeliest[self.length, self.at] = logp.topk(most, -1)
        return tokens

    def _drawn(self, logits: Tensor, probs: Tensor) -> Tensor:
        temperature = self.temperature[self.at]
        if self.tempered:
            probs = (logits / temperature.clamp(min=1e-6)[:, None]).softmax(-1)
        probs = probs.double()
        if self.cut:
            probs = nucleus(probs, self.top_p[self.at])
        cumulative = probs.cumsum(-1)
        u = self.uniform[self.length, self.at] * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, u[:, None], right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        return torch.where(temperature == 0, logits.argmax(-1), tokens) if self.tempered else tokens

    def note(self, facts: Mapping[str, Tensor]) -> None:
        """Numbers [living rows] by name of the tokens that were just chosen."""
        for name, numbers in facts.items():
            kept = self.facts.setdefault(name, torch.empty_like(self.numbers[0]))
            kept[self.length, self.at] = numbers.to(kept)

    def append(self, tokens: Tensor) -> list[int] | None:
        """The chosen tokens have been written. Returns which of the living rows go on, as places among them; None if all do.

        The holes are filled by the last of them, so that few rows change their place.
        """
        self.length += 1
        over = []
        for row, token in zip(self.alive, tokens.tolist(), strict=True):
            self.ids[row].append(token)
            limit = self.requests[self.request_of[row]].max_new_tokens
            over.append(token in self.end_ids or self.length >= limit)
        if not any(over):
            return None
        self._finish([row for row, done in zip(self.alive, over, strict=True) if done])
        living = over.count(False)
        movers = (place for place in range(len(over) - 1, living - 1, -1) if not over[place])
        kept = [next(movers) if over[place] else place for place in range(living)]
        self.alive = [self.alive[place] for place in kept]
        self.at = torch.tensor(self.alive, dtype=torch.long, device=self.at.device)
        return kept

    def _finish(self, rows: list[int]) -> None:
        """Rows have ended: their numbers leave the device, and requests that are whole are told of."""
        logprobs, entropy = self.numbers[:, : self.length, rows].transpose(1, 2).tolist()
        tops = zip(
            *(x[: self.length, rows].transpose(0, 1).tolist() for x in (self.likeliest, self.likely)), strict=True
        )
        facts = {name: numbers[: self.length, rows].T.tolist() for name, numbers in self.facts.items()}
        for place, (row, lp, h, (best, values)) in enumerate(zip(rows, logprobs, entropy, tops, strict=True)):
            ids, top = self.ids[row], self.requests[self.request_of[row]].top
            pairs = zip(best, values, strict=True)
            likely = tuple(tuple(zip(i[:top], v[:top], strict=True)) for i, v in pairs) if top else ()
            finish: Finish = "stop" if ids[-1] in self.end_ids else "length"
            own_facts = {name: tuple(numbers[place]) for name, numbers in facts.items()}
            self._draws[row] = Draw(tuple(ids), tuple(lp), tuple(h), finish, likely, own_facts)
        for request in sorted({self.request_of[row] for row in rows}):
            own = [row for row, i in enumerate(self.request_of) if i == request]
            if all(row in self._draws for row in own):
                self.ended(request, [self._draws[row] for row in own])


def _stream(request: Request, draw: int, longest: int) -> Tensor:
    """The random numbers [longest] of a draw, those past its limit 0."""
    generator = torch.Generator().manual_seed(named_seed(request.seed + draw, 0))
    numbers = torch.rand(request.max_new_tokens, generator=generator, dtype=torch.float64)
    return torch.nn.functional.pad(numbers, (0, longest - len(numbers)))


def nucleus(probs: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but the smallest set of likeliest tokens whose mass reaches top_p [rows]; the likeliest always stays."""
    ordered, index = probs.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p[:, None]
    return probs.scatter(1, index, ordered.masked_fill(outside, 0.0))
