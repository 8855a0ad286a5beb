"""Configuration: what is written out reads back the same, overrides land where they say, mistakes are one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from omniopd.config import dump_config, load_config
from omniopd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SMALL: dict[str, Any] = {"student": {"path": "s"}, "teacher": {"type": "openai", "model": "m"}, "task": "arithmetic"}


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_load_and_read_back_the_same(example: Path) -> None:
    config = load_config(example)
    assert load_config(yaml.safe_load(dump_config(config))) == config


def test_the_readme_config_loads_and_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("```yaml\n")[1].split("```")[0]
    assert len(block.splitlines()) < 25
    config = load_config(yaml.safe_load(block))
    assert config.student.lora is not None


def test_defaults_have_one_home() -> None:
    method = load_config(SMALL).method
    assert (method.name, method.chunks, method.chunk_tokens, method.continuations) == ("omniopd", 10, 50, 10)
    assert method.anchor.beta == 0.1


def test_the_paper_preset() -> None:
    method = load_config({**SMALL, "method": "omniopd/paper"}).method
    assert (method.chunks, method.chunk_tokens, method.continuations) == (10, 50, 10)
    assert (method.score.name, method.lead, method.anchor.beta) == ("edit_distance", 0, 0.1)
    assert [(signal.name, signal.alpha, signal.centred) for signal in method.signals] == [
        ("likelihood_weight", 1.0, False)
    ]


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.steps=7", lambda c: c.train.steps == 7),
        ("method.anchor.beta=0.5", lambda c: c.method.anchor.beta == 0.5),
        ("method.signals=[survival, {name: likelihood_weight, centred: true}]", lambda c: c.method.signals[1].centred),
        ("method=seqkd", lambda c: c.method.name == "seqkd"),
        ("teacher.base_url=http://127.0.0.1:1/v1", lambda c: c.teacher.base_url.endswith(":1/v1")),
        ("task.train_size=9", lambda c: c.task.train_size == 9),
        ("student.lora.rank=4", lambda c: c.student.lora.rank == 4),
        ("output=/tmp/x", lambda c: str(c.output) == "/tmp/x"),
    ],
)
def test_overrides_land_where_they_say(override: str, read: Any) -> None:
    assert read(load_config(SMALL, [override]))


def test_an_override_does_not_change_the_mapping_it_was_given() -> None:
    load_config(SMALL, ["student.path=other"])
    assert SMALL["student"]["path"] == "s"


def test_a_key_in_the_wrong_place_is_not_quoted() -> None:
    for wrong in ({"api_key": "sk-canary-123"}, {"api_key_env": "sk-canary-123"}):
        with pytest.raises(ConfigError) as caught:
            load_config({**SMALL, "teacher": {"type": "openai", "model": "m", **wrong}})
        assert "canary" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_several_mistakes_name_the_first_and_count_the_rest() -> None:
    with pytest.raises(ConfigError, match=r"\(and 1 more\)"):
        load_config({**SMALL, "train": {"steps": -1, "prompts_per_step": 0}})


def test_beta_zero_has_to_be_meant() -> None:
    assert load_config(SMALL, ["method.anchor={beta: 0, allow_none: true}"]).method.anchor.beta == 0
    with pytest.raises(ConfigError, match="method.anchor.*collapse"):
        load_config(SMALL, ["method.anchor.beta=0"])
