"""The answer store: one row per draw, durable, shared, and clear about what is wrong with a file."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from omniopd.errors import StoreError
from omniopd.store import VERSION, Booking, Draw, Store


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


# ---------------------------------------------------------------------- what calls cost


def booking(run: str = "run", **fields: object) -> Booking:
    plain = Booking(
        run, "t/m@x", "continue", "m-1", 2, 3, 100, 20, 60, 10, 5, 0.25, "prices of 2026-11-01", 12.5, "r-1"
    )
    return replace(plain, **fields)  # type: ignore[arg-type]


def test_a_booking_comes_back_as_it_went_in(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    made = [booking(), booking(reason="error", cost_usd=0.0), booking("other", estimated=True, cost_usd=2.0)]
    for one in made:
        store.keep({}, booking=one)
    assert [Booking(**call) for call in store.calls()] == made
    assert [Booking(**call) for call in store.calls("run")] == made[:2]
    assert (store.spent("run"), store.spent("other"), store.spent("nobody")) == (0.25, 2.0, 0.0)
    assert list(store.calls("nobody")) == []
    stats = store.stats()
    assert (stats.calls, stats.cost_usd) == (3, 2.25)


def test_draws_holes_and_booking_are_kept_together_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    unwritable = booking(price=object())
    with pytest.raises(StoreError):
        store.keep({"a": draw()}, {"b": "error"}, unwritable, "t")
    stats = store.stats()
    assert (stats.answers, stats.holes, stats.calls) == (0, {}, 0)
    store.keep({"a": draw()}, {"b": "error"}, booking(), "t")
    stats = store.stats()
    assert (stats.answers, stats.holes, stats.calls, stats.by_teacher) == (1, {"error": 1}, 1, {"t": 1})


def test_a_call_is_booked_though_another_process_was_faster_with_its_draws(tmp_path: Path) -> None:
    one, two = Store(tmp_path / "s"), Store(tmp_path / "s")
    one.keep({"k": draw("first")}, booking=booking(), teacher="t")
    assert two.keep({"k": draw("second")}, booking=booking(), teacher="t")["k"].text == "first"
    assert two.stats().calls == 2  # both were paid
    assert two.spent("run") == 0.5


# ---------------------------------------------------------------------- looking into it, thinning it out


def filled(path: Path) -> Store:
    """Three answers and a rejected reply of one teacher, an answer and a rejected reply of another, at times 10 to 60."""
    store = Store(path)
    times = iter(range(10, 70, 10))

    def at(text: str, rejected: str | None = None) -> Draw:
        return replace(draw(text, rejected), time=float(next(times)))

    store.keep({"a": at("1"), "b": at("2"), "c": at("3"), "d": at("x", "empty")}, {"h": "refusal"}, booking(), "one")
    store.keep({"e": at("4"), "f": at("y", "restart")}, {"i": "error", "j": "error"}, booking(), "two")
    return store


def test_stats(tmp_path: Path) -> None:
    stats = filled(tmp_path / "s").stats()
    assert (stats.answers, stats.rejected) == (4, {"empty": 1, "restart": 1})
    assert stats.holes == {"refusal": 1, "error": 2}
    assert stats.by_teacher == {"one": 4, "two": 2}
    assert (stats.calls, stats.cost_usd) == (2, 0.5)
    empty = Store(tmp_path / "empty").stats()
    assert (empty.answers, empty.rejected, empty.by_teacher, empty.calls, empty.cost_usd) == (0, {}, {}, 0, 0.0)


def test_draws_are_told_with_key_and_teacher(tmp_path: Path) -> None:
    rows = list(filled(tmp_path / "s").draws())
    assert [(row["key"], row["teacher"]) for row in rows] == [
        *((key, "one") for key in "abcd"),
        ("e", "two"),
        ("f", "two"),
    ]
    assert rows[3] == {"key": "d", "teacher": "one", **asdict(replace(draw("x", "empty"), time=40.0))}


@pytest.mark.parametrize(
    ("conditions", "left"),
    [
        ({"teacher": "one"}, "ef"),
        ({"teacher": "three"}, "abcdef"),
        ({"before": 35.0}, "def"),
        ({"before": 10.0}, "abcdef"),
        ({"rejected": True}, "abce"),
        ({"teacher": "one", "before": 35.0}, "def"),
        ({"teacher": "one", "rejected": True}, "abcef"),
        ({"teacher": "two", "before": 1e12, "rejected": True}, "abcde"),
        ({}, ""),
    ],
)
def test_pruning_deletes_what_meets_all_conditions_and_keeps_the_books(
    tmp_path: Path, conditions: dict[str, Any], left: str
) -> None:
    store = filled(tmp_path / "s")
    gone = 6 - len(left)
    assert store.prune(**conditions, dry_run=True) == gone
    assert len(list(store.draws())) == 6
    assert store.prune(**conditions) == gone
    assert "".join(row["key"] for row in store.draws()) == left
    assert store.prune(**conditions) == 0
    stats = store.stats()
    assert (stats.calls, stats.holes) == (2, {"refusal": 1, "error": 2})
    assert store.spent("run") == 0.5
    assert store.keep({"a": draw("again")})["a"].text == ("1" if "a" in left else "again")


def test_pruning_gives_the_space_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    store.keep({f"k{index}": draw("x" * 10_000) for index in range(100)}, teacher="t")
    store.close()
    before = (tmp_path / "s").stat().st_size
    store = Store(tmp_path / "s")
    assert store.prune(teacher="t") == 100
    store.close()
    assert (tmp_path / "s").stat().st_size < before / 10


def test_probes_are_kept_by_teacher_and_renewed(tmp_path: Path) -> None:
    store = Store(tmp_path / "s")
    assert store.probe("f") is None
    store.put_probe("f", {"rung": "prefill", "at": "then"})
    store.put_probe("g", {"rung": "raw"})
    store.put_probe("f", {"rung": "instruct", "found": "naïve 🙂 \ud800"})
    store.close()
    store = Store(tmp_path / "s")
    assert store.probe("f") == {"rung": "instruct", "found": "naïve 🙂 \ud800"}
    assert store.probe("g") == {"rung": "raw"}


# ---------------------------------------------------------------------- older formats

FORMAT_1 = """
CREATE TABLE draws (key TEXT PRIMARY KEY, rejected TEXT, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE holes (key TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE teachers (fingerprint TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
PRAGMA application_id = 0x4F4D4E49;
PRAGMA user_version = 1;
INSERT INTO draws VALUES ('k', NULL, '{"text": "hi", "finish": "stop", "rung": "prefill", "model": "m", "prompt_tokens": 3,
"completion_tokens": 2, "time": 1.5, "rejected": null}');
INSERT INTO draws VALUES ('l', 'empty', '{"text": "", "finish": "stop", "rung": "prefill", "model": "m", "prompt_tokens": 3,
"completion_tokens": 2, "time": 1.5, "rejected": "empty"}');
INSERT INTO holes VALUES ('h', 'refusal');
INSERT INTO teachers VALUES ('f', '{"rung": "prefill"}');
"""


def of_format_1(path: Path) -> Path:
    """A store as the first version of this program wrote it."""
    with sqlite3.connect(path) as db:
        db.executescript(FORMAT_1)
    db.close()
    return path


@pytest.mark.parametrize("create", [True, False])
def test_a_store_of_format_1_keeps_its_answers_and_takes_new_ones(tmp_path: Path, create: bool) -> None:
    path = of_format_1(tmp_path / "s")
    for _ in range(2):  # the second time it is of today's format
        store = Store(path, create=create)
        assert store.get_many(["k", "l"]) == {"k": draw(), "l": draw("", "empty")}
        assert store.get_holes(["h"]) == {"h": "refusal"}
        assert store.teachers() == {"f": {"rung": "prefill"}}
        stats = store.stats()
        assert (stats.answers, stats.by_teacher[""], stats.calls, store.probe("f")) == (1, 2, 0, None)
        store.close()
    store = Store(path)
    store.keep({"n": draw("new")}, booking=booking(), teacher="f")
    assert store.stats().by_teacher == {"": 2, "f": 1}
    assert store.prune(teacher="") == 2
    assert store.spent("run") == 0.25
    store.close()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)


def test_a_recording_of_format_1_on_read_only_media_can_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = of_format_1(tmp_path / "s")
    before = path.read_bytes()
    monkeypatch.setattr(os, "access", lambda *_: False)
    store = Store(path, create=False)
    assert store.get_many(["k"]) == {"k": draw()}
    assert store.get_holes(["h"]) == {"h": "refusal"}
    assert store.teachers() == {"f": {"rung": "prefill"}}
    store.close()
    assert path.read_bytes() == before


def test_several_processes_bring_one_old_store_up_to_date(tmp_path: Path) -> None:
    code = "import sys\nfrom omniopd.store import Store\nfor path in sys.argv[1:]: Store(path).close()"
    paths = [str(of_format_1(tmp_path / f"s{index}")) for index in range(8)]
    workers = [subprocess.Popen([sys.executable, "-c", code, *paths]) for _ in range(3)]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    for path in paths:
        store = Store(path)
        assert store.stats().by_teacher == {"": 2}
        store.close()
