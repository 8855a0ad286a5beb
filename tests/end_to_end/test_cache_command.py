"""`omniopd cache`: what a store holds, fewer of it, and all of it as JSON Lines."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from omniopd.cli import main
from omniopd.store import Booking, Draw, Store

ODD = 'naïve 漢字 🙂 "quoted"\n\u2028 \ud800 \x00 [bold]x[/bold]'
DAY = 86_400.0
NAMES = ("openai/[m]@localhost#1", "gemini/m@host#2")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a store: of one teacher an old answer and a new rejected reply, of another a new answer."""
    folder = tmp_path / "run"
    store, now = Store(folder / "answers.sqlite"), time.time()
    one, two = NAMES
    first = Booking("run", one, "continue", "m", 1, 2, 100, 20, 0, 0, 0, 0.25, "teacher.price", now, "r-1")
    store.keep({"a": Draw(ODD, "stop", "prefill", "m", 100, 20, now - 3 * DAY)}, {"h": "refusal"}, first, one)
    store.keep({"b": Draw("x", "stop", "prefill", "m", 100, 20, now, "restart")}, teacher=one)
    store.keep({"c": Draw("y", "length", "prefill", "m", 100, 20, now)}, teacher=two)
    store.close()
    return folder


def keys(run: Path) -> str:
    store = Store(run / "answers.sqlite")
    try:
        return "".join(row["key"] for row in store.draws())
    finally:
        store.close()


@pytest.mark.parametrize("name", ["", "answers.sqlite"])
def test_stats(run: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["cache", "stats", str(run / name)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    for line in (
        "answers 2",
        "rejected: restart 1",
        "no answer: refusal 1",
        "calls booked 1, $0.2500",
        f"of {NAMES[0]} 2 draws",
        f"of {NAMES[1]} 1 draws",
    ):
        assert line in lines
    assert "answers.sqlite,0.0MB" in "".join(lines).replace(" ", "")  # the title may be wrapped


@pytest.mark.parametrize(
    ("flags", "left"),
    [
        (["--teacher", NAMES[0]], "c"),
        (["--teacher", "nobody"], "abc"),
        (["--older-than", "2"], "bc"),
        (["--older-than", "0.5", "--rejected"], "abc"),
        (["--rejected"], "ac"),
        (["--teacher", NAMES[0], "--older-than", "2"], "bc"),
    ],
)
def test_prune(run: Path, flags: list[str], left: str, capsys: pytest.CaptureFixture[str]) -> None:
    gone = 3 - len(left)
    assert main(["cache", "prune", str(run), *flags, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith(f"{gone} draws would be deleted; what they cost stays")
    assert keys(run) == "abc"
    assert main(["cache", "prune", str(run), *flags]) == 0
    assert capsys.readouterr().out.startswith(f"{gone} draws deleted; what they cost stays")
    assert keys(run) == left
    store = Store(run / "answers.sqlite")
    assert store.spent("run") == 0.25
    store.close()


def test_prune_deletes_nothing_that_is_not_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--dry-run"]):
        assert main(["cache", "prune", str(run), *flags]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert said.startswith("omniopd: cache prune: name what to delete: --teacher, --older-than or --rejected")
    assert keys(run) == "abc"


def test_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "export", str(run)]) == 0
    printed = capsys.readouterr().out
    assert main(["cache", "export", str(run), "--out", str(tmp_path / "draws.jsonl")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "draws.jsonl").read_text(encoding="ascii") == printed  # for any terminal, whatever the text
    rows = [json.loads(line) for line in printed.splitlines()]
    store = Store(run / "answers.sqlite")
    draws = store.get_many(["a", "b", "c"])
    assert rows == [
        {"key": key, "teacher": teacher, **asdict(draws[key])}
        for key, teacher in zip("abc", (*NAMES[:1] * 2, NAMES[1]), strict=True)
    ]
    assert rows[0]["text"] == ODD
    assert main(["cache", "export", str(run), "--what", "calls"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == list(store.calls())
    store.close()


def test_what_cannot_be_looked_into_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("no database, only text\n" * 100)
    (tmp_path / "empty").mkdir()
    with sqlite3.connect(tmp_path / "theirs.sqlite") as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    for words, said in (
        (["stats", str(tmp_path / "none.sqlite")], "no such file"),
        (["stats", str(tmp_path / "empty")], "answers.sqlite: no such file"),
        (["export", str(tmp_path / "text")], "not a healthy answer store"),
        (["prune", str(tmp_path / "theirs.sqlite"), "--rejected"], "another program's"),
        (["export", str(run), "--out", str(tmp_path / "no" / "such" / "folder")], "--out: "),
        (["export", str(run), "--out", str(tmp_path)], "--out: "),
    ):
        assert main(["cache", *words]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("omniopd: ") and said in captured.err
    assert not (tmp_path / "none.sqlite").exists()


def test_a_reader_that_goes_away_is_no_crash(run: Path) -> None:
    """As in `omniopd cache export STORE | head`."""
    store = Store(run / "answers.sqlite")
    store.keep({f"k{index}": Draw("x" * 1000, "stop", "prefill") for index in range(2000)})
    store.close()
    command = [sys.executable, "-m", "omniopd.cli", "cache", "export", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as export:
        assert export.stdout is not None and export.stderr is not None
        export.stdout.readline()
        export.stdout.close()
        assert export.stderr.read() == b""
    assert export.returncode == 0
