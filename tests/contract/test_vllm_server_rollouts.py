"""Live: a vLLM server writes for a student, takes its weights after each update, and is compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from omniopd.errors import StudentError
from omniopd.types import Message, Prompt, Rollout
from students.policy import Policy
from students.samplers.vllm_server import VllmServerRollouts, VllmServerSampler

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
LONG = "Tom has 12 apples and buys 7 more, gives 3 to Ann and eats 2 of them. How many are left? " * 2
PROMPTS = [Prompt(str(i), (Message("user", f"{LONG}What is {i} + 7?"),)) for i in range(16)]
LIMIT = 1e-3  # nats


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The demo student with a head of its own: `reload_weights` on a CPU leaves a head that is the embedding as it was."""
    folder = tmp_path_factory.mktemp("student")
    model = AutoModelForCausalLM.from_pretrained(DEMO / "student")
    head = model.get_input_embeddings().weight.detach().clone()
    model.config.tie_word_embeddings = False
    model.get_output_embeddings().weight = torch.nn.Parameter(head)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "student").save_pretrained(folder)
    return tiny.policy(folder, max_new_tokens=24)


@pytest.fixture(scope="module")
def url(needs_vllm: None, student: Policy) -> Iterator[str]:
    with servers.vllm_student(Path(student.settings.path)) as url:
        yield url


@pytest.fixture(scope="module")
def sampler(url: str, student: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServerSampler]:
    settings = VllmServerRollouts(base_url=url, model=servers.MODEL, weights=tmp_path_factory.mktemp("weights"))
    sampler = VllmServerSampler(settings, student, 0)
    yield sampler
    sampler.close()


def learn(student: Policy, seed: int) -> None:
    """Other weights, as far from the last as some hundred updates would bring them."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=dice))


def largest_difference(student: Policy, rollouts: list[Rollout]) -> float:
    """Of all log-probs, from those of a dense pass."""
    return max(
        float((torch.tensor(r.logprobs) - tiny.dense(student.model, r.prompt_ids, r.ids)[0]).abs().max())
        for r in rollouts
    )


def test_s1_s6_after_each_push_log_probs_are_the_trainers(student: Policy, sampler: VllmServerSampler) -> None:
    seen = set()
    for update in range(6):
        sampler.push(update)
        rollouts = sampler.sample(PROMPTS, update + 1)
        assert sampler.gap is not None and sampler.gap.p99 < LIMIT
        assert largest_difference(student, rollouts) < LIMIT
        for rollout in rollouts:
            assert rollout.version == update
            assert (rollout.finish == "stop") == (rollout.ids[-1] in student.end_ids)
            assert not set(rollout.ids[:-1]) & student.end_ids
        seen.add(str([rollout.ids for rollout in rollouts]))
        learn(student, update)
    assert len(seen) == 6
    sampler.push(6)


def test_s6_a_push_that_is_skipped_is_caught(student: Policy, sampler: VllmServerSampler) -> None:
    learn(student, 10)
    with pytest.raises(StudentError, match="log-probs of the vLLM server and the trainer differ by"):
        sampler.sample(PROMPTS, 7)
    sampler.push(7)
    sampler.sample(PROMPTS, 7)


def test_s6_a_repeated_prompt_is_of_the_new_weights(student: Policy, sampler: VllmServerSampler) -> None:
    sampler.sample(PROMPTS, 8)
    learn(student, 11)
    sampler.push(8)
    assert [r.ids for r in sampler.greedy(PROMPTS)] == [r.ids for r in tiny.sampler(student).greedy(PROMPTS)]
    sampler.sample(PROMPTS, 9)


def test_a_rollout_is_named_by_seed_step_and_row(sampler: VllmServerSampler) -> None:
    first = sampler.sample(PROMPTS, 20)
    again = sampler.sample(PROMPTS[3:5], 20, rows=[3, 4])
    assert [rollout.ids for rollout in again] == [rollout.ids for rollout in first[3:5]]


def test_a_folder_that_the_server_can_not_read_is_one_line(
    student: Policy, sampler: VllmServerSampler, tmp_path: Path
) -> None:
    with pytest.raises(StudentError, match=r"^student.rollouts.weights: .* answers \d+ to /collective_rpc") as caught:
        sampler.load(tmp_path / "not here")
    assert "\n" not in str(caught.value)


def test_a_model_that_it_does_not_serve_is_one_line(url: str, student: Policy, tmp_path: Path) -> None:
    other = VllmServerSampler(VllmServerRollouts(base_url=url, model="other", weights=tmp_path), student, 0)
    with pytest.raises(StudentError, match=r"^student.rollouts.model: .*other"):
        other.sample(PROMPTS[:1], 1)
    other.close()
