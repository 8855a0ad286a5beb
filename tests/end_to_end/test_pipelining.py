"""Steps that overlap: the same as the plain loop without lag, the same every time with it, and clean wherever they stop."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scripted import ScriptedTeacher, scripted
from test_resume import finish, start, weights_equal, write

from omniopd.cli import main
from omniopd.config import load_config
from omniopd.errors import OmniError, TeacherError
from omniopd.opening import open_teacher
from omniopd.run import Run
from omniopd.sampling import named_seed

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
Tree = dict[str, Any]


@pytest.fixture
def short(settings: Tree) -> Tree:
    """A run that measures nothing, whose updates are so large that later weights write other texts."""
    train = {**settings["train"], "steps": 5, "learning_rate": 3e-3}
    return {**settings, "train": train, "eval": {"problems": 0}}


def make(settings: Tree, place: Path, **train: Any) -> Run:
    output = {"output": str(place), "store": str(place / "answers.sqlite")}
    return Run(load_config({**settings, "train": {**settings["train"], **train}, **output}))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.policy.model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def rows_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]


def plain(run: Run) -> dict[str, torch.Tensor]:
    """The loop as the paper has it: write all, ask about all, wait for all, learn."""

    async def loop() -> None:
        async with open_teacher(run) as (teacher, _):
            for step in range(1, run.config.train.steps + 1):
                rollouts = run.sampler.sample(run.prompts(step), step)
                evidence = await teacher.gather(run.method.audit(rollouts, step))
                signal = run.method.read(rollouts, evidence, step)
                torch.manual_seed(named_seed(run.config.seed, "update", step))
                run.trainer.update(rollouts, signal)
                run.sampler.push(step)

    asyncio.run(loop())
    return weights(run)


def jittery(seed: int) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    """The scripted answers, each after another short wait."""
    draw = random.Random(seed)

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(draw.uniform(0, 0.15))
        return scripted(body)

    return answer


def test_s2_without_lag_a_run_is_the_plain_loop_bit_for_bit(
    short: Tree, teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    expected = plain(make(short, tmp_path / "plain"))
    teacher.answer = jittery(0)
    run = make(short, tmp_path / "run")
    before = weights(run)
    run.train()
    assert equal(weights(run), expected)
    assert not equal(before, expected)
    assert [row["lag"] for row in rows_of(tmp_path / "run")] == [{"0": 4}] * 5


def test_s2_without_lag_a_white_box_run_is_the_plain_loop_bit_for_bit(short: Tree, tmp_path: Path) -> None:
    settings = {**short, "teacher": {"type": "transformers", "path": str(DEMO / "sibling")}, "method": {"name": "opd"}}
    expected = plain(make(settings, tmp_path / "plain"))
    run = make(settings, tmp_path / "run")
    run.train()
    assert equal(weights(run), expected)


@pytest.mark.parametrize("max_lag", [1, 2])
def test_s2_with_lag_a_run_repeats_whatever_the_teachers_latencies(
    short: Tree, teacher: ScriptedTeacher, tmp_path: Path, max_lag: int
) -> None:
    found = []
    for seed in range(2):
        teacher.answer = jittery(seed)
        run = make(short, tmp_path / str(seed), max_lag=max_lag)
        summary = run.train()
        found.append(weights(run))
    assert equal(*found)
    rows = rows_of(tmp_path / "0")
    lags = [min(max_lag, step) for step in range(5)]
    assert [row["lag"] for row in rows] == [{str(lag): 4} for lag in lags]
    assert summary["lag"] == {str(lag): 4 * times for lag, times in Counter(lags).items()}
    assert 0 <= summary["wait_share"] < 1
    for row in rows:
        spans = row["spans"]
        assert spans["rollout"][0] <= spans["evidence"][0] < spans["evidence"][1] <= spans["update"][0] + 1e-3
        assert spans["rollout"][1] <= spans["wait"][0] <= spans["wait"][1] <= spans["update"][0] + 1e-3
    plainly = make(short, tmp_path / "plain")
    plainly.train()
    assert not equal(weights(plainly), found[0])


def test_a_white_box_run_with_lag_repeats(short: Tree, tmp_path: Path) -> None:
    settings = {**short, "teacher": {"type": "transformers", "path": str(DEMO / "sibling")}, "method": {"name": "opd"}}
    found = []
    for name in "ab":
        run = make(settings, tmp_path / name, max_lag=1)
        run.train()
        found.append(weights(run))
    assert equal(*found)


def test_the_first_rollout_is_asked_about_while_the_others_are_written(
    short: Tree, teacher: ScriptedTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler goes on only when the server has the query of the rollout that has ended."""
    came, written = threading.Event(), list[int]()

    def answer(body: dict[str, Any]) -> tuple[int, Any]:
        came.set()
        return scripted(body)

    teacher.answer = answer
    run = make(short, tmp_path / "run", steps=1)
    sample, ask = run.sampler.sample, run.method.ask
    asked: list[int] = []

    def asking(rollout: Any, row: int, step: int) -> Any:
        queries = ask(rollout, row, step)
        asked.extend([row] * len(queries))
        return queries

    def waiting(prompts: Any, step: int, rows: Any, ended: Any, *how: Any) -> Any:
        def over(place: int, rollout: Any) -> None:
            ended(place, rollout)
            written.append(place)
            if asked:
                assert came.wait(60), "the server has heard of no query"

        return sample(prompts, step, rows, over, *how)

    monkeypatch.setattr(run.method, "ask", asking)
    monkeypatch.setattr(run.sampler, "sample", waiting)
    run.train()
    assert sorted(written) == [0, 1, 2, 3]
    (row,) = rows_of(tmp_path / "run")
    assert row["spans"]["evidence"][0] < row["spans"]["rollout"][1]


# ---------------------------------------------------------------------- where it stops


@pytest.fixture
def lagging(settings: Tree) -> Tree:
    train = {**settings["train"], "steps": 6, "max_lag": 2, "learning_rate": 3e-3}
    return {**settings, "train": train, "eval": {"problems": 8, "every": 3}}


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 90
    while not happened() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "the run was over before the moment came"
    assert happened()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_s10_stopped_with_steps_begun_and_resumed_equals_uninterrupted(
    lagging: Tree, teacher: ScriptedTeacher, tmp_path: Path, how: signal.Signals
) -> None:
    """The steps that are begun were written by older weights than the checkpoint's: it has to keep them."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config = write(lagging, whole)
    finish(start(config))
    calls = len(teacher.bodies)
    teacher.bodies.clear()
    teacher.latency = 0.2
    config = write(lagging, stopped)
    process = start(config)
    metrics = stopped / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and '"step": 3' in metrics.read_text(), process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in errors and "never" not in errors
    time.sleep(0.2)  # calls in flight end at the server
    teacher.latency = 0.0
    before = len(teacher.bodies)
    finish(start(config, "--resume"))
    assert weights_equal(whole, stopped)
    if how == signal.SIGINT:  # what was under way was waited for and kept
        assert len(teacher.bodies) == calls
    assert len(teacher.bodies) - before <= calls / 2
    lags = [[row["lag"] for row in rows_of(place / "run") if row["step"]] for place in (whole, stopped)]
    assert lags[0] == lags[1] == [{str(lag): 4} for lag in (0, 1, 2, 2, 2, 2)]


def test_a_ctrl_c_in_the_update_keeps_that_step(
    short: Tree, teacher: ScriptedTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(short, tmp_path / "run", max_lag=1, save_every=50)
    update, loops = run.trainer.update, list[Any]()

    def interrupted(*arguments: Any) -> Any:
        if run.trainer.updates == 2:
            heard = threading.Event()
            loops[0].call_soon_threadsafe(lambda: (loops[1].cancel(), heard.set()))
            assert heard.wait(30)
        return update(*arguments)

    monkeypatch.setattr(run.trainer, "update", interrupted)

    async def trained() -> None:
        loops.extend((asyncio.get_running_loop(), asyncio.current_task()))
        await run._train(False)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(trained())
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    resumed = make(short, tmp_path / "run", max_lag=1, save_every=50)
    resumed.train(resume=True)
    whole = make(short, tmp_path / "whole", max_lag=1, save_every=50)
    whole.train()
    assert equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("place", ["sample", "update"])
def test_an_error_in_the_lane_ends_everything(
    short: Tree,
    teacher: ScriptedTeacher,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
) -> None:
    caplog.set_level(logging.WARNING)
    run = make(short, tmp_path / "run", max_lag=2)
    teacher.latency = 0.3
    owner = run.sampler if place == "sample" else run.trainer
    work = getattr(owner, place)

    def failing(*arguments: Any) -> Any:
        if place == "update" or arguments[1] == 2:
            raise OmniError("broken")
        return work(*arguments)

    monkeypatch.setattr(owner, place, failing)

    async def trained() -> None:
        with pytest.raises(OmniError, match="broken"):
            await run._train(False)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(trained())
    assert "never retrieved" not in caplog.text
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"
    calls = len(teacher.bodies)
    monkeypatch.undo()
    teacher.latency = 0.0
    make(short, tmp_path / "run", max_lag=2).train(resume=True)
    whole = make(short, tmp_path / "whole", max_lag=2)
    whole.train()
    assert len(teacher.bodies) % 2 == 0 and calls < len(teacher.bodies) / 2  # each query was asked once by each run
    students = [load_file(tmp_path / name / "student" / "model.safetensors") for name in ("run", "whole")]
    assert equal(*students)


def test_a_teacher_that_fails_ends_everything_and_the_run_goes_on_from_there(
    short: Tree, teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    whole = make(short, tmp_path / "whole", max_lag=2)
    whole.train()
    calls, count = len(teacher.bodies), Counter[str]()
    teacher.bodies.clear()

    def failing(body: dict[str, Any]) -> tuple[int, Any]:
        count["calls"] += 1
        return scripted(body) if count["calls"] < 25 else (401, {"error": {"message": "no such key"}})

    teacher.answer = failing
    run = make(short, tmp_path / "run", max_lag=2)

    async def trained() -> None:
        with pytest.raises(TeacherError, match="the key was refused"):
            await run._train(False)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(trained())
    teacher.answer = scripted
    refused = len(teacher.bodies) - 24
    resumed = make(short, tmp_path / "run", max_lag=2)
    resumed.train(resume=True)
    assert equal(weights(resumed), weights(whole))
    assert len(teacher.bodies) - refused == calls  # what was answered is not asked again


def test_a_budget_stops_a_lagging_run_and_it_goes_on_when_it_is_raised(
    short: Tree, teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    price = {"prompt": 400.0, "completion": 1000.0}  # a call of 50 and 24 tokens: 4.4 cents
    priced = {**short, "teacher": {**short["teacher"], "price": price}}
    priced["train"] = {**short["train"], "max_lag": 2}
    whole, stopped = write(priced, tmp_path / "whole"), write(priced, tmp_path / "stopped")
    assert main(["train", str(whole)]) == 0
    calls = len(teacher.bodies)
    teacher.bodies.clear()
    capsys.readouterr()
    assert main(["train", str(stopped), "budget_usd=1.0"]) == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("omniopd: ")]
    assert "of 1 dollars" in line
    assert 0.8 < 0.044 * len(teacher.bodies) <= 1.0
    assert main(["train", str(stopped), "budget_usd=100", "--resume"]) == 0
    assert len(teacher.bodies) == calls
    assert weights_equal(tmp_path / "whole", tmp_path / "stopped")


def test_a_shorter_resumption_leaves_out_steps_that_were_begun(
    short: Tree, teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    """Steps that the checkpoint keeps beyond the new end are neither asked about nor learned."""
    run = make(short, tmp_path / "run", max_lag=2, save_every=2)
    update = run.trainer.update

    def failing(*arguments: Any) -> Any:
        if run.trainer.updates == 2:
            raise OmniError("broken")
        return update(*arguments)

    run.trainer.update = failing  # type: ignore[method-assign]
    with pytest.raises(OmniError, match="broken"):
        run.train()
    calls = len(teacher.bodies)
    make(short, tmp_path / "run", max_lag=2, save_every=2, steps=3).train(resume=True)
    assert [row["lag"] for row in rows_of(tmp_path / "run")] == [{"0": 4}, {"1": 4}, {"2": 4}]
    assert len(teacher.bodies) == calls
