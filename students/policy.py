"""The student's weights: loading, LoRA, the frozen reference, and what the model can do, found by trying it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from omniopd.chat import ChatTemplate, first_line
from omniopd.errors import DataError, StudentError
from omniopd.model import hidden_times_head_is_logits, split_model
from omniopd.registry import SAMPLERS
from omniopd.sampling import end_ids
from omniopd.settings import Settings, tagged
from omniopd.types import Prompt


class LoraSettings(Settings):
    """Train adapters instead of all weights; the frozen reference is then the same model with adapters off."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    target_modules: str | list[str] = "all-linear"


class StudentSettings(Settings):
    """Which model learns, and how it samples."""

    path: str = Field(description="model folder or hub id")
    dtype: Literal["float32", "bfloat16"] = "float32"
    lora: LoraSettings | None = None
    rollouts: tagged(SAMPLERS) = Field(default="transformers", validate_default=True)  # type: ignore[valid-type]
    max_new_tokens: int = Field(default=512, ge=1)
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"
    slice_tokens: int | None = Field(
        default=None,
        ge=1,
        description="positions whose logits exist at one time; null: as many as take 128 MiB in fp32",
    )
    micro_batch_tokens: int = Field(default=16_384, ge=1, description="padded tokens in one forward pass")


class Policy:
    """A causal LM with its tokenizer and, if it is `anchored`, its frozen initial weights.

    Raises:
        StudentError: the path is no causal language model, or its tokenizer can't do what is needed.
    """

    def __init__(self, settings: StudentSettings, *, anchored: bool = True) -> None:
        self.settings = settings
        self.chat = ChatTemplate.load(settings.path, "student.path", StudentError)
        self.tokenizer = self.chat.tokenizer
        self.vocabulary = self.chat.vocabulary
        model = _load_model(settings)
        self.end_ids = end_ids(model, self.tokenizer)
        if not self.end_ids:
            raise StudentError(
                "student.path: neither the generation config nor the tokenizer names an end-of-text token; add one"
            )
        own = self.tokenizer.eos_token_id  # an instruct model's turn ends with this one, not with the end of documents
        self.end_id: int = min(self.end_ids) if own is None else own
        self.context: int = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self._reference: Any = None
        if settings.lora:
            model = _with_lora(model, settings.lora)
        elif anchored:
            self._reference = copy.deepcopy(model).requires_grad_(False).eval()
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        self.model: Any = model  # a PreTrainedModel, or peft's wrapper around one
        self.splits_head = hidden_times_head_is_logits(self.causal_lm)
        self.packs_trees = self.splits_head and _tree_mask_is_exact(self.causal_lm)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The causal LM itself, adapters in place."""
        return self.model.get_base_model() if self.settings.lora else self.model

    @property
    def parameters(self) -> int:
        """How many numbers the model has, adapters included."""
        return sum(p.numel() for p in self.model.parameters())

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The frozen initial student: a copy, or the same model with its adapters off."""
        if self.settings.lora:
            with self.model.disable_adapter():
                yield self.causal_lm
        else:
            assert self._reference is not None, "only an anchored policy has a reference"
            yield self._reference

    def cautions(self) -> list[str]:
        """Settings that are allowed but known to end badly, a sentence each."""
        if self.settings.dtype == "bfloat16" and not self.settings.lora:
            return ["student.dtype=bfloat16 without student.lora: small updates are lost in its 8 bits; prefer float32"]
        return []

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Gradient checkpointing on, where it is asked for; everything else stays as in sampling, without dropout."""
        layers = [m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            layer.training = self.settings.gradient_checkpointing
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        if self._reference is not None:
            self._reference.to(device)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """The prompt by the model's own chat template, ready for the answer.

        Only the template writes control tokens: where a message holds the text of one, it stays text.

        Raises:
            DataError: prompt and response do not fit the model's context, or the template refuses the messages.
        """
        try:
            ids = self.chat.ids(prompt.messages)
        except ValueError as error:
            raise DataError(f"prompt {prompt.id}: the student's chat template refuses it: {error}") from None
        room = self.context - self.settings.max_new_tokens
        if len(ids) > room:
            raise DataError(
                f"prompt {prompt.id}: {len(ids)} tokens and student.max_new_tokens={self.settings.max_new_tokens} do not "
                f"fit the student's context of {self.context}; shorten the prompt or lower student.max_new_tokens"
            )
        return ids

    def decode(self, ids: list[int]) -> str:
        return self.chat.decode(ids)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of plain text, and each token's span of characters. No text becomes a control token."""
        return self.chat.encode(text)


def _load_model(settings: StudentSettings) -> PreTrainedModel:
    path = settings.path
    if not Path(path).is_dir() and path.count("/") != 1:
        raise StudentError(f"student.path: '{path}' is neither a folder nor a hub id like 'Qwen/Qwen3-0.6B'")
    try:
        AutoConfig.from_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, settings.dtype), attn_implementation=settings.attention
        ).eval()
    except Exception as error:
        if settings.attention == "sdpa" and "scaled_dot_product_attention" in str(error):
            raise StudentError(f"student.attention: '{path}' can't use sdpa; set student.attention=eager") from None
        raise StudentError(
            f"student.path: '{path}' is no causal language model that loads: {first_line(error)}"
        ) from None


def _with_lora(model: PreTrainedModel, lora: LoraSettings) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


@torch.no_grad()
def _tree_mask_is_exact(model: PreTrainedModel) -> bool:
    """Whether a branch packed behind its sibling sees just its own ancestors: not so with recurrent or windowed layers.

    A window may be longer than any text worth trying, so that the kinds of layers are asked for first.
    """
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    body, head = split_model(model)
    trunk, branch = [1, 2, 3, 4], [5, 6]
    packed = torch.tensor([[*trunk, *branch]], device=model.device) % head.weight.shape[0]
    alone = torch.tensor([[*trunk[:2], *branch]], device=model.device) % head.weight.shape[0]
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    seen[4:, 2:4] = False  # the branch leaves the trunk after its second token
    bias = torch.zeros(1, 1, 6, 6, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min).to(model.device)
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]], device=model.device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = body(input_ids=packed, attention_mask=bias, position_ids=positions).last_hidden_state[0, 4:]
            line = body(input_ids=alone).last_hidden_state[0, 2:]
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return torch.allclose(tree.float(), line.float(), atol=tolerance, rtol=tolerance)
