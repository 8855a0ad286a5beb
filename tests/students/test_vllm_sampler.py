"""vLLM in this process as the student's pen: a scripted package in its place. See tests/contract for the real one."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
import tiny
import torch
from fake_vllm import Copy
from pydantic import ValidationError

from omniopd.errors import ConfigError, StudentError
from omniopd.registry import SAMPLERS
from omniopd.sampling import named_seed
from omniopd.types import Rollout, Writing
from students.policy import Policy, StudentSettings
from students.ranks import Ranks
from students.samplers.vllm import VllmRollouts, VllmSampler

PROMPTS = [tiny.prompt(f"What is {i} + 7?", str(i)) for i in range(5)]


@pytest.fixture
def copy() -> Copy:
    return Copy()


@pytest.fixture
def built() -> list[Any]:
    return []


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, copy: Copy, built: list[Any]) -> Iterator[Callable[..., VllmSampler]]:
    made: list[VllmSampler] = []

    def build(student: Policy, cpu: bool = False, **settings: Any) -> VllmSampler:
        monkeypatch.setitem(sys.modules, "vllm", fake_vllm.package(copy, built, cpu))
        made.append(VllmSampler(VllmRollouts(**settings), student, 5))
        return made[-1]

    yield build
    for sampler in made:
        sampler.close()


@pytest.fixture
def student(tied_folder: Path) -> Policy:
    return tiny.policy(tied_folder)


def learn(student: Policy, seed: int = 0) -> None:
    """Other weights."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=dice))


def alike(mine: list[Rollout], theirs: list[Rollout], close: float = 1e-5) -> None:
    for one, other in zip(mine, theirs, strict=True):
        assert (one.ids, one.text, one.ends, one.finish, one.prompt) == (
            other.ids,
            other.text,
            other.ends,
            other.finish,
            other.prompt,
        )
        assert one.logprobs == pytest.approx(other.logprobs, abs=close)
        assert one.entropy == pytest.approx(other.entropy, abs=close)


def test_found_by_name() -> None:
    assert SAMPLERS.get("vllm") is VllmSampler
    settings = StudentSettings(path="x", rollouts={"type": "vllm", "check_every": 4})  # type: ignore[arg-type]
    assert settings.rollouts == VllmRollouts(check_every=4)
    for taken in ("dtype", "max_model_len", "logprobs_mode"):
        with pytest.raises(ValidationError, match=f"'{taken}' has its own field or is settled by the student"):
            VllmRollouts(engine={taken: None})


def test_its_rollouts_are_those_of_the_embedded_sampler(student: Policy, make: Callable[..., VllmSampler]) -> None:
    sampler = make(student)
    for step in (1, 2):
        sampler.push(step - 1)
        rollouts = sampler.sample(PROMPTS, step, rows=[1, 3, 5, 7, 9])
        alike(rollouts, tiny.sampler(student, 5).sample(PROMPTS, step, rows=[1, 3, 5, 7, 9]))
        assert {rollout.version for rollout in rollouts} == {step - 1}
        assert sampler.gap is not None and sampler.gap.p99 < 1e-5
        assert sampler.gap.tokens == sum(map(len, rollouts))
        learn(student)


def test_each_response_is_heard_of_with_its_entropies(student: Policy, make: Callable[..., VllmSampler]) -> None:
    heard: dict[int, Rollout] = {}
    rollouts = make(student).sample(PROMPTS, 1, ended=heard.__setitem__)
    assert list(heard) == [4, 3, 2, 1, 0]  # as the engine ends them
    assert [heard[place] for place in range(5)] == rollouts
    assert not any(math.isnan(value) for rollout in rollouts for value in rollout.entropy)


def test_a_rollout_is_heard_of_before_the_last_has_ended(
    student: Policy, make: Callable[..., VllmSampler], copy: Copy
) -> None:
    asked: list[int] = []
    make(student).sample(PROMPTS * 8, 1, ended=lambda place, rollout: asked.append(len(copy.asked)))
    assert asked[0] == 40 // 8 and asked[-1] == 40


def test_the_engine_is_asked_for_the_plain_distribution(
    student: Policy, make: Callable[..., VllmSampler], copy: Copy
) -> None:
    make(student).sample(PROMPTS[:2], 3)
    assert [fields["seed"] for fields in copy.asked] == [named_seed(5, "rollout", 3, row) for row in (1, 0)]
    assert all(0 <= fields["seed"] < 2**63 for fields in copy.asked)
    assert all(fields["stop_token_ids"] == sorted(student.end_ids) for fields in copy.asked)
    assert all((fields["temperature"], fields["max_tokens"]) == (1.0, 16) for fields in copy.asked)


def test_a_lower_limit_is_asked_of_the_engine_and_cuts_the_same_text(
    student: Policy, make: Callable[..., VllmSampler], copy: Copy
) -> None:
    sampler = make(student)
    whole = sampler.sample(PROMPTS, 1)
    copy.asked.clear()
    limits = [3, None, 1, 99, 5]
    cut = sampler.sample(PROMPTS, 1, writings=[Writing(max_tokens=limit) for limit in limits])
    assert sorted(fields["max_tokens"] for fields in copy.asked) == [1, 3, 5, 16, 16]
    for long, short, limit in zip(whole, cut, limits, strict=True):
        assert short.ids == long.ids[: limit or 16]
        assert short.finish == (long.finish if len(long) == len(short) and long.finish == "stop" else "length")


def test_the_engine_is_built_for_the_student(
    student: Policy, make: Callable[..., VllmSampler], built: list[Any], tied_folder: Path
) -> None:
    sampler = make(student, max_model_len=64, engine={"max_num_seqs": 7})
    assert not built  # before it is needed
    sampler.push(0)
    (llm,) = built
    assert llm.settings == {
        "model": str(tied_folder),
        "dtype": "float32",
        "trust_remote_code": False,
        "logprobs_mode": "raw_logprobs",
        "gpu_memory_utilization": 0.3,
        "max_model_len": 64,
        "tensor_parallel_size": 1,
        "enforce_eager": False,
        "max_num_seqs": 7,
    }


def test_on_a_cpu_the_head_is_packed_again(student: Policy, make: Callable[..., VllmSampler], built: list[Any]) -> None:
    make(student, cpu=True).push(0)
    (llm,) = built
    assert llm.settings["worker_extension_cls"] == "students.samplers.vllm.Repacking"
    assert llm.settings["enable_chunked_prefill"] is False
    assert llm.called == ["reload_weights", "repack_head"]


def test_what_was_never_pushed_is_pushed_before_the_first_rollout(
    student: Policy, make: Callable[..., VllmSampler]
) -> None:
    learn(student)  # as a run that resumes
    for write in ("sample", "greedy"):
        sampler = make(student)
        rollouts = sampler.sample(PROMPTS, 1) if write == "sample" else sampler.greedy(PROMPTS)
        own = tiny.sampler(student, 5)
        expected = own.sample(PROMPTS, 1) if write == "sample" else own.greedy(PROMPTS)
        assert [rollout.ids for rollout in rollouts] == [rollout.ids for rollout in expected]


def test_greedy_takes_the_likeliest_and_knows_no_entropies(student: Policy, make: Callable[..., VllmSampler]) -> None:
    rollouts = make(student).greedy(PROMPTS)
    assert [rollout.ids for rollout in rollouts] == [r.ids for r in tiny.sampler(student).greedy(PROMPTS)]
    assert all(math.isnan(value) for rollout in rollouts for value in rollout.entropy)


def test_lora_weights_are_pushed_merged(llama_folder: Path, make: Callable[..., VllmSampler]) -> None:
    student = tiny.policy(llama_folder, lora={"rank": 2})
    sampler = make(student)
    before = sampler.sample(PROMPTS, 1)
    learn(student)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    sampler.push(1)
    after = sampler.sample(PROMPTS, 1)
    assert before != after
    alike(after, tiny.sampler(student, 5).sample(PROMPTS, 1), close=1e-4)  # merging rounds


# ---------------------------------------------------------------------- what goes wrong


def test_s6_a_push_that_is_skipped_is_caught(student: Policy, make: Callable[..., VllmSampler]) -> None:
    sampler = make(student)
    sampler.sample(PROMPTS, 1)
    learn(student)
    with pytest.raises(
        StudentError, match=r"^student.rollouts: log-probs of vLLM .* max_gap=0.001.*max_gap if"
    ) as caught:
        sampler.sample(PROMPTS, 2)
    assert "\n" not in str(caught.value)
    sampler.push(1)
    sampler.sample(PROMPTS, 2)


def test_s6_an_engine_that_takes_no_weights_is_caught(
    student: Policy, make: Callable[..., VllmSampler], copy: Copy
) -> None:
    sampler = make(student)
    copy.deaf = True
    sampler.sample(PROMPTS, 1)
    learn(student)
    sampler.push(1)
    with pytest.raises(StudentError, match="after update 1"):
        sampler.sample(PROMPTS, 2)


def test_s6_a_prompt_kept_from_before_the_push_is_caught(
    student: Policy, make: Callable[..., VllmSampler], copy: Copy
) -> None:
    sampler = make(student)
    sampler.sample(PROMPTS, 1)
    learn(student)
    copy.forgets = False
    sampler.push(1)
    with pytest.raises(StudentError, match="other weights or computes otherwise"):
        sampler.sample(PROMPTS, 2)


def test_s6_a_prefix_cache_that_can_not_be_reset_stops_the_push(
    student: Policy, make: Callable[..., VllmSampler], copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "reset", lambda: False)
    with pytest.raises(StudentError, match="keeps its prefix cache"):
        make(student).push(0)


@pytest.mark.parametrize("offset", [0.01, math.nan])
def test_s1_other_numbers_are_caught(
    student: Policy, make: Callable[..., VllmSampler], copy: Copy, offset: float
) -> None:
    copy.offset = offset
    with pytest.raises(StudentError, match="max_gap=0.001"):
        make(student).sample(PROMPTS, 1)
    if offset == 0.01:
        sampler = make(student, max_gap=0.02)
        sampler.sample(PROMPTS, 1)
        assert sampler.gap is not None and sampler.gap.mean == pytest.approx(0.01, abs=1e-4)


def test_bfloat16_has_a_wider_limit(tied_folder: Path, make: Callable[..., VllmSampler], copy: Copy) -> None:
    sampler = make(tiny.policy(tied_folder, dtype="bfloat16"))
    copy.offset = 0.1
    sampler.sample(PROMPTS, 1)
    copy.offset = 0.5
    with pytest.raises(StudentError, match="max_gap=0.25"):
        sampler.sample(PROMPTS, 2)


def test_l10_between_checks_entropies_are_scored_for_those_who_read_them(
    student: Policy, make: Callable[..., VllmSampler], copy: Copy
) -> None:
    sampler = make(student, check_every=3)
    sampler.sample(PROMPTS, 1)
    assert sampler.gap is not None  # the first one, whatever its number
    copy.offset = 1.0
    rollouts = sampler.sample(PROMPTS, 2)
    assert sampler.gap is None
    for rollout in rollouts:
        _, entropy = tiny.dense(student.model, rollout.prompt_ids, rollout.ids)
        torch.testing.assert_close(torch.tensor(rollout.entropy), entropy, atol=1e-5, rtol=1e-5)
    with pytest.raises(StudentError):
        sampler.sample(PROMPTS, 3)
    sampler.entropies = False
    assert all(math.isnan(value) for rollout in sampler.sample(PROMPTS, 4) for value in rollout.entropy)


def test_weights_that_do_not_load_are_one_line(student: Policy, make: Callable[..., VllmSampler], copy: Copy) -> None:
    sampler = make(student)
    sampler.push(0)
    copy.fault = RuntimeError("size mismatch\nfor layers.0")
    with pytest.raises(StudentError, match=r"^student.rollouts: vLLM can't load the pushed weights: size mismatch$"):
        sampler.push(1)


def test_a_folder_that_can_not_be_written_is_one_line(
    student: Policy, make: Callable[..., VllmSampler], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StudentError, match=r"^student.rollouts: the weights can't be written to .*student.rollouts.weights"
    ):
        make(student, weights=tmp_path / "file").push(0)


def test_a_model_that_vllm_refuses_is_one_line(student: Policy, make: Callable[..., VllmSampler], copy: Copy) -> None:
    copy.fault = ValueError("no kernel for heads of 8")
    with pytest.raises(ConfigError, match=r"^student.path: vLLM can't load '.*': no kernel for heads of 8$"):
        make(student).push(0)


def test_a_missing_package_is_one_line(student: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"^student.rollouts: vllm needs the package vllm; pip install"):
        VllmSampler(VllmRollouts(), student, 0)


def test_of_several_processes_the_main_one_writes_and_all_load(
    student: Policy, make: Callable[..., VllmSampler], copy: Copy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ranks = Ranks()
    ranks.index = 1
    monkeypatch.setattr(ranks, "all", lambda part: [part])
    monkeypatch.setattr(ranks, "from_main", lambda work: tmp_path)
    sampler = make(student)
    sampler.ranks = ranks
    with pytest.raises(StudentError, match=r"^student.rollouts.weights: .*version-4 is not there"):
        sampler.push(4)
    student.model.save_pretrained(tmp_path / "version-4")  # as the main process does
    sampler.push(4)
    assert copy.loaded[-1] == str(tmp_path / "version-4") and (tmp_path / "version-4").exists()


def test_nothing_is_left_behind(
    student: Policy, make: Callable[..., VllmSampler], copy: Copy, built: list[Any], tmp_path: Path
) -> None:
    sampler = make(student)
    sampler.push(0)
    pushed = Path(copy.loaded[-1])
    assert not pushed.exists() and pushed.parent.exists()
    sampler.close()
    assert not pushed.parent.exists() and [llm.shut for llm in built] == [1]
    alike(sampler.sample(PROMPTS, 1), tiny.sampler(student, 5).sample(PROMPTS, 1))  # builds another
    sampler.close()
    assert [llm.shut for llm in built] == [1, 1]
    own = make(student, weights=tmp_path / "weights")
    own.push(7)
    own.close()
    assert copy.loaded[-1] == str(tmp_path / "weights" / "version-7") and not list((tmp_path / "weights").iterdir())
