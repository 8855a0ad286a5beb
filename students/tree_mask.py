"""Whether a model takes the masks that trees and bins need, found by trying it."""

from __future__ import annotations

import warnings

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from omniopd.model import split_model


@torch.no_grad()
def tree_mask_is_exact(model: PreTrainedModel) -> bool:
    """Whether tokens packed behind others see just their own ancestors: not so with recurrent or windowed layers.

    Tried with a branch behind its sibling, and another text behind both. A window may be longer than any text worth trying,
    so that the kinds of layers are asked for first.
    """
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return False
    body, head = split_model(model)
    trunk, branch, other = [1, 2, 3, 4], [5, 6], [7, 8]
    packed = torch.tensor([[*trunk, *branch, *other]], device=model.device) % head.weight.shape[0]
    alone = torch.tensor([[*trunk[:2], *branch]], device=model.device) % head.weight.shape[0]
    seen = torch.ones(8, 8, dtype=torch.bool).tril()
    seen[4:, 2:4] = False  # the branch leaves the trunk after its second token
    seen[6:, :6] = False
    bias = torch.zeros(1, 1, 8, 8, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min).to(model.device)
    positions = torch.tensor([[0, 1, 2, 3, 2, 3, 0, 1]], device=model.device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = body(input_ids=packed, attention_mask=bias, position_ids=positions).last_hidden_state[0, 4:]
            branch_alone = body(input_ids=alone).last_hidden_state[0, 2:]
            other_alone = body(input_ids=packed[:, 6:]).last_hidden_state[0]
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    lines = torch.cat([branch_alone, other_alone])
    return torch.allclose(tree.float(), lines.float(), atol=tolerance, rtol=tolerance)
