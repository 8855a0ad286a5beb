"""What a user can get wrong: one line on stderr that names the field or file and the mend, exit code 2, nothing lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripted import ScriptedTeacher

from omniopd.cli import main

Fails = Callable[..., str]


@pytest.fixture
def fails(settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Fails:
    """Runs `omniopd train` with overrides, checks that it fails as it should, and returns the one line."""

    def run(*overrides: str, flags: tuple[str, ...] = ()) -> str:
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings))
        capsys.readouterr()
        code = main(["train", str(config), *overrides, *flags])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("omniopd: ")]
        assert code == 2
        assert len(lines) == 1
        assert "Traceback" not in lines[0]
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.stesp=5", ["train.stesp", "unknown key 'stesp'", "did you mean 'steps'"]),
        ("method.chunk=5", ["method.chunk", "unknown key 'chunk'", "did you mean 'chunks'"]),
        ("teacher.mode=5", ["teacher.mode", "did you mean 'model'"]),
        ("student.lora.rnk=5", ["student.lora.rnk", "did you mean 'rank'"]),
        ("train.steps=many", ["train.steps", "integer", "'many'"]),
        ("method.chunks=0", ["method.chunks", "greater than or equal to 1"]),
        ("method.chunk_tokens=0", ["method.chunk_tokens", "greater than or equal to 1"]),
        ("method.continuations=1000", ["method.continuations", "less than or equal to 128"]),
        ("method.anchor.beta=0", ["method.anchor", "allow_none=true"]),
        ("method.score=token_agreemnt", ["method.score", "token_agreement"]),
        ("method.signals=[survive]", ["method.signals.0", "survival"]),
        ("method.name=omniodp", ["method", "omniopd"]),
        ("teacher.type=opanai", ["teacher", "openai"]),
        ("task.type=gsm", ["task", "gsm8k"]),
        ("student.path=/no/such/folder", ["student.path", "/no/such/folder"]),
        ("student.max_new_tokens=2030", ["arithmetic/", "context of 2048", "student.max_new_tokens"]),
        ("nonsense", ["'nonsense'", "train.steps=5"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_mend(fails: Fails, override: str, said: list[str]) -> None:
    line = fails(override)
    for words in said:
        assert words in line


def test_missing_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "no-such.yaml"]) == 2
    assert "no-such.yaml" in capsys.readouterr().err


def test_config_that_is_no_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("student: {path: x\nteacher: [")
    assert main(["train", str(path)]) == 2
    line = capsys.readouterr().err
    assert "bad.yaml: line" in line
    assert len(line.splitlines()) == 1


def test_student_folder_without_a_model(fails: Fails, tmp_path: Path) -> None:
    folder = tmp_path / "no-model"
    folder.mkdir()
    assert "student.path" in fails(f"student.path={folder}")


def _jsonl(settings: dict[str, Any], path: Path) -> None:
    settings["task"] = {"type": "jsonl", "path": str(path), "heldout_size": 2}


def test_missing_data_file(fails: Fails, settings: dict[str, Any], tmp_path: Path) -> None:
    _jsonl(settings, tmp_path / "none.jsonl")
    assert "none.jsonl" in fails()


def test_malformed_line_is_numbered(fails: Fails, settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "1+1?", "answer": "2"})
    path.write_text(f"{row}\n{row}\n{{broken\n")
    _jsonl(settings, path)
    line = fails()
    assert "rows.jsonl" in line
    assert "3" in line.split("rows.jsonl")[1]


def test_empty_dataset(fails: Fails, settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    _jsonl(settings, path)
    assert "empty.jsonl" in fails()


def test_unreachable_teacher(fails: Fails) -> None:
    line = fails("teacher.base_url=http://127.0.0.1:9/v1")
    assert "127.0.0.1:9" in line


def test_refused_key(
    fails: Fails, settings: dict[str, Any], teacher: ScriptedTeacher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-canary-1234567890")
    teacher.answer = lambda body: (401, {"error": {"message": "bad key sk-canary-1234567890"}})
    line = fails("teacher.api_key_env=SOME_KEY")
    assert "SOME_KEY" in line
    assert "canary" not in line
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert written
    assert all(b"canary" not in path.read_bytes() for path in written)


def test_unset_key(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert "NO_SUCH_KEY" in fails("teacher.api_key_env=NO_SUCH_KEY")


def test_a_teacher_that_answers_nothing_stops_the_run_and_keeps_a_checkpoint(
    fails: Fails, teacher: ScriptedTeacher, tmp_path: Path
) -> None:
    empty = {"message": {"content": ""}, "finish_reason": "stop"}
    teacher.answer = lambda body: (200, {"model": "m", "choices": [empty] * body.get("n", 1), "usage": {}})
    line = fails("train.steps=20")
    assert "empty: " in line
    assert (tmp_path / "run" / "checkpoints" / "step-000003").is_dir()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["drops"]["empty"] > 0
    assert summary["rejects"]["empty"] == 3 * summary["drops"]["empty"]


def test_chunks_that_fit_into_no_response_stop_the_run(fails: Fails, teacher: ScriptedTeacher) -> None:
    assert "no response that a chunk fits into" in fails("method.chunk_tokens=48", "train.steps=20")
    assert not teacher.bodies


def test_the_folder_of_another_run(fails: Fails, settings: dict[str, Any], tmp_path: Path) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "config.yaml").write_text("seed: 7\n")
    before = sorted(output.iterdir())
    assert str(output) in fails()
    assert str(output) in fails(flags=("--resume",))
    assert sorted(output.iterdir()) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 6 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(fails: Fails, small_disk: Path) -> None:
    line = fails(f"output={small_disk / 'run'}")
    assert "No space left on device" in line
    assert "--resume" in line
    assert str(small_disk) in line


def test_nan_loss_stops_before_the_step_is_applied(
    fails: Fails, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    from students.trainer import Trainer

    healthy = Trainer.accumulate

    def poisoned(self: Trainer, rollouts: Any, signal: Any) -> dict[str, float]:
        terms = healthy(self, rollouts, signal)
        if self.updates == 2:
            self.trained[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
        return terms

    monkeypatch.setattr(Trainer, "accumulate", poisoned)
    line = fails()
    assert "not applied" in line
    assert "train.learning_rate" in line
    kept = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())


def test_embedding_without_its_model(fails: Fails) -> None:
    line = fails("method.score={name: embedding, model: /no/such/model}", "method.signals=[likelihood_weight]")
    assert "/no/such/model" in line


def test_nothing_is_written_when_the_config_is_wrong(fails: Fails, tmp_path: Path) -> None:
    fails("train.steps=-1")
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_began_needs_no_resume(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["teacher"]["api_key_env"] = "OMNI_LATE_KEY"
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert main(["train", str(path)]) == 2
    monkeypatch.setenv("OMNI_LATE_KEY", "sk-late-key-01")
    assert main(["train", str(path), "train.steps=1"]) == 0
