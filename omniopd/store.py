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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omniopd.errors import StoreError

if TYPE_CHECKING:  # the shared types import torch, which a process that only looks into a store can do without
    from omniopd.types import Finish

VERSION = 2
APPLICATION_ID = 0x4F4D4E49  # "OMNI": tells our file from another program's SQLite file
NEVER_STORED = frozenset({"refusal", "filtered", "error"})
_SLICE = 500  # keys per SELECT, below SQLite's oldest limit on parameters

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS draws (key TEXT PRIMARY KEY, rejected TEXT, value TEXT NOT NULL, "
    "teacher TEXT NOT NULL DEFAULT '') WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS holes (key TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS teachers (fingerprint TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS probes (fingerprint TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS calls "
    "(id INTEGER PRIMARY KEY, run TEXT NOT NULL, cost_usd REAL NOT NULL, value TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS calls_of_run ON calls (run)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
)


@dataclass(frozen=True, slots=True)
class Draw:
    """One reply of a teacher, with its share of the usage of the call that brought it.

    `rejected` is None for an answer; else the rule that the text broke, and the text is kept to look at, not to use. Scores
    of somebody else's text are a draw too, of the rung `score`: no text, and `tokens` as `teachers.given` writes them.
    """

    text: str
    finish: Finish
    rung: str
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    time: float = 0.0
    rejected: str | None = None
    tokens: list[Any] = field(
        default_factory=list
    )  # [text, log-prob, [[text, log-prob], ...]] of each token, where they were asked for


@dataclass(frozen=True, slots=True)
class Booking:
    """One call to a teacher as the ledger keeps it. `run` is the run's name, `reason` why a dropped call brought nothing.

    `estimated` marks tokens that the provider did not tell and that were counted from the text's length.
    """

    run: str
    teacher: str
    purpose: str  # continue, answer or probe
    model: str
    draws: int
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    cost_usd: float
    price: str
    time: float
    request_id: str = ""
    reason: str | None = None
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds: answers, rejected replies by reason, holes by reason, teachers, draws of each, calls, USD."""

    answers: int
    rejected: Mapping[str, int]
    holes: Mapping[str, int]
    teachers: int
    by_teacher: Mapping[str, int]
    calls: int
    cost_usd: float


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
        self._frozen = False
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

    def keep(
        self,
        draws: Mapping[str, Draw],
        holes: Mapping[str, str] | None = None,
        booking: Booking | None = None,
        teacher: str = "",
    ) -> dict[str, Draw]:
        """Keep what one call brought, all or nothing; committed when this returns.

        The first writer wins: where another process was faster, its draw comes back, and both go on with the same one.

        Args:
            draws: answers and rejected replies by key.
            holes: reasons by key, noted for a replay: these draws were asked for and brought no answer.
            booking: what the call cost.
            teacher: the fingerprint of the teacher whose draws these are.

        Returns:
            What the store now holds under the keys of `draws`.

        Raises:
            StoreError: the file can't be written.
        """
        assert not any(draw.rejected in NEVER_STORED for draw in draws.values()), "a hole is no draw"
        values = [(key, draw.rejected, json.dumps(asdict(draw)), teacher) for key, draw in draws.items()]
        if not (values or holes or booking):
            return {}
        with self._transaction() as db:
            if values:
                db.executemany(
                    "INSERT OR IGNORE INTO draws (key, rejected, value, teacher) VALUES (?, ?, ?, ?)", values
                )
                db.executemany("DELETE FROM holes WHERE key = ?", [(key,) for key in draws])
            if holes:
                db.executemany("INSERT OR REPLACE INTO holes VALUES (?, ?)", list(holes.items()))
            if booking:
                row = (booking.run, booking.cost_usd, json.dumps(asdict(booking)))
                db.execute("INSERT INTO calls (run, cost_usd, value) VALUES (?, ?, ?)", row)
        return self.get_many(draws)

    def get_holes(self, keys: Iterable[str]) -> dict[str, str]:
        """The reasons noted by `keep`. For a replay only: a live run asks again.

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
        rows = self._read("SELECT fingerprint, value FROM teachers ORDER BY fingerprint")
        return {fingerprint: json.loads(value) for fingerprint, value in rows}

    def put_probe(self, fingerprint: str, record: Mapping[str, Any]) -> None:
        """Keep (or renew) what a probe of a teacher found.

        Raises:
            StoreError: the file can't be written.
        """
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO probes VALUES (?, ?)", (fingerprint, json.dumps(record)))

    def probe(self, fingerprint: str) -> dict[str, Any] | None:
        """What the last probe of a teacher found; None if it was never probed.

        Raises:
            StoreError: the file can't be read.
        """
        rows = self._read("SELECT value FROM probes WHERE fingerprint = ?", (fingerprint,))
        return json.loads(rows[0][0]) if rows else None

    def spent(self, run: str) -> float:
        """USD that a run's calls have cost.

        Raises:
            StoreError: the file can't be read.
        """
        return float(self._read("SELECT COALESCE(SUM(cost_usd), 0) FROM calls WHERE run = ?", (run,))[0][0])

    def calls(self, run: str | None = None) -> Iterator[dict[str, Any]]:
        """The bookings of one run, or of all, oldest first.

        Raises:
            StoreError: the file can't be read.
        """
        where, which = ("", ()) if run is None else (" WHERE run = ?", (run,))
        for (value,) in self._read(f"SELECT value FROM calls{where} ORDER BY id", which):
            yield json.loads(value)

    def draws(self) -> Iterator[dict[str, Any]]:
        """Every kept draw with its key and its teacher, in the order of the keys.

        Raises:
            StoreError: the file can't be read.
        """
        for key, teacher, value in self._read("SELECT key, teacher, value FROM draws ORDER BY key"):
            yield {"key": key, "teacher": teacher, **json.loads(value)}

    def prune(
        self, *, teacher: str | None = None, before: float | None = None, rejected: bool = False, dry_run: bool = False
    ) -> int:
        """Delete draws that meet all conditions given: of a teacher, older than `before` (epoch seconds), rejected ones.

        Returns:
            How many were (with `dry_run`: would be) deleted. What calls cost stays on the books.

        Raises:
            StoreError: the file can't be written.
        """
        conditions, values = ["1"], list[Any]()
        if teacher is not None:
            conditions, values = [*conditions, "teacher = ?"], [*values, teacher]
        if before is not None:
            conditions, values = [*conditions, "json_extract(value, '$.time') < ?"], [*values, before]
        if rejected:
            conditions.append("rejected IS NOT NULL")
        where = " AND ".join(conditions)
        if dry_run:
            return int(self._read(f"SELECT COUNT(*) FROM draws WHERE {where}", values)[0][0])
        with self._transaction() as db:
            deleted = db.execute(f"DELETE FROM draws WHERE {where}", values).rowcount
        with self._lock, self._guard():
            self._db.execute("VACUUM")
        return deleted

    def stats(self) -> StoreStats:
        """Counts of what is kept.

        Raises:
            StoreError: the file can't be read.
        """
        kept = dict(self._read("SELECT rejected, COUNT(*) FROM draws GROUP BY rejected"))
        by_teacher = dict(self._read("SELECT teacher, COUNT(*) FROM draws GROUP BY teacher ORDER BY teacher"))
        holes = dict(self._read("SELECT reason, COUNT(*) FROM holes GROUP BY reason"))
        ((teachers,),) = self._read("SELECT COUNT(*) FROM teachers")
        ((calls, cost),) = self._read("SELECT COUNT(*), COALESCE(SUM(cost_usd), 0) FROM calls")
        return StoreStats(kept.pop(None, 0), kept, holes, teachers, by_teacher, calls, cost)

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
        self._frozen = not writable
        return f"{uri}?mode=rw" if writable else f"{uri}?immutable=1"

    def _prepare(self) -> None:
        self._db.execute("BEGIN")  # the three belong together: another process may be making this file right now
        (kind,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        self._db.execute("COMMIT")
        if kind == APPLICATION_ID:
            if version > VERSION or version < 1:
                raise StoreError(f"{self.path}: a store of format {version}, this program reads {VERSION}; use another")
        elif tables:
            raise StoreError(f"{self.path}: not a store of answers but another program's database; use another path")
        self._enter_wal()
        self._db.execute("PRAGMA synchronous = NORMAL")
        if version != VERSION and not self._frozen:
            with self._transaction() as db:
                (version,) = db.execute("PRAGMA user_version").fetchone()  # another process may have been faster
                if version == 1:  # its draws name no teacher
                    db.execute("ALTER TABLE draws ADD COLUMN teacher TEXT NOT NULL DEFAULT ''")
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

    def _read(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._lock, self._guard():
            return self._db.execute(query, values).fetchall()

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
