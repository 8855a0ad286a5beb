"""Runs of several real processes on this machine (gloo, loopback): what they learn, and how they end together."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml
from safetensors.torch import load_file
from scripted import ScriptedTeacher
from torch.testing import assert_close

from omniopd.store import Store

TRAIN = ["-m", "omniopd", "train"]


def write(settings: dict[str, Any], place: Path, **train: Any) -> Path:
    place.mkdir(exist_ok=True)
    config = place / "config.yaml"
    tree = {**settings, "train": {**settings["train"], **train}, "output": str(place / "run")}
    config.write_text(yaml.safe_dump(tree))
    return config


def launched(kind: str, config: Path, *flags: str) -> str:
    """What two processes print that `accelerate launch` starts as the shipped file says, but for their number."""
    file = str(processes.ROOT / "examples" / "scale" / f"{kind}.yaml")
    options = ["--config_file", file, "--num_processes", "2", "--main_process_port", "0"]
    command = ["-m", "accelerate.commands.launch", *options, *TRAIN, str(config), *flags]
    ((code, output, errors),) = processes.finish([processes.alone(command)])
    assert code == 0, errors
    return output


def together(config: Path, nodes: int = 1, **environment: str) -> list[tuple[int, str, str]]:
    return processes.finish(processes.start([*TRAIN, str(config)], nodes=nodes, **environment))


def alone(config: Path, *flags: str) -> None:
    ((code, _, errors),) = processes.finish([processes.alone([*TRAIN, str(config), *flags])])
    assert code == 0, errors


def assert_same_student(one: Path, other: Path) -> None:
    left, right = (load_file(place / "run" / "student" / "model.safetensors") for place in (one, other))
    assert_close(left, right, atol=1e-5, rtol=0)


def rows(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]


def said(ends: list[tuple[int, str, str]]) -> list[str]:
    """What the processes say for themselves."""
    return [line for _, _, errors in ends for line in errors.splitlines() if line.startswith("omniopd: ")]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that needs it: a run of one process."""
    return {"place": tmp_path_factory.mktemp("alone")}


@pytest.fixture
def five_steps(kept: dict[str, Any], settings: dict[str, Any], teacher: ScriptedTeacher) -> Path:
    """A run of one process that goes through; three prompts a step make shares of unequal size."""
    if "asked" not in kept:
        alone(write(settings, kept["place"], steps=5, prompts_per_step=3))
        kept["asked"] = sorted(map(str, teacher.bodies))
        teacher.bodies.clear()
    return Path(kept["place"])


def test_s3_launched_processes_learn_what_one_learns(
    five_steps: Path, kept: dict[str, Any], settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    output = launched("ddp", write(settings, tmp_path / "two", steps=5, prompts_per_step=3))
    assert_same_student(tmp_path / "two", five_steps)
    assert sorted(map(str, teacher.bodies)) == kept["asked"]
    assert output.count("report: ") == 1
    for mine, one in zip(rows(tmp_path / "two"), rows(five_steps), strict=True):
        for name in ("loss", "coverage", "response_tokens", "grad_norm", "eval"):
            assert mine.get(name) == (one.get(name) if name == "eval" else pytest.approx(one.get(name), abs=1e-5))
    mine, one = (json.loads((place / "run/summary.json").read_text()) for place in (tmp_path / "two", five_steps))
    assert mine["teacher"]["calls"] == one["teacher"]["calls"]


def test_o14_shards_are_saved_whole_and_one_process_goes_on(
    five_steps: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    place = tmp_path / "sharded"
    launched("fsdp2", write(settings, place, steps=3, prompts_per_step=3))
    alone(write(settings, place, steps=5, prompts_per_step=3), "--resume")
    assert_same_student(place, five_steps)


def test_shards_go_on_from_one_process(five_steps: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    place = tmp_path / "sharded"
    alone(write(settings, place, steps=3, prompts_per_step=3))
    launched("fsdp2", write(settings, place, steps=5, prompts_per_step=3), "--resume")
    assert_same_student(place, five_steps)


@pytest.mark.parametrize("victim", [0, 1])
def test_s3_a_killed_process_ends_the_other_with_a_message(
    victim: int, settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    teacher.latency = 0.2
    place = tmp_path / "run"
    running = processes.start([*TRAIN, str(write(settings, place, steps=500))])
    deadline = time.monotonic() + 90
    while not (place / "run" / "metrics.jsonl").exists() or len(rows(place)) < 3:
        assert time.monotonic() < deadline and all(process.poll() is None for process in running)
        time.sleep(0.1)
    running[victim].send_signal(signal.SIGKILL)
    ends = processes.finish(running, timeout=60)
    assert ends[victim][0] == -signal.SIGKILL and ends[1 - victim][0] == 2
    assert len(said(ends)) == 1, said(ends)
    (line,) = said(ends)
    assert "has died" in line and "--resume" in line
    assert "Traceback" not in ends[1 - victim][2]


def test_an_error_in_one_process_is_one_line_and_its_exit_code_everywhere(
    settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    calls = iter(range(1000))

    def sometimes(body: dict[str, Any]) -> tuple[int, Any]:
        return (401, {"error": {"message": "no"}}) if next(calls) == 20 else usual(body)

    usual, teacher.answer = teacher.answer, sometimes
    ends = together(write(settings, tmp_path / "run", steps=50))
    assert [code for code, _, _ in ends] == [2, 2]
    assert len(said(ends)) == 1, said(ends)
    (line,) = said(ends)
    assert "401" in line
    assert not any("Traceback" in errors for _, _, errors in ends)
    summary = json.loads((tmp_path / "run" / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"


def test_a_budget_holds_for_processes_with_a_store_each(
    settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    settings["teacher"]["price"] = {"prompt": 1000.0, "completion": 1000.0}
    settings["budget_usd"] = 2.0
    ends = together(write(settings, tmp_path / "run", steps=50), nodes=2)
    assert [code for code, _, _ in ends] == [3, 3]
    assert len(said(ends)) == 1, said(ends)
    (line,) = said(ends)
    assert "budget_usd" in line
    summary = json.loads((tmp_path / "run" / "run" / "summary.json").read_text())
    assert summary["status"] == "out of budget"
    stores = [Store(tmp_path / "run" / "run" / f"answers{node}.sqlite", create=False) for node in ("", "-node1")]
    spent = [sum(call["cost_usd"] for call in store.calls()) for store in stores]
    assert 0 < min(spent) <= max(spent) <= 1.0


def test_what_several_processes_cannot_do_is_one_line(settings: dict[str, Any], tmp_path: Path) -> None:
    ends = together(write(settings, tmp_path / "run", prompts_per_step=1))
    assert [code for code, _, _ in ends] == [2, 2]
    assert len(said(ends)) == 1, said(ends)
    (line,) = said(ends)
    assert "train.prompts_per_step" in line
    settings["student"]["lora"] = {"rank": 2}
    ends = together(write(settings, tmp_path / "run"), **processes.FSDP2)
    assert len(said(ends)) == 1, said(ends)
    (line,) = said(ends)
    assert "student.lora" in line
