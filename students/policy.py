"""The student's weights: loading, LoRA, the frozen reference, and what the model can do, found by trying it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from omniopd.chat import ChatTemplate, first_line
from omniopd.errors import DataError, StudentError
from omniopd.model import hidden_times_head_is_logits, split_model
from omniopd.registry import SAMPLERS
from omniopd.sampling import end_ids
from omniopd.settings import Settings, tagged
from omniopd.types import Prompt
from students.tree_mask import tree_mask_is_exact


class LoraSettings(Settings):
    """Train adapters instead of all weights; the frozen reference is then the same model with adapters off."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    target_modules: str | list[str] = "all-linear"


class StudentSettings(Settings):
    """Which model learns, and how it samples."""

    path: str = Field(description="model folder or hub id")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="of the weights")
    mixed_precision: bool = Field(
        default=False,
        description="compute in bfloat16, when sampling as when learning; weights and optimizer keep their dtype",
    )
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
    micro_batch_tokens: int = Field(
        default_factory=lambda: 16_384 if torch.accelerator.is_available() else 1_024,
        ge=1,
        description="padded tokens in one forward pass of the update; unless given 16,384, or 1,024 on a CPU, in whose "
        "caches they have room",
    )

    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"]:
        """What matrix products are made in."""
        return "bfloat16" if self.mixed_precision else self.dtype


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
        self.packs_trees = self.splits_head and tree_mask_is_exact(self.causal_lm)

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The causal LM itself, adapters in place."""
        return self.model.get_base_model() if self.settings.lora else self.model

    @property
    def parameters(self) -> int:
        """How many numbers the model has, adapters included."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def frozen(self) -> PreTrainedModel | None:
        """The copy of the initial student; None without anchor, and under LoRA, which needs none."""
        return self._reference

    @property
    def hidden_size(self) -> int:
        """Numbers of a last hidden state."""
        return int(self.causal_lm.config.get_text_config().hidden_size)

    def states(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Last hidden states [B, L, D] and the head; for families that rework the logits, the logits and the identity.

        Args:
            model: the policy's causal LM, or its reference.
        """
        if not self.splits_head:
            return model(**inputs, use_cache=False).logits, nn.Identity()
        body, head = split_model(model)
        return body(**inputs, use_cache=False).last_hidden_state, head

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """The frozen initial student: a copy, or the same model with its adapters off."""
        if self.settings.lora:
            with self.model.disable_adapter():
                yield self.causal_lm
        else:
            assert self.frozen is not None, "only an anchored policy has a reference"
            yield self.frozen

    def cautions(self) -> list[str]:
        """Settings that are allowed but known to end badly, a sentence each."""
        if self.settings.dtype == "bfloat16" and not self.settings.lora:
            return [
                "student.dtype=bfloat16 without student.lora: small updates are lost in its 8 bits; prefer float32 with "
                "student.mixed_precision=true"
            ]
        return []

    def computing(self) -> AbstractContextManager[Any]:
        """Every forward pass of the student happens inside this: autocast to bfloat16 where `mixed_precision` asks for it.

        Sampling, too: the update's importance ratios, entropies and on-policy values presume that what wrote a token and what
        learns it agree, and products in another type would be a gap between them in every step (trap S1).
        """
        if not self.settings.mixed_precision:
            return nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)

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

    def embeddings(self) -> torch.Tensor:
        """A copy of the present input embeddings [V, E], on the CPU."""
        table: Any = self.causal_lm.get_input_embeddings()
        return torch.as_tensor(table.weight).detach().cpu().clone()


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
