"""Whole runs with a judge, and one with a discriminator: what they cost, repeat and refuse."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from omniopd.cli import main
from omniopd.registry import RULES
from omniopd.store import Store
from omniopd.types import Message
from teachers.rules.arithmetic import results

STUDENT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "student"
JUDGE = {"type": "scripted", "rule": "arithmetic"}


@RULES.register("right answers, for tests")
class RightAnswers:
    """A teacher that knows the demo's task."""

    version = 1

    def answer(self, messages: Sequence[Message], seed: int) -> str:
        steps = results(messages[-1].content) or [0]
        return f"{' '.join(f'It is {step}.' for step in steps)} #### {steps[-1]}"


class Command:
    """`omniopd train` in this process."""

    def __init__(self, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.place, self._capsys = place, capsys
        self.settings: dict[str, Any] = {
            "student": {"path": str(STUDENT), "max_new_tokens": 48},
            "teacher": {"type": "scripted", "rule": "right answers, for tests"},
            "judge": JUDGE,
            "task": {"type": "arithmetic", "train_size": 16, "heldout_size": 8},
            "train": {
                "steps": 2, "prompts_per_step": 3, "rollouts_per_prompt": 4, "learning_rate": 1e-4, "save_every": 1
            },
            "eval": {"problems": 0},
        }  # fmt: skip

    def __call__(self, *words: str, name: str = "run", **settings: Any) -> tuple[int, str]:
        config = self.place / f"{name}.yaml"
        config.write_text(yaml.safe_dump({**self.settings, **settings, "output": str(self.place / name)}))
        self._capsys.readouterr()
        return main(["train", str(config), *words]), self._capsys.readouterr().err

    def rows(self, name: str = "run") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.place / name / "metrics.jsonl").read_text().splitlines()]

    def manifest(self, name: str = "run") -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.place / name / "manifest.json").read_text())
        return found

    def same_weights(self, one: str, other: str) -> bool:
        left, right = (load_file(self.place / name / "student" / "model.safetensors") for name in (one, other))
        return all(left[key].equal(right[key]) for key in left)


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, capsys)


@pytest.mark.parametrize("method", ["ovd", "ropd"])
def test_a_run_with_a_judge_is_counted_and_can_be_replayed(train: Command, method: str) -> None:
    settings = {"method": {"name": method}}
    assert train(**settings)[0] == 0
    for row in train.rows():
        assert set(row["teachers"]) == {"judge", "teacher"} and row["reward_known"] > 0
        assert row["queries"] == sum(one["queries"] for one in row["teachers"].values())
    mark = train.manifest()["teacher_fingerprint"]
    assert mark.startswith("scripted/right answers") and " judged by scripted/arithmetic#" in mark
    store = Store(train.place / "run" / "answers.sqlite")
    prints = sorted(store.teachers())
    store.close()
    assert len(prints) == 2
    replay = [
        {"type": "replay", "path": str(train.place / "run" / "answers.sqlite"), "fingerprint": one} for one in prints
    ]
    assert train(name="again", **settings, judge=replay[0], teacher=replay[1])[0] == 0
    assert train.same_weights("run", "again") and train.manifest("again")["teacher_fingerprint"] == mark
    code, said = train("--resume", "train.steps=3", **settings, judge={**JUDGE, "fingerprint": "another"})
    assert code == 2 and "omniopd: teacher: the run began with" in said


def test_without_a_judge_the_teacher_is_asked(train: Command) -> None:
    train.settings["teacher"], train.settings["judge"] = JUDGE, None
    assert train(method={"name": "ovd", "use": "reward"})[0] == 0
    assert all(row["reward_known"] > 0 and "teachers" not in row for row in train.rows())
    assert "judged" not in train.manifest()["teacher_fingerprint"]


def test_a_judge_that_no_method_asks_is_not_opened(train: Command) -> None:
    judge = {"type": "openai", "base_url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}
    assert train(method={"name": "seqkd"}, judge=judge)[0] == 0
    code, said = train(method={"name": "ovd"}, judge=judge, name="other")
    assert code == 2 and "omniopd: judge: teacher.api_key_env: the environment variable NO_SUCH_KEY" in said


def test_a_discriminator_goes_on_where_it_was(train: Command) -> None:
    settings = {"method": {"name": "gad", "warmup_steps": 1, "learning_rate": 1e-4}}
    assert train("train.steps=4", name="whole", **settings)[0] == 0
    assert train("train.steps=2", name="parts", **settings)[0] == 0
    assert train("train.steps=4", "--resume", name="parts", **settings)[0] == 0
    assert train.same_weights("whole", "parts")
    losses = [[row["gad_loss"] for row in train.rows(name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(set(losses[0])) == 4
    code, said = train("train.max_lag=1", name="lagging", **settings)
    assert code == 2 and "omniopd: train.max_lag: the method 'gad'" in said
