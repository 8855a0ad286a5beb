"""A teacher in this process: local weights, drawn from by the sampler that the student uses. `type: transformers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM, PreTrainedModel

from omniopd.chat import ChatTemplate, first_line
from omniopd.errors import ConfigError, OmniError, TeacherError
from omniopd.model import logits_of
from omniopd.registry import TEACHERS
from omniopd.sampling import Guide, Request, end_ids, sample
from omniopd.types import AnswerQuery, Capabilities, Prompt
from teachers.backend import offers_of
from teachers.engine import Drawn, Engine, Given
from teachers.forward import frozen, score
from teachers.in_process import InProcessBackend, InProcessConfig, InProcessTeacher
from teachers.scoring import Scores

BATCH_TOKENS = 65_536


class TransformersConfig(InProcessConfig):
    """Settings of `type: transformers`.

    `device: auto` takes the GPU where there is one. `batch_tokens` bounds a batch, draws times padded length, and so the
    memory that it takes.
    """

    type: Literal["transformers"] = "transformers"
    device: str = "auto"
    batch_tokens: int = Field(default=BATCH_TOKENS, ge=1)


class TransformersEngine(Engine):
    """A causal language model of the library `transformers`."""

    def __init__(self, model: PreTrainedModel, chat: ChatTemplate, batch_tokens: int = BATCH_TOKENS) -> None:
        """Draw from a model; batches are cut where draws times padded length would pass `batch_tokens`."""
        context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        super().__init__(chat, context, model.device.type)
        self.model, self.batch_tokens = model.eval().requires_grad_(False), batch_tokens
        logits = logits_of(model)  # None: of an unusual build, so that it draws but does not score
        self.logits = (
            None if logits is None else frozen(logits)
        )  # one for all: targets of one head are computed together
        self.end_ids = end_ids(model, chat.tokenizer)

    @classmethod
    def load(
        cls,
        path: str,
        chat: ChatTemplate,
        *,
        field: str,
        error: type[OmniError] = ConfigError,
        dtype: str = "auto",
        device: str = "auto",
        batch_tokens: int = BATCH_TOKENS,
    ) -> TransformersEngine:
        """Load a model folder or hub id; `field` is what names it in messages.

        Raises:
            OmniError: of the given type: it is no causal language model that loads, or names no end of a text.
            ConfigError: there is no such device.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as problem:  # a torch without CUDA asserts
            raise ConfigError(
                f"teacher.device: there is no '{device}': {first_line(problem)}; set it to cpu or auto"
            ) from None
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map={"": device})
        except Exception as problem:  # the library raises a different type for every way in which this fails
            raise error(f"{field}: '{path}' is no causal language model that loads: {first_line(problem)}") from None
        engine = cls(model, chat, batch_tokens)
        if not engine.end_ids:
            raise error(
                f"{field}: neither generation config nor tokenizer of '{path}' names an end-of-text token; add one"
            )
        return engine

    def draw_batch(self, requests: Sequence[Request]) -> list[list[Drawn]]:
        """See `Engine`.

        Raises:
            TeacherError: a batch does not fit into the device's memory.
        """
        with self._in_memory():
            drawn = sample(self.model, requests, self.end_ids, batch_tokens=self.batch_tokens)
        return [[Drawn(draw.ids, draw.finish, draw.logprobs, draw.top) for draw in draws] for draws in drawn]

    def score_batch(self, rows: Sequence[Given]) -> list[Scores]:
        """See `Engine`.

        Raises:
            TeacherError: a batch does not fit into the device's memory.
        """
        assert self.logits is not None, "offered only where it is there"
        with self._in_memory():
            return score(self.model, self.logits, rows, batch_tokens=self.batch_tokens)

    @contextmanager
    def _in_memory(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TeacherError(
                f"teacher.batch_tokens: {self.batch_tokens} do not fit into memory; lower it ({first_line(error)})"
            ) from None


class TransformersBackend(InProcessBackend):
    """Weights of the library `transformers` as a back end."""

    config: TransformersConfig
    engine: TransformersEngine

    @classmethod
    def capabilities(cls, config: InProcessConfig, chat: ChatTemplate) -> Capabilities:
        """See `InProcessBackend`."""
        offered = offers_of(chat, config, "raw", chat.vocabulary.size)
        return replace(offered, logits=offered.score, decode=True)

    @property
    def offers(self) -> Capabilities:
        """Less than is promised where the model is of a build that its logits can't be had of."""
        offered = super().offers
        return offered if self.engine.logits else replace(offered, score=False, topk=0, logits=False)

    def load(self, chat: ChatTemplate) -> TransformersEngine:
        """See `InProcessBackend`."""
        config = self.config
        return TransformersEngine.load(
            config.path,
            chat,
            field="teacher.path",
            dtype=config.dtype,
            device=config.device,
            batch_tokens=config.batch_tokens,
        )


@TEACHERS.register("transformers")
class TransformersTeacher(InProcessTeacher):
    """A `Teacher` of local weights in this process."""

    Config = TransformersConfig
    Backend = TransformersBackend
    backend: TransformersBackend

    @property
    def guide(self) -> Guide:
        """Its weights, for a sampler that blends them with the student's ("decode")."""
        engine = self.backend.engine
        return Guide(engine.model, engine.end_ids, self._prompt_ids, engine.turn, engine.context)

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt as it is scored after: its own template, its own system text."""
        try:
            return self.backend.chat.ids(self.manner.ask(AnswerQuery(prompt, 0, 1, 1, 0)).messages)
        except ValueError as error:
            raise TeacherError(f"the chat template of the teacher refuses '{prompt.id}': {error}") from None
