"""Rollouts: exact numbers, streams by name, and characters that belong to tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from omniopd.types import Prompt, Rollout
from students.policy import Policy

PROMPTS = [tiny.prompt("What is 12 + 7?", "a"), tiny.prompt("And 3?", "b"), tiny.prompt("東京 😀", "c")]


@pytest.fixture(scope="module", params=[("byte_level", "llama"), ("pieces", "qwen3")], ids=["llama", "qwen3"])
def student(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> Policy:
    return tiny.policy(tiny_folder(*request.param), max_new_tokens=24)


def same(a: Rollout, b: Rollout) -> bool:
    return (a.prompt_ids, a.ids, a.text, a.ends, a.finish) == (b.prompt_ids, b.ids, b.text, b.ends, b.finish)


def test_s1_numbers_are_the_trainers_own(student: Policy) -> None:
    for rollout in tiny.sampler(student, 0).sample(PROMPTS, 1):
        logp, entropy = tiny.dense(student.model, rollout.prompt_ids, rollout.ids)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logp, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(rollout.entropy), entropy, atol=1e-5, rtol=1e-5)


def test_a_rollout_holds_together(student: Policy) -> None:
    for rollout in tiny.sampler(student, 0).sample(PROMPTS * 3, 1):
        assert rollout.author == "student"
        assert len(rollout) == len(rollout.logprobs) == len(rollout.entropy) == len(rollout.ends) <= 24
        assert rollout.text == student.decode(list(rollout.ids))
        assert list(rollout.ends) == sorted(rollout.ends) and rollout.ends[-1] <= len(rollout.text)
        assert (rollout.finish == "stop") == (rollout.ids[-1] in student.end_ids)
        assert not set(rollout.ids[:-1]) & student.end_ids
        assert rollout.prompt_ids == student.prompt_ids(rollout.prompt)


def test_a_rollout_is_named_by_seed_step_and_row(student: Policy) -> None:
    sampler = tiny.sampler(student, 5)
    first = sampler.sample(PROMPTS, 2)
    assert all(map(same, first, tiny.sampler(student, 5).sample(PROMPTS, 2)))
    assert all(map(same, first[:1], sampler.sample(PROMPTS[:1], 2)))  # without its neighbours
    again: list[list[Rollout]] = [sampler.sample(PROMPTS, 3), tiny.sampler(student, 6).sample(PROMPTS, 2)]
    assert all(not same(a, b) for other in again for a, b in zip(first, other, strict=True))
    twins = sampler.sample([PROMPTS[0]] * 2, 2)
    assert twins[0].ids != twins[1].ids


def test_s6_the_next_rollout_is_of_the_new_weights(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder)
    before = tiny.sampler(student, 0).sample(PROMPTS, 1)
    with torch.no_grad():
        student.model.get_output_embeddings().weight.mul_(0.5)
    after = tiny.sampler(student, 0).sample(PROMPTS, 1)
    assert not any(map(same, before, after))
    logp, _ = tiny.dense(student.model, after[0].prompt_ids, after[0].ids)
    torch.testing.assert_close(torch.tensor(after[0].logprobs), logp, atol=1e-5, rtol=1e-5)


def test_greedy_takes_the_likeliest(student: Policy) -> None:
    (rollout,) = tiny.sampler(student, 0).greedy(PROMPTS[:1])
    whole = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
    with torch.no_grad():
        best = student.model(input_ids=whole).logits[0, len(rollout.prompt_ids) - 1 : -1].argmax(-1)
    assert best.tolist() == list(rollout.ids)
    assert same(rollout, tiny.sampler(student, 9).greedy(PROMPTS[:1])[0])


def test_unwritten_rollouts_have_a_prompt_and_no_tokens(student: Policy) -> None:
    for prompt, rollout in zip(PROMPTS, tiny.sampler(student, 0).unwritten(PROMPTS), strict=True):
        assert (rollout.prompt, rollout.prompt_ids, len(rollout), rollout.text) == (
            prompt,
            student.prompt_ids(prompt),
            0,
            "",
        )


@pytest.mark.parametrize("text", ["The answer is 19.", "東京 <|end|> </s> 😀", ""])
def test_a_given_text_is_scored_as_if_the_student_had_written_it(student: Policy, text: str) -> None:
    rollout = tiny.sampler(student, 0).given(Prompt("p", PROMPTS[0].messages), text)
    assert (rollout.text, rollout.finish, rollout.ids[-1]) == (text, "stop", student.end_id)
    assert rollout.ends[-1] == len(text) and student.end_id not in rollout.ids[:-1]
    logp, entropy = tiny.dense(student.model, rollout.prompt_ids, rollout.ids)
    torch.testing.assert_close(torch.tensor(rollout.logprobs), logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(rollout.entropy), entropy, atol=1e-5, rtol=1e-5)


def test_lora_students_sample_with_their_adapters(llama_folder: Path) -> None:
    student = tiny.policy(llama_folder, lora={"rank": 2})
    plain = tiny.sampler(tiny.policy(llama_folder), 0).sample(PROMPTS, 1)
    assert all(map(same, plain, tiny.sampler(student, 0).sample(PROMPTS, 1)))
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    adapted = tiny.sampler(student, 0).sample(PROMPTS, 1)
    assert not any(map(same, plain, adapted))
    logp, _ = tiny.dense(student.model, adapted[0].prompt_ids, adapted[0].ids)
    torch.testing.assert_close(torch.tensor(adapted[0].logprobs), logp, atol=1e-5, rtol=1e-5)
