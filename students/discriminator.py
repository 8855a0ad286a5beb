"""A network that tells two authors apart: the student's transformer, copied, with a scalar head on the last token.

It has an optimizer of its own and shares no weight with the student, so that neither's loss reaches the other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from omniopd.model import split_model
from students.policy import Policy
from students.scoring import Text, by_length

HEAD_SD = 0.02  # of the head's first weights, as of a new layer in most families


class Discriminator:
    """D(x, y): a number for each text; see `omniopd.method.Discriminator`."""

    def __init__(self, policy: Policy, learning_rate: float, max_grad_norm: float, seed: int) -> None:
        """Copy the policy's present weights. Those that the student does not train, adapters aside, are not trained here."""
        self._policy, self._max_grad_norm = policy, max_grad_norm
        body: Any = copy.deepcopy(split_model(policy.causal_lm)[0])
        head = nn.Linear(policy.hidden_size, 1, bias=False)
        with torch.no_grad():
            head.weight.normal_(std=HEAD_SD, generator=torch.Generator().manual_seed(seed))
        self.network = nn.ModuleDict({"body": body.eval(), "head": head.to(policy.model.device)})
        self._trained = {name: weight for name, weight in self.network.named_parameters() if weight.requires_grad}
        self._optimizer = torch.optim.AdamW(self._trained.values(), lr=learning_rate, weight_decay=0.0)

    @torch.no_grad()
    def values(self, texts: Sequence[Text]) -> list[float]:
        """D of each text."""
        found: dict[int, float] = {}
        for batch in by_length(texts, self._policy.settings.micro_batch_tokens):
            found |= zip(batch, self._forward([texts[i] for i in batch]).tolist(), strict=True)
        return [found[i] for i in range(len(texts))]

    def learn(self, texts: Sequence[Text], slopes: Sequence[float]) -> float:
        """One AdamW step along the gradient of `sum slope * D(text)`; returns its norm before clipping.

        A step whose gradient is not finite is left out.
        """
        self._optimizer.zero_grad(set_to_none=True)
        for batch in by_length(texts, self._policy.settings.micro_batch_tokens):
            values = self._forward([texts[i] for i in batch])
            (values * torch.tensor([slopes[i] for i in batch], device=values.device)).sum().backward()
        norm = nn.utils.clip_grad_norm_(list(self._trained.values()), self._max_grad_norm)
        if norm.isfinite():
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_dict(self) -> dict[str, Any]:
        """The trained weights and the optimizer."""
        weights = {name: weight.detach() for name, weight in self._trained.items()}
        return {"weights": weights, "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        with torch.no_grad():
            for name, weight in self._trained.items():
                weight.copy_(state["weights"][name])
        self._optimizer.load_state_dict(dict(state["optimizer"]))

    def _forward(self, texts: Sequence[Text]) -> Tensor:
        """D [B] in fp32, with gradient."""
        device = self._policy.model.device
        rows = [torch.tensor([*prompt, *ids]) for prompt, ids in texts]
        ids = pad_sequence(rows, batch_first=True).to(device)
        seen = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        with self._policy.computing():
            hidden = self.network["body"](input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows), device=device), seen.sum(1) - 1]
        values: Tensor = self.network["head"](last.float())[:, 0]
        return values
