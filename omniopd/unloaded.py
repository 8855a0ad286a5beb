"""What can be told of a run without its weights: a student of which nothing is loaded but, perhaps, its tokenizer, is enough
to put a method together and to see what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from omniopd.chat import ChatTemplate
from omniopd.choosing import offers
from omniopd.composition import compose
from omniopd.config import RunConfig
from omniopd.errors import OmniError, StudentError
from omniopd.fitting import check_method, check_needs
from omniopd.method import Method
from omniopd.registry import SAMPLERS, TASKS
from omniopd.types import Capabilities, Teacher
from students.ranks import Ranks


class Unloaded:
    """A `StudentText` for methods that are not run. Without a vocabulary only constructors may look at it."""

    end_ids: frozenset[int] = frozenset()
    end_id = 0

    def __init__(self, vocabulary: Any = None) -> None:
        self.vocabulary = vocabulary

    def decode(self, ids: list[int]) -> NoReturn:
        raise RuntimeError("no student is loaded")

    def encode(self, text: str) -> NoReturn:
        raise RuntimeError("no student is loaded")

    def embeddings(self) -> Tensor:
        """Of no tokens."""
        return torch.zeros(0, 0)


@dataclass(frozen=True, slots=True)
class _Offer:
    """A teacher of whom only promises are known."""

    capabilities: Capabilities


def method_of(config: RunConfig) -> Method:
    """The config's method, made without the student's weights.

    Raises:
        OmniError: the student's tokenizer does not load, or parts can't be joined.
    """
    vocabulary = ChatTemplate.load(config.student.path, "student.path", StudentError).vocabulary
    return compose(config.method, Unloaded(vocabulary), config.seed, group=config.train.rollouts_per_prompt)


def misfit(config: RunConfig) -> str:
    """Why a run would be refused, as far as that can be told without loading anything; "" if nothing speaks against it."""
    try:
        method, sampler = method_of(config), SAMPLERS.get(config.student.rollouts.type)
        check_method(config, method, sampler, Ranks(), TASKS.build(config.task).train)
        check_needs(method, cast(Teacher, _Offer(offers(config))))
    except OmniError as error:
        return str(error)
    return ""
