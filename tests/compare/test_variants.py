"""What is compared: how methods are named, what they may change, and the controls beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from omniopd.compare.variants import (
    Variant,
    config_of,
    extends,
    folder_of,
    length_matched,
    read_variants,
    shuffled,
)
from omniopd.config import RunConfig, load_config
from omniopd.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo"


@pytest.fixture
def base() -> RunConfig:
    return load_config(
        {
            "student": {"path": str(DEMO / "student"), "max_new_tokens": 32},
            "teacher": {"type": "transformers", "path": str(DEMO / "sibling"), "top_p": 0.9},
            "task": {"type": "arithmetic"},
            "signal": "auto",
            "train": {"steps": 5, "learning_rate": 1e-3},
            "seed": 7,
        }
    )


def resolved(base: RunConfig, variant: Variant, seed: int = 7) -> RunConfig:
    return config_of(base, variant, seed, Path("runs/x"))


def test_methods_are_names_and_blocks_with_commas_between() -> None:
    found = read_variants("opd, {name: opd, form: dense}, {name: gndpo, parts: [{name: whiten, clip: 1}]}")
    assert [one.label for one in found] == ["opd", "opd form=dense", "gndpo parts=[whiten clip=1]"]
    assert found[0].settings == {"method": {"name": "opd"}}
    assert found[1].settings == {"method": {"name": "opd", "form": "dense"}}


def test_a_file_maps_labels_to_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "methods.yaml"
    path.write_text("plain: opd\nmany: {method: {name: scope}, train: {rollouts_per_prompt: 8}}\n")
    plain, many = read_variants(str(path))
    assert (plain.label, plain.settings) == ("plain", {"method": {"name": "opd"}})
    assert many.settings == {"method": {"name": "scope"}, "train": {"rollouts_per_prompt": 8}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no method"),
        ("opd,opd", "stands there twice"),
        ("{form: dense}", "a block with a name"),
        ("3", "needs 'method'"),
        ("[", "not YAML"),
        ("missing.yaml", "is missing or no mapping"),
    ],
)
def test_what_is_wrong_with_a_list_is_one_line(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        read_variants(text)
    assert str(error.value).startswith("--methods: ")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "opd", "task": {"type": "gsm8k"}}, "sets task, which must be the same for all"),
        ({"method": "opd", "seed": 3}, "sets seed, which must be the same for all"),
        ({"method": "opd", "train": {"prompts_per_step": 2}}, "its steps would have other prompts"),
        ({"train": {"steps": 2}}, "needs 'method'"),
    ],
)
def test_what_must_be_the_same_for_all_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    path = tmp_path / "methods.yaml"
    path.write_text(yaml.safe_dump({"plain": "opd", "odd": settings}))
    with pytest.raises(ConfigError, match=f"odd: .*{words}"):
        read_variants(str(path))


def test_a_variant_changes_what_it_says_and_nothing_else(base: RunConfig) -> None:
    variant = Variant(
        "many", {"method": {"name": "gndpo"}, "train": {"rollouts_per_prompt": 8}, "teacher": {"top_p": 0.5}}
    )
    config = resolved(base, variant, seed=9)
    assert (config.method.name, config.signal, config.seed, config.store) == ("gndpo", None, 9, None)
    assert (config.train.rollouts_per_prompt, config.train.steps, config.train.learning_rate) == (8, 5, 1e-3)
    assert (config.teacher.top_p, config.teacher.path) == (0.5, str(DEMO / "sibling"))
    other = resolved(
        base, Variant("other", {"method": {"name": "opd"}, "teacher": {"type": "transformers", "path": "x"}})
    )
    assert (other.teacher.path, other.teacher.top_p) == (
        "x",
        1.0,
    )  # a component that is named anew replaces the one before


def test_other_settings_are_another_folder_and_another_seed_is_not(base: RunConfig) -> None:
    opd, dense = read_variants("opd,{name: opd, form: dense}")
    names = [folder_of(one, resolved(base, one)) for one in (opd, dense)]
    assert names[0] != names[1]
    assert folder_of(opd, resolved(base, opd, seed=8)) == names[0]
    longer = base.model_copy(update={"train": base.train.model_copy(update={"steps": 6})})
    assert folder_of(opd, resolved(longer, opd)) != names[0]
    assert folder_of(Variant("a/../b c", opd.settings), resolved(base, opd)).replace("-", "").isalnum()


def test_a_method_that_decides_something_has_a_shuffled_control(base: RunConfig) -> None:
    plain, fire, gndpo, omniopd, seqkd = read_variants("opd,fire,gndpo,omniopd,seqkd")
    control = shuffled(fire, resolved(base, fire))
    assert control is not None
    assert (control.label, control.control, control.of) == ("fire (shuffled)", "shuffled", "fire")
    assert resolved(base, control).method.control == "shuffled"
    for one in (plain, gndpo, seqkd):  # nothing is decided
        assert shuffled(one, resolved(base, one)) is None
    answers = Variant("gad", {"method": {"name": "gad"}, "train": {"rollouts_per_prompt": 2}})
    others = shuffled(answers, resolved(base, answers))
    assert others is not None and resolved(base, others).method.control == "shuffled"
    placebo = shuffled(omniopd, resolved(base, omniopd))
    assert placebo is not None
    assert resolved(base, placebo).method.placebo == "shuffle"
    assert resolved(base, placebo).method.control == "none"


def test_the_length_control_has_the_form_and_the_rate_of_its_method(base: RunConfig) -> None:
    """Else it would lay the gain of a dense form to the part beside it."""
    opd = read_variants("opd")[0]
    block = {"name": "trb", "parts": [{"name": "teachability", "rho": 0.5}], "control": "shuffled"}
    dense = Variant("dense", {"method": block, "train": {"learning_rate": 5e-4}})
    config = resolved(base, length_matched(dense, opd, 4, resolved(base, dense), resolved(base, opd)))
    method = config.method
    assert (method.name, method.form, method.support, method.k) == ("opd", "dense", "student", 16)
    assert (method.control, [part.name for part in method.parts]) == ("none", ["horizon"])
    assert (config.train.learning_rate, config.train.steps) == (5e-4, 5)


def test_the_length_control_is_the_baseline_with_a_horizon(base: RunConfig) -> None:
    opd, fire = read_variants("opd,fire")
    control = length_matched(fire, opd, 12.6, resolved(base, fire), resolved(base, opd))
    assert (control.label, control.of) == ("fire (length)", "fire")
    config = resolved(base, control)
    assert config.method.name == "opd"
    assert [(part.name, part.tokens) for part in config.method.parts] == [("horizon", 13)]
    assert control.settings == {"method": {"name": "opd", "parts": [{"name": "horizon", "tokens": 13}]}}
    assert extends(resolved(base, fire), resolved(base, opd))
    assert not extends(resolved(base, opd), resolved(base, fire))
