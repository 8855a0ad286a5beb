"""The answer store: one row per draw of a teacher, in one SQLite file, written before the answer is used.

Durability: write-ahead log with `synchronous=NORMAL`. A commit is in the operating system's hands when it returns, so
a process killed by any signal (`kill -9`) loses nothing; a power cut may lose the last few commits, never the file's
integrity, and what it loses is only asked again. That spares an fsync per HTTP reply on the event loop. Several
processes of one machine may share a file; SQLite's log does not work across machines on a network file system.

What is kept: valid answers, and replies that a rule rejected (with the reason, never used as an answer), since asking
again would be paid again. Refusals, filtered replies and errors are not stored: a later run asks again. Only that they
happened is noted (`holes`: a key and a reason, no text), for a replay to meet the holes of the run it repeats.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd.errors import StoreError

if TYPE_CHECKING:  # the shared types import torch, which a process that only looks into a store can do without
    from omniopd.types import Finish

VERSION = 1
APPLICATION_ID = 0x4F4D4E49  # "OMNI": tells our file from another program's SQLite file
NEVER_STORED = frozenset({"refusal", "filtered", "error"})
_SLICE = 500  # keys per SELECT, below SQLite's oldest limit on parameters

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS draws (key TEXT PRIMARY KEY, rejected TEXT, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS holes (key TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS teachers (fingerprint TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)


@dataclass(frozen=True, slots=True)
class Draw:
    """One reply of a teacher, with its share of the usage of the call that brought it.

    `rejected` is None for an answer; else the rule that the text broke, and the text is kept to look at, not to use.
    """

    text: str
    finish: Finish
    rung: str
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    time: float = 0.0
    rejected: str | None = None


@dataclass(frozen=True, slots=True)
class StoreStats:
    """How many rows a store holds: answers, rejected replies by reason, holes by reason, teachers."""

    answers: int
    rejected: Mapping[str, int]
    holes: Mapping[str, int]
    teachers: int


class Store:
    """Draws by key, in one SQLite file. Safe to share between threads and processes of one machine."""

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True, busy_s: float = 30.0) -> None:
        """Open the file, or make it.

        Raises:
            StoreError: the file can't be opened or made, is locked, or is no store of this version.
        """
        self.path = Path(path)
        self._lock = threading.RLock()
        self._busy_s = busy_s
        if not create and not self.path.is_file():
            raise StoreError(f"{self.path}: no such file; name the store that the recorded run wrote")
        with self._guard():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            uri = self._uri(create)
            self._db = sqlite3.connect(uri, busy_s, isolation_level=None, check_same_thread=False, uri=True)
        try:
            with self._guard():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def get_many(self, keys: Iterable[str]) -> dict[str, Draw]:
        """The draws that are there, answers and rejected ones; a key that is not there is left out.

        Raises:
            StoreError: the file can't be read.
        """
        rows = self._select("SELECT key, value FROM draws WHERE key IN", keys)
        with self._guard():
            return {key: Draw(**json.loads(value)) for key, value in rows}

    def put_many(self, rows: Mapping[str, Draw]) -> dict[str, Draw]:
        """Keep draws; committed when this returns. Returns what the store now holds under these keys.

        The first writer wins: where another process was faster, its draw comes back, and both go on with the same one.

        Raises:
            StoreError: the file can't be written.
        """
        assert not any(draw.rejected in NEVER_STORED for draw in rows.values()), "a hole is no draw"
        if not rows:
            return {}
        values = [(key, draw.rejected, json.dumps(asdict(draw))) for key, draw in rows.items()]
        with self._transaction() as db:
            db.executemany("INSERT OR IGNORE INTO draws VALUES (?, ?, ?)", values)
            db.executemany("DELETE FROM holes WHERE key = ?", [(key,) for key in rows])
        return self.get_many(rows)

    def put_holes(self, reasons: Mapping[str, str]) -> None:
        """Note for a replay that these draws were asked for and brought no answer, and why.

        Raises:
            StoreError: the file can't be written.
        """
        if reasons:
            with self._transaction() as db:
                db.executemany("INSERT OR REPLACE INTO holes VALUES (?, ?)", list(reasons.items()))

    def get_holes(self, keys: Iterable[str]) -> dict[str, str]:
        """The reasons noted by `put_holes`. For a replay only: a live run asks again.

        Raises:
            StoreError: the file can't be read.
        """
        return dict(self._select("SELECT key, reason FROM holes WHERE key IN", keys))

    def put_teacher(self, fingerprint: str, settings: Mapping[str, Any]) -> None:
        """Keep (or renew) what is known of a teacher; `settings` must hold no secret.

        Raises:
            StoreError: the file can't be written.
        """
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO teachers VALUES (?, ?)", (fingerprint, json.dumps(settings)))

    def teachers(self) -> dict[str, dict[str, Any]]:
        """The settings of every teacher that this store has answers of, by fingerprint.

        Raises:
            StoreError: the file can't be read.
        """
        with self._lock, self._guard():
            rows = self._db.execute("SELECT fingerprint, value FROM teachers ORDER BY fingerprint").fetchall()
            return {fingerprint: json.loads(value) for fingerprint, value in rows}

    def stats(self) -> StoreStats:
        """Counts of what is kept.

        Raises:
            StoreError: the file can't be read.
        """
        with self._lock, self._guard():
            kept = dict(self._db.execute("SELECT rejected, COUNT(*) FROM draws GROUP BY rejected").fetchall())
            holes = dict(self._db.execute("SELECT reason, COUNT(*) FROM holes GROUP BY reason").fetchall())
            (teachers,) = self._db.execute("SELECT COUNT(*) FROM teachers").fetchone()
        return StoreStats(kept.pop(None, 0), kept, holes, teachers)

    def close(self) -> None:
        """Close the file; closing twice is allowed."""
        with self._lock:
            self._db.close()

    def _uri(self, create: bool) -> str:
        uri = self.path.resolve().as_uri()
        if create:
            return f"{uri}?mode=rwc"
        # SQLite's log needs a writable folder even to read; a recording on read-only media is opened as it lies.
        writable = os.access(self.path, os.W_OK) and os.access(self.path.resolve().parent, os.W_OK)
        return f"{uri}?mode=rw" if writable else f"{uri}?immutable=1"

    def _prepare(self) -> None:
        self._db.execute("BEGIN")  # the three belong together: another process may be making this file right now
        (kind,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        self._db.execute("COMMIT")
        if kind == APPLICATION_ID:
            if version != VERSION:
                raise StoreError(f"{self.path}: a store of format {version}, this program reads {VERSION}; use another")
        elif tables:
            raise StoreError(f"{self.path}: not a store of answers but another program's database; use another path")
        self._enter_wal()
        self._db.execute("PRAGMA synchronous = NORMAL")
        if kind != APPLICATION_ID:
            with self._transaction() as db:
                for statement in _SCHEMA:
                    db.execute(statement)

    def _enter_wal(self) -> None:
        """Switch to the write-ahead log. SQLite skips its busy wait here when two processes open a new file at once."""
        deadline = time.monotonic() + self._busy_s
        while True:
            try:
                if self._db.execute("PRAGMA journal_mode").fetchone() != ("wal",):
                    self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _select(self, query: str, keys: Iterable[str]) -> list[tuple[str, str]]:
        wanted, rows = list(keys), list[tuple[str, str]]()
        with self._lock, self._guard():
            for start in range(0, len(wanted), _SLICE):
                part = wanted[start : start + _SLICE]
                rows += self._db.execute(f"{query} ({','.join('?' * len(part))})", part).fetchall()
        return rows

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._guard():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:  # an interrupt too must leave nothing half-written
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, ValueError, TypeError) as error:
            raise StoreError(f"{self.path}: {_plain(error)}") from error


def _plain(error: Exception) -> str:
    """What went wrong with the file, and the mend, in one line."""
    said = str(error).lower()
    if "locked" in said or "busy" in said:
        return "the answer store is locked by another process; wait for it to end, or use another store"
    if "full" in said or "no space" in said:
        return "the disk is full; free some space and resume, no answer that was stored is lost"
    if "readonly" in said or "read-only" in said or "permission" in said:
        return "the answer store can't be written; check the permissions of the file and its folder"
    if isinstance(error, sqlite3.OperationalError | OSError):
        return f"the answer store can't be used: {' '.join(str(error).split())}"
    return f"not a healthy answer store ({' '.join(str(error).split())}); restore it from a copy or use another path"
