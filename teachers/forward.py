"""Scores of given tokens by a causal language model in this process: one pass of its body, then logits in slices.

Rows are padded on the right, behind everything that a causal model looks at, so that no mask is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from omniopd.model import split_model
from omniopd.types import Distributions, Usage
from teachers.engine import Given
from teachers.scoring import Scores, likeliest

SLICE = 512  # places whose logits [SLICE, V] exist at one time

Logits = Callable[[Tensor], Tensor]


@torch.no_grad()
def score(model: PreTrainedModel, logits: Logits, rows: Sequence[Given], *, batch_tokens: int) -> list[Scores]:
    """The scores of each row, in order.

    Args:
        logits: makes logits [n, V] of last hidden states [n, D].
        batch_tokens: bound on rows times width of one batch, hence on memory.
    """
    found: dict[int, Scores] = {}
    for batch in _batches(rows, batch_tokens):
        hidden = _hidden(model, [rows[place] for place in batch])
        found |= {place: _scores(rows[place], states, logits) for place, states in zip(batch, hidden, strict=True)}
    return [found[place] for place in range(len(rows))]


def _batches(rows: Sequence[Given], batch_tokens: int) -> Iterator[list[int]]:
    """Places of the rows by length, cut where the next one would make the padded batch too large."""
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place].ids)):
        if batch and (len(batch) + 1) * len(rows[place].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _hidden(model: PreTrainedModel, rows: Sequence[Given]) -> list[Tensor]:
    """For each row the last hidden states [n, D] that its n scored tokens were foretold from."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows], device=model.device)
    hidden = split_model(model)[0](input_ids=ids, use_cache=False).last_hidden_state
    return [states[_first(row) - 1 : len(row.ids) - 1] for states, row in zip(hidden, rows, strict=True)]


def _scores(row: Given, hidden: Tensor, logits: Logits) -> Scores:
    """Log-probs in fp32 over the whole vocabulary."""
    own: list[float | None] = [None] * (_first(row) - row.start)  # nothing precedes the first token of all
    top: list[dict[int, float]] = [{} for _ in own]
    ids = torch.tensor(row.ids[_first(row) :], device=hidden.device)
    for states, given in zip(hidden.split(SLICE), ids.split(SLICE), strict=True):
        logp = logits(states).float().log_softmax(-1)
        own += logp.gather(1, given[:, None])[:, 0].tolist()
        values, tokens = logp.topk(min(row.top, logp.shape[-1]), -1)
        places = zip(tokens.tolist(), values.tolist(), strict=True)
        top += [likeliest(dict(zip(*place, strict=True)), row.top) for place in places]
    whole = Distributions(hidden.clone(), _frozen(logits)) if row.whole else None
    return Scores(tuple(own), tuple(top), whole, Usage(prompt_tokens=len(row.ids)))


def _first(row: Given) -> int:
    return max(row.start, 1)


def _frozen(logits: Logits) -> Logits:
    def head(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return logits(hidden)

    return head
