"""A made-up part that uses every hook, through real runs: who is called when, and nothing is lost on the way."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import every_hook
import pytest
import tiny
import torch
from every_hook import BEGUN, BLANK, INITIAL, NAME, PLAIN, SHORT, WHOLE, EveryHook

from omniopd.composition import Composed
from omniopd.config import load_config
from omniopd.run import Run
from omniopd.types import Writing

Make = Callable[..., Run]
DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
NOT_TOLD_AGAIN = ("seconds", "spans", "teacher_", "cost")


@pytest.fixture(autouse=True)
def made_up() -> Iterator[None]:
    with every_hook.registered():
        yield


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run of four steps of six rows, one of each kind."""

    def run(name: str = "run", method: dict[str, Any] | None = None, **train: Any) -> Run:
        place = tmp_path / name
        config = {
            "student": {"path": str(DEMO / "student"), "max_new_tokens": 24},
            "teacher": {"type": "transformers", "path": str(DEMO / "sibling")},
            "task": {"type": "arithmetic", "train_size": 32, "heldout_size": 4},
            "method": method or {"name": "opd", "parts": [NAME], "anchor": {"beta": 0.1}},
            "train": {"steps": 4, "prompts_per_step": 6, "learning_rate": 3e-3, "save_every": 1, "keep_checkpoints": 9},
            "eval": {"problems": 0},
            "output": str(place),
        }
        config["train"] |= train
        return Run(load_config(config))

    return run


def the_part(run: Run) -> EveryHook:
    assert isinstance(run.method, Composed)
    (part,) = run.method.parts
    assert isinstance(part, EveryHook)
    return part


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.policy.model.state_dict().items()}


def log(run: Run) -> list[dict[str, Any]]:
    """The rows of the log without what a clock says, and what an answer costs that is in the store."""
    rows = map(json.loads, (run.config.output / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.startswith(NOT_TOLD_AGAIN)} for row in rows]


def test_hooks_come_in_order_and_each_writing_as_it_was_wished(make: Make) -> None:
    run = make(steps=2)
    initial = weights(run)
    run.train()
    part = the_part(run)
    of_step = [name for name, group in itertools.groupby(part.calls, key=lambda call: call[0])]
    once = ["before", "writings", "ask", "again", "measure", "apply", "after"]
    assert of_step == once * 2
    assert part.calls.count(("again", 2)) == every_hook.ROUNDS + 1  # the last one asks for nothing more
    assert part.calls.count(("ask", 2)) == 6 == [name for name, _ in part.calls].count("measure") / 2

    rows = part.read
    assert [row.author for row in rows] == ["student", "student", "mixed", "student", "initial", "teacher"]
    assert [row.given for row in rows] == [0, 0, 3, 0, 0, len(rows[WHOLE])]
    assert len(rows[SHORT]) <= 5 < max(len(rows[PLAIN]), len(rows[INITIAL]))
    assert len(rows[BLANK]) == 0 and rows[BLANK].facts == {}
    assert rows[WHOLE].ids[-1] == run.policy.end_id and rows[WHOLE].finish == "stop"
    run.policy.model.load_state_dict(initial)
    for row in (BEGUN, INITIAL):  # written by weights of which one has seen one update
        before = tiny.dense(run.policy.model, rows[row].prompt_ids, rows[row].ids)[0]
        assert (row == INITIAL) == torch.allclose(before, torch.tensor(rows[row].logprobs), atol=1e-4)
        torch.testing.assert_close(before, torch.tensor(rows[row].facts[f"{NAME}.initial"]).float(), atol=1e-4, rtol=0)


def test_the_first_updates_given_tokens_have_the_students_own_log_probs(make: Make) -> None:
    run = make(steps=1)
    before = weights(run)
    run.train()
    rows = the_part(run).read
    run.policy.model.load_state_dict(before)
    for row in (BEGUN, WHOLE):
        logp, entropy = tiny.dense(run.policy.model, rows[row].prompt_ids, rows[row].ids)
        torch.testing.assert_close(torch.tensor(rows[row].logprobs), logp, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(rows[row].entropy), entropy, atol=1e-5, rtol=0)


def test_the_part_weighs_what_it_measured_and_its_figures_are_logged(make: Make) -> None:
    run = make(steps=3)
    run.train()
    rows = log(run)
    factors = [row["factor"] for row in rows]
    assert factors[-1] == the_part(run).factor
    assert len(set(factors)) == len(factors) == 3
    assert all(row["weight_min"] < row["weight_max"] for row in rows)


@pytest.mark.parametrize("lag", [0, 1])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lag: int
) -> None:
    """The folder as it is in the middle of step 3 is what a process leaves that is killed there."""
    run, killed = make(max_lag=lag), tmp_path / "killed"
    update = run.trainer.update

    def spied(rollouts: Any, signal: Any) -> Any:
        if run.trainer.updates == 2:
            shutil.copytree(run.config.output, killed)
        return update(rollouts, signal)

    monkeypatch.setattr(run.trainer, "update", spied)
    run.train()
    rows, read, whole = log(run), the_part(run).read, weights(run)
    shutil.rmtree(run.config.output)
    killed.rename(run.config.output)
    again = make(max_lag=lag)
    again.train(resume=True)
    assert [step for name, step in the_part(again).calls if name == "apply"] == [3, 4]
    assert all(weights(again)[name].equal(tensor) for name, tensor in whole.items())
    assert the_part(again).factor == the_part(run).factor
    assert the_part(again).read == read
    assert log(again) == rows
    assert [row["lag"] for row in rows] == [{"0": 6}] + [{str(lag): 6}] * 3


def test_candidates_and_authors_survive_the_checkpoint_of_a_begun_step(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EveryHook, "candidates", 2)
    run = make(steps=3, max_lag=1)
    run.train()
    kept = [row for row in the_part(run).read if len(row)]
    tops = {len(place) for row in kept for place in row.top[row.given :]}
    assert tops == {2}
    resumed = make(steps=3, max_lag=1)
    for step in (3, 2):  # as killed after step 1, with step 2 begun
        shutil.rmtree(run.config.output / "checkpoints" / f"step-{step:06d}")
    (run.config.output / "summary.json").unlink()
    resumed.train(resume=True)
    assert the_part(resumed).read == the_part(run).read


def test_a_horizon_is_the_beginning_of_the_whole_rollout(tiny_folder: Callable[..., Path]) -> None:
    """Same stream, same first tokens; what is cut has no end token and says so."""
    student = tiny.policy(tiny_folder())
    prompts = [tiny.prompt("Hi " * n, f"p{n}") for n in range(1, 7)]
    full = tiny.sampler(student).sample(prompts, 1)
    for limit in (1, 3, 40):
        cut = tiny.sampler(student).sample(prompts, 1, writings=[Writing(max_tokens=limit)] * len(prompts))
        for short, long in zip(cut, full, strict=True):
            assert short.ids == long.ids[:limit]
            assert short.finish == (long.finish if len(long) <= limit else "length")
            assert short.logprobs == pytest.approx(long.logprobs[:limit], abs=1e-5)
    mixed = tiny.sampler(student).sample(prompts, 1, writings=[Writing(max_tokens=n) for n in range(1, 7)])
    assert [row.ids for row in mixed] == [row.ids[:n] for n, row in enumerate(full, 1)]
