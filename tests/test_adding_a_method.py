"""docs/adding-a-method.md, followed to the letter: its package is installed, its test passes, its config trains."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
SMALL = ["train.steps=2", "train.prompts_per_step=4", "task.train_size=16", "task.heldout_size=2", "eval.problems=0"]


def blocks() -> dict[str, str]:
    """The page's files by name: code blocks whose first line is a comment with a file name."""
    return dict(re.findall(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's package, installed as a stranger would; returns the folder that it is installed in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "loud_method.py"):
        (source / name).write_text(blocks()[name])
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, capture_output=True, timeout=120)
    return target


def run(package: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A program that finds the installed package."""
    environment = {**os.environ, "PYTHONPATH": f"{package}:{ROOT}", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", *command], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def test_the_method_and_its_part_are_short() -> None:
    code = [line for line in blocks()["loud_method.py"].splitlines() if line.strip()]
    assert len(code) < 40
    assert set(blocks()) == {"loud_method.py", "pyproject.toml", "loud.yaml", "test_loud.py"}


def test_the_pages_own_test_passes(package: Path, tmp_path: Path) -> None:
    (tmp_path / "test_loud.py").write_text(blocks()["test_loud.py"])
    done = run(package, "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path / "test_loud.py"))
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_it_is_shown_like_any_other(package: Path) -> None:
    done = run(package, "omniopd.cli", "methods", "loud")
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "a method over opd" in said
    assert "loud_tokens" in said
    assert "share of tokens that are left out" in said


def test_its_config_trains_with_a_part_of_another_method_beside_its_own(package: Path, tmp_path: Path) -> None:
    (tmp_path / "loud.yaml").write_text(blocks()["loud.yaml"])
    output = tmp_path / "run"
    done = run(package, "omniopd.cli", "train", str(tmp_path / "loud.yaml"), *SMALL, f"output={output}")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"]]
    assert len(steps) == 2
    for row in steps:
        assert row["kept_share"] == pytest.approx(0.3, abs=0.05)  # quiet: 0.7
        assert row["loud_threshold"] > 0
        assert row["weight_mean"] == pytest.approx(1)  # entropy_weights, over what loud_tokens has left
    assert json.loads((output / "summary.json").read_text())["method"] == "loud"


def test_a_wrong_setting_of_the_part_is_named(package: Path, tmp_path: Path) -> None:
    (tmp_path / "loud.yaml").write_text(blocks()["loud.yaml"])
    wrong = "method.parts=[{name: loud_tokens, quite: 1}]"
    done = run(package, "omniopd.cli", "train", str(tmp_path / "loud.yaml"), wrong, f"output={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "unknown key 'quite'; did you mean 'quiet'?" in done.stderr
