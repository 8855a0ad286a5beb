"""Log-probs of given tokens: each value lands on its own token, and a reply that holds no scores says so.

The canary of these tests: the log-prob of token t is -t, so a row that is shifted by one shows at every place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny

from teachers.scoring import EchoScorer, Scorer, scorer_of
from teachers.wire import Malformed

IDS = (7, 301, 12, 55, 7, 40)
CANARY = (None, -1.0, -2.0, -3.0, -4.0, -5.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("byte-level")
    tiny.byte_level().save_pretrained(path)
    return str(path)


def vllm_place(place: int) -> dict[str, Any] | None:
    """What vLLM says of one place: two likelier ids, or one where the given id is the second."""
    if place == 0:
        return None
    others = {"300": {"logprob": -place + 0.5, "rank": 1}, "310": {"logprob": -place - (place % 2) + 0.25, "rank": 2}}
    return {**others, str(IDS[place]): {"logprob": float(-place), "rank": 3}}


def vllm(places: Any) -> dict[str, Any]:
    return {"choices": [{"text": "x", "finish_reason": "length", "prompt_logprobs": places}]}


def sglang(own: Any, top: Any = None) -> dict[str, Any]:
    return {"text": "", "meta_info": {"prompt_tokens": 6, "input_token_logprobs": own, "input_top_logprobs": top}}


def sglang_own() -> list[list[Any]]:
    return [[value, one, None] for value, one in zip(CANARY, IDS, strict=True)]


def sglang_top() -> list[Any]:
    return [None, *([[-t + 0.5, 300, None], [float(-t), IDS[t], None]] for t in range(1, 6))]


def echo(values: Any, ids: Any = None, top: Any = None) -> dict[str, Any]:
    said = {"tokens": ["a"] * len(values or ()), "token_logprobs": values, "token_ids": ids, "top_logprobs": top}
    return {"choices": [{"text": "x", "finish_reason": "length", "logprobs": said}]}


def together(values: Any, ids: Any = None) -> dict[str, Any]:
    said = {"tokens": ["a"] * len(values), "token_logprobs": values, "token_ids": ids}
    own = {"tokens": ["x"], "token_logprobs": [-9.0], "token_ids": [3]}
    return {"prompt": [{"text": "…", "logprobs": said}], "choices": [{"text": "x", "logprobs": own}]}


@pytest.fixture
def scorers(bench: Any, folder: str) -> dict[str, Scorer]:
    backends = {
        "vllm": bench.make("vllm").backend,
        "sglang": bench.make("sglang").backend,
        "fireworks": bench.make("openai", preset="fireworks", tokenizer=folder).backend,
        "together": bench.make("openai", preset="together", tokenizer=folder).backend,
    }
    found = {name: scorer_of(backend) for name, backend in backends.items()}
    assert all(scorer is not None for scorer in found.values())
    return found  # type: ignore[return-value]


GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "vllm": lambda: vllm([vllm_place(t) for t in range(6)]),
    "sglang": lambda: sglang(sglang_own(), sglang_top()),
    "fireworks": lambda: echo([*CANARY, -9.0], [*IDS, 3]),
    "together": lambda: together(list(CANARY), [float(one) for one in IDS]),
}


def test_what_can_score_is_a_scorer(bench: Any, folder: str, scorers: dict[str, Scorer]) -> None:
    assert all(isinstance(scorer, Scorer) for scorer in scorers.values())
    assert isinstance(scorers["together"], EchoScorer)
    for kind, settings in [
        ("openai", {"preset": "fireworks"}),  # without the tokenizer there are no ids to send
        ("openai", {"preset": "openai", "tokenizer": folder}),
        ("ollama", {"tokenizer": folder}),
        ("llamacpp", {"tokenizer": folder}),
    ]:
        assert scorer_of(bench.make(kind, **settings).backend) is None


@pytest.mark.parametrize("name", GOOD)
def test_r1_r13_each_value_lands_on_its_own_token(scorers: dict[str, Scorer], name: str) -> None:
    scores = scorers[name].read_scores(GOOD[name](), IDS, 2)
    assert scores.logprobs == CANARY
    assert len(scores.top) == 6
    assert scores.top[0] == {}


def test_the_k_likeliest_are_kept_and_not_the_given_one_beside_them(scorers: dict[str, Scorer]) -> None:
    by_vllm = scorers["vllm"].read_scores(GOOD["vllm"](), IDS, 2)
    assert by_vllm.top[1] == {300: -0.5, 301: -1.0}  # 301, the given one, is the second there
    assert by_vllm.top[2] == {300: -1.5, 310: -1.75}  # 12 is the third and left out
    assert scorers["vllm"].read_scores(GOOD["vllm"](), IDS, 0).top == ({},) * 6
    by_sglang = scorers["sglang"].read_scores(GOOD["sglang"](), IDS, 2)
    assert by_sglang.top[5] == {300: -4.5, 40: -5.0}
    assert scorers["sglang"].read_scores(sglang(sglang_own()), IDS, 0).top == ({},) * 6


def test_an_alternative_that_is_no_single_token_is_left_out(scorers: dict[str, Scorer]) -> None:
    tokenizer = tiny.byte_level()
    (the,) = tokenizer.encode(" the", add_special_tokens=False)
    top = [None, *({" the": -0.5, " the the": -0.6} for _ in range(6))]
    scores = scorers["fireworks"].read_scores(echo([*CANARY, -9.0], [*IDS, 3], top), IDS, 2)
    assert scores.top == ({}, *({the: -0.5},) * 5)


SHIFTED = list(CANARY[1:])
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("vllm", vllm([vllm_place(t) for t in range(1, 6)]), "5 tokens for the 6"),
    ("vllm", vllm([*(vllm_place(t) for t in range(1, 6)), vllm_place(5)]), "no log-prob for token 1 of 6"),
    ("vllm", vllm([None, *(vllm_place(t) for t in (1, 1, 3, 4, 5))]), "no log-prob for token 2 of 6"),
    ("vllm", vllm([None, *(vllm_place(t) for t in (1, 2, 3, 4))]), "5 tokens for the 6"),
    ("vllm", vllm([None, {str(IDS[1]): {"logprob": 0.4}}, *(vllm_place(t) for t in range(2, 6))]), "log-prob 0.4 for"),
    ("vllm", vllm(None), "ignores the field"),
    ("vllm", {"choices": [{"text": "x"}]}, "ignores the field"),
    ("vllm", {"choices": []}, "another shape"),
    ("vllm", {"error": "x"}, "another shape"),
    ("vllm", vllm([None, *({str(one): {"logprob": 0.0}} for one in IDS[1:])]), "same log-prob, 0"),
    ("sglang", sglang(sglang_own()[1:], sglang_top()[1:]), "other tokens than the 6"),
    ("sglang", sglang([[v, i, None] for v, i in zip([*SHIFTED, -9.0], (9, *IDS[1:]), strict=True)]), "other tokens"),
    (
        "sglang",
        sglang([[v, i, None] for v, i in zip([None, None, *CANARY[2:]], IDS, strict=True)], sglang_top()),
        "token 1 of 6",
    ),
    ("sglang", sglang(sglang_own(), sglang_top()[1:]), "alternatives of 5 tokens"),
    ("sglang", {"text": "", "meta_info": {"prompt_tokens": 6}}, "ignores return_logprob"),
    ("sglang", [], "another shape"),
    (
        "sglang",
        sglang([[None if t == 0 else -1.5, one, None] for t, one in enumerate(IDS)], sglang_top()),
        "same log-prob",
    ),
    ("fireworks", echo([*SHIFTED, -9.0]), "6 tokens for the 6 that were sent and one more"),
    ("fireworks", echo([-9.0]), "ignores echo"),
    ("fireworks", echo(None), "ignores echo"),
    ("fireworks", {"choices": [{"text": "x", "logprobs": None}]}, "ignores echo"),
    ("fireworks", echo([*CANARY, -9.0, -9.0]), "8 tokens"),
    ("fireworks", echo([*CANARY, -9.0], [*IDS[1:], 3, 3]), "other tokens than those"),
    ("fireworks", echo([None, -1.0, None, -3.0, -4.0, -5.0, -9.0]), "no log-prob for token 2 of 6"),
    ("fireworks", echo([None, -1.0, float("nan"), -3.0, -4.0, -5.0, -9.0]), "no log-prob for token 2 of 6"),
    ("together", together(SHIFTED), "5 tokens for the 6"),
    ("together", together([None, *CANARY]), "7 tokens for the 6"),
    ("together", together([None, -2.0, -2.0, -2.0, -2.0, -2.0]), "same log-prob, -2"),
    ("together", echo([-9.0]), "ignores echo"),
]


@pytest.mark.parametrize(("name", "payload", "wrong"), BAD)
def test_r8_what_holds_no_scores_is_said(scorers: dict[str, Scorer], name: str, payload: Any, wrong: str) -> None:
    with pytest.raises(Malformed, match=wrong):
        scorers[name].read_scores(payload, IDS, 2)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_minus_infinity_is_a_value_of_a_given_token_and_no_alternative(scorers: dict[str, Scorer], name: str) -> None:
    said = GOOD[name]()
    if name == "vllm":
        for entry in said["choices"][0]["prompt_logprobs"][3].values():
            entry["logprob"] = -9999.0  # JSON has no infinity
    else:
        said["meta_info"]["input_token_logprobs"][3][0] = float("-inf")  # Python's JSON has
        said["meta_info"]["input_top_logprobs"][3] = [[float("-inf"), 300, None]]
    scores = scorers[name].read_scores(said, IDS, 2)
    assert scores.logprobs == (*CANARY[:3], float("-inf"), *CANARY[4:])
    assert scores.top[3] == {} and scores.top[4]


@pytest.mark.parametrize("name", GOOD)
def test_usage_is_what_the_server_tells_or_what_was_sent(scorers: dict[str, Scorer], name: str) -> None:
    said = GOOD[name]()
    assert scorers[name].read_scores(said, IDS, 2).usage.prompt_tokens == 6
    told = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 4}}
    if name == "sglang":
        said["meta_info"] |= {"prompt_tokens": 9, "completion_tokens": 1, "cached_tokens": 4}
    usage = scorers[name].read_scores(said | {"usage": told}, IDS, 2).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cache_read_tokens) == (9, 1, 4)


def test_a_single_token_has_no_score_and_is_no_error(scorers: dict[str, Scorer]) -> None:
    assert scorers["vllm"].read_scores(vllm([None]), IDS[:1], 2).logprobs == (None,)


def test_vllm_is_asked_for_prompt_logprobs(scorers: dict[str, Scorer]) -> None:
    call = scorers["vllm"].score_call(IDS, 5)
    assert (call.url, call.tokens) == ("http://127.0.0.1:8000/v1/completions", 7)
    assert call.body == {
        "model": "scripted",
        "prompt": list(IDS),
        "max_tokens": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "prompt_logprobs": 5,
    }


def test_sglang_is_asked_for_the_input_from_its_first_token(scorers: dict[str, Scorer]) -> None:
    call = scorers["sglang"].score_call(IDS, 5)
    assert call.url == "http://127.0.0.1:30000/generate"
    assert call.body == {
        "input_ids": list(IDS),
        "sampling_params": {
            "max_new_tokens": 0,
            "temperature": 1.0,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        },
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 5,
    }


def test_echo_sends_ids_and_to_together_their_text(scorers: dict[str, Scorer]) -> None:
    tokenizer = tiny.byte_level()
    ids = tokenizer.encode("<|user|>the answer<|assistant|>", add_special_tokens=False)
    rest = {"model": "scripted", "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "echo": True, "logprobs": 1}
    fireworks, together = (scorers[name].score_call(ids, 1) for name in ("fireworks", "together"))
    assert fireworks.url == "https://api.fireworks.ai/inference/v1/completions"
    assert fireworks.body == {"prompt": ids, **rest}
    assert together.body == {"prompt": "<|user|>the answer<|assistant|>", **rest}
