"""Checkpoints: a Hugging Face model folder with the trainer's state beside it, complete or not there at all.

They are the same for any number of processes. The main one writes them; all read them, from a disk that all of them see.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from omniopd.errors import RunError
from students.policy import Policy
from students.ranks import Ranks
from students.sharding import spread_like, whole_weights
from students.trainer import Trainer

_STATE = "trainer.pt"


class Stateful(Protocol):
    """What has a state beside the weights: a method."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def save_checkpoint(
    folder: Path, step: int, policy: Policy, trainer: Trainer, method: Stateful, progress: dict[str, Any], keep: int
) -> Path:
    """Write `folder/step-NNNNNN`; it appears under that name only when all of it is on disk. Keep the newest `keep`."""
    target = folder / f"step-{step:06d}"
    weights, state = whole_weights(policy.model, keep=trainer.ranks.main), trainer.state_dict()
    if (
        not trainer.ranks.main or target.exists()
    ):  # a resumed run came by here again: the same step gives the same weights
        return target
    partial = folder / f".partial-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_model(partial, policy, weights)
        kept = {"trainer": state, "method": method.state_dict(), "progress": json.dumps(progress)}
        torch.save(kept, partial / _STATE)
    except (SafetensorError, RuntimeError) as error:  # how the two libraries report a full disk
        shutil.rmtree(partial, ignore_errors=True)
        reason = (str(error).splitlines() or ["unknown reason"])[0]
        raise RunError(f"{target}: can't be written: {reason}; mend that, then continue with --resume") from None
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    partial.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def save_model(folder: Path, policy: Policy, weights: dict[str, Tensor] | None = None) -> None:
    """Weights and tokenizer in Hugging Face format; under LoRA the adapter, loadable by peft and vLLM.

    Args:
        weights: whole ones, where those of the model are sharded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policy.model.save_pretrained(folder, state_dict=weights)
    policy.tokenizer.save_pretrained(folder)


def save_student(folder: Path, policy: Policy, ranks: Ranks) -> None:
    """The finished student as a model of its own, for transformers and vLLM as they are: adapters merged in."""
    save_merged(folder, policy, keep=ranks.main)
    if ranks.main:
        policy.tokenizer.save_pretrained(folder)


def save_merged(folder: Path, policy: Policy, *, keep: bool = True) -> None:
    """The present weights as a model of its own, adapters merged in. Every process must call it; those write that `keep`."""
    weights = whole_weights(policy.model, keep=keep)
    if keep:
        model = copy.deepcopy(policy.model).merge_and_unload() if policy.settings.lora else policy.model
        model.save_pretrained(folder, state_dict=weights)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def load_checkpoint(path: Path, policy: Policy, trainer: Trainer, method: Stateful) -> dict[str, Any]:
    """Put weights, trainer's and method's state back; returns the progress record that was saved.

    Raises:
        RunError: the checkpoint can't be read or belongs to another model.
    """
    try:
        state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or set(state) != {"trainer", "method", "progress"}:
            raise ValueError(f"{_STATE} holds no trainer's state")
        progress = dict(json.loads(state["progress"]))
        _set_weights(policy, path)
        trainer.load_state_dict(state["trainer"])
        method.load_state_dict(state["method"])
        return progress
    except Exception as error:  # each library raises types of its own for a damaged file
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise RunError(f"{path}: this checkpoint can't be resumed from: {reason}") from None


def _set_weights(policy: Policy, path: Path) -> None:
    """Read as the library reads a model, since it may write one with other names and shapes than it computes with."""
    if policy.settings.lora:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        weights = load_file(path / "adapter_model.safetensors")
        if set(weights) != set(get_peft_model_state_dict(policy.model)):
            raise ValueError("its adapter has other layers than this student's")
        set_peft_model_state_dict(policy.model, weights)
        return
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=policy.model.dtype, output_loading_info=True)
    saved, info = loaded
    if strange := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"weights do not match: {sorted(map(str, strange))[:3]}")
    present = policy.model.state_dict(keep_vars=True)
    weights = {name: spread_like(weight, present.get(name, weight)) for name, weight in saved.state_dict().items()}
    policy.model.load_state_dict(weights)
