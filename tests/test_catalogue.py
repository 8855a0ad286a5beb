"""What is said of methods and parts is what their code says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from omniopd.catalogue import entries, entry
from omniopd.catalogue.pages import FOLDER, pages, stale, write
from omniopd.catalogue.settings import options
from omniopd.cli import main
from omniopd.errors import ConfigError
from omniopd.objective import Objective
from omniopd.part import Place
from omniopd.registry import METHODS, PARTS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    write(root)
    return root


def test_the_committed_pages_are_what_the_code_says() -> None:
    assert stale(ROOT) == [], "run `make docs`"


def test_every_method_and_part_has_a_page_and_a_place_in_the_index(written: Path) -> None:
    index = (written / FOLDER / "README.md").read_text()
    for name in METHODS.names():
        file = f"{name.replace('/', '-')}.md"
        assert (written / FOLDER / file).exists()
        assert f"[{name}]({file})" in index
    for name in PARTS.names():
        assert (written / FOLDER / f"part-{name}.md").exists()
        assert f"[{name}](part-{name}.md)" in index
    assert all(place.name.lower() in index for place in Place)


def test_a_page_that_is_changed_missing_or_left_over_is_stale(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    assert stale(tmp_path) == []
    (tmp_path / FOLDER / "opd.md").write_text("other")
    (tmp_path / FOLDER / "fire.md").unlink()
    (tmp_path / FOLDER / "gone.md").write_text("a method that was removed")
    assert [path.name for path in stale(tmp_path)] == ["fire.md", "gone.md", "opd.md"]
    write(tmp_path)
    assert stale(tmp_path) == []


def test_a_page_shows_the_formula_and_the_code_of_it() -> None:
    text = pages()[FOLDER / "part-whiten.md"]
    assert "A = (d - mu) / max(sqrt(var + 1e-8), sigma_min)" in text
    assert "def moments(d: Tensor) -> tuple[float, float]:\n    " in text
    assert "def apply(self, draft: Draft) -> None:\n    " in text
    assert "../../omniopd/parts/whiten.py" in text


def test_links_between_pages_lead_somewhere(written: Path) -> None:
    import re

    for path in (written / FOLDER).glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            root = written if not target.startswith("../") else ROOT
            assert (root / FOLDER / target).resolve().exists(), f"{path.name}: {target}"


@pytest.mark.parametrize(
    ("name", "text_only"), [("omniopd", "yes"), ("seqkd", "yes"), ("opd", "no"), ("gndpo", "partly")]
)
def test_whether_a_text_only_teacher_will_do_is_computed(name: str, text_only: str) -> None:
    assert entry(name).text_only == text_only


def test_needs_are_those_of_the_method_with_its_parts() -> None:
    fire = entry("fire")
    assert fire.needs == ("logits", "same tokenizer", "score")
    assert fire.base == "opd"
    assert [part["name"] for part in fire.parts] == ["trajectory_filter", "entropy_weights"]
    assert fire.slots == ("credit",)
    assert entry("trajectory_filter").needs == ("score",)


@pytest.mark.parametrize("kind", ["method", "part"])
def test_each_says_what_it_is(kind: Any) -> None:
    for one in entries(kind):
        assert len(one.title.split()) > 1, one.name
        assert len(one.text) > 80, one.name
        assert one.ours and (ROOT / one.place).exists()
        assert one.slots or one.base, one.name
        assert kind == "method" or one.order
        if kind == "part":
            undescribed = [option.name for option in one.options if not option.description]
            assert not undescribed, f"{one.name}: settings without a description: {undescribed}"


class Toy(Objective):
    name: Literal["toy"] = "toy"
    rate: float = Field(default=0.5, gt=0, le=2, description="how fast,\n    in steps")
    kind: Literal["a", "b"] | None = None
    needed: int


class Derived(Toy):
    rate: float = 0.75


def test_options_have_default_bounds_and_words() -> None:
    found = {option.name: option for option in options(Toy)}
    assert list(found)[:3] == ["rate", "kind", "needed"]
    assert (found["rate"].default, found["rate"].allowed) == ("0.5", "number, above 0 and at most 2")
    assert found["rate"].description == "how fast, in steps"
    assert (found["kind"].default, found["kind"].allowed) == ("null", "a | b | null")
    assert found["needed"].default == "required"
    assert found["anchor.beta"].default == "0.1"
    assert "name" not in found


def test_a_default_of_its_own_keeps_the_words_of_the_base() -> None:
    first = next(iter(options(Derived)))
    assert (first.name, first.default, first.description) == ("rate", "0.75", "how fast, in steps")


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'whiten'"):
        entry("whitn")


def test_the_command_shows_all_and_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in [*METHODS.names(), *PARTS.names()])
    assert main(["methods", "fire"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "FiRe-OPD",
        "2606.02684",
        "trajectory_filter, its part",
        "keep_i = [a_i >=",
        "share of rollouts that is dropped",
    ):
        assert words in out
    assert main(["methods", "rock_tokens"]) == 0  # a method and its part of one name
    assert "rock_tokens, its part" in capsys.readouterr().out
    assert entry("rock_tokens", "part").order == "weight"
    assert main(["methods", "whiten"]) == 0
    assert "sigma_min" in capsys.readouterr().out
    assert main(["methods", "frie"]) == 2
    assert "did you mean 'fire'" in capsys.readouterr().err
