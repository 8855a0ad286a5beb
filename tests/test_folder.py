"""A run's folder: records travel through checkpoints, logs are cut back, NaN becomes null."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from omniopd.config import load_config
from omniopd.errors import RunError
from omniopd.folder import Record, RunFolder
from omniopd.types import Usage

TREE = {"student": {"path": "s"}, "teacher": {"type": "openai", "model": "m"}, "task": "arithmetic"}


def folder(tmp_path: Path, *overrides: str, resume: bool = False) -> RunFolder:
    made = RunFolder(load_config(TREE, [f"output={tmp_path / 'run'}", *overrides]), resume=resume)
    made.begin()
    return made


def test_a_record_survives_json() -> None:
    record = Record(
        step=3, usage=Usage(1, 2, 3, 4, 0.5), drops=Counter(empty=2), rejects=Counter(meta=1), before={"n": 1}
    )
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_nan_is_logged_as_null(tmp_path: Path) -> None:
    run = folder(tmp_path)
    run.log({"step": 1, "loss": float("nan"), "deep": {"x": [float("inf"), 1.0]}})
    assert json.loads((run.path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "deep": {"x": [None, 1.0]}}


def test_logs_are_cut_back_to_a_step_and_half_written_lines_dropped(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    RunFolder._cut_back(log, 1)
    assert log.read_text() == '{"step": 0}\n{"step": 1}\n'


def test_a_resumed_run_may_be_longer_but_not_another(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(RunError, match="holds a run already; use --resume"):
        folder(tmp_path)
    folder(tmp_path, "train.steps=500", resume=True)
    with pytest.raises(RunError, match="another run.*learning_rate"):
        folder(tmp_path, "train.steps=500", "train.learning_rate=0.5", resume=True)


def test_s7_another_teacher_is_refused(tmp_path: Path) -> None:
    run = folder(tmp_path)
    (run.path / "manifest.json").write_text(json.dumps({"teacher_fingerprint": "one"}))
    run.check_teacher("one")
    with pytest.raises(RunError, match="began with one, this is two"):
        run.check_teacher("two")


def test_a_run_that_is_killed_while_it_begins_leaves_no_half_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        folder(tmp_path)
    assert not (tmp_path / "run" / "config.yaml").exists()
    folder(tmp_path)
    assert (tmp_path / "run" / "config.yaml").exists()
