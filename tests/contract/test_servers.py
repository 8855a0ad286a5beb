"""The servers themselves do what the contract tests of the adapters build on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import httpx
import pytest
import servers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evals.tasks.arithmetic import Problem, problems

PROBLEMS = list(islice(problems("heldout", 5), 4))
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}
GREEDY = {"model": servers.MODEL, "max_tokens": 13, "temperature": 0}


def post(url: str, path: str, body: dict[str, Any], **headers: str) -> Any:
    """The decoded answer; an error fails the test with what the server said."""
    answer = httpx.post(url + path, json=body, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def asked(problem: Problem, prefix: str | None = None) -> list[dict[str, str]]:
    """The question as chat messages, with the beginning of an answer if there is one."""
    begun = [] if prefix is None else [{"role": "assistant", "content": prefix}]
    return [{"role": "user", "content": problem.question}, *begun]


def prompt(problem: Problem, prefix: str = "") -> str:
    """The question as the demo teacher's template writes it."""
    return f"<s>[INST]{problem.question}[/INST]{prefix}"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(servers.TEACHER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(servers.TEACHER).eval()


@pytest.fixture(scope="module")
def greedy(tokenizer: Any, model: Any) -> Callable[[str, int], str]:
    """What transformers goes on with, without chance."""

    def complete(text: str, count: int) -> str:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=count, do_sample=False)
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    return complete


@pytest.mark.parametrize("problem", PROBLEMS)
def test_vllm_continues_an_answer_literally(vllm: str, problem: Problem, greedy: Callable[[str, int], str]) -> None:
    for prefix in (problem.terse[:3], problem.wordy[:20], problem.terse.partition(" ")[0] + " "):
        expected = greedy(prompt(problem, prefix), 13)
        chat = post(vllm, "/v1/chat/completions", {**GREEDY, **CONTINUE, "messages": asked(problem, prefix)})
        assert chat["choices"][0]["message"]["content"] == expected
        message = post(vllm, "/v1/messages", {**GREEDY, "messages": asked(problem, prefix)})
        assert message["content"][0]["text"] == expected


def test_vllm_can_be_told_to_close_the_last_turn(vllm: str, greedy: Callable[[str, int], str]) -> None:
    begun = asked(PROBLEMS[0], PROBLEMS[0].terse[:3])
    closed = {**GREEDY, "messages": begun, "chat_template_kwargs": {"open_turn": False}}
    after_the_end = greedy(prompt(PROBLEMS[0], PROBLEMS[0].terse[:3]) + "</s>", 13)
    assert post(vllm, "/v1/chat/completions", closed)["choices"][0]["message"]["content"] == after_the_end
    assert post(vllm, "/v1/messages", closed)["content"][0]["text"] == after_the_end


def test_vllm_draws_as_often_as_asked(vllm: str) -> None:
    body = {**GREEDY, **CONTINUE, "messages": asked(PROBLEMS[0], ""), "temperature": 1.5, "n": 8, "seed": 3}
    first, second = (
        [choice["message"]["content"] for choice in post(vllm, "/v1/chat/completions", body)["choices"]]
        for _ in range(2)
    )
    assert len(first) == 8
    assert len(set(first)) > 1
    assert first == second


def test_vllm_scores_a_prompt_as_transformers_does(vllm: str, tokenizer: Any, model: Any) -> None:
    ids = tokenizer(prompt(PROBLEMS[0], PROBLEMS[0].terse), add_special_tokens=False).input_ids
    body = {"model": servers.MODEL, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
    scores = post(vllm, "/v1/completions", body)["choices"][0]["prompt_logprobs"]
    assert scores[0] is None
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for position, token in enumerate(ids[1:], start=1):
        assert scores[position][str(token)]["logprob"] == pytest.approx(logp_TV[position - 1, token].item(), abs=1e-2)


def test_litellm_continues_a_model_turn_and_answers_a_question(litellm: str, greedy: Callable[[str, int], str]) -> None:
    problem, prefix = PROBLEMS[0], PROBLEMS[0].terse[:3]
    question = {"role": "user", "parts": [{"text": problem.question}]}
    begun = {"role": "model", "parts": [{"text": prefix}]}
    for contents, text in (([question], prompt(problem)), ([question, begun], prompt(problem, prefix))):
        body = {"contents": contents, "generationConfig": {"maxOutputTokens": 13, "temperature": 0}}
        path = f"/v1beta/models/{servers.MODEL}:generateContent"
        answer = post(litellm, path, body, **{"x-goog-api-key": servers.LITELLM_KEY})
        assert answer["candidates"][0]["content"]["parts"][0]["text"] == greedy(text, 13)
        assert answer["candidates"][0]["finishReason"] == "MAX_TOKENS"
        assert answer["usageMetadata"]["candidatesTokenCount"] == 13


def test_litellm_wants_its_key(litellm: str) -> None:
    answer = httpx.post(f"{litellm}/v1/chat/completions", json={**GREEDY, "messages": asked(PROBLEMS[0])}, timeout=60)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "auth_error"


@pytest.mark.parametrize("problem", PROBLEMS)
def test_llamacpp_answers_as_transformers_does(
    llamacpp: str, problem: Problem, tokenizer: Any, greedy: Callable[[str, int], str]
) -> None:
    text = post(llamacpp, "/apply-template", {"messages": asked(problem, problem.terse[:3])})["prompt"]
    assert text == prompt(problem, problem.terse[:3])
    ids = post(llamacpp, "/tokenize", {"content": text})["tokens"]
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    for asks in (text, ids):
        answer = post(llamacpp, "/completion", {"prompt": asks, "n_predict": 80, "temperature": 0})
        assert answer["content"] == greedy(text, 80)
        assert answer["stop_type"] == "eos"


def test_llamacpp_draws_as_often_as_asked(llamacpp: str) -> None:
    body = {"prompt": prompt(PROBLEMS[0]), "n_predict": 8, "temperature": 1.5, "top_k": 0, "min_p": 0.0, "n_cmpl": 8}
    drawn = [answer["content"] for answer in post(llamacpp, "/completion", body)]
    assert len(drawn) == 8
    assert len(set(drawn)) > 1


def test_llamacpp_repeats_the_beginning_in_a_chat(llamacpp: str, greedy: Callable[[str, int], str]) -> None:
    problem, prefix = PROBLEMS[0], PROBLEMS[0].terse[:3]
    answer = post(llamacpp, "/v1/chat/completions", {**GREEDY, "messages": asked(problem, prefix)})
    assert answer["choices"][0]["message"]["content"] == prefix + greedy(prompt(problem, prefix), 13)
