"""A copy of a Qwen3 folder whose attention heads are wider, and whose answers are the same.

vLLM's attention on the CPU knows some widths only, and the demo teacher's 36 is not among them. Zeros are added to
every head. Three things depend on the width and are undone: the norm of queries and keys averages over it, the scores
are divided by its root, and the rotary frequencies are spread over it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def padded(folder: Path, target: Path, width: int = 64) -> Path:
    """Write the copy and return its folder."""
    shutil.copytree(folder, target)
    config = json.loads((folder / "config.json").read_text())
    narrow = config["head_dim"]
    # rotary embedding turns entry i together with entry i + width / 2: each half stays at the start of its half
    places = torch.cat([torch.arange(narrow // 2), width // 2 + torch.arange(narrow // 2)])
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("k_norm.weight"):
            weights[name] = _spread(weight * (narrow / width) ** 0.5, places, width)
        elif name.endswith("q_norm.weight"):
            # its own factor (narrow / width) ** 0.5 and that of the scores' divisor cancel
            weights[name] = _spread(weight, places, width)
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            rows = weight.T.reshape(weight.shape[1], -1, narrow)
            weights[name] = _spread(rows, places, width).flatten(1).T.contiguous()
        elif name.endswith("o_proj.weight"):
            weights[name] = _spread(weight.reshape(weight.shape[0], -1, narrow), places, width).flatten(1)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config["head_dim"] = width
    config["rope_parameters"]["rope_theta"] **= width / narrow
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def _spread(values: torch.Tensor, places: torch.Tensor, width: int) -> torch.Tensor:
    """The last axis widened: zeros everywhere but at `places`."""
    wide = values.new_zeros(*values.shape[:-1], width)
    wide[..., places] = values
    return wide
