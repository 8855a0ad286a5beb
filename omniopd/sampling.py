"""Seeded batched sampling from a causal language model, for rollouts, evaluation and teachers of local weights.

Each draw has a random stream of its own, seeded by name, so what a row becomes does not depend on its neighbours, on the
batch it was put in or on how often something was sampled before. The prompt is computed once for all its draws, and
finished rows leave the batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from omniopd.blending import Blend, Blended, Guide
from omniopd.decoding import Decoding
from omniopd.drawing import Draw, Ended, Request, Rows, named_seed
from omniopd.errors import TeacherError
from omniopd.threads import one_thread, small_products

__all__ = ["Blend", "Draw", "Guide", "Request", "end_ids", "named_seed", "sample"]


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a response: the generation config's, and the tokenizer's; empty where neither names one."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    return frozenset({*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None})


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
        blend: the teacher that bends the model's distribution at every token; of requests at temperature 1 and top-p 1,
            since a budget of KL means nothing otherwise.

    Raises:
        OmniError: the model does not keep its past in the library's cache.
        TeacherError: a prompt and its response do not fit the context of the teacher that bends.
    """
    drawn: dict[int, list[Draw]] = {}
    for batch in _batches(requests, batch_tokens):

        def over(place: int, draws: list[Draw], batch: list[int] = batch) -> None:
            drawn[batch[place]] = draws
            if ended is not None:
                ended(batch[place], draws)

        with nullcontext() if blend is None else blend.guide.turn:
            _sample_batch(model, [requests[i] for i in batch], end_ids, over, blend)
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


def _sample_batch(
    model: PreTrainedModel,
    requests: list[Request],
    end_ids: Collection[int],
    ended: Ended,
    blend: Blend | None,
) -> None:
    draws, room = [r.draws for r in requests], max(r.max_new_tokens for r in requests)
    own = Decoding(model, [r.prompt_ids for r in requests], draws, room)
    at_work = own if blend is None else _blended(own, blend, requests, end_ids)
    rows = Rows(requests, end_ids, own.logits.shape[-1], model.device, ended)
    with one_thread(small_products(model, len(rows.alive))):
        while True:
            tokens = rows.choose(at_work.logits)
            rows.note(at_work.facts(tokens))
            kept = rows.append(tokens)
            if not rows.alive:
                return
            at_work.step(tokens, kept)  # where some rows ended, with the others


def _blended(own: Decoding, blend: Blend, requests: Sequence[Request], end_ids: Collection[int]) -> Blended:
    """The teacher beside the model, on the same rows."""
    prompts, room = [r.guide_ids for r in requests], max(r.max_new_tokens for r in requests)
    longest = max(len(r.guide_ids) + r.max_new_tokens for r in requests)
    if longest > blend.guide.context:
        raise TeacherError(
            f"a prompt and its response do not fit the teacher's context of {blend.guide.context} ({longest} in all); lower "
            "student.max_new_tokens"
        )
    with torch.autocast(blend.guide.model.device.type, enabled=False):
        teacher = Decoding(blend.guide.model, prompts, [r.draws for r in requests], room)
    return Blended(own, teacher, blend, end_ids)
