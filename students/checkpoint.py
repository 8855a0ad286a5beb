"""Checkpoints: a Hugging Face model folder with the trainer's state beside it, complete or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from omniopd.errors import RunError
from students.policy import Policy
from students.trainer import Trainer

_STATE = "trainer.pt"


def save_checkpoint(folder: Path, step: int, policy: Policy, trainer: Trainer, progress: dict[str, Any], keep: int) -> Path:
    """Write `folder/step-NNNNNN`; it appears under that name only when all of it is on disk. Keep the newest `keep`."""
    target = folder / f"step-{step:06d}"
    if target.exists():  # a resumed run came by here again: the same step gives the same weights
        return target
    partial = folder / f".partial-{step:06d}"
    shutil.rmtree(partial, ignore_errors=True)
    save_model(partial, policy)
    torch.save({"trainer": trainer.state_dict(), "progress": json.dumps(progress)}, partial / _STATE)
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    partial.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def save_model(folder: Path, policy: Policy) -> None:
    """Weights and tokenizer in Hugging Face format; under LoRA the adapter, loadable by peft and vLLM."""
    folder.mkdir(parents=True, exist_ok=True)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def load_checkpoint(path: Path, policy: Policy, trainer: Trainer) -> dict[str, Any]:
    """Put weights and trainer state back; returns the progress record that was saved.

    Raises:
        RunError: the checkpoint can't be read or belongs to another model.
    """
    try:
        weights: dict[str, torch.Tensor] = {}
        for part in sorted(path.glob("*.safetensors")):  # large models are saved in several
            weights.update(load_file(part))
        state = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        _set_weights(policy, weights)
        trainer.load_state_dict(state["trainer"])
        return dict(json.loads(state["progress"]))
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise RunError(f"{path}: this checkpoint can't be resumed from: {reason}") from None


def _set_weights(policy: Policy, weights: dict[str, torch.Tensor]) -> None:
    if policy.settings.lora:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(policy.model, weights)
        return
    missing, unexpected = policy.model.load_state_dict(weights, strict=False)
    tied = {name for name, _ in policy.model.named_parameters(remove_duplicate=False)} - {
        name for name, _ in policy.model.named_parameters()
    }
    if unexpected or set(missing) - tied:
        raise ValueError(f"weights do not match: {sorted({*missing, *unexpected} - tied)[:3]}")
