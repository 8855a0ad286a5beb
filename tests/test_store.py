"""The answer store: one row per draw, durable, shared, and clear about what is wrong with a file."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from omniopd.errors import StoreError
from omniopd.store import Draw, Store


def draw(text: str = "hi", rejected: str | None = None) -> Draw:
    return Draw(text, "stop", "prefill", "m", 3, 2, 1.5, rejected)


def test_a_draw_comes_back_as_it_went_in(tmp_path: Path) -> None:
    texts = ["", " leading", "trailing \n", "naïve café 漢字 🙂", "\ud800 lone", "null\x00byte"]
    rows = {f"k{index}": draw(text) for index, text in enumerate(texts)}
    store = Store(tmp_path / "deep" / "er" / "s.sqlite")
    assert store.keep(rows) == rows
    store.close()
    assert Store(tmp_path / "deep" / "er" / "s.sqlite").get_many([*rows, "absent"]) == rows


def test_many_keys_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    rows = {f"k{index}": draw(str(index)) for index in range(1201)}
    assert store.keep(rows) == rows
    assert store.get_many(list(rows)) == rows
    assert store.get_many([]) == {}
    assert store.keep({}) == {}


def test_the_first_writer_wins(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "s"), Store(tmp_path / "s")
    one.keep({"k": draw("first")})
    assert two.keep({"k": draw("second")})["k"].text == "first"


def test_s9_refusals_filtered_replies_and_errors_are_no_draws(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    for reason in ("refusal", "filtered", "error"):
        with pytest.raises(AssertionError):
            store.keep({"k": draw("x", reason)})
    store.keep({"a": draw(), "b": draw("x", "restart")})
    store.keep({}, {"c": "refusal"})
    stats = store.stats()
    assert (stats.answers, stats.rejected, stats.holes, stats.teachers) == (1, {"restart": 1}, {"refusal": 1}, 0)
    assert store.get_many(["c"]) == {}
    store.keep({"c": draw("now answered")})
    assert store.get_holes(["c"]) == {}


def test_teachers_are_renewed(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.put_teacher("f", {"rung": None})
    store.put_teacher("f", {"rung": "prefill"})
    assert store.teachers() == {"f": {"rung": "prefill"}}


def test_s10_a_killed_process_loses_nothing_it_committed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from omniopd.store import Draw, Store\n"
        "store = Store(sys.argv[1])\n"
        "for i in range(25): store.keep({f'k{i}': Draw(str(i), 'stop', 'prefill')})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], check=False, timeout=60)
    assert Store(tmp_path / "s").stats().answers == 25


def test_several_processes_share_a_new_file(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from omniopd.store import Draw, Store\n"
        "for i in range(20): Store(f'{sys.argv[1]}-{i}').close()\n"  # each of them a race for who makes the file
        "store = Store(sys.argv[1])\n"
        "for i in range(20): store.keep({f'{sys.argv[2]}-{i}': Draw('x', 'stop', 'prefill')})\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "s")]
    workers = [subprocess.Popen([*command, name]) for name in ("a", "b", "c")]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert Store(tmp_path / "s").stats().answers == 60


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    with pytest.raises(KeyboardInterrupt), store._transaction() as db:
        db.execute("INSERT INTO holes VALUES ('k', 'error')")
        raise KeyboardInterrupt
    assert store.get_holes(["k"]) == {}
    store.keep({}, {"k": "error"})


def one_line(error: pytest.ExceptionInfo[StoreError], path: Path) -> str:
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_errors_name_the_file_and_the_mend(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_bytes(b"this is no database at all, only text\n" * 100)
    with pytest.raises(StoreError) as error:
        Store(path)
    assert "not a healthy answer store" in one_line(error, path)
    with pytest.raises(StoreError) as error:
        Store(tmp_path)
    one_line(error, tmp_path)
    with pytest.raises(StoreError) as error:
        Store(tmp_path / "absent", create=False)
    assert "no such file" in one_line(error, tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    blocked = tmp_path / "s" / "below-a-file"
    with pytest.raises(StoreError) as error:
        Store(blocked)
    one_line(error, blocked)


def test_another_programs_database_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(StoreError) as error:
        Store(path)
    assert "another program's" in one_line(error, path)
    assert path.read_bytes() == before


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    Store(path).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError) as error:
        Store(path)
    assert "format 99" in one_line(error, path)


def test_a_locked_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = Store(path, busy_s=0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError) as error:
        store.keep({"k": draw()})
    assert "locked" in one_line(error, path)
    other.execute("ROLLBACK")
    assert store.keep({"k": draw()})
    other.close()


def test_a_full_disk(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError) as error:
        store.keep({f"k{index}": draw("x" * 5000) for index in range(20)})
    assert "disk is full" in one_line(error, tmp_path / "s")
    assert store.stats().answers == 0


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.close()
    store.close()
    with pytest.raises(StoreError):
        store.get_many(["k"])


def test_a_recording_on_read_only_media_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "s")
    store.keep({"k": draw()})
    store.close()
    monkeypatch.setattr(os, "access", lambda *_: False)
    recording = Store(tmp_path / "s", create=False)
    assert recording.get_many(["k"]) == {"k": draw()}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    with pytest.raises(StoreError) as error:
        recording.keep({"l": draw()})
    assert "can't be written" in one_line(error, tmp_path / "s")
