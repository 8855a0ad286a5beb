"""Components by name: built-ins, a stranger's package through entry points, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from omniopd.errors import ConfigError
from omniopd.registry import METHODS, SCORES, SIGNALS, TASKS, TEACHERS, Registry

PACKAGE = {
    "pyproject.toml": """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "stranger"
version = "1.0"
[tool.setuptools]
py-modules = ["stranger"]
[project.entry-points."omniopd.scores"]
same_length = "stranger:same_length"
same_letters = "stranger:SameLetters"
broken = "stranger:no_such_thing"
""",
    "stranger.py": """
from typing import Literal
from omniopd.settings import Settings

def same_length(pairs):
    return [float(len(chunk.text) == len(reply.text)) for chunk, reply in pairs]

class SameLetters:
    class Config(Settings):
        name: Literal["same_letters"] = "same_letters"
        share: float = 0.5

    def __init__(self, config):
        self.share = config.share

    def __call__(self, pairs):
        return [self.share * float(set(chunk.text) == set(reply.text)) for chunk, reply in pairs]
""",
}

USE = """
from omniopd.config import load_config
from omniopd.registry import SCORES
from omniopd.types import Chunk, Reply
tree = {"student": {"path": "s"}, "teacher": {"type": "openai", "model": "m"}, "task": "arithmetic"}
pairs = [(Chunk(0, 0, 1, "", "ab", (2,)), Reply("ba", "stop")), (Chunk(0, 0, 1, "", "ab", (2,)), Reply("c", "stop"))]
for score in ("same_length", {"name": "same_letters", "share": 0.25}):
    config = load_config({**tree, "method": {"name": "omniopd", "score": score}})
    print(SCORES.build(config.method.score)(pairs))
print("same_letters" in SCORES.names())
for wrong in ({"name": "same_letters", "shar": 1}, "broken"):
    try:
        load_config({**tree, "method": {"name": "omniopd", "score": wrong}})
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_score_functions_of_an_installed_package_work_by_name(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name, text in PACKAGE.items():
        (source / name).write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["[1.0, 0.0]", "[0.25, 0.0]", "True"]
    assert lines[3].startswith("ConfigError config: method.score.shar: unknown key 'shar'; did you mean 'share'?")
    assert lines[4].startswith("ConfigError config: method.score: score 'broken': entry point stranger:no_such_thing")


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        (TEACHERS, {"openai", "replay"}),
        (METHODS, {"omniopd", "omniopd/paper", "seqkd"}),
        (SIGNALS, {"likelihood_weight", "survival", "continuation_likelihood"}),
        (SCORES, {"token_agreement", "edit_distance", "rouge1", "embedding"}),
        (TASKS, {"arithmetic", "gsm8k", "jsonl"}),
    ],
)
def test_built_ins_are_found_by_their_files(registry: Registry[object], names: set[str]) -> None:
    assert names <= set(registry.names())
    for name in names:
        assert registry.get(name).Config.model_fields[registry.tag].default == name  # type: ignore[attr-defined]


def test_an_unknown_name_gets_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match="unknown score 'rouge'; did you mean 'rouge1'.*edit_distance"):
        SCORES.get("rouge")


def test_a_name_can_be_taken_once() -> None:
    registry: Registry[object] = Registry("thing", "omniopd.scores", "name")
    registry.register("one")(object())
    with pytest.raises(ConfigError, match="thing 'one' is registered twice"):
        registry.register("one")(object())
