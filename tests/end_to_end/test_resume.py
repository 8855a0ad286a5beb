"""A real process is really killed, and goes on: the same weights bit for bit, and no stored answer asked for again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from scripted import ScriptedTeacher

from omniopd.store import Store

CHUNKS_PER_STEP = 4 * 2  # rollouts times chunks: the scripted run never has fewer room than that


def start(config: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "omniopd.cli", "train", str(config), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def write(settings: dict[str, Any], place: Path) -> Path:
    place.mkdir(exist_ok=True)
    config = place / "config.yaml"
    config.write_text(yaml.safe_dump({**settings, "output": str(place / "run")}))
    return config


def weights_equal(one: Path, other: Path) -> bool:
    left, right = (load_file(place / "run" / "student" / "model.safetensors") for place in (one, other))
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that needs it: the weights and the number of calls of a run that nobody killed."""
    return {"place": tmp_path_factory.mktemp("whole")}


def whole_run(uninterrupted: dict[str, Any], settings: dict[str, Any], teacher: ScriptedTeacher) -> None:
    if "calls" not in uninterrupted:
        finish(start(write(settings, uninterrupted["place"])))
        uninterrupted["calls"] = len(teacher.bodies)
        uninterrupted["bodies"] = sorted(map(str, teacher.bodies))
        teacher.bodies.clear()


def when_calls(count: int) -> Callable[[ScriptedTeacher, Path], bool]:
    return lambda teacher, run: len(teacher.bodies) >= count


def when_there(name: str) -> Callable[[ScriptedTeacher, Path], bool]:
    return lambda teacher, run: (run / name).exists()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(when_there("config.yaml"), id="before-the-first-step"),
        pytest.param(when_calls(3), id="in-the-middle-of-the-first-gather"),
        pytest.param(when_calls(2 * CHUNKS_PER_STEP + 3), id="in-the-middle-of-a-later-gather"),
        pytest.param(when_there("checkpoints/.partial-000002"), id="while-a-checkpoint-is-written"),
        pytest.param(when_there("checkpoints/step-000002"), id="right-after-a-checkpoint"),
    ],
)
def test_s10_killed_and_resumed_equals_uninterrupted(
    moment: Callable[[ScriptedTeacher, Path], bool],
    uninterrupted: dict[str, Any],
    settings: dict[str, Any],
    teacher: ScriptedTeacher,
    tmp_path: Path,
) -> None:
    # One name for the teacher in all runs: the port differs, and a local server's port is not part of its fingerprint.
    whole_run(uninterrupted, settings, teacher)
    config = write(settings, tmp_path)
    teacher.latency = 0.05
    process = start(config)
    deadline = time.monotonic() + 90
    while not moment(teacher, tmp_path / "run") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert process.poll() is None, "the run was over before the moment came"
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)  # calls in flight end at the server
    teacher.latency = 0.0
    paid = 0
    if (tmp_path / "run" / "answers.sqlite").exists():
        store = Store(tmp_path / "run" / "answers.sqlite")
        paid = store.stats().answers + sum(store.stats().rejected.values())
        store.close()
    teacher.bodies.clear()
    finish(start(config, "--resume"))
    draws = settings["method"]["continuations"]
    assert len(teacher.bodies) == uninterrupted["calls"] - paid // draws
    assert weights_equal(tmp_path, uninterrupted["place"])
    metrics = [(p / "run" / "metrics.jsonl").read_text().count("\n") for p in (tmp_path, uninterrupted["place"])]
    assert metrics[0] == metrics[1]


def test_a_run_replayed_from_its_store_gives_the_same_weights_and_makes_no_call(
    uninterrupted: dict[str, Any], settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    whole_run(uninterrupted, settings, teacher)
    recorded = uninterrupted["place"] / "run" / "answers.sqlite"
    finish(start(write({**settings, "teacher": {"type": "replay", "path": str(recorded)}}, tmp_path)))
    assert not teacher.bodies
    assert weights_equal(tmp_path, uninterrupted["place"])


def test_s7_a_resumed_run_refuses_another_teacher(
    settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    config = write(settings, tmp_path)
    finish(start(config))
    write({**settings, "teacher": {**settings["teacher"], "model": "another"}}, tmp_path)
    process = start(config, "--resume")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "another" in errors
