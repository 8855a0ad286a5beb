"""What students and teachers of local weights both need to know of a causal language model, found by trying it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from omniopd.errors import OmniError


def split_model(model: PreTrainedModel) -> tuple[Any, Any]:
    """The transformer without its head, and the head.

    Raises:
        OmniError: it has no head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise OmniError(f"{type(model).__name__} has no output head; choose a causal language model")
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model, head


def hidden_times_head_is_logits(model: PreTrainedModel) -> bool:
    """Whether the head alone makes the logits; some families scale or cap them afterwards."""
    return _makes_logits(model, split_model(model)[1])


def logits_of(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What makes logits [n, V] of last hidden states [n, D] exactly as the model does, scales and caps included.

    It is the model's own forward pass around a body that says what it is given: a second view of the same weights, so
    that the model itself stays as it is. None for a model that is not built that way.
    """
    body, head = split_model(model)
    if hidden_times_head_is_logits(model):
        return head
    around = copy.copy(model)
    around._modules = {name: _Said() if child is body else child for name, child in model._modules.items()}

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return around(inputs_embeds=hidden[None], use_cache=False).logits[0]

    return logits if _makes_logits(model, logits) else None


class _Said(nn.Module):
    """Stands for a transformer whose last hidden states are known."""

    def forward(self, *, inputs_embeds: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


@torch.no_grad()
def _makes_logits(model: PreTrainedModel, make: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether this makes the model's logits of its last hidden states.

    A cap hardly touches small logits, so the head's output is made large for the comparison.
    """
    body, head = split_model(model)
    ids = torch.arange(8, device=model.device)[None] % head.weight.shape[0]
    louder = head.register_forward_hook(lambda module, inputs, output: output * 1000)
    try:
        hidden = body(input_ids=ids).last_hidden_state[0]
        return torch.allclose(make(hidden).float(), model(input_ids=ids).logits[0].float(), atol=1e-5, rtol=1e-4)
    except (TypeError, AttributeError):
        return False
    finally:
        louder.remove()
