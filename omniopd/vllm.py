"""What students and teachers both need to know of vLLM in this process. The package is imported when an engine is built."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from omniopd.chat import first_line
from omniopd.errors import ConfigError

UNCHANGED: Mapping[str, float] = {
    "top_k": 0,  # off
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}
"""Sampling fields that leave the model's distribution as it is. All are stated (trap R15): vLLM would fill those that are
left out from the model's own generation config."""


def load_package(field: str, value: str) -> Any:
    """The package itself.

    Raises:
        ConfigError: it is not there or does not load; `value` of the config's `field` is what needs it.
    """
    try:
        vllm: Any = importlib.import_module("vllm")
        vllm.LLM  # noqa: B018 - the rest of it is imported with this
        return vllm
    except ImportError as problem:
        if isinstance(problem, ModuleNotFoundError) and problem.name == "vllm":
            raise ConfigError(f"{field}: {value} needs the package vllm; pip install 'omniopd[vllm]'") from None
        raise ConfigError(f"{field}: the package vllm does not load: {first_line(problem)}") from None


def load_engine(vllm: Any, field: str, model: str, **settings: Any) -> Any:
    """An `LLM` whose log-probs are those of temperature 1, and which runs no code that comes with the weights.

    Args:
        field: of the config, where `model` stands.

    Raises:
        ConfigError: vLLM can't load it.
    """
    plain: dict[str, Any] = {"trust_remote_code": False, "logprobs_mode": "raw_logprobs"}
    if on_cpu(vllm):  # there (seen in 0.32) a seeded request whose prompt is computed in two steps ends the engine
        plain["enable_chunked_prefill"] = False
    try:
        return vllm.LLM(model=model, **{**plain, **settings})
    except Exception as problem:  # of any type, from any layer below
        raise ConfigError(f"{field}: vLLM can't load '{model}': {first_line(problem)}") from None


def on_cpu(vllm: Any) -> bool:
    """Whether its engines run on the CPU."""
    return bool(vllm.platforms.current_platform.is_cpu())
