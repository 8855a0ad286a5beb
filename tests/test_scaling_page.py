"""docs/scaling.md: its settings load, its commands parse, and what it names is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from omniopd.config import RunConfig, TrainSettings, load_config
from omniopd.registry import TEACHERS
from students.policy import StudentSettings

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
LAUNCHERS = sorted((ROOT / "examples" / "scale").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    """The page's code of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def lines(text: str) -> list[list[str]]:
    """Shell commands as words, comments left out."""
    return [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines() if line.strip()]


COMMANDS = [command for block in blocks("bash") for command in lines(block)]


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.split("\n")[0][:40])
def test_every_settings_block_loads(block: str) -> None:
    base = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    part = yaml.safe_load(block)
    assert isinstance(load_config(base | part), RunConfig)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "accelerate"], ids=" ".join)
def test_every_launch_is_one_that_accelerate_knows(command: list[str]) -> None:
    assert command[1] == "launch"
    found, rest = launch_command_parser().parse_known_args(command[2:])
    assert rest == [] and found.module and found.training_script == "omniopd.cli"
    assert found.training_script_args[0] == "train"
    if found.config_file:
        assert ROOT / found.config_file in LAUNCHERS


def test_launchers_ask_for_what_their_names_say() -> None:
    found: dict[str, Any] = {path.stem: load_config_from_file(str(path)) for path in LAUNCHERS}
    assert {name: str(config.distributed_type.value) for name, config in found.items()} == {
        "ddp": "MULTI_GPU",
        "fsdp2": "FSDP",
    }
    assert found["fsdp2"].fsdp_config == {"fsdp_version": 2}
    for config in found.values():
        assert config.mixed_precision == "no"  # it is the student's setting


def test_every_setting_that_is_named_is_there() -> None:
    teachers = [TEACHERS.get(name).Config for name in ("openai", "vllm")]
    homes = {"train": [TrainSettings], "student": [StudentSettings], "teacher": teachers}
    named = set(re.findall(r"\b(train|student|teacher)\.([a-z_]+)\b", PAGE))
    assert len(named) > 8
    for part, field in named:
        assert any(field in home.model_fields for home in homes[part]), f"{part}.{field}"


def test_every_file_that_is_named_is_there() -> None:
    for name in re.findall(r"\bexamples/[\w/.]+\w", PAGE):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / name).exists(), name
