"""Checkpoints: bit for bit, complete or absent, and a damaged one is refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from omniopd.errors import RunError
from omniopd.objective import Objective
from omniopd.types import Rollout, Signal
from students.checkpoint import checkpoints, load_checkpoint, save_checkpoint, save_model
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

Folder = Callable[..., Path]


class Remembers:
    """A method with a state."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = dict(state)


METHOD = Remembers()
PROGRESS = {"step": 3, "drops": {"refusal": 2}, "note": "東京"}

KINDS: list[tuple[str, dict[str, Any], Any]] = [
    ("llama", {}, None),
    ("llama", {"tie_word_embeddings": True}, None),
    ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}, None),
    ("llama", {}, {"rank": 2}),
    ("llama", {"tie_word_embeddings": True}, {"rank": 2}),
]
IDS = ["untied", "tied", "experts", "lora", "lora-tied"]


def fresh(tiny_folder: Folder, kind: str, settings: dict[str, Any], lora: Any) -> tuple[Policy, Trainer]:
    torch.manual_seed(0)  # LoRA's initial weights
    student = tiny.policy(tiny_folder(kind=kind, **settings), lora=lora)
    return student, Trainer(student, OptimizerSettings(learning_rate=1e-2, warmup_steps=4), Objective())


def learn(student: Policy, trainer: Trainer, rollout: Rollout, steps: int) -> None:
    value = torch.linspace(-1, 1, len(rollout))
    for _ in range(steps):
        trainer.update([rollout], Signal((value,), (value > 0,)))


def state(student: Policy, trainer: Trainer) -> list[Tensor]:
    moments = [v for entry in trainer.optimizer.state_dict()["state"].values() for v in entry.values()]
    return [v.detach().clone() for v in [*student.model.state_dict().values(), *moments]]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("kind", "settings", "lora"), KINDS, ids=IDS)
def test_a_resumed_update_is_bitwise_the_uninterrupted_one(
    tiny_folder: Folder, tmp_path: Path, kind: str, settings: dict[str, Any], lora: Any
) -> None:
    student, trainer = fresh(tiny_folder, kind, settings, lora)
    rollout = tiny.rollout(student, range(20, 32))
    learn(student, trainer, rollout, 3)
    path = save_checkpoint(tmp_path, 3, student, trainer, METHOD, PROGRESS, keep=2)
    saved = state(student, trainer)

    other, resumed = fresh(tiny_folder, kind, settings, lora)
    assert not equal(state(other, resumed)[: len(saved) // 2], saved[: len(saved) // 2])
    assert load_checkpoint(path, other, resumed, METHOD) == PROGRESS
    assert resumed.updates == 3
    assert equal(state(other, resumed), saved)

    learn(student, trainer, rollout, 2)
    learn(other, resumed, rollout, 2)
    assert equal(state(other, resumed), state(student, trainer))
    assert not equal(state(other, resumed), saved)


def test_loading_keeps_the_reference_and_the_tie(tied_folder: Path, tmp_path: Path, tiny_folder: Folder) -> None:
    student, trainer = fresh(tiny_folder, "llama", {"tie_word_embeddings": True}, None)
    learn(student, trainer, tiny.rollout(student, range(20, 32)), 2)
    path = save_checkpoint(tmp_path, 2, student, trainer, METHOD, {}, keep=1)
    other, resumed = fresh(tiny_folder, "llama", {"tie_word_embeddings": True}, None)
    load_checkpoint(path, other, resumed, METHOD)
    assert other.model.lm_head.weight is other.model.model.embed_tokens.weight
    initial = tiny.policy(tied_folder).model.state_dict()
    with other.reference() as frozen:
        assert all(torch.equal(v, initial[k]) for k, v in frozen.state_dict().items())
    inside = {id(p) for group in resumed.optimizer.param_groups for p in group["params"]}
    assert inside == {id(p) for p in other.model.parameters()}  # the optimizer still holds these very weights


def test_the_newest_are_kept_and_partial_ones_ignored(tiny_folder: Folder, tmp_path: Path) -> None:
    student, trainer = fresh(tiny_folder, "llama", {}, None)
    assert checkpoints(tmp_path / "none") == []
    (tmp_path / ".partial-000009").mkdir()  # a crash while writing
    (tmp_path / ".partial-000009" / "model.safetensors").write_bytes(b"half")
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, step, student, trainer, METHOD, {"step": step}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000010", "step-000100"]
    assert load_checkpoint(checkpoints(tmp_path)[-1], student, trainer, METHOD) == {"step": 100}
    assert not list(tmp_path.glob(".partial-*"))  # step 9 was written again, over the half one


def test_a_crash_while_writing_leaves_no_checkpoint(
    tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, trainer = fresh(tiny_folder, "llama", {}, None)
    save_checkpoint(tmp_path, 1, student, trainer, METHOD, {}, keep=1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, student, trainer, METHOD, {}, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000001"]


def test_the_same_step_is_not_written_twice(tiny_folder: Folder, tmp_path: Path) -> None:
    student, trainer = fresh(tiny_folder, "llama", {}, None)
    save_checkpoint(tmp_path, 1, student, trainer, METHOD, {"first": True}, keep=1)
    save_checkpoint(tmp_path, 1, student, trainer, METHOD, {"first": False}, keep=1)
    assert load_checkpoint(tmp_path / "step-000001", student, trainer, METHOD) == {"first": True}


DAMAGE: dict[str, Callable[[Path], object]] = {
    "half the weights": lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:2000]),
    "no weights": lambda p: (p / "model.safetensors").unlink(),
    "weights of noise": lambda p: (p / "model.safetensors").write_bytes(b"\x80" * 4000),
    "half the state": lambda p: (p / "trainer.pt").write_bytes((p / "trainer.pt").read_bytes()[:500]),
    "state of noise": lambda p: (p / "trainer.pt").write_bytes(b"noise" * 100),
    "empty state": lambda p: (p / "trainer.pt").write_bytes(b""),
    "no state": lambda p: (p / "trainer.pt").unlink(),
    "foreign state": lambda p: torch.save({"progress": "{}"}, p / "trainer.pt"),
    "no config": lambda p: (p / "config.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_line(tiny_folder: Folder, tmp_path: Path, damage: str) -> None:
    student, trainer = fresh(tiny_folder, "llama", {}, None)
    path = save_checkpoint(tmp_path, 1, student, trainer, METHOD, {}, keep=1)
    DAMAGE[damage](path)
    with pytest.raises(RunError) as caught:
        load_checkpoint(path, student, trainer, METHOD)
    message = str(caught.value)
    assert message.startswith(f"{path}: this checkpoint can't be resumed from: ")
    assert "\n" not in message and len(message) > len(str(path)) + 50


@pytest.mark.parametrize("damage", ["half", "gone", "other"])
def test_a_damaged_adapter_is_refused_in_one_line(tiny_folder: Folder, tmp_path: Path, damage: str) -> None:
    student, trainer = fresh(tiny_folder, "llama", {}, {"rank": 2})
    path = save_checkpoint(tmp_path, 1, student, trainer, METHOD, {}, keep=1)
    adapter = path / "adapter_model.safetensors"
    if damage == "half":
        adapter.write_bytes(adapter.read_bytes()[:500])
    elif damage == "gone":
        adapter.unlink()
    else:
        student, trainer = fresh(tiny_folder, "llama", {}, {"rank": 2, "target_modules": ["q_proj"]})
    with pytest.raises(RunError, match=r"this checkpoint can't be resumed from: .") as caught:
        load_checkpoint(path, student, trainer, METHOD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [{"hidden_size": 32}, {"num_hidden_layers": 3}, {"tie_word_embeddings": True}])
def test_another_models_checkpoint_is_refused(tiny_folder: Folder, tmp_path: Path, other: dict[str, Any]) -> None:
    student, trainer = fresh(tiny_folder, "llama", {}, None)
    path = save_checkpoint(tmp_path, 1, student, trainer, METHOD, {}, keep=1)
    stranger, strange_trainer = fresh(tiny_folder, "llama", other, None)
    if other == {"tie_word_embeddings": True}:  # the same shapes: told by the optimizer, which has one weight less
        other_path = save_checkpoint(tmp_path / "tied", 1, stranger, strange_trainer, METHOD, {}, keep=1)
        path, stranger, strange_trainer = other_path, student, trainer
        learn(stranger, strange_trainer, tiny.rollout(stranger, range(20, 25)), 1)
    with pytest.raises(RunError, match="can't be resumed"):
        load_checkpoint(path, stranger, strange_trainer, METHOD)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_saved_student_loads_with_the_library_alone(tiny_folder: Folder, tmp_path: Path, lora: Any) -> None:
    student, trainer = fresh(tiny_folder, "llama", {}, lora)
    rollout = tiny.rollout(student, range(20, 32))
    learn(student, trainer, rollout, 2)
    save_model(tmp_path / "student", student)
    if lora:
        from peft import AutoPeftModelForCausalLM

        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "student")
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    ours, _ = tiny.dense(student.model, rollout.prompt_ids, rollout.ids)
    theirs, _ = tiny.dense(loaded.eval(), rollout.prompt_ids, rollout.ids)
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert tokenizer.chat_template == student.tokenizer.chat_template
