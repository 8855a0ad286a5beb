"""`omniopd selftest`, as a user types it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from scripted import ScriptedTeacher

from omniopd.cli import main
from omniopd.selftest import checks

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> str:
    """A teacher in this process that has the student's tokenizer."""
    settings["teacher"] = {"type": "transformers", "path": str(DEMO / "sibling")}
    settings["signal"] = "auto"
    del settings["method"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_it_shows_every_check_and_keeps_nothing(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftest", config]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for check in checks.CHECKS:
        assert check.name in out
    assert "passed" in out
    assert "failed" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_failed_check_is_one_line_and_exit_code_2(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = checks.Check("positions", lambda bench: checks.Seen(False, "all off by one"))
    monkeypatch.setattr("omniopd.selftest.CHECKS", [wrong])
    assert main(["selftest", config]) == 2
    said = capsys.readouterr()
    assert "failed" in said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("omniopd: ")]
    assert line == "omniopd: selftest: 1 of 1 checks failed; positions: all off by one"


def test_a_teacher_of_text_only_is_tested_as_far_as_that_goes(
    settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["selftest", str(path), "train.prompts_per_step=2"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "skipped" in out
    assert "omniopd controls" in out
    assert teacher.bodies


def test_a_paid_teacher_needs_a_yes(
    settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    paid = ["selftest", str(path), "teacher.price={prompt: 100, completion: 1000}", "train.prompts_per_step=2"]
    assert main(paid) == 2
    said = capsys.readouterr().err
    assert "the self-test asks the live teacher: at most" in said
    assert "add --yes" in said
    assert not teacher.bodies
    assert main([*paid, "--yes"]) == 0
    assert teacher.bodies
