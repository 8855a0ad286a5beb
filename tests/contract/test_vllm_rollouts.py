"""Live: vLLM in this process writes for the demo student, takes its weights after each update, and is compared with it.

Skipped where the package is not installed; `test_in_process.py` runs this file where it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from omniopd.config import RunConfig
from omniopd.errors import StudentError
from omniopd.run import Run
from omniopd.types import Message, Prompt, Rollout
from students.policy import Policy
from students.samplers.vllm import VllmRollouts, VllmSampler

pytestmark = [pytest.mark.contract, pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")]

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
LONG = "Tom has 12 apples and buys 7 more, gives 3 to Ann and eats 2 of them. How many are left? " * 2
PROMPTS = [Prompt(str(i), (Message("user", f"{LONG}What is {i} + 7?"),)) for i in range(16)]
LIMIT = 1e-3  # nats
BLOCK = 32  # tokens that the prefix cache keeps at least; the CPU's default is longer than our prompts


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    """The engine in this very process: it is there sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


def settings(**more: Any) -> VllmRollouts:
    return VllmRollouts(enforce_eager=True, max_model_len=512, engine={"block_size": BLOCK}, **more)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Policy, VllmSampler]]:
    """The demo student, whose head is its embedding, and the sampler."""
    student = tiny.policy(DEMO / "student", max_new_tokens=24)
    sampler = VllmSampler(settings(), student, 0)
    yield student, sampler
    sampler.close()


def learn(student: Policy, seed: int) -> None:
    """Other weights, as far from the last as some hundred updates would bring them."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=dice))


def largest_difference(student: Policy, rollouts: list[Rollout]) -> float:
    """Of all log-probs, from those of a dense pass."""
    return max(
        float((torch.tensor(r.logprobs) - tiny.dense(student.model, r.prompt_ids, r.ids)[0]).abs().max())
        for r in rollouts
    )


def test_s1_s6_after_each_push_log_probs_are_the_trainers(pair: tuple[Policy, VllmSampler]) -> None:
    student, sampler = pair
    seen = []
    for update in range(6):
        sampler.push(update)
        heard: dict[int, Rollout] = {}
        rollouts = sampler.sample(PROMPTS, update + 1, ended=heard.__setitem__)
        assert [heard[place] for place in range(len(PROMPTS))] == rollouts
        assert sampler.gap is not None and sampler.gap.p99 < LIMIT
        assert largest_difference(student, rollouts) < LIMIT
        for rollout in rollouts:
            assert rollout.version == update
            assert (rollout.finish == "stop") == (rollout.ids[-1] in student.end_ids)
            _, entropy = tiny.dense(student.model, rollout.prompt_ids, rollout.ids)
            torch.testing.assert_close(torch.tensor(rollout.entropy), entropy, atol=1e-4, rtol=1e-4)
        seen.append([rollout.ids for rollout in rollouts])
        learn(student, update)
    assert len({str(ids) for ids in seen}) == 6
    sampler.push(6)


def test_s6_a_push_that_is_skipped_is_caught(pair: tuple[Policy, VllmSampler]) -> None:
    student, sampler = pair
    learn(student, 10)
    with pytest.raises(StudentError, match="log-probs of vLLM and the trainer differ by"):
        sampler.sample(PROMPTS, 7)
    sampler.push(7)
    sampler.sample(PROMPTS, 7)


def test_s6_a_reload_that_leaves_the_head_as_it_was_is_caught(
    pair: tuple[Policy, VllmSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, sampler = pair
    monkeypatch.setattr(sampler, "_extension", {})  # what vLLM 0.32 does by itself
    learn(student, 11)
    sampler.push(8)
    with pytest.raises(StudentError, match="after update 8"):
        sampler.sample(PROMPTS, 8)
    monkeypatch.undo()
    sampler.push(8)
    sampler.sample(PROMPTS, 8)


def test_s6_a_repeated_prompt_is_of_the_new_weights(
    pair: tuple[Policy, VllmSampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, sampler = pair
    assert len(student.prompt_ids(PROMPTS[0])) > 2 * BLOCK  # what all prompts begin with is kept
    before = sampler.greedy(PROMPTS)
    learn(student, 12)
    sampler.push(9)
    after = sampler.greedy(PROMPTS)
    assert before != after
    assert [rollout.ids for rollout in after] == [rollout.ids for rollout in tiny.sampler(student).greedy(PROMPTS)]
    sampler.sample(PROMPTS, 9)
    learn(student, 13)
    with monkeypatch.context() as patch:  # the cache is really on: without a reset the old keys and values show
        patch.setattr(sampler._llm, "reset_prefix_cache", lambda: True)
        sampler.push(10)
        with pytest.raises(StudentError, match="after update 10"):
            sampler.sample(PROMPTS, 10)
    sampler.push(10)
    sampler.sample(PROMPTS, 10)


def test_a_rollout_is_named_by_seed_step_and_row(pair: tuple[Policy, VllmSampler]) -> None:
    _, sampler = pair
    first = sampler.sample(PROMPTS, 20)
    again = sampler.sample(PROMPTS[3:5], 20, rows=[3, 4])  # without its neighbours
    assert [rollout.ids for rollout in again] == [rollout.ids for rollout in first[3:5]]
    assert [rollout.ids for rollout in sampler.sample(PROMPTS, 21)] != [rollout.ids for rollout in first]
    twins = sampler.sample([PROMPTS[0]] * 8, 22)
    assert len({rollout.ids for rollout in twins}) > 1


def test_first_tokens_come_as_often_as_the_student_says(pair: tuple[Policy, VllmSampler]) -> None:
    student, sampler = pair
    prompt = Prompt("p", (Message("user", "Tom"),))
    draws = 2000
    sampler.entropies, every = False, sampler._check_every
    sampler._check_every = 1000  # nothing but the engine's own work
    try:
        rollouts = sampler.sample([prompt] * draws, 31)
    finally:
        sampler.entropies, sampler._check_every = True, every
    with torch.no_grad():
        logits = student.model(input_ids=torch.tensor([student.prompt_ids(prompt)])).logits[0, -1]
    chances, tokens = logits.softmax(-1).topk(5)
    for p, token in zip(chances.tolist(), tokens.tolist(), strict=True):  # five standard deviations
        seen = sum(rollout.ids[0] == token for rollout in rollouts) / draws
        assert seen == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / draws) + 1e-9)


def test_a_run_learns_with_it(tmp_path: Path) -> None:
    config = RunConfig.model_validate(
        {
            "student": {
                "path": str(DEMO / "student"),
                "max_new_tokens": 32,
                "lora": {"rank": 4},
                "rollouts": {"type": "vllm", "enforce_eager": True, "max_model_len": 512},
            },
            "teacher": {"type": "transformers", "path": str(DEMO / "teacher")},
            "task": {"type": "arithmetic", "train_size": 64, "heldout_size": 16},
            "method": {"name": "omniopd", "chunks": 2, "chunk_tokens": 6, "continuations": 2},
            "train": {"steps": 3, "prompts_per_step": 4, "learning_rate": 1e-3},
            "eval": {"problems": 8},
            "output": str(tmp_path / "run"),
        }
    )
    summary = Run(config).train()
    assert summary["status"] == "finished"
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["gap_p99"] for row in rows if row["step"]]
    assert len(gaps) == 3 and max(gaps) < LIMIT
    assert all(row["mean_entropy"] > 0 for row in rows if row["step"])
