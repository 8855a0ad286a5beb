"""Sampling: streams that depend on nothing but their name, exact numbers, and the right distribution."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from omniopd.errors import OmniError
from omniopd.kv_cache import decoding_mask, roomy_cache, takes_bias
from omniopd.sampling import Draw, Request, named_seed, sample

END = 1
PROMPTS = [(5, 9, 40), (7,), (30, 31, 32, 33, 34, 35, 36), (12, 80)]


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2", "mistral"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    settings = {"sliding_window": 4} if request.param == "mistral" else {}
    return tiny.model(tiny.byte_level(), request.param, **settings)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny.model(tiny.byte_level())


def requests(draws: int = 1, limit: int = 12) -> list[Request]:
    return [Request(p, named_seed("test", i), limit, draws) for i, p in enumerate(PROMPTS)]


def close(a: Draw, b: Draw) -> bool:
    return (
        (a.ids, a.finish) == (b.ids, b.finish)
        and torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-5)
        and torch.allclose(torch.tensor(a.entropy), torch.tensor(b.entropy), atol=1e-5)
    )


def test_seeds_have_names() -> None:
    assert named_seed(0, "rollout", 3, 1) == 4469640723056124473  # must not change: old runs are resumed by it
    seeds = {named_seed(run, step, row) for run in range(5) for step in range(5) for row in range(5)}
    assert len(seeds) == 125 and max(seeds) < 2**63


def test_a_row_does_not_depend_on_its_neighbours(model: PreTrainedModel) -> None:
    together = sample(model, requests(), [END])
    alone = [sample(model, [request], [END])[0] for request in requests()]
    backwards = sample(model, requests()[::-1], [END])[::-1]
    for batched, single, reversed_ in zip(together, alone, backwards, strict=True):
        assert close(batched[0], single[0])
        assert close(batched[0], reversed_[0])


@pytest.mark.parametrize("budget", [1, 60, 130])
def test_cutting_the_batch_changes_nothing(llama: PreTrainedModel, budget: int) -> None:
    whole = sample(llama, requests(draws=3), [END])
    parts = sample(llama, requests(draws=3), [END], batch_tokens=budget)
    assert all(close(a, b) for x, y in zip(whole, parts, strict=True) for a, b in zip(x, y, strict=True))


def test_batch_tokens_bounds_the_padded_batch(llama: PreTrainedModel) -> None:
    seen: list[int] = []
    hook = llama.register_forward_pre_hook(lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True)
    sample(llama, requests(limit=20), [END], batch_tokens=2 * 27)  # the longest prompt and 20 more, twice
    hook.remove()
    assert max(seen) <= 2 < len(PROMPTS)


def test_draws_share_a_prompt_and_differ(model: PreTrainedModel) -> None:
    request = Request(PROMPTS[0], 7, 15, draws=4)
    (four,) = sample(model, [request], [END])
    assert len({draw.ids for draw in four}) == 4
    (two,) = sample(model, [replace(request, draws=2)], [END])
    assert [d.ids for d in two] == [d.ids for d in four[:2]]  # draw d is draw d, however many are asked for
    (first,) = sample(model, [replace(request, draws=1)], [END])[0]
    assert close(first, four[0])


def test_draw_d_is_the_draw_alone_with_seed_plus_d(model: PreTrainedModel) -> None:
    (four,) = sample(model, [Request(PROMPTS[0], 7, 15, draws=4)], [END])
    alone = sample(model, [Request(PROMPTS[0], 7 + d, 15) for d in range(4)], [END])
    assert all(close(together, single) for together, (single,) in zip(four, alone, strict=True))


def test_the_prompt_is_computed_once_for_all_draws(llama: PreTrainedModel) -> None:
    seen: list[tuple[int, int]] = []
    hook = llama.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    sample(llama, [Request(PROMPTS[2], 0, 3, draws=5)], [])
    hook.remove()
    assert seen == [(1, 7), (5, 1), (5, 1)]


def test_other_seeds_give_other_texts(llama: PreTrainedModel) -> None:
    texts = {sample(llama, [Request(PROMPTS[0], seed, 12)], [END])[0][0].ids for seed in range(20)}
    assert len(texts) > 15


def test_l9_numbers_are_those_of_the_distribution_that_produced_the_token(model: PreTrainedModel) -> None:
    """Left padding and the cache change nothing, and no number stands one token late."""
    for request, draws in zip(
        requests(draws=2, limit=40), sample(model, requests(draws=2, limit=40), [END]), strict=True
    ):
        for draw in draws:
            logp, entropy = tiny.dense(model, request.prompt_ids, draw.ids)
            torch.testing.assert_close(torch.tensor(draw.logprobs), logp, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.tensor(draw.entropy), entropy, atol=1e-5, rtol=1e-5)
            if len(draw.ids) > 2:  # the canary: shifted by one the numbers are far off
                assert (torch.tensor(draw.entropy)[1:] - entropy[:-1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["gemma2", "lfm2"])
def test_left_padding_is_exact_for_capped_and_hybrid_models(kind: str) -> None:
    layers = {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {"sliding_window": 4}
    odd = tiny.model(tiny.byte_level(), kind, **layers)
    for request, (draw,) in zip(requests(), sample(odd, requests(), [END]), strict=True):
        logp, _ = tiny.dense(odd, request.prompt_ids, draw.ids)
        torch.testing.assert_close(torch.tensor(draw.logprobs), logp, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "lfm2"])
def test_rows_are_exact_when_others_have_left_holes(kind: str) -> None:
    """Of the rows that go on some move to the places of those that ended, with all that they have seen."""
    layers = {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}
    model = tiny.model(tiny.byte_level(), kind, **layers)
    limits = [2, 9, 4, 12]
    asked = [Request(p, 3, limit, draws=2) for p, limit in zip(PROMPTS, limits, strict=True)]
    for request, draws in zip(asked, sample(model, asked, []), strict=True):
        for draw in draws:
            logp, entropy = tiny.dense(model, request.prompt_ids, draw.ids)
            assert len(draw.ids) == request.max_new_tokens
            torch.testing.assert_close(torch.tensor(draw.logprobs), logp, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(torch.tensor(draw.entropy), entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "takes"), [("llama", True), ("gpt2", True), ("bloom", False)])
def test_models_that_read_the_mask_in_their_own_way_are_given_a_mask(kind: str, takes: bool) -> None:
    model = tiny.model(tiny.byte_level(), kind)
    assert takes_bias(model) is takes
    for request, (draw,) in zip(requests(), sample(model, requests(), [END]), strict=True):
        logp, _ = tiny.dense(model, request.prompt_ids, draw.ids)
        torch.testing.assert_close(torch.tensor(draw.logprobs), logp, atol=1e-5, rtol=1e-5)


def test_a_model_with_a_window_is_given_a_mask_however_long_the_window_is() -> None:
    """The library cuts a mask to the window; a bias would be taken as it is."""
    windowed = tiny.model(tiny.byte_level(), "mistral", sliding_window=100)
    assert takes_bias(windowed)  # the trial is too short to tell
    mask = decoding_mask(windowed, roomy_cache(windowed, 9), torch.tensor([[0, 1, 1]]), 9)
    assert mask is not None and mask.shape == (1, 9)


def test_a_model_without_a_standard_cache_is_refused_in_one_line() -> None:
    with pytest.raises(OmniError, match="MambaForCausalLM keeps no standard cache"):
        sample(tiny.model(tiny.byte_level(), "mamba", state_size=4), requests(), [END])


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Pearson's statistic over its degrees of freedom, rare tokens pooled: about 1 if the draws follow `probs`."""
    order = probs.argsort(descending=True)
    counts, expected = counts[order].double(), probs[order].double() * counts.sum()
    often = expected >= 5
    pooled = torch.cat([counts[often], counts[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    kept = expected > 0
    return float(((pooled - expected)[kept] ** 2 / expected[kept]).sum() / (kept.sum() - 1))


def first_tokens(model: PreTrainedModel, draws: int, **how: float) -> torch.Tensor:
    (drawn,) = sample(model, [Request(PROMPTS[0], 11, 1, draws, **how)], [])
    return torch.bincount(torch.tensor([d.ids[0] for d in drawn]), minlength=model.config.vocab_size)


def probabilities(model: PreTrainedModel, temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        return (model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1] / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_draws_follow_the_models_probabilities(llama: PreTrainedModel, temperature: float) -> None:
    counts = first_tokens(llama, 20_000, temperature=temperature)
    assert chi_square(counts, probabilities(llama, temperature)) < 1.5
    assert chi_square(counts, probabilities(llama, temperature * 1.2)) > 3  # the test can tell


def test_second_tokens_follow_the_models_probabilities_too(llama: PreTrainedModel) -> None:
    """A stream that reused its first number would pass the test above and fail this one."""
    (drawn,) = sample(llama, [Request(PROMPTS[0], 3, 2, 20_000)], [])
    first = torch.tensor([d.ids[0] for d in drawn]).mode().values
    seconds = torch.tensor([d.ids[1] for d in drawn if d.ids[0] == first])
    with torch.no_grad():
        probs = llama(input_ids=torch.tensor([[*PROMPTS[0], int(first)]])).logits[0, -1].softmax(-1)
    assert len(seconds) > 500
    assert chi_square(torch.bincount(seconds, minlength=len(probs)), probs) < 1.6


@pytest.mark.parametrize("top_p", [0.3, 0.8])
def test_top_p_keeps_the_smallest_set_that_reaches_it(llama: PreTrainedModel, top_p: float) -> None:
    probs = probabilities(llama)
    ranked = probs.argsort(descending=True)
    needed = next(n for n in range(1, len(probs) + 1) if probs[ranked[:n]].sum() >= top_p)
    nucleus = torch.zeros_like(probs).scatter(0, ranked[:needed], probs[ranked[:needed]])
    counts = first_tokens(llama, 5_000, top_p=top_p)
    assert set(counts.nonzero()[:, 0].tolist()) <= set(ranked[:needed].tolist())
    assert chi_square(counts, nucleus / nucleus.sum()) < 2
    assert first_tokens(llama, 50, top_p=1e-9)[ranked[0]] == 50


def test_temperature_zero_is_greedy_also_beside_others(llama: PreTrainedModel) -> None:
    greedy = Request(PROMPTS[0], 0, 12, temperature=0.0)
    (draw,) = sample(llama, [greedy], [END])[0]
    ids = list(PROMPTS[0])
    for token in draw.ids:
        with torch.no_grad():
            assert token == int(llama(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    mixed = sample(llama, [greedy, Request(PROMPTS[1], 5, 12), replace(greedy, seed=9)], [END])
    assert close(mixed[0][0], draw) and close(mixed[2][0], draw)
    assert close(mixed[1][0], sample(llama, [Request(PROMPTS[1], 5, 12)], [END])[0][0])


def test_r6_numbers_are_at_temperature_one_whatever_is_drawn_at(llama: PreTrainedModel) -> None:
    (draw,) = sample(llama, [Request(PROMPTS[0], 4, 10, temperature=0.5, top_p=0.7)], [END])[0]
    logp, entropy = tiny.dense(llama, PROMPTS[0], draw.ids)
    torch.testing.assert_close(torch.tensor(draw.logprobs), logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(draw.entropy), entropy, atol=1e-5, rtol=1e-5)


def test_the_likeliest_are_those_of_the_distribution_at_temperature_one(llama: PreTrainedModel) -> None:
    asked = [
        Request(PROMPTS[0], 4, 10, draws=2, temperature=0.5, top_p=0.7, top=3),
        Request(PROMPTS[1], 4, 6),
        Request(PROMPTS[2], 4, 3, top=10_000),  # more than there are
    ]
    drawn = sample(llama, asked, [END])
    assert [draw.ids for draws in drawn for draw in draws] == [
        draw.ids for draws in sample(llama, [replace(r, top=0) for r in asked], [END]) for draw in draws
    ]
    assert drawn[1][0].top == ()
    assert {len(place) for place in drawn[2][0].top} == {llama.config.vocab_size}
    for draw in drawn[0]:
        ids = torch.tensor([[*PROMPTS[0], *draw.ids]])
        with torch.no_grad():
            logp = llama(input_ids=ids).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1)
        best = logp.topk(3)
        assert [[token for token, _ in place] for place in draw.top] == best.indices.tolist()
        values = torch.tensor([[value for _, value in place] for place in draw.top])
        torch.testing.assert_close(values, best.values, atol=1e-5, rtol=1e-5)


def test_limits_hold_row_by_row_and_a_longer_limit_only_goes_on(llama: PreTrainedModel) -> None:
    asked = [Request(PROMPTS[i], 2, limit) for i, limit in enumerate([1, 4, 30, 17])]
    drawn = [draws[0] for draws in sample(llama, asked, [])]
    assert [len(d.ids) for d in drawn] == [1, 4, 30, 17]
    assert all(len(d.ids) == len(d.logprobs) == len(d.entropy) and d.finish == "length" for d in drawn)
    (longer,) = sample(llama, [replace(asked[1], max_new_tokens=25)], [])[0]
    assert longer.ids[:4] == drawn[1].ids


def test_an_end_token_ends_its_row_and_belongs_to_it(llama: PreTrainedModel) -> None:
    (free,) = sample(llama, [Request(PROMPTS[0], 8, 30)], [])[0]
    end = free.ids[5]
    stop = free.ids.index(end)
    (draw,) = sample(llama, [Request(PROMPTS[0], 8, 30)], [end, 10_000])[0]
    assert (draw.ids, draw.finish) == (free.ids[: stop + 1], "stop")
    (last,) = sample(llama, [Request(PROMPTS[0], 8, stop + 1)], [end])[0]
    assert last.finish == "stop"  # the end at the limit is an end


def test_rows_that_ended_leave_the_batch(llama: PreTrainedModel) -> None:
    widths: list[int] = []
    hook = llama.register_forward_pre_hook(lambda m, a, k: widths.append(len(k["input_ids"])), with_kwargs=True)
    sample(llama, [Request(p, 0, limit) for p, limit in zip(PROMPTS, [1, 2, 3, 4], strict=True)], [])
    hook.remove()
    assert widths == [4, 3, 2, 1]


def test_a_request_is_told_of_as_soon_as_its_last_draw_has_ended(llama: PreTrainedModel) -> None:
    passes: list[int] = []
    told: list[tuple[int, int, list[Draw]]] = []
    hook = llama.register_forward_pre_hook(lambda m, a, k: passes.append(len(k["input_ids"])), with_kwargs=True)
    limits = [9, 1, 4, 6]
    asked = [Request(p, 0, limit, draws=2) for p, limit in zip(PROMPTS, limits, strict=True)]
    drawn = sample(llama, asked, [], ended=lambda i, draws: told.append((i, len(passes), draws)))
    hook.remove()
    assert [(i, after) for i, after, _ in told] == [
        (1, 1),
        (2, 4),
        (3, 6),
        (0, 9),
    ]  # passes: the prompt's, then one a token
    assert all(draws == drawn[i] for i, _, draws in told)


def test_a_request_waits_for_its_slowest_draw(llama: PreTrainedModel) -> None:
    (free,) = sample(llama, [Request(PROMPTS[0], 8, 20, draws=3)], [])
    end = free[1].ids[2]  # the second draw ends early, at the latest here
    told: list[list[Draw]] = []
    (draws,) = sample(llama, [Request(PROMPTS[0], 8, 20, draws=3)], [end], ended=lambda i, all_: told.append(all_))
    assert len({len(draw.ids) for draw in draws}) > 1
    assert told == [draws]


def test_requests_keep_their_numbers_across_batches(llama: PreTrainedModel) -> None:
    told: dict[int, list[Draw]] = {}
    drawn = sample(llama, requests(), [END], batch_tokens=1, ended=told.__setitem__)
    assert [told[i] for i in range(len(PROMPTS))] == drawn


def test_small_products_take_one_thread_and_the_prompt_all(llama: PreTrainedModel) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []
    hook = llama.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    try:
        sample(llama, [Request(PROMPTS[0], 0, 3)], [])
        assert seen == [2, 1, 1]
        assert torch.get_num_threads() == 2
    finally:
        hook.remove()
        torch.set_num_threads(before)


def test_o11_impossible_tokens_leave_entropy_finite_and_are_never_drawn(llama: PreTrainedModel) -> None:
    def forbid(module: object, inputs: object, output: object) -> None:
        output.logits[..., 50:] = -torch.inf  # type: ignore[attr-defined]

    hook = llama.register_forward_hook(forbid)
    (draws,) = sample(llama, [Request(PROMPTS[0], 0, 8, 200)], [])
    hook.remove()
    assert max(max(d.ids) for d in draws) < 50
    assert all(0 <= h < float("inf") for d in draws for h in d.entropy)


def test_no_requests_no_draws(llama: PreTrainedModel) -> None:
    assert sample(llama, [], [END]) == []
