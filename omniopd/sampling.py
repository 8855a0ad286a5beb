"""Seeded batched sampling from a causal language model, for rollouts, evaluation and teachers of local weights.

Each draw has a random stream of its own, seeded by name, so what a row becomes does not depend on its neighbours, on the
batch it was put in or on how often something was sampled before. The prompt is computed once for all its draws, and
finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omniopd.drawing import Draw, Ended, Request, Rows, named_seed
from omniopd.errors import OmniError
from omniopd.kv_cache import decoding_mask, keep_rows, roomy_cache
from omniopd.threads import one_thread, small_products
from omniopd.types import Teacher

__all__ = ["Blend", "Draw", "Request", "end_ids", "named_seed", "sample"]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a response: the generation config's, and the tokenizer's; empty where neither names one."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset({*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None})


@dataclass(frozen=True)
class Blend:
    """A teacher of the same vocabulary that may bend the student's next-token distribution by `budget` nats of KL."""

    model: PreTrainedModel
    budget: float

    @classmethod
    def of(cls, teacher: Teacher, budget: float) -> Blend | None:
        """The blend with a teacher that offers its weights; None where there is nothing to spend."""
        return cls(teacher.model, budget) if budget > 0 else None  # type: ignore[attr-defined]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    requests: Sequence[Request],
    end_ids: Collection[int],
    *,
    batch_tokens: int = 65_536,
    ended: Ended | None = None,
    blend: Blend | None = None,
) -> list[list[Draw]]:
    """Draw from the model; `result[i][d]` is draw d of request i.

    Args:
        end_ids: ids that end a response.
        batch_tokens: bound on rows times width of one batch, hence on memory.
        ended: hears of request i, with its draws, as soon as the last of them has ended.
        blend: the teacher that bends the model's distribution at every token.

    Raises:
        OmniError: the model does not keep its past in the library's cache.
    """
    drawn: dict[int, list[Draw]] = {}
    for batch in _batches(requests, batch_tokens):

        def over(place: int, draws: list[Draw], batch: list[int] = batch) -> None:
            drawn[batch[place]] = draws
            if ended is not None:
                ended(batch[place], draws)

        _sample_batch(model, [requests[i] for i in batch], end_ids, over)
    return [drawn[i] for i in range(len(requests))]


def _batches(requests: Sequence[Request], batch_tokens: int) -> Iterator[list[int]]:
    """Requests by the length of their prompts, cut where the next one would make the padded batch too large."""
    batch: list[int] = []
    rows = width = 0
    for i in sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids)):
        request = requests[i]
        wider = max(width, len(request.prompt_ids) + request.max_new_tokens)
        if batch and (rows + request.draws) * wider > batch_tokens:
            yield batch
            batch, rows, wider = [], 0, len(request.prompt_ids) + request.max_new_tokens
        batch.append(i)
        rows, width = rows + request.draws, wider
    if batch:
        yield batch


def _sample_batch(model: PreTrainedModel, requests: list[Request], end_ids: Collection[int], ended: Ended) -> None:
    device = model.device
    length = max(len(r.prompt_ids) for r in requests)
    width = length + max(r.max_new_tokens for r in requests)
    # padded on the left: every row's next token stands in the last column
    ids = torch.tensor([[*[0] * (length - len(r.prompt_ids)), *r.prompt_ids] for r in requests], device=device)
    short = torch.tensor([length - len(r.prompt_ids) for r in requests], device=device)
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
    logits, position = out.logits[:, -1:], positions[:, -1:]
    rows = Rows(requests, end_ids, logits.shape[-1], device, ended)
    if len(rows.alive) > len(requests):
        row_of = torch.tensor(rows.request_of, device=device)
        cache.reorder_cache(row_of)
        logits, position, real = logits[row_of], position[row_of], real[row_of]
    mask = decoding_mask(model, cache, real, width)
    with one_thread(small_products(model, len(rows.alive))):
        while True:
            tokens = rows.choose(logits[:, -1].float())
            kept = rows.append(tokens)
            if not rows.alive:
                return
            if kept is not None:  # some rows ended: carry on with the others
                keep_rows(cache, kept, device)
                tokens, position = tokens[kept], position[kept]
                mask = None if mask is None else mask[kept]
            length += 1
            position = position + 1
            logits = model(
                input_ids=tokens[:, None],
                attention_mask=None if mask is None else mask[..., :length],
                position_ids=position,
                use_cache=True,
                past_key_values=cache,
            ).logits
