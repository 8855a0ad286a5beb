"""A run's configuration: one YAML file, `key=value` overrides, and errors that name the field and the mend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, model_validator

from omniopd.errors import ConfigError
from omniopd.registry import METHODS, TASKS, TEACHERS
from omniopd.settings import Settings, first_problem, tagged
from students.policy import StudentSettings
from students.ranks import RANK_TIMEOUT_S
from students.trainer import OptimizerSettings

Signal = Literal["auto", "logits", "topk", "scores", "continuations", "answers"]


class TrainSettings(OptimizerSettings):
    """The loop: how many steps of how many prompts, and what is kept on the way."""

    steps: int = Field(default=100, ge=0)
    prompts_per_step: int = Field(default=32, ge=1)
    rollouts_per_prompt: int = Field(
        default=1, ge=1, description="rollouts of each prompt of a step; methods that compare them need several"
    )
    max_lag: int = Field(
        default=0,
        ge=0,
        description="updates that the student may be ahead of the weights that wrote a rollout: so many further steps are "
        "written while the teacher reads; 0: none",
    )
    save_every: int = Field(default=25, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1)
    keep_audits: int = Field(default=2, ge=0, description="rollouts per step whose audits are kept for the report")
    track: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        default=[], description="trackers that get every step's numbers too"
    )
    max_silent_steps: int = Field(default=3, ge=1, description="stop after so many steps in a row without any signal")
    rank_timeout_s: float = Field(
        default=RANK_TIMEOUT_S,
        gt=0,
        description="how long one process of several waits for another before the run ends",
    )


class EvalSettings(Settings):
    """When and on how many held-out problems accuracy is measured; answers are greedy."""

    problems: int | None = Field(default=200, ge=0, description="held-out problems; null takes all, 0 measures nothing")
    every: int = Field(default=0, ge=0, description="steps between evaluations on the way; 0: only before and after")
    every_problems: int | None = Field(default=None, ge=1, description="problems of those on the way; null: as many")
    teacher: bool = Field(default=False, description="let the teacher answer the same problems too (paid calls)")
    teacher_tokens: int = Field(default=512, ge=1, description="token limit of the teacher's answers")


class Unnamed(Settings):
    """Settings of a method that `signal` is still to name; `omniopd.choosing` checks them when it does."""

    model_config = ConfigDict(extra="allow")


class RunConfig(Settings):
    """Everything that a run is made from. With a `signal`, a `method` without a name is the one that reads it."""

    student: StudentSettings
    teacher: tagged(TEACHERS)  # type: ignore[valid-type]
    judge: tagged(TEACHERS) | None = Field(  # type: ignore[valid-type]
        default=None, description="who grades, where a method needs that; null: the teacher"
    )
    task: tagged(TASKS)  # type: ignore[valid-type]
    method: tagged(METHODS, default="omniopd") = Field(default="omniopd", validate_default=True)  # type: ignore[valid-type]
    signal: Signal | None = Field(
        default=None, description="what of the teacher is learned from; auto: the best that it offers; null: see method"
    )
    train: TrainSettings = TrainSettings()
    eval: EvalSettings = EvalSettings()
    output: Path = Path("runs/run")
    store: Path | None = Field(default=None, description="answer store; default: answers.sqlite in the output folder")
    prices: Path | None = Field(
        default=None, description="YAML file of prices: date, models with USD per million tokens"
    )
    budget_usd: float | None = Field(
        default=None, gt=0, description="stop before the teacher has cost more (exit code 3)"
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _left_to_the_signal(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("signal") is None:
            return tree
        method = {} if tree.get("method") is None else tree["method"]
        return {**tree, "method": Unnamed(**method)} if isinstance(method, dict) and "name" not in method else tree

    @property
    def store_path(self) -> Path:
        return self.store or self.output / "answers.sqlite"


def load_config(source: Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate a run's configuration.

    Args:
        source: a YAML file, or the same as a mapping.
        overrides: `dotted.key=value`, the value in YAML.

    Raises:
        ConfigError: one line naming the field (or file) and the mend.
    """
    if isinstance(source, Path):
        tree, where = _read_yaml(source), str(source)
    else:
        tree, where = _copied(source), "config"
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {first_problem(error, RunConfig)}") from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration, every default written out, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _copied(tree: Any) -> Any:
    return {key: _copied(value) for key, value in tree.items()} if isinstance(tree, Mapping) else tree


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8 text"
        raise ConfigError(f"{path}: can't be read: {reason}; name an existing YAML file") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise ConfigError(f"{path}:{line} not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: is empty or no mapping; it needs at least student, teacher and task")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in the tree; a name where a mapping belongs (`teacher: replay`) is opened up."""
    dotted, sign, text = override.partition("=")
    if not sign or not dotted:
        raise ConfigError(f"'{override}': an override looks like train.steps=5")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, leaf = dotted.split(".")
    node: Any = tree
    for parent in parents:
        if not isinstance(node.get(parent), dict):
            name = node.get(parent)
            node[parent] = {"name" if parent == "method" else "type": name} if isinstance(name, str) else {}
        node = node[parent]
    node[leaf] = value
