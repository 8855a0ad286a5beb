"""A tiny model as a teacher, without a back end: its scores of a query by one dense forward pass, no cache, no padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from omniopd.boundary import openings_of
from omniopd.model import split_model
from omniopd.types import Distributions, Query, ScoreQuery, TokenScores
from students.policy import Policy


@torch.no_grad()
def scored(teacher: Policy, query: Query) -> TokenScores:
    """What the teacher gives a response: its own cut of the text, unless both have one vocabulary."""
    assert isinstance(query, ScoreQuery)
    vocabulary, before = teacher.vocabulary, teacher.prompt_ids(query.prompt)
    if query.vocabulary == vocabulary.digest:
        before += query.after
        ids, ends = query.ids, vocabulary.spell(query.ids).ends
    else:
        spelling = vocabulary.cut(query.text)
        ids, ends = spelling.ids, spelling.ends
        if query.closes:
            ids, ends = (*ids, teacher.end_id), (*ends, len(query.text.encode()))
    if not ids:
        return TokenScores(query, rejected={"empty": 1})
    body, head = split_model(teacher.causal_lm)
    hidden = body(torch.tensor([[*before, *ids]])).last_hidden_state[0, len(before) - 1 : -1]
    logp = head(hidden).float().log_softmax(-1)
    own = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
    top = tuple(_top(row, query.top) for row in logp) if query.top else ()
    cut = query.vocabulary != vocabulary.digest
    opened = [openings_of(id, float(p), near, vocabulary.bytes_of) for id, p, near in zip(ids, own, top, strict=False)]
    return TokenScores(
        query,
        ids=ids,
        ends=ends,
        logprobs=tuple(own.tolist()),
        top=top,
        openings=tuple(opened) if cut else (),
        distributions=Distributions(hidden, head) if query.whole else None,
        vocabulary=vocabulary,
    )


def _top(logp: torch.Tensor, k: int) -> dict[int, float]:
    values, ids = logp.topk(k)
    return dict(zip(ids.tolist(), values.tolist(), strict=True))


def scores_of(queries: Sequence[Query], logprob: Callable[[int, int], float]) -> list[TokenScores]:
    """Scores that say `logprob(row, t)` of token t of each response, in the student's own tokens."""
    return [
        TokenScores(
            query,
            ids=query.ids,
            ends=tuple([None] * len(query.ids)),
            logprobs=tuple(logprob(query.row, t) for t in range(len(query.ids))),
        )
        for query in queries
        if isinstance(query, ScoreQuery)
    ]
