"""`omniopd probe`, as a user types it, and what a run makes of what it found."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from honest import Honest
from scripted import ScriptedTeacher

from omniopd.chat import ChatTemplate
from omniopd.cli import main
from omniopd.run import Run
from omniopd.store import Store
from omniopd.types import Prompt

TEACHER = Path(__file__).resolve().parents[2] / "examples" / "demo" / "teacher"
Serve = Callable[..., Honest]


@pytest.fixture
def serve(teacher: ScriptedTeacher) -> Serve:
    """Makes the teacher an honest server, or one that lies in these points."""

    def make(*lies: str, **settings: Any) -> Honest:
        server = Honest(*lies, name="scripted", **settings)
        teacher.answer = server
        return server

    return make


@pytest.fixture
def config(settings: dict[str, Any], tmp_path: Path) -> str:
    settings["teacher"]["continuation"] = "auto"
    settings["eval"] = {"problems": 0}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def store_of(tmp_path: Path) -> Store:
    return Store(tmp_path / "run" / "answers.sqlite", create=False)


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("omniopd: ")]
    return line


def test_it_says_its_cost_first_and_shows_what_it_found(
    config: str, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    price = "teacher.price={prompt: 100, completion: 1000}"
    assert main(["probe", config, "--yes", price]) == 0
    said = capsys.readouterr()
    cost = next(line for line in said.err.splitlines() if "at most" in line)
    calls, dollars = int(cost.split(" calls")[0].split()[-1]), float(cost.rpartition("$")[2])
    assert 0 < len(server.bodies) <= calls
    out = " ".join(said.out.split())
    for words in (
        "continuation.prefill",
        "unknown_field_refused",
        "continuation: prefill",
        "pilot: 8 queries",
        "prompt check",
    ):
        assert words in out
    paid = float(out.partition("asked: ")[2].partition("$")[2].split()[0])
    assert 0 < paid <= dollars


def test_it_asks_before_it_sends(
    config: str, serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()

    class Terminal:
        def __init__(self, answer: str) -> None:
            self.answer = answer

        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return self.answer

    assert main(["probe", config]) == 2  # the tests have no terminal
    assert "add --yes" in line_of(capsys)
    for answer in ("n\n", "\n", ""):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert main(["probe", config]) == 2
        assert "not agreed to; nothing was sent" in capsys.readouterr().err
    assert not server.bodies
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert main(["probe", config]) == 0
    assert "go on? [y/N]" in capsys.readouterr().err


def test_json_is_all_that_it_prints(
    config: str, serve: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    serve("n", chat=ChatTemplate.load(str(TEACHER), "teacher.tokenizer"))
    assert main(["probe", config, "--yes", "--json", "teacher.n=true", f"teacher.tokenizer={TEACHER}"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.isascii()
    assert {"fingerprint", "findings", "rung", "usage", "pilot", "prompts", "disproved", "fidelity"} <= found.keys()
    assert found["disproved"][0].startswith("teacher.n: ")
    assert [row[0] for row in found["prompts"]["rows"]][:2] == ["prompt", "BOS tokens"]
    assert store_of(tmp_path).probe(found["fingerprint"])["findings"] == found["findings"]  # type: ignore[index]


def test_a_run_finds_the_pilots_answers_in_its_store_and_never_asks_again(
    config: str, serve: Serve, tmp_path: Path
) -> None:
    server = serve()
    assert main(["probe", config, "--yes"]) == 0
    probing = len(server.bodies)
    booked = [call for call in store_of(tmp_path).calls() if call["purpose"] == "continue"]
    assert len(booked) == 8  # two chunks of each of four rollouts, three draws a call
    assert main(["train", config]) == 0

    def name(body: dict[str, Any]) -> str:
        return json.dumps([body["messages"], body["seed"]])

    assert not {name(body) for body in server.bodies[:probing]} & {name(body) for body in server.bodies[probing:]}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["teacher_calls"] for row in rows if row["step"] == 1] == [0]
    assert [row["teacher_cached_calls"] for row in rows if row["step"] == 1] == [8]
    assert all(row["teacher_calls"] for row in rows if row["step"] > 1)


def test_the_pilot_of_a_large_step_asks_about_its_first_rollouts_only(
    config: str, serve: Serve, tmp_path: Path
) -> None:
    server = serve()
    large = ["train.prompts_per_step=20", "train.steps=1", "teacher.max_attempts=4"]
    large += ["method.chunks=4", "method.chunk_tokens=2", "method.continuations=1"]
    assert main(["probe", config, "--yes", *large]) == 0
    piloted, probed = [call for call in store_of(tmp_path).calls() if call["purpose"] == "continue"], len(server.bodies)
    assert 64 <= len(piloted) < 80
    assert main(["train", config, *large]) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert row["teacher_cached_calls"] == len(piloted)
    assert len(server.bodies) - probed == row["queries"] - len(piloted) > 0


def test_the_record_is_in_the_runs_manifest_and_auto_asks_no_more(config: str, serve: Serve, tmp_path: Path) -> None:
    server = serve("restart")
    assert main(["probe", config, "--yes"]) == 0
    probing = len(server.bodies)
    assert main(["train", config, "train.steps=2"]) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["teacher_probe"] == store_of(tmp_path).probe(manifest["teacher_fingerprint"])
    assert manifest["teacher_probe"]["rung"] == "instruct"
    asked = [body["messages"][-1]["content"] for body in server.bodies[probing:]]
    assert asked
    assert all("<begun>" in text and "Count from 1" not in text for text in asked)
    assert {call["purpose"] for call in store_of(tmp_path).calls()} == {"probe", "continue"}


def test_a_run_without_a_probe_says_so_in_its_manifest(config: str, serve: Serve, tmp_path: Path) -> None:
    serve()
    assert main(["train", config, "train.steps=1"]) == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["teacher_probe"] is None


@pytest.mark.parametrize(
    ("lie", "override", "field", "mend"),
    [
        ("n", "teacher.n=true", "teacher.n", "set auto or false"),
        ("seed", "teacher.seed=true", "teacher.seed", "set auto or false"),
        ("temperature", "teacher.temperature=0.7", "teacher.temperature", "set 1.0"),
        ("restart", "teacher.continuation=prefill", "teacher.continuation", "set instruct or auto"),
        ("logprobs_ignored", "teacher.logprobs=5", "teacher.logprobs", "set 0"),
        ("thinking_told", "teacher.thinking=off", "teacher.thinking", "teacher.thinking_tokens"),
    ],
)
def test_train_refuses_what_the_probe_disproves(
    config: str,
    serve: Serve,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    lie: str,
    override: str,
    field: str,
    mend: str,
) -> None:
    server = serve(lie)
    assert main(["probe", config, "--yes", override]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"omniopd train would refuse: {field}: " in out
    asked = len(server.bodies)
    assert main(["train", config, override]) == 2
    line = line_of(capsys)
    assert line.startswith(f"omniopd: {field}: the probe found otherwise")
    assert mend in line
    assert "or probe again" in line
    assert len(server.bodies) == asked


def test_a_setting_that_the_server_refuses_outright_is_one_line(
    config: str, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    serve("temperature_0_refused")
    assert main(["probe", config, "--yes", "teacher.temperature=0"]) == 2
    assert "teacher.temperature to null" in line_of(capsys)


def test_the_dry_run_uses_the_pilot_and_says_so(
    config: str, serve: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    serve()
    price = "teacher.price={prompt: 1000, completion: 1000, cache_read: 1}"

    def plan(*overrides: str) -> str:
        capsys.readouterr()
        assert main(["train", config, "--dry-run", price, *overrides]) == 0
        return " ".join(capsys.readouterr().out.replace("│", "").split())

    before = plan()
    assert "estimated; omniopd probe measures it" in before
    assert main(["probe", config, "--yes"]) == 0
    after = plan()
    assert "measured by the probe's pilot" in after
    assert "continuation prefill" in after
    assert "estimated" in plan("method.chunk_tokens=3")  # another run than the pilot's
    assert "refused teacher.logprobs: 30 is more than the 20" in plan("teacher.logprobs=30")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_second_probe_keeps_the_pilot_of_the_first(config: str, serve: Serve, tmp_path: Path) -> None:
    serve()

    def record() -> dict[str, Any]:
        with sqlite3.connect(tmp_path / "run" / "answers.sqlite") as db:
            return json.loads(db.execute("SELECT value FROM probes").fetchone()[0])

    assert main(["probe", config, "--yes"]) == 0
    first = record()
    assert main(["probe", config, "--yes"]) == 0
    assert record()["pilot"] == first["pilot"] is not None


@pytest.mark.parametrize(
    "teacher_settings",
    [
        {
            "type": "routed",
            "teachers": {"a": {"type": "openai", "model": "m", "api_key_env": None}},
            "weights": {"a": 1},
        },
        {"type": "replay"},
    ],
    ids=["routed", "replay"],
)
def test_only_a_single_live_teacher_can_be_probed(
    config: str, serve: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path, teacher_settings: dict[str, Any]
) -> None:
    serve()
    assert main(["train", config, "train.steps=1"]) == 0
    if teacher_settings["type"] == "replay":
        teacher_settings = {**teacher_settings, "path": str(tmp_path / "run" / "answers.sqlite")}
    tree = yaml.safe_load(Path(config).read_text()) | {"teacher": teacher_settings, "output": str(tmp_path / "other")}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(tree))
    capsys.readouterr()
    assert main(["probe", str(tmp_path / "other.yaml"), "--yes"]) == 2
    assert line_of(capsys) == (
        "omniopd: teacher.type: only a single live teacher can be probed; name one of them in teacher"
    )


def test_an_unreachable_teacher_is_one_line(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", config, "--yes", "teacher.base_url=http://127.0.0.1:9/v1"]) == 2
    assert "127.0.0.1:9" in line_of(capsys)


def test_the_prompts_are_shown_side_by_side(config: str, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    serve(chat=ChatTemplate.load(str(TEACHER), "teacher.tokenizer"))
    assert main(["probe", config, "--yes", f"teacher.tokenizer={TEACHER}"]) == 0
    out = capsys.readouterr().out
    assert "no difference but markup" in out
    assert "<|user|>" in out
    assert "[INST]" in out


def test_a_last_rung_that_is_not_proved_is_taken_with_a_word(
    config: str, serve: Serve, teacher: ScriptedTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve("restart")

    def deaf(body: dict[str, Any]) -> tuple[int, Any]:
        """Never opens with the piece that it is asked to open with."""
        begun = "<begun>" in body["messages"][-1]["content"]
        return server(body | {"messages": [{"role": "user", "content": "What?"}]} if begun else body)

    teacher.answer = deaf
    assert main(["probe", config, "--yes"]) == 0
    assert "continuation: instruct (not proved" in capsys.readouterr().out


def test_fidelity_compares_the_rungs_over_the_same_chunks(
    config: str, serve: Serve, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server = serve()
    assert main(["probe", config, "--yes", "--json", "--fidelity"]) == 0
    rows = {row["rung"]: row for row in json.loads(capsys.readouterr().out)["fidelity"]}
    assert list(rows) == ["prefill", "instruct"]
    assert rows["prefill"]["replies"] == rows["instruct"]["replies"] == 24
    assert all(0 < row["similarity"] <= 1 for row in rows.values())
    # The same draws come out of this server on either rung, so that one is as near as can be to the other.
    assert rows["instruct"]["similarity"] > rows["prefill"]["similarity"]
    assert main(["probe", config, "--yes", "--fidelity"]) == 0
    assert "fidelity to prefill" in capsys.readouterr().out
    sent = len(server.bodies)
    assert main(["probe", config, "--yes", "--fidelity", "teacher.prefill_style=none"]) == 2
    assert "drop --fidelity" in line_of(capsys)
    assert main(["probe", config, "--yes", "--fidelity", "method={name: seqkd}"]) == 2
    assert "drop --fidelity" in line_of(capsys)
    assert len(server.bodies) == sent


def test_decay_lets_the_teacher_end_what_the_student_began(
    config: str, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()
    assert main(["probe", config, "--yes", "--json", "--decay", "8,0,1000"]) == 0
    said = capsys.readouterr()
    calls = int(next(line for line in said.err.splitlines() if "at most" in line).split(" calls")[0].split()[-1])
    rows = json.loads(said.out)["decay"]
    assert [row["tokens"] for row in rows] == [0, 8, 1000]
    assert all(row["continued"] + row["whole"] == 4 for row in rows)
    assert [row["whole"] for row in rows] == [0, 0, 4]
    assert 0 < len(server.bodies) <= calls
    assert main(["probe", config, "--yes", "--decay", "0,1000"]) == 0
    assert "teacher ended" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["probe", config, "--yes", "--decay", "ten"])
    assert "'ten' are no numbers of tokens; write them as 0,50,100" in capsys.readouterr().err


def test_decay_needs_right_answers(
    config: str, serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    prompts = Run.prompts

    def unknown(run: Run, step: int) -> list[Prompt]:
        return [replace(prompt, reference=None) for prompt in prompts(run, step)]

    monkeypatch.setattr(Run, "prompts", unknown)
    assert main(["probe", config, "--yes", "--decay", "0"]) == 2
    assert "drop --decay" in line_of(capsys)
    assert not server.bodies


def test_what_a_server_says_is_text_and_no_command_to_the_terminal(
    config: str, serve: Serve, teacher: ScriptedTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve()

    def rude(body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("n", 1) > 1:
            return 400, {"error": {"message": "no [bold]n[/bold]\n\u001b[2J\u0007 here", "param": "n"}}
        return server(body)

    teacher.answer = rude
    assert main(["probe", config, "--yes"]) == 0
    said = capsys.readouterr()
    assert "[bold]n[/bold]" in "".join(said.out.replace("\u2502", "").split())
    assert not {"\u001b", "\u0007"} & set(said.out + said.err)
