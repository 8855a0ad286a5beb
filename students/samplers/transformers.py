"""Rollouts by the policy itself, in this process: exact entropies, no weights to push. `student.rollouts: transformers`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

from omniopd.registry import SAMPLERS
from omniopd.sampling import Blend, Draw, Request, named_seed, sample
from omniopd.settings import Settings
from omniopd.types import Author, Prompt, Rollout, Writing
from students.policy import Policy
from students.rollouts import PLAIN, Ended, Sampler
from students.scoring import score


class TransformersRollouts(Settings):
    """Our own sampling loop over the model's forward pass."""

    type: Literal["transformers"] = "transformers"


@dataclass(frozen=True, slots=True)
class Piece:
    """A rollout that is to be written, with the seed of its stream."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    writing: Writing
    seed: int


@SAMPLERS.register("transformers")
class TransformersSampler(Sampler):
    """The embedded sampler."""

    Config = TransformersRollouts
    offers = frozenset({"horizon", "text", "initial", "blend", "candidates"})

    def __init__(self, config: TransformersRollouts, policy: Policy, seed: int) -> None:
        super().__init__(policy, seed)

    def sample(
        self,
        prompts: Sequence[Prompt],
        step: int,
        rows: Sequence[int] | None = None,
        ended: Ended | None = None,
        writings: Sequence[Writing] | None = None,
        blend: Blend | None = None,
    ) -> list[Rollout]:
        """See `Sampler`."""
        rows = range(len(prompts)) if rows is None else rows
        writings = [PLAIN] * len(prompts) if writings is None else writings
        pieces = [
            Piece(
                prompt,
                self.policy.prompt_ids(prompt),
                writing,
                named_seed(self.seed, "rollout", step, row) if writing.seed is None else writing.seed,
            )
            for prompt, row, writing in zip(prompts, rows, writings, strict=True)
        ]
        rollouts: dict[int, Rollout] = {}

        def over(place: int, rollout: Rollout) -> None:
            rollouts[place] = rollout
            if ended is not None:
                ended(place, rollout)

        for initial in (False, True):
            if at := [place for place, piece in enumerate(pieces) if piece.writing.initial == initial]:
                self._write([pieces[place] for place in at], _moved(over, at), initial, None if initial else blend)
        return [rollouts[place] for place in range(len(prompts))]

    def greedy(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """See `Sampler`."""
        rollouts: dict[int, Rollout] = {}
        pieces = [Piece(prompt, self.policy.prompt_ids(prompt), PLAIN, 0) for prompt in prompts]
        self._write(pieces, rollouts.__setitem__, temperature=0.0)
        return [rollouts[place] for place in range(len(prompts))]

    def _write(
        self,
        pieces: Sequence[Piece],
        ended: Ended,
        initial: bool = False,
        blend: Blend | None = None,
        temperature: float = 1.0,
    ) -> None:
        policy = self.policy
        begins = self._beginnings(pieces)
        requests = [
            Request(
                (*piece.prompt_ids, *begin.ids),
                piece.seed,
                self._limit(piece) - len(begin.ids),
                temperature=temperature,
                top=self.candidates if temperature else 0,
                guide_ids=(*blend.guide.prompt_ids(piece.prompt), *begin.ids) if blend else (),
            )
            for piece, begin in zip(pieces, begins, strict=True)
        ]

        def over(place: int, draws: list[Draw]) -> None:
            piece, begin, draw = pieces[place], begins[place], draws[0]
            whole = Draw(
                begin.ids + draw.ids, begin.logprobs + draw.logprobs, begin.entropy + draw.entropy, draw.finish,
                ((),) * len(begin.ids) + draw.top if draw.top else (),
                {name: (math.nan,) * len(begin.ids) + numbers for name, numbers in draw.facts.items()},
            )  # fmt: skip
            author: Author = "initial" if initial else "mixed" if begin.ids else "student"
            ended(place, self._rollout(piece.prompt, piece.prompt_ids, whole, author, len(begin.ids)))

        policy.model.eval()
        with policy.computing(), policy.reference() if initial else nullcontext(policy.model) as model:
            sample(model, requests, policy.end_ids, ended=over, blend=blend)

    def _limit(self, piece: Piece) -> int:
        most = self.policy.settings.max_new_tokens
        return most if piece.writing.max_tokens is None else min(most, piece.writing.max_tokens)

    def _beginnings(self, pieces: Sequence[Piece]) -> list[Draw]:
        """What each is given to begin with, with the student's own log-probs; one token at least is left to write."""
        given = [piece.writing.begins[: self._limit(piece) - 1] for piece in pieces]
        texts = [(piece.prompt_ids, ids) for piece, ids in zip(pieces, given, strict=True) if ids]
        found = iter(score(self.policy, texts))
        return [Draw(ids, *(next(found) if ids else ((), ())), "length") for ids in given]


def _moved(ended: Ended, places: Sequence[int]) -> Ended:
    """Who hears of the i-th of some rollouts by its place among all."""
    return lambda i, rollout: ended(places[i], rollout)
