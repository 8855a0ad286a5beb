"""Every kind of signal, from the config to the trained student, on the demo models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from honest import Honest
from scripted import ScriptedTeacher

from omniopd.chat import ChatTemplate
from omniopd.cli import main
from omniopd.config import load_config
from omniopd.report import write_report

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
TEXT = {"continuations": {"chunks": 1, "chunk_tokens": 6, "continuations": 2}, "answers": {"answer_tokens": 160}}


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return {
        "student": {"path": str(DEMO / "student"), "max_new_tokens": 32},
        "teacher": {"type": "transformers", "path": str(DEMO / "sibling")},
        "task": {"type": "arithmetic", "train_size": 32, "heldout_size": 8},
        "signal": "auto",
        "train": {"steps": 2, "prompts_per_step": 4, "learning_rate": 1e-4, "save_every": 1},
        "eval": {"problems": 4},
        "output": str(tmp_path / "run"),
    }


def written(tree: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def rows_of(tmp_path: Path) -> list[dict[str, Any]]:
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["step"]]


@pytest.mark.parametrize(
    ("kind", "teacher", "method"),
    [
        ("logits", "sibling", "opd"),
        ("topk", "sibling", "opd"),
        ("scores", "sibling", "opd"),
        ("scores", "teacher", "dpca"),
        ("logits", "teacher", "bpm"),
        ("continuations", "teacher", "omniopd"),
        ("answers", "teacher", "seqkd"),
    ],
)
def test_a_kind_trains(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, teacher: str, method: str
) -> None:
    tree |= {"signal": kind, "method": TEXT.get(kind, {})}
    tree["teacher"]["path"] = str(DEMO / teacher)
    assert main(["train", written(tree, tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["method"], summary["steps"]) == ("finished", method, 2)
    assert summary["signal"]["read"] in said
    kept = load_config(tmp_path / "run" / "config.yaml")
    assert (kept.signal, kept.method.name) == (kind, method)
    for row in rows_of(tmp_path):
        assert row["grad_norm"] > 0
        assert row["coverage"] > 0.9 or kind in TEXT


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        ("sibling", "whole distributions, token by token (teacher has the student's tokenizer)"),
        (
            "teacher",
            "whole distributions, aligned by bytes (teacher has another tokenizer)",
        ),
    ],
)
def test_the_choice_is_shown_everywhere(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], teacher: str, words: str
) -> None:
    tree["teacher"]["path"] = str(DEMO / teacher)
    config = written(tree, tmp_path)
    assert main(["train", config, "--dry-run"]) == 0
    plan = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert words in plan
    assert "teacher calls 8" in plan
    assert "teacher weights" in plan
    assert not (tmp_path / "run").exists()
    assert main(["train", config]) == 0
    assert f"signal: {words}" in " ".join(capsys.readouterr().err.split())
    assert words in write_report(tmp_path / "run").read_text().replace("&#x27;", "'")


def test_s7_a_resumed_run_keeps_its_choice(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tree, tmp_path)
    assert main(["train", config, "signal=scores"]) == 0
    assert main(["train", config, "--resume", "train.steps=3"]) == 0  # auto would take logits
    assert load_config(tmp_path / "run" / "config.yaml").signal == "scores"
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    capsys.readouterr()
    assert main(["train", config, "--resume", "train.steps=4", "signal=topk"]) == 2
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "teacher"), [("scores", "sibling"), ("scores", "teacher"), ("logits", "sibling")])
def test_verify_shows_the_value_of_every_token(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, teacher: str
) -> None:
    tree |= {"signal": kind}
    tree["teacher"]["path"] = str(DEMO / teacher)
    question = "Ann has 12 apples. Ann buys 7 more. How many apples does Ann have now?"
    assert main(["verify", written(tree, tmp_path), "--prompt", question, "--answer", "12+7=19. #### 19"]) == 0
    out = capsys.readouterr().out
    assert "nats per token" in out
    values = [line for line in out.splitlines() if line.strip().endswith("'") and ("+" in line or "-" in line)]
    assert bool(values) == (kind == "scores")
    if kind == "logits":
        assert "the target is a distribution at each token" in out


def test_controls_refuse_a_method_without_a_placebo(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["controls", written(tree, tmp_path)]) == 2
    assert "method: 'opd' has no placebo runs" in capsys.readouterr().err


# ---------------------------------------------------------------------- a server that is asked for scores


@pytest.fixture
def served(tree: dict[str, Any], teacher: ScriptedTeacher) -> dict[str, Any]:
    """The student's tokenizer behind a vLLM server."""
    student = str(DEMO / "student")
    settings = {"type": "vllm", "base_url": teacher.url, "model": "scripted", "tokenizer": student, "max_attempts": 1}
    return tree | {"teacher": settings, "eval": {"problems": 0}}


def honest(*lies: str) -> Honest:
    return Honest(*lies, name="scripted", chat=ChatTemplate.load(str(DEMO / "student"), "teacher.tokenizer"))


def test_scores_of_a_server_train_and_are_found_again(
    served: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    teacher.answer = server = honest()
    config = written(served, tmp_path)
    assert main(["train", config, "signal=scores"]) == 0
    assert {len(body["prompt"]) > 1 and body["prompt_logprobs"] for body in server.bodies} == {0}
    assert [row["teacher_calls"] for row in rows_of(tmp_path)] == [4, 4]
    store = f"store={tmp_path / 'run' / 'answers.sqlite'}"
    assert main(["train", config, "signal=scores", store, f"output={tmp_path / 'again'}"]) == 0
    assert len(server.bodies) == 8


def test_what_a_probe_disproves_auto_does_not_take(
    served: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher.answer = honest("scores_ignored")
    config = written(served, tmp_path)
    plans = []
    for command in (["train", config, "--dry-run"], ["probe", config, "--yes"], ["train", config, "--dry-run"]):
        assert main(command) == 0
        plans.append(" ".join(capsys.readouterr().out.replace("│", " ").split()))
    assert "likeliest tokens of given text, token by token" in plans[0]
    assert "continuations of the student's text" in plans[2]
    assert "no log-probs of given text" in plans[2]
    assert main(["train", config, "signal=null", "method=opd"]) == 2
    assert (
        "method: reads log-probs of given text; the probe found otherwise (no prompt_logprobs"
        in capsys.readouterr().err
    )
    assert main(["train", config, "signal=scores"]) == 2
    assert "signal: scores: the teacher (type vllm) has no log-probs of given text" in capsys.readouterr().err
