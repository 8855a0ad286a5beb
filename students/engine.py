"""Rollouts by an engine that has a copy of the policy's weights: pushed after each update, compared with the trainer's.

A copy can be stale (trap S6), half loaded, or computed so differently that its log-probs are not the trainer's (trap S1). All
of these show in one number, the gap between both sides' log-probs of the tokens that the engine has just written; above a
limit the run stops. An engine gives no exact entropy over the whole vocabulary, so entropies are the policy's own (trap L10).
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field
from safetensors import SafetensorError

from omniopd.chat import first_line
from omniopd.errors import StudentError
from omniopd.sampling import Blend, Draw, named_seed
from omniopd.settings import Settings
from omniopd.types import Finish, Prompt, Rollout, Writing
from omniopd.vllm import UNCHANGED
from students.checkpoint import save_merged
from students.gap import gap
from students.policy import Policy
from students.rollouts import Ended, Sampler
from students.scoring import score

MAX_GAP = {"float32": 1e-3, "bfloat16": 0.25}
"""Nats. In float32 other kernels differ by 1e-5 or so. In bfloat16 a logit between 16 and 32 is rounded by up to 1/16, the
token's own and all that it is compared with, on either side; so a push that is lost shows there only when the weights have
moved far enough."""

PARTS = 8  # a step is scored in about so many: fewer keep the teacher waiting, more waste forward passes


class EngineSettings(Settings):
    """What all such engines have in common."""

    check_every: int = Field(
        default=1, ge=1, description="steps between two comparisons of the engine's log-probs with the trainer's"
    )
    max_gap: float | None = Field(
        default=None,
        gt=0,
        description="the run stops where the 99th percentile of their difference is above this, in nats; null: 1e-3 in "
        "float32, 0.25 in bfloat16",
    )


@dataclass(frozen=True, slots=True)
class Asked:
    """A response that is to be written."""

    prompt_ids: tuple[int, ...]
    seed: int
    temperature: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Written:
    """What an engine wrote: ids [T], the end token included, and its own log-probs [T] at temperature 1, in nats."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish


class EngineSampler(Sampler):
    """A sampler over such an engine. `Rollout.logprobs` are the engine's: those of the policy that acted."""

    name: ClassVar[str]  # of the engine, in messages
    shared: ClassVar[bool] = False  # whether one engine writes for all processes of the run; the main one pushes

    def __init__(self, settings: EngineSettings, policy: Policy, seed: int, weights: Path | None = None) -> None:
        """`weights` is the folder that pushed weights pass through; None: one in memory, or a temporary one."""
        super().__init__(policy, seed)
        self._check_every = settings.check_every
        self._limit = settings.max_gap or MAX_GAP[policy.settings.compute_dtype]
        self._weights = weights
        self._open = ExitStack()
        self._holds_weights = self._compared = False

    @abstractmethod
    def write(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Written]]:
        """The responses with their places in `asked`, each as soon as it has ended."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Take up the weights in a model folder, and forget whatever was computed with others.

        Raises:
            StudentError: it can't.
        """

    def push(self, version: int) -> None:
        """See `Sampler`. Of several processes the main one writes, and nobody samples before all engines have read.

        Raises:
            StudentError: the folder can't be written, or the engine can't load it.
        """
        main = self.ranks is None or self.ranks.main
        folder = self._folder() / f"version-{version}"
        try:
            save_merged(folder, self.policy, keep=main)
            self._meet()
            if main or not self.shared:
                if not folder.is_dir():
                    raise StudentError(
                        f"student.rollouts.weights: {folder} is not there; name a folder that all machines see"
                    )
                self.load(folder)
            self._meet()
        except (OSError, SafetensorError) as problem:
            raise StudentError(
                f"student.rollouts: the weights can't be written to {folder}: {first_line(problem)}; name another folder "
                "with student.rollouts.weights"
            ) from None
        finally:
            if main:
                shutil.rmtree(folder, ignore_errors=True)
        self._holds_weights = True
        super().push(version)

    def sample(
        self,
        prompts: Sequence[Prompt],
        step: int,
        rows: Sequence[int] | None = None,
        ended: Ended | None = None,
        writings: Sequence[Writing] | None = None,
        blend: Blend | None = None,
    ) -> list[Rollout]:
        """See `Sampler`; of `writings` only the limits.

        Raises:
            StudentError: the engine's log-probs are not the trainer's.
        """
        rows = range(len(prompts)) if rows is None else rows
        limits = [writing.max_tokens for writing in writings] if writings else [None] * len(prompts)
        asked = self._asked(prompts, [named_seed(self.seed, "rollout", step, row) for row in rows], 1.0, limits)
        compares = not self._compared or step % self._check_every == 0
        scores = compares or self.entropies
        rollouts: dict[int, Rollout] = {}
        own: dict[int, tuple[float, ...]] = {}  # the trainer's log-probs
        for part in _parts(self.write(asked), len(asked) // PARTS if scores else 1):
            texts = [(asked[place].prompt_ids, written.ids) for place, written in part]
            scored = score(self.policy, texts) if scores else [((), _unknown(ids)) for _, ids in texts]
            for (place, written), (own[place], entropy) in zip(part, scored, strict=True):
                rollouts[place] = self._written(prompts[place], asked[place], written, entropy)
                if ended is not None:
                    ended(place, rollouts[place])
        self.gap = None
        if compares:
            self._compare([rollouts[place].logprobs for place in own], list(own.values()))
        return [rollouts[place] for place in range(len(prompts))]

    def greedy(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        """See `Sampler`; without entropies."""
        asked = self._asked(prompts, [0] * len(prompts), 0.0, [None] * len(prompts))
        written = dict(self.write(asked))
        return [
            self._written(prompt, asked[place], written[place], _unknown(written[place].ids))
            for place, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        """See `Sampler`."""
        self._holds_weights = False
        self._open.close()

    def sampling(self, asked: Asked) -> dict[str, Any]:
        """vLLM's sampling fields for one response. The ids that end it are the policy's own and no others."""
        return {
            "n": 1,
            "temperature": asked.temperature,
            "top_p": 1.0,
            **UNCHANGED,
            "seed": asked.seed,
            "max_tokens": asked.max_tokens,
            "stop_token_ids": sorted(self.policy.end_ids),
            "ignore_eos": True,
            "logprobs": 0,  # the written token's alone
        }

    def _asked(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], temperature: float, limits: Sequence[int | None]
    ) -> list[Asked]:
        if not self._holds_weights:
            self.push(self.version)
        most = self.policy.settings.max_new_tokens
        return [
            Asked(self.policy.prompt_ids(prompt), seed, temperature, most if limit is None else min(most, limit))
            for prompt, seed, limit in zip(prompts, seeds, limits, strict=True)
        ]

    def _written(self, prompt: Prompt, asked: Asked, written: Written, entropy: tuple[float, ...]) -> Rollout:
        return self._rollout(prompt, asked.prompt_ids, Draw(written.ids, written.logprobs, entropy, written.finish))

    def _compare(self, engines: Sequence[Sequence[float]], trainers: Sequence[Sequence[float]]) -> None:
        self.gap = gap(list(chain.from_iterable(engines)), list(chain.from_iterable(trainers)))
        if self.gap is None:  # nothing was written
            return
        self._compared = True
        if not self.gap.within(self._limit):
            raise StudentError(
                f"student.rollouts: log-probs of {self.name} and the trainer differ by {self.gap.p99:.2g} nats (99th "
                f"percentile of {self.gap.tokens} tokens, mean {self.gap.mean:.2g}) after update {self.version}, more than "
                f"max_gap={self._limit:g}: it has other weights or computes otherwise; use student.rollouts=transformers, or "
                "raise student.rollouts.max_gap if that is its rounding"
            )

    def _folder(self) -> Path:
        """Where weights are pushed through, the same for all processes of the run."""
        if self._weights is None:
            self._weights = self._temporary() if self.ranks is None else self.ranks.from_main(self._temporary)
            self._open.callback(setattr, self, "_weights", None)
        return self._weights

    def _temporary(self) -> Path:
        """A folder until `close`, in memory where there is room."""
        size = sum(p.numel() * p.element_size() for p in self.policy.model.parameters())
        memory = Path("/dev/shm")
        there = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2 * size
        folder = tempfile.TemporaryDirectory(prefix="omniopd-weights-", dir=memory if there else None)
        return Path(self._open.enter_context(folder))

    def _meet(self) -> None:
        """Wait for the other processes of the run."""
        if self.ranks is not None:
            self.ranks.all(None)


def _unknown(ids: Sequence[int]) -> tuple[float, ...]:
    return (math.nan,) * len(ids)


def _parts(written: Iterator[tuple[int, Written]], size: int) -> Iterator[list[tuple[int, Written]]]:
    """The same in lists of at least `size`, the last one excepted."""
    part = []
    for one in written:
        part.append(one)
        if len(part) >= size:
            yield part
            part = []
    if part:
        yield part
