"""A model at work on rows: the prompts once, then a token for each row, with the past kept and ended rows left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from omniopd.errors import OmniError
from omniopd.kv_cache import decoding_mask, keep_rows, roomy_cache


class Decoding:
    """Rows that a model writes, R of them: a row for each draw of each prompt, in order.

    `logits` [R, V] in fp32 are those of each row's next token.

    Raises:
        OmniError: the model does not keep its past in the library's cache.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], draws: Sequence[int], room: int
    ) -> None:
        """Compute the prompts; `room` is how many tokens will follow them at most."""
        self.model, device = model, model.device
        self._length = length = max(map(len, prompts))
        width = length + room
        # padded on the left: every row's next token stands in the last column
        ids = torch.tensor([[*[0] * (length - len(prompt)), *prompt] for prompt in prompts], device=device)
        short = torch.tensor([length - len(prompt) for prompt in prompts], device=device)
        real = (torch.arange(length, device=device) >= short[:, None]).long()
        positions = (real.cumsum(1) - 1).clamp(min=0)
        out = model(
            input_ids=ids,
            attention_mask=real,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            past_key_values=roomy_cache(model, width),
        )
        cache = getattr(out, "past_key_values", None)
        if cache is None:
            raise OmniError(
                f"{type(model).__name__} keeps no standard cache to sample with; choose one with attention layers"
            )
        logits, self._position, self._cache = out.logits[:, -1], positions[:, -1:], cache
        if sum(draws) > len(prompts):
            row_of = torch.tensor([i for i, count in enumerate(draws) for _ in range(count)], device=device)
            cache.reorder_cache(row_of)
            logits, self._position, real = logits[row_of], self._position[row_of], real[row_of]
        self._mask = decoding_mask(model, cache, real, width)
        self.logits = logits.float()

    def facts(self, tokens: Tensor) -> Mapping[str, Tensor]:
        """Numbers [R] by name of the tokens [R] that were chosen next."""
        return {}

    def step(self, tokens: Tensor, kept: Sequence[int] | None) -> None:
        """The rows have been given these tokens [R]; from now on there are only those `kept`, in that order (None: all)."""
        device = self.model.device
        tokens = tokens.to(device)
        if kept is not None:
            keep_rows(self._cache, kept, device)
            tokens, self._position = tokens[kept], self._position[kept]
            self._mask = None if self._mask is None else self._mask[kept]
        self._length += 1
        self._position = self._position + 1
        logits = self.model(
            input_ids=tokens[:, None],
            attention_mask=None if self._mask is None else self._mask[..., : self._length],
            position_ids=self._position,
            use_cache=True,
            past_key_values=self._cache,
        ).logits
        self.logits = logits[:, -1].float()
