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
CPU_TOKENS = 1024  # more at once make no product faster on a CPU: states leave its cache, rows are padded more

Logits = Callable[[Tensor], Tensor]


@torch.no_grad()
def score(model: PreTrainedModel, logits: Logits, rows: Sequence[Given], *, batch_tokens: int) -> list[Scores]:
    """The scores of each row, in order.

    Args:
        logits: makes logits [n, V] of last hidden states [n, D], without gradients; the head of whole distributions.
        batch_tokens: bound on rows times width of one batch, hence on memory.
    """
    if model.device.type == "cpu":
        batch_tokens = min(batch_tokens, CPU_TOKENS)
    found: dict[int, Scores] = {}
    for batch in _batches(rows, batch_tokens):
        found |= zip(batch, _scores([rows[place] for place in batch], model, logits), strict=True)
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


def _scores(rows: Sequence[Given], model: PreTrainedModel, logits: Logits) -> list[Scores]:
    """Log-probs in fp32 over the whole vocabulary, of one batch."""
    hidden = _hidden(model, rows)
    ids = torch.tensor([token for row in rows for token in row.ids[_first(row) :]], device=model.device)
    most = max(row.top for row in rows)
    own: list[float] = []
    best: list[tuple[list[int], list[float]]] = []
    for states, given in zip(torch.cat(hidden).split(SLICE), ids.split(SLICE), strict=True):
        logp = logits(states).float().log_softmax(-1)
        own += logp.gather(1, given[:, None])[:, 0].tolist()
        values, tokens = logp.topk(min(most, logp.shape[-1]), -1)
        best += zip(tokens.tolist(), values.tolist(), strict=True)
    scores = []
    end = 0
    for row, states in zip(rows, hidden, strict=True):
        start, end = end, end + len(states)
        unknown = _first(row) - row.start  # nothing precedes the first token of all
        top = [likeliest(dict(zip(*place, strict=True)), row.top) for place in best[start:end]]
        whole = Distributions(states.clone(), logits) if row.whole else None
        usage = Usage(prompt_tokens=len(row.ids))
        scores.append(Scores((*[None] * unknown, *own[start:end]), (*[{}] * unknown, *top), whole, usage))
    return scores


def _first(row: Given) -> int:
    return max(row.start, 1)


def frozen(logits: Logits) -> Logits:
    """The same without gradients."""

    def head(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            return logits(hidden)

    return head
