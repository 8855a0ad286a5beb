"""The commands, as a user types them, against a teacher behind real HTTP."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripted import ScriptedTeacher

from omniopd import distill, load_config
from omniopd.cli import main
from omniopd.run import Run

SIBLING = Path(__file__).resolve().parents[2] / "examples" / "demo" / "sibling"
SHARED = Path(os.environ.get("OMNIOPD_SHARED", Path(__file__).resolve().parents[3] / "shared"))


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def test_dry_run_prints_the_plan_and_spends_nothing(
    config: str, teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", config, "--dry-run", "teacher.price={prompt: 100, completion: 1000}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for words in ("continuation_likelihood", "teacher calls", "teacher tokens", "memory", "$"):
        assert words in out
    assert not teacher.bodies
    assert not (tmp_path / "run").exists()


def test_train_writes_what_it_promises(
    config: str, teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", config, "eval.every=2"]) == 0
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["wall_seconds"] > 0
    for when in ("before", "after"):
        assert set(summary["eval"][when]) >= {"accuracy", "ci95", "n"}
    assert summary["teacher"]["calls"] == len(teacher.bodies)
    assert summary["teacher"]["prompt_tokens"] == 50 * len(teacher.bodies)
    assert summary["teacher"]["completion_tokens"] == 24 * len(teacher.bodies)
    assert 0 < summary["signal"]["coverage"] <= 1
    assert (summary["method"], summary["score"], summary["seed"]) == ("omniopd", "token_agreement", 0)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval" in row] == [0, 2]
    assert all(row["queries"] == row["chunks"] + sum(row["drops"].values()) for row in rows[1:])
    assert load_config(yaml.safe_load((run / "config.yaml").read_text())).train.steps == 4
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["versions"]["torch"]
    assert manifest["teacher_fingerprint"].startswith("openai/scripted@localhost")
    assert "report.html" in capsys.readouterr().out
    assert "student after" in (run / "report.html").read_text() or (run / "report.html").stat().st_size > 10_000


def test_the_trained_student_loads_with_transformers_and_can_be_evaluated(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", config]) == 0
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    capsys.readouterr()
    assert main(["eval", config, "--model", str(tmp_path / "run" / "student")]) == 0
    assert "95 % interval" in capsys.readouterr().out


def test_a_student_trained_with_lora_is_a_model_of_its_own(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", config, "student.lora.rank=2", "train.steps=2"]) == 0
    student = tmp_path / "run" / "student"
    assert not (student / "adapter_config.json").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    capsys.readouterr()
    assert main(["eval", config, "--model", str(student)]) == 0
    assert f"accuracy {summary['eval']['after']['accuracy']:.1%}" in capsys.readouterr().out


def test_verify_audits_a_given_answer(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    question = "Ann has 12 apples. Ann buys 7 more. How many apples does Ann have now?"
    arguments = ["verify", config, "--prompt", question, "--answer", "12+7=18. #### 18"]
    assert main([*arguments, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == "12+7=18. #### 18"
    assert record["chunks"]
    for chunk in record["chunks"]:
        assert record["text"][chunk["char_start"] : chunk["char_end"]] == chunk["text"]
        assert chunk["n_eff"] == len(chunk["replies"]) == 3
    assert main(arguments) == 0
    assert "entropy" in capsys.readouterr().out


def test_controls_run_every_placebo_and_keep_finished_ones(
    config: str, teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["controls", config, "train.steps=1", "eval.problems=4"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("real", "shuffle", "constant", "self"))
    rows = json.loads((tmp_path / "run" / "controls.json").read_text())
    assert [row["control"] for row in rows] == ["real", "shuffle", "constant", "self"]
    calls = len(teacher.bodies)
    assert main(arguments) == 0
    assert len(teacher.bodies) == calls


def test_controls_of_which_one_would_be_refused_spend_nothing(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The student itself is served as text, and the part reads log-probs."""
    weights = f"teacher={{type: transformers, path: {SIBLING}}}"
    assert main(["controls", config, weights, "method.parts=[trust_region]"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "the run 'self' (its teacher, the student, is served as text) would be refused: method: needs" in line
    assert not list((tmp_path / "run").glob("*-*"))


def test_distill_from_python(settings: dict[str, Any]) -> None:
    settings["train"]["steps"] = 1
    assert distill(load_config(settings))["status"] == "finished"


def test_same_seed_and_same_answers_give_the_same_weights(settings: dict[str, Any], tmp_path: Path) -> None:
    states = []
    for name in ("one", "two"):
        run = Run(load_config({**settings, "output": str(tmp_path / name)}))
        run.train()
        states.append(run.policy.model.state_dict())
    assert all(states[0][key].equal(states[1][key]) for key in states[0])


def test_trackers_get_every_steps_numbers(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator

    logged: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.update({step: values}))
    distill(load_config(settings))
    assert sorted(logged) == [1, 2, 3, 4]
    assert all(isinstance(number, (int, float)) for number in logged[1].values())
    assert logged[1]["teacher_calls"] > 0


def test_a_tracker_that_is_not_installed_is_named(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    from accelerate.tracking import get_available_trackers

    if "wandb" in map(str, get_available_trackers()):
        pytest.skip("wandb is installed here")
    assert main(["train", config, "train.track=[wandb]"]) == 2
    assert "train.track: 'wandb' is not installed" in capsys.readouterr().err


def test_another_seed_gives_other_rollouts(settings: dict[str, Any]) -> None:
    texts = []
    for seed in (0, 1):
        run = Run(load_config({**settings, "seed": seed}))
        texts.append([rollout.text for rollout in run.sampler.sample(run.task.train[:4], 1)])
    assert texts[0] != texts[1]


def test_r17_another_teacher_changes_the_loss(
    settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    settings["train"]["steps"] = 1
    first = distill(load_config({**settings, "output": str(tmp_path / "a")}))
    said = {"message": {"content": "Nonsense, really."}, "finish_reason": "length"}
    teacher.answer = lambda body: (200, {"model": "m", "choices": [said] * body.get("n", 1), "usage": {}})
    second = distill(load_config({**settings, "output": str(tmp_path / "b")}))
    losses = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])["loss"] for name in ("a", "b")
    ]
    assert first["steps"] == second["steps"] == 1
    assert losses[0] != losses[1]


@pytest.mark.skipif(not (SHARED / "data" / "gsm8k").is_dir(), reason="needs the GSM8K files")
def test_gsm8k_trains_on_real_questions(settings: dict[str, Any], tmp_path: Path) -> None:
    from omniopd.report import write_report

    settings["task"] = {"type": "gsm8k", "path": str(SHARED / "data" / "gsm8k")}
    settings["train"]["steps"] = 2
    summary = distill(load_config({**settings, "student": {**settings["student"], "max_new_tokens": 64}}))
    assert summary["status"] == "finished"
    assert 0.05 < summary["signal"]["coverage"] <= 1
    assert write_report(tmp_path / "run").stat().st_size > 10_000
