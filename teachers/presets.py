"""Providers that speak OpenAI's chat format, each with what it does in its own way. The probe decides, not this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PrefillStyle = Literal["vllm", "prefix", "partial", "plain", "none"]


@dataclass(frozen=True, slots=True)
class Preset:
    """Defaults of the settings, and what the settings do not say.

    Attributes:
        prefill_style: how an open assistant turn is marked: `vllm` (`add_generation_prompt: false` with
            `continue_final_message: true`), `prefix` or `partial` (a flag on the last message), `plain` (nothing),
            `none` (the format has no such thing).
        no_thinking: what is added to a request to switch hidden reasoning off.
        completions: whether it has a completion route for the rung `raw`.
    """

    base_url: str
    api_key_env: str | None
    prefill_style: PrefillStyle
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    seed_field: str = "seed"
    n: bool | Literal["auto"] = "auto"
    seed: bool | Literal["auto"] = "auto"
    no_thinking: Mapping[str, Any] = field(default_factory=dict)
    completions: bool = False


_DISABLED = {"thinking": {"type": "disabled"}}

PRESETS: dict[str, Preset] = {
    "generic": Preset(
        "",
        "OPENAI_API_KEY",
        "vllm",
        no_thinking={"chat_template_kwargs": {"enable_thinking": False}},
        completions=True,
    ),
    "openai": Preset(
        "https://api.openai.com/v1",
        "OPENAI_API_KEY",
        "none",
        max_tokens_field="max_completion_tokens",
        no_thinking={"reasoning_effort": "none"},
    ),
    "openrouter": Preset(
        "https://openrouter.ai/api/v1", "OPENROUTER_API_KEY", "plain", no_thinking={"reasoning": {"enabled": False}}
    ),
    "together": Preset("https://api.together.xyz/v1", "TOGETHER_API_KEY", "none", completions=True),
    "fireworks": Preset("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY", "none", completions=True),
    "deepseek": Preset(
        "https://api.deepseek.com/beta", "DEEPSEEK_API_KEY", "prefix", n=False, seed=False, no_thinking=_DISABLED
    ),
    "mistral": Preset("https://api.mistral.ai/v1", "MISTRAL_API_KEY", "prefix", seed_field="random_seed"),
    "kimi": Preset("https://api.moonshot.ai/v1", "MOONSHOT_API_KEY", "partial", seed=False, no_thinking=_DISABLED),
}
