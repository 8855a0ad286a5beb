"""What is compared: methods by label, each with what it changes of the one config, and the control runs beside them.

A file of methods maps a label to a method's name, or to what of the config differs:

    opd: opd
    fire: {method: {name: fire, parts: [{name: trajectory_filter, drop: 0.1}, entropy_weights]}}
    ropd: {method: ropd, judge: {type: transformers, path: examples/demo/teacher}}

The first is what the others are measured against.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from omniopd.config import RunConfig, load_config
from omniopd.errors import ConfigError
from omniopd.registry import METHODS
from omniopd.unloaded import method_of

MAY_DIFFER = ("method", "train", "teacher", "judge")
Control = Literal["", "shuffled", "length"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One side of the comparison. A control belongs to the method labelled `of`."""

    label: str
    settings: Mapping[str, Any]
    control: Control = ""
    of: str = ""


def read_variants(methods: str) -> list[Variant]:
    """The methods that a command names: a YAML file, or names and method blocks with commas between.

    Raises:
        ConfigError: the file or the list is not what it should be, or sets what has to be the same for all.
    """
    if methods.endswith((".yaml", ".yml")):
        tree = _yaml(Path(methods).read_text(encoding="utf-8") if Path(methods).is_file() else "", methods)
        if not isinstance(tree, dict) or not tree:
            raise ConfigError(f"--methods: {methods}: is missing or no mapping; it maps labels to methods")
        return [Variant(str(label), _settings(str(label), found)) for label, found in tree.items()]
    tree = _yaml(f"[{methods}]", "the list")
    if not tree:
        raise ConfigError("--methods: names no method; as in --methods opd,fire")
    variants: list[Variant] = []
    for block in tree:
        label = _label(block)
        if label in [one.label for one in variants]:
            raise ConfigError(f"--methods: '{label}' stands there twice; leave one out")
        variants.append(Variant(label, _settings(label, {"method": block})))
    return variants


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--methods: {where}: not YAML: {getattr(error, 'problem', None) or error}") from None


def _label(block: Any) -> str:
    """A method block in a few words: its name, and what it sets."""
    if not isinstance(block, dict):
        return str(block)
    said = [f"{key}={_plain(value)}" for key, value in block.items() if key != "name"]
    return " ".join([str(block.get("name", "?")), *said])


def _plain(value: Any) -> str:
    """A setting on one line, a part that states nothing but its name as that."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, dict) and "name" in value:
        return _label(value)
    return value if isinstance(value, str) else json.dumps(value)


def _settings(label: str, found: Any) -> Mapping[str, Any]:
    settings = {"method": found} if isinstance(found, str) else found
    block = settings.get("method") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not (isinstance(block, str) or (isinstance(block, dict) and "name" in block)):
        raise ConfigError(f"--methods: {label}: needs 'method', a name or a block with a name")
    if strangers := sorted(settings.keys() - set(MAY_DIFFER)):
        raise ConfigError(
            f"--methods: {label}: sets {strangers[0]}, which must be the same for all; put it into the config (a method may "
            f"set {', '.join(MAY_DIFFER)})"
        )
    if "prompts_per_step" in (settings.get("train") or {}):
        raise ConfigError(
            f"--methods: {label}: sets train.prompts_per_step, so that its steps would have other prompts; put it into the "
            "config"
        )
    return {**settings, "method": {"name": block} if isinstance(block, str) else block}


def config_of(base: RunConfig, variant: Variant, seed: int, output: Path) -> RunConfig:
    """The config of one run. Each pays for its own answers: a store in common would make the second one's free.

    Raises:
        ConfigError: a setting is wrong.
    """
    tree = base.model_dump(mode="json", exclude_unset=True)
    tree |= {"signal": None, "store": None, "seed": seed, "output": str(output)}
    return load_config(_merged(tree, variant.settings))


def _merged(tree: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the settings over it; a component that is named anew (`name` or `type`) replaces the one before."""
    merged = dict(tree)
    for key, value in settings.items():
        whole = not isinstance(value, Mapping) or "name" in value or "type" in value
        merged[key] = value if whole or not isinstance(tree.get(key), Mapping) else _merged(tree[key], value)
    return merged


def folder_of(variant: Variant, config: RunConfig) -> str:
    """The name of a variant's folder: other settings, another folder, so that no run is taken for another."""
    tree = config.model_dump(mode="json", exclude={"seed", "output", "store", "prices", "budget_usd"})
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:8]
    slug = "".join(letter if letter.isalnum() else "-" for letter in variant.label)[:60].strip("-")
    return f"{slug}-{digest}"


# ------------------------------------------------------------------ controls


def shuffled(variant: Variant, config: RunConfig) -> Variant | None:
    """The same with what it decides dealt out at random; None where nothing is decided.

    A mask or a weight that is dealt out is a random one of the same rate and histogram, so this is the random control too.
    """
    setting = {"control": "shuffled"} if method_of(config).decides else {}
    if hasattr(config.method, "placebo"):  # what it makes of the teacher's text, dealt out to other chunks
        setting["placebo"] = "shuffle"
    if not setting:
        return None
    settings = {**variant.settings, "method": {**variant.settings["method"], **setting}}
    return Variant(f"{variant.label} (shuffled)", settings, "shuffled", variant.label)


def length_matched(variant: Variant, baseline: Variant, tokens: float, config: RunConfig, plain: RunConfig) -> Variant:
    """The baseline in the form that a method has it, without its parts, cut to the tokens a rollout from which it learned.

    Args:
        config, plain: of the method and of the baseline, which it extends.
    """
    own, usual = config.method.model_dump(mode="json"), plain.method.model_dump(mode="json")
    form = {key: own[key] for key in usual if key not in ("name", "parts", "control") and own[key] != usual[key]}
    method = baseline.settings["method"]
    parts = [*method.get("parts", []), {"name": "horizon", "tokens": max(1, round(tokens))}]
    settings = {**baseline.settings, **variant.settings, "method": {**method, **form, "parts": parts}}
    return Variant(f"{variant.label} (length)", settings, "length", variant.label)


def extends(config: RunConfig, baseline: RunConfig) -> bool:
    """Whether a method is a variant of the baseline's, so that what both learn from can be compared in tokens."""
    return issubclass(METHODS.get(config.method.name), METHODS.get(baseline.method.name))
