"""A teacher that fails all the time, a client that is killed or stopped: every draw is answered or counted, every answer is
paid for once and kept, and the books agree with the server's."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import faults
import pytest
import yaml
from faults import FaultServer, FaultSettings
from scripted import Answer, ScriptedTeacher, scripted

from omniopd.cli import main
from omniopd.errors import TeacherError
from omniopd.ledger import Ledger
from omniopd.store import Store
from omniopd.types import Chunk, ContinueQuery, Evidence, Message, Prompt, Usage
from teachers.openai import OpenAIConfig, OpenAITeacher

FAULTS = Path(faults.__file__)
N = 4  # draws of a query
LONG = "OMNIOPD_FAULTS"  # the number of queries for a longer look, as OMNIOPD_FAULTS=10000
READ = {"ok", *faults.TEXTS}  # what a client can read: whatever its worth, it is paid for and not asked for again
PREFIX = "Let us add the numbers one after another, and write each sum down: first"


def queries(count: int) -> list[ContinueQuery]:
    """That many, all different, four to a rollout; every eighth goes on from nothing."""
    made = []
    for number in range(count):
        row, place = divmod(number, 4)
        prefix = "" if number % 8 == 0 else PREFIX + f" {number}+{number}={2 * number}," * (place + 1)
        chunk = Chunk(row, 8 * place, 8 * place + 8, prefix, " next", (5,) * 8)
        prompt = Prompt(f"p{row}", (Message("user", f"Add up the numbers to {row}."),))
        made.append(ContinueQuery(prompt, chunk, N, 16, seed=1000 * number))
    return made


def connect(store: Store, url: str, **settings: Any) -> OpenAITeacher:
    """A teacher at that address whose calls are booked on "run"."""
    given = {"base_url": url, "model": "faulty-1", "api_key_env": None, "continuation": "prefill", "warm_cache": False}
    config = OpenAIConfig(**{**given, "price": {"prompt": 1.0, "completion": 4.0}, **settings})
    return OpenAITeacher(config, store, Ledger(store, "run"))


@contextmanager
def program(log: Path, **settings: Any) -> Iterator[str]:
    """The fault server as a process of its own, which writes its log to a file; yields the base URL."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, str(FAULTS), "--log", str(log), *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[-1]
        finally:
            server.terminate()


def read_log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask_of(call: dict[str, Any]) -> str:
    """What the server calls the request that a booked call answered."""
    return str(call["request_id"]).removeprefix("chatcmpl-")


@dataclass
class Books:
    """The client's books against the server's log: `accepted` entries were read by the client, `others` were not."""

    calls: list[dict[str, Any]]
    log: list[dict[str, Any]]
    timeout_s: float
    accepted: list[dict[str, Any]] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)

    def check(self) -> None:
        """Each request was read at most once, as the last of its tries, and booked as it was billed."""
        booked: dict[str, list[dict[str, Any]]] = {}
        for call in self.calls:
            if call["reason"] is None:
                booked.setdefault(ask_of(call), []).append(call)
        assert all(len(calls) == 1 for calls in booked.values())
        tries: dict[str, list[dict[str, Any]]] = {}
        for entry in self.log:
            tries.setdefault(entry["request"][:24], []).append(entry)
        assert booked.keys() <= tries.keys()
        for ask, entries in tries.items():
            entries.sort(key=lambda entry: entry["attempt"])
            if ask not in booked:
                self.others += entries
                continue
            *before, last = entries
            (call,) = booked[ask]
            assert last["reply"] in READ
            assert last["choices"] == call["draws"]
            assert last["attempt"] == call["attempts"] or (self.timeout_s < 5 and last["attempt"] < call["attempts"])
            for name in ("prompt_tokens", "completion_tokens"):
                assert last[name] == call[name]
            assert last["cached_tokens"] == call["cache_read_tokens"]
            self.accepted.append(last)
            self.others += before
            # A good reply that was asked for again came too late.
            for one, following in pairwise(entries):
                late = following["arrived"] - one["arrived"] > 0.9 * self.timeout_s
                assert one["reply"] not in READ or late
        # A try that is cut short on a busy machine may never reach the server.
        sent = sum(call["attempts"] for call in self.calls)
        assert sent == len(self.log) or (self.timeout_s < 5 and sent > len(self.log))

    def total(self, name: str) -> int:
        return sum(entry[name] for entry in self.accepted)


def check_evidence(found: Sequence[Evidence], books: Books, store: Store) -> None:
    """Every draw is a reply or has its reason, and the sums are those of the ledger, the store and the server."""
    assert all(len(one.replies) + sum(one.rejected.values()) == one.query.n for one in found)
    said = sum((Counter(entry["texts"]) for entry in books.accepted), Counter[str]())
    reasons = sum((Counter(one.rejected) for one in found), Counter[str]())
    given_up = N * len(found) - said.total()
    assert sum(len(one.replies) for one in found) == said["good"] + said["duplicate"]
    assert reasons["error"] == said["no_finish"] + given_up
    for reason in ("empty", "refusal", "restart"):
        assert reasons[reason] == said[reason]
    assert reasons.keys() <= {"error", "empty", "refusal", "restart"}
    stats = store.stats()
    assert stats.answers == said["good"] + said["duplicate"]
    assert Counter(stats.rejected) + Counter(stats.holes) == reasons
    used = sum((one.usage for one in found), Usage())
    assert used.prompt_tokens == sum(call["prompt_tokens"] for call in books.calls) == books.total("prompt_tokens")
    assert used.completion_tokens == books.total("completion_tokens")
    cost = (books.total("prompt_tokens") + 4 * books.total("completion_tokens")) / 1e6
    assert used.cost_usd == pytest.approx(cost) == pytest.approx(store.spent("run"))
    assert used.calls == sum(call["attempts"] for call in books.calls)


def gathered(store: Store, log: Path, asked: Sequence[ContinueQuery], server: Any, client: Any) -> tuple[str, Books]:
    """Gather, hold the books against each other, and gather again for nothing; returns what happened in a line."""
    with program(log, seed=5, **server) as url:
        live = connect(store, url, **client)
        began = time.monotonic()
        found = asyncio.run(live.gather(asked))
        seconds = time.monotonic() - began
        books = Books(list(store.calls()), read_log(log), client["timeout_s"])
        books.check()
        check_evidence(found, books, store)
        again = asyncio.run(live.gather([one.query for one in found if not one.rejected]))
        assert again and sum((one.usage for one in again), Usage()) == Usage(cached_calls=len(again))
        assert len(read_log(log)) == len(books.log)
    met = Counter(entry["reply"] for entry in books.log)
    drops = sum((Counter(one.rejected) for one in found), Counter[str]())
    retries = sum(call["attempts"] - 1 for call in books.calls)
    lost = sum(call["reason"] is not None for call in books.calls)
    happened = f"{seconds:.1f} s, {met.total()} requests, {retries} retries, {lost} calls given up"
    return f"{happened}; met {dict(met)}; holes {dict(drops)}", books


@pytest.mark.parametrize("concurrency", [300, "auto"] if LONG in os.environ else [300])
def test_at_30_percent_faults_every_query_is_answered_or_counted_and_paid_for_once(
    concurrency: int | str, tmp_path: Path
) -> None:
    count = int(os.environ.get(LONG, 2_000))
    server = {"faults": 0.3, "kinds": "status,wire,bodies,texts,hang=0,drip=0"}
    client = {"concurrency": concurrency, "timeout_s": 60.0, "max_attempts": 4}
    store = Store(tmp_path / "answers.sqlite")
    happened, books = gathered(store, tmp_path / "log", queries(count), server, client)
    print(f"{count} queries, concurrency {concurrency}: {happened}")
    met = Counter(entry["reply"] for entry in books.log)
    assert met.keys() == {"ok", *faults.KINDS} - {"hang", "drip"}
    assert 0.27 < 1 - met["ok"] / met.total() < 0.33


def test_replies_that_never_come_or_drip_are_asked_for_again(tmp_path: Path) -> None:
    server = {"faults": 0.3, "kinds": "hang,drip", "hang_s": 60, "drip_s": 60}
    client = {"concurrency": 60, "timeout_s": 0.5, "max_attempts": 4}
    happened, books = gathered(Store(tmp_path / "answers.sqlite"), tmp_path / "log", queries(60), server, client)
    print(happened)
    assert Counter(entry["reply"] for entry in books.others).keys() >= {"hang", "drip"}


def test_a_reply_that_is_short_for_once_does_not_make_all_calls_short(tmp_path: Path) -> None:
    with FaultServer(script=["ok", "fewer"]) as server:
        live = connect(Store(tmp_path / "answers.sqlite"), server.url, warm_cache=True)
        found = asyncio.run(live.gather(queries(4)))
        assert [len(one.replies) for one in found] == [N] * 4
        assert sorted((entry.n, entry.choices) for entry in server.log) == [(2, 2), (4, 2), (4, 4), (4, 4), (4, 4)]
    with FaultServer(
        FaultSettings(n_honoured=False)
    ) as server:  # one that always gives a single text is not asked for more
        live = connect(Store(tmp_path / "other.sqlite"), server.url, warm_cache=True)
        asyncio.run(live.gather(queries(4)))
        assert sorted(entry.n for entry in server.log) == [1] * 15 + [4]


# ---------------------------------------------------------------------- kill -9


def client(path: str, url: str, count: str) -> None:
    """The program that is killed."""
    asyncio.run(connect(Store(path), url, concurrency=30, timeout_s=60, max_attempts=4).gather(queries(int(count))))


def test_s10_a_killed_client_loses_no_stored_answer_and_no_stored_answer_is_asked_for_again(tmp_path: Path) -> None:
    path, log, count = tmp_path / "answers.sqlite", tmp_path / "log", 120
    faulty = {"faults": 0.3, "kinds": "status,wire,bodies,hang=0,drip=0", "latency": 0.1, "jitter": 0.1}
    with program(log, **faulty) as url:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAULTS.parents[1]), str(FAULTS.parent)])}
        command = [sys.executable, __file__, str(path), url, str(count)]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as killed:
            deadline = time.monotonic() + 60
            while len(log.read_text().splitlines()) < 45 and time.monotonic() < deadline and killed.poll() is None:
                time.sleep(0.005)
            assert killed.poll() is None, killed.communicate()[1]
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        store = Store(path)
        draws, calls = {draw["key"]: draw for draw in store.draws()}, list(store.calls())
        time.sleep(0.4)  # what was under way ends at the server
        before = read_log(log)
        assert 0 < len(calls) < count
        second = connect(store, url, concurrency=30, timeout_s=60, max_attempts=4)
        found = asyncio.run(second.gather(queries(count)))
        after = read_log(log)[len(before) :]

    kept = {ask_of(call) for call in calls if call["reason"] is None}
    assert len(draws) == N * len(kept)
    again = {entry["request"][:24] for entry in after}
    assert again.isdisjoint(kept)
    assert {draw["key"]: draw for draw in store.draws()}.items() >= draws.items()
    # All the rest is asked for, also what the server had answered just before the kill.
    booked = [call for call in store.calls() if call["reason"] is None]
    assert len({ask_of(call) for call in booked}) == len(booked)
    assert kept | again == {entry["request"][:24] for entry in [*before, *after]}
    assert len(kept | again) == count

    # The books of both processes are those of the replies that are kept, and the evidence is that of a run without a fault.
    bill = {entry["request"][:24]: entry for entry in [*before, *after] if entry["reply"] == "ok"}
    for name in ("prompt_tokens", "completion_tokens"):
        assert sum(call[name] for call in booked) == sum(bill[ask_of(call)][name] for call in booked)
        assert sum(call[name] for call in booked) == sum(draw[name] for draw in store.draws())
    assert second._ledger.spent == pytest.approx(sum(call["cost_usd"] for call in store.calls("run")))
    with FaultServer() as server:
        whole = asyncio.run(connect(Store(tmp_path / "whole.sqlite"), server.url).gather(queries(count)))
    pairs = [(one, other) for one, other in zip(found, whole, strict=True) if not one.rejected]
    assert len(pairs) >= count - 3  # at four tries each, hardly any is given up
    assert all(one.replies == other.replies for one, other in pairs)


# ---------------------------------------------------------------------- stopped in the middle


class Slow:
    """Answers of a scripted teacher: five good ones, then a special one as soon as `company` calls have arrived; whatever
    came after it is answered well, but only after the special one."""

    def __init__(self, server: ScriptedTeacher, special: Answer, company: int) -> None:
        self.good, self.arrived = 0, 0
        self._special, self._company, self._changed, self._over = special, company, threading.Condition(), False
        server.answer = self

    def __call__(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self._changed:
            self.arrived += 1
            number = self.arrived
            self._changed.notify_all()
            if number == 6:
                assert self._changed.wait_for(lambda: self.arrived >= self._company, 30)
            elif number > 6:
                assert self._changed.wait_for(lambda: self._over, 30)
        if number > 6:
            time.sleep(0.4)
        status, payload = self._special(body) if number == 6 else scripted(body)
        with self._changed:
            self.good += status == 200
            self._over = self._over or number == 6
            self._changed.notify_all()
        return status, payload


def refused_key(body: dict[str, Any]) -> tuple[int, Any]:
    return 401, {"error": {"message": "no such key", "code": "invalid_api_key"}}


def ctrl_c(body: dict[str, Any]) -> tuple[int, Any]:
    os.kill(os.getpid(), signal.SIGINT)
    return scripted(body)


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize(
    ("special", "error"), [(refused_key, TeacherError), (ctrl_c, KeyboardInterrupt)], ids=["401", "ctrl-c"]
)
def test_what_is_under_way_at_the_end_is_kept_and_nothing_new_is_sent(
    special: Answer,
    error: type[BaseException],
    chained: bool,
    teacher: ScriptedTeacher,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    slow, store = Slow(teacher, special, company=17), Store(tmp_path / "answers.sqlite")
    live = connect(store, teacher.url, concurrency=12, warm_cache=chained)
    with pytest.raises(error):
        asyncio.run(live.gather(queries(80)))
    sent = slow.arrived
    assert 17 <= sent <= 19  # twelve at once beside five that were answered, and a few before the news got round
    good = slow.good
    assert good >= 16
    assert store.stats().answers == N * good
    assert store.stats().calls == good
    assert store.spent("run") == live._ledger.spent == pytest.approx(good * (50 + 4 * 8 * N) / 1e6)
    assert live._ledger.reserved == 0
    time.sleep(0.2)
    assert slow.arrived == sent
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize("status", [401, 500])
def test_calls_that_fail_together_end_in_one_error(
    status: int, teacher: ScriptedTeacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The others' errors are not shouted into the log when they are thrown away."""
    arrived = threading.Barrier(12)

    def fail(body: dict[str, Any]) -> tuple[int, Any]:
        with suppress(threading.BrokenBarrierError):
            arrived.wait(1)  # the first twelve fail at one moment
        return status, {"error": {"message": "no"}}

    teacher.answer = fail
    live = connect(Store(tmp_path / "answers.sqlite"), teacher.url, concurrency=12, max_attempts=1)
    with pytest.raises(TeacherError):
        asyncio.run(live.gather(queries(40)))
    del live
    gc.collect()
    assert not caplog.records


def test_ctrl_c_in_training_keeps_what_was_under_way_and_says_how_to_go_on(
    settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = Slow(teacher, ctrl_c, company=8)  # four rollouts of two chunks
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    beside = (
        "teacher.warm_cache=false"  # chained, a second chunk would wait for its first, and that for the special call
    )
    assert main(["train", str(config), "eval.problems=0", beside]) == 130
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("omniopd: ")]
    assert len(said) == 1 and "--resume" in said[0]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("interrupted", 0)
    store = Store(tmp_path / "run" / "answers.sqlite")
    assert store.stats().calls == slow.good == slow.arrived == 8
    assert store.stats().answers == settings["method"]["continuations"] * slow.good


def test_odd_text_of_a_teacher_is_only_text(settings: dict[str, Any], teacher: ScriptedTeacher, tmp_path: Path) -> None:
    """Line ends of other scripts, half a character (a lone surrogate), a null: the run, its logs and an export go on."""
    odd = "\u2028 1\x85 2 \ud800 3\x00 <|end|>"
    said = {"message": {"content": odd}, "finish_reason": "length"}
    usage = {"prompt_tokens": 5, "completion_tokens": 5}
    teacher.answer = lambda body: (200, {"model": odd, "choices": [said] * body.get("n", 1), "usage": usage})
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert main(["train", str(config), "eval.problems=0", "train.steps=2"]) == 0
    assert main(["train", str(config), "eval.problems=0", "train.steps=3", "--resume"]) == 0
    lines = (tmp_path / "run" / "audits.jsonl").read_text(encoding="utf-8").split("\n")
    audits = [json.loads(line) for line in lines if line]
    assert {audit["step"] for audit in audits} == {1, 2, 3}
    replies = {reply["text"] for audit in audits for chunk in audit["chunks"] for reply in chunk["replies"]}
    assert replies == {odd.replace("\ud800", "\ufffd")}
    assert main(["cache", "export", str(tmp_path / "run"), "--out", str(tmp_path / "draws")]) == 0
    exported = [json.loads(line) for line in (tmp_path / "draws").read_text().splitlines()]
    assert {draw["text"] for draw in exported} == replies


if __name__ == "__main__":
    client(*sys.argv[1:])
