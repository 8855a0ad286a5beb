"""The fault server: each fault looks on the wire as its name says, and its books are complete."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faults
import httpx
import pytest
from faults import FaultServer, FaultSettings

PARTIAL = "Ann has 12 apples and buys 7 more, so 12+7=19. She gives 5 to Ben, so 19-5="
KEY = "Bearer sk-CanaryKey-5f2d81c09a7e"


def body(text: str = PARTIAL, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "How many apples?"}, {"role": "assistant", "content": text}]
    return {"model": "m", "messages": messages, "seed": 1, "n": 4, "max_tokens": 32, **fields}


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [choice["message"]["content"] for choice in response.json()["choices"]]


def fates(server: FaultServer) -> list[str]:
    return [entry.reply for entry in server.log]


def soon(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + 3
    while not true() and time.monotonic() < end:
        time.sleep(0.005)
    return true()


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Kept connections: a new client reads its certificates anew."""
    with httpx.Client(timeout=5) as client:
        yield client


def ask(client: httpx.Client, server: FaultServer, **fields: Any) -> httpx.Response:
    return client.post(f"{server.url}/chat/completions", json=body(**fields), headers={"Authorization": KEY})


def pipelined(server: FaultServer, sent: list[dict[str, Any]], at_once: int = 50) -> None:
    """Send many requests over one connection, without looking at the replies."""
    raw = [json.dumps(one).encode() for one in sent]
    requests = [b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(one), one) for one in raw]
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        for start in range(0, len(requests), at_once):
            batch, replies = requests[start : start + at_once], b""
            connection.sendall(b"".join(batch))
            while replies.count(b"HTTP/1.1 ") < len(batch):
                replies += connection.recv(2**20)


# Good replies


def test_a_good_reply_is_in_the_usual_shape(client: httpx.Client) -> None:
    with FaultServer() as server:
        reply = ask(client, server).json()
        again = ask(client, server).json()
        models = client.get(f"{server.url}/models").json()
    assert (reply["object"], reply["model"]) == ("chat.completion", models["data"][0]["id"])
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
    written = [choice["message"]["content"] for choice in reply["choices"]]
    assert len(set(written)) == 4
    assert all(4 < len(text) < 40 for text in written)
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == sum(math.ceil(len(text) / 4) for text in written)
    assert usage["prompt_tokens"] >= len(PARTIAL) / 4
    assert (again["choices"], again["usage"]) == (reply["choices"], usage)


def test_a_draw_is_fixed_by_messages_seed_and_place(client: httpx.Client) -> None:
    with FaultServer() as server:
        together = texts(ask(client, server, n=4, seed=1))
        alone = [texts(ask(client, server, n=1, seed=1 + index))[0] for index in range(4)]
        assert together[0] == alone[0]
        assert not set(together[1:]) & set(alone[1:])
        assert not set(together) & set(texts(ask(client, server, text="Another.")))
        server.settings = FaultSettings(place_counts=False)
        together = texts(ask(client, server, n=4, seed=1))
        alone = [texts(ask(client, server, n=1, seed=1 + index))[0] for index in range(4)]
    assert together == alone


def test_without_a_seed_every_request_draws_anew(client: httpx.Client) -> None:
    with FaultServer() as server:
        assert not set(texts(ask(client, server, seed=None))) & set(texts(ask(client, server, seed=None)))


def test_a_partial_solution_inside_the_last_turn_is_gone_on_with(client: httpx.Client) -> None:
    shown = f"Go on.\n<begun>\n{PARTIAL}\n</begun>\n<last_piece>so 19-5=</last_piece>"
    turn = [{"role": "user", "content": shown}]
    with FaultServer(script=["ok", "restart"]) as server:
        assert all(text.startswith("so 19-5= ") for text in texts(ask(client, server, messages=turn)))
        assert all(text == PARTIAL for text in texts(ask(client, server, messages=turn)))
        assert texts(ask(client, server, text="1, 2, 3, 4,"))[0].startswith(" 5, ")


def test_bad_requests_are_told_and_written_down(client: httpx.Client) -> None:
    with FaultServer() as server:
        url = f"{server.url}/chat/completions"
        for sent in (b"", b"[]", b'{"messages": []}', b'{"messages": ["hi"]}'):
            assert client.post(url, content=sent).status_code == 400
        for fields in ({"stream": True}, {"n": -1}, {"n": "four"}, {"seed": "one"}, {"max_tokens": -5}):
            assert ask(client, server, **fields).status_code == 400
        assert client.get(url).status_code == 404
        assert client.post(url, content=iter([b"chunked"])).status_code == 411
        assert server.counts == {"bad_request": 9}


def test_a_lone_surrogate_is_text(client: httpx.Client) -> None:
    sent = json.dumps(body(text="broken \ud800 text"))
    with FaultServer(script=["restart"]) as server:
        reply = client.post(f"{server.url}/chat/completions", content=sent)
    assert texts(reply)[0] == "broken \ud800 text"


# Faults on the wire


@pytest.mark.parametrize(("kind", "status"), faults.STATUS.items())
def test_an_error_status(kind: str, status: int, client: httpx.Client) -> None:
    with FaultServer(FaultSettings(retry_after=0.25), script=[kind]) as server:
        reply = ask(client, server)
        assert ask(client, server).status_code == 200
    assert reply.status_code == status
    assert reply.json()["error"]["message"]
    assert reply.headers.get("Retry-After") == ("0.25" if kind == "429" else None)
    assert server.log[0].completion_tokens == server.log[0].choices == 0


def test_a_hang_lasts_until_the_client_goes_away(client: httpx.Client) -> None:
    with FaultServer(script=["hang"]) as server:
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{server.url}/chat/completions", json=body(), timeout=0.1)
        assert soon(lambda: server.in_flight == 0)
        assert server.most_in_flight == 1


def test_a_hang_ends_by_itself(client: httpx.Client) -> None:
    with FaultServer(FaultSettings(hang_s=0.05), script=["hang"]) as server, pytest.raises(httpx.RemoteProtocolError):
        ask(client, server)


def test_a_drip_is_a_good_reply_in_small_drops(client: httpx.Client) -> None:
    with FaultServer(FaultSettings(drip_s=0.3), script=["drip"]) as server:
        begun, drops = time.monotonic(), []
        with client.stream("POST", f"{server.url}/chat/completions", json=body()) as reply:
            drops = list(reply.iter_raw())
        assert time.monotonic() - begun > 0.25
    assert len(drops) > 20
    assert len(json.loads(b"".join(drops))["choices"]) == 4


def test_a_drip_ends_when_the_client_goes_away() -> None:
    async def impatient() -> None:
        async with httpx.AsyncClient() as client, asyncio.timeout(0.2):
            await client.post(f"{server.url}/chat/completions", json=body())

    with FaultServer(script=["drip"]) as server:
        with pytest.raises(TimeoutError):
            asyncio.run(impatient())
        assert soon(lambda: server.in_flight == 0)


def test_a_reset_comes_before_any_reply(client: httpx.Client) -> None:
    with FaultServer(script=["reset"]) as server, pytest.raises(httpx.ReadError) as caught:
        ask(client, server)
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    assert isinstance(cause, OSError)
    assert cause.errno == errno.ECONNRESET


def test_a_reset_in_the_middle_of_the_body() -> None:
    sent = json.dumps(body()).encode()
    with FaultServer(script=["reset_midway"]) as server, socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(sent), sent))
        head, _, half = raw.recv(65536).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert half.startswith(b'{"id": ')
        with pytest.raises(ConnectionResetError):
            raw.recv(65536)


@pytest.mark.parametrize(("kind", "error"), [("reset_midway", httpx.ReadError), ("short", httpx.RemoteProtocolError)])
def test_a_body_that_breaks_off(kind: str, error: type[Exception], client: httpx.Client) -> None:
    with FaultServer(script=[kind]) as server:
        with pytest.raises(error):
            ask(client, server)
        assert len(texts(ask(client, server))) == 4
    # The client has nothing of the first, and pays for it.
    assert server.log[0].completion_tokens == server.log[1].completion_tokens > 0


@pytest.mark.parametrize("kind", ["truncated", "malformed"])
def test_a_whole_body_that_is_no_json(kind: str, client: httpx.Client) -> None:
    with FaultServer(script=[kind]) as server:
        reply = ask(client, server)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    assert int(reply.headers["content-length"]) == len(reply.content)
    assert reply.content.startswith(b'{"id": ')
    with pytest.raises(json.JSONDecodeError):
        reply.json()


def test_a_page_instead_of_json(client: httpx.Client) -> None:
    with FaultServer(script=["html"]) as server:
        reply = ask(client, server)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert "<html>" in reply.text


@pytest.mark.parametrize(("kind", "choices"), [("no_choices", []), ("null_choices", None)])
def test_no_choices(kind: str, choices: Any, client: httpx.Client) -> None:
    with FaultServer(script=[kind]) as server:
        reply = ask(client, server)
    assert reply.status_code == 200
    assert reply.json()["choices"] == choices
    assert server.log[0].choices == 0


def test_an_error_inside_a_200(client: httpx.Client) -> None:
    with FaultServer(script=["error_in_200"]) as server:
        reply = ask(client, server)
    assert reply.status_code == 200
    assert reply.json().keys() == {"error"}


@pytest.mark.parametrize(
    ("kind", "expected", "finish"),
    [
        ("empty", [""] * 4, "length"),
        ("refusal", [faults.REFUSAL] * 4, "stop"),
        ("restart", [PARTIAL] * 4, "length"),
    ],
)
def test_texts_that_are_no_evidence(kind: str, expected: list[str], finish: str, client: httpx.Client) -> None:
    with FaultServer(script=[kind]) as server:
        reply = ask(client, server)
    assert texts(reply) == expected
    assert {choice["finish_reason"] for choice in reply.json()["choices"]} == {finish}
    assert server.log[0].texts == {kind: 4}


def test_no_finish_duplicates_and_fewer(client: httpx.Client) -> None:
    with FaultServer(script=["no_finish", "duplicates", "fewer", "ok"]) as server:
        unfinished, duplicates, fewer, good = (ask(client, server) for _ in range(4))
    assert {choice["finish_reason"] for choice in unfinished.json()["choices"]} == {None}
    assert texts(duplicates) == texts(good)[:1] * 4
    assert texts(fewer) == texts(good)[:2]
    assert [entry.choices for entry in server.log] == [4, 4, 2, 4]
    assert server.log[1].texts == {"good": 1, "duplicate": 3}


def test_every_kind_has_been_looked_at() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{kind}"' in text for kind in faults.KINDS if kind not in faults.STATUS)


@pytest.mark.parametrize("kind", [*faults.STATUS, "html", "error_in_200"])
def test_the_key_is_said_back_on_request(kind: str, client: httpx.Client) -> None:
    with FaultServer(FaultSettings(echo_key=True), script=[kind]) as server:
        assert KEY in ask(client, server).text
        assert KEY not in ask(client, server).text
    with FaultServer(script=[kind]) as server:
        assert KEY not in ask(client, server).text


# Who meets what


def test_the_share_of_faults_and_their_weights() -> None:
    settings = FaultSettings(faults=0.3, kinds={"500": 3, "no_choices": 1}, seed=7)
    with FaultServer(settings) as server:
        pipelined(server, [body(seed=seed, n=1) for seed in range(2000)])
        counts = server.counts
    assert counts.total() == 2000
    met = counts["500"] + counts["no_choices"]
    for count, total, share in ((met, 2000, 0.3), (counts["no_choices"], met, 0.25)):
        assert abs(count - total * share) < 4 * math.sqrt(total * share * (1 - share))


def test_the_same_seed_gives_the_same_fates_in_another_order(client: httpx.Client) -> None:
    def run(order: int, seed: int) -> dict[tuple[str, int], str]:
        bodies = [index for index in range(60) for _ in range(2)]
        random.Random(order).shuffle(bodies)
        kinds = dict.fromkeys((*faults.STATUS, *faults.BODIES, *faults.TEXTS), 1.0)
        with FaultServer(FaultSettings(faults=0.5, kinds=kinds, seed=seed)) as server:
            for index in bodies:
                ask(client, server, seed=index)
            return {(entry.request, entry.attempt): entry.reply for entry in server.log}

    first = run(1, seed=3)
    assert len(first) == 120
    assert run(2, seed=3) == first != run(1, seed=4)
    assert Counter(first.values())["ok"] > 30
    retried = [(fate, first[request, 2]) for (request, attempt), fate in first.items() if attempt == 1 and fate != "ok"]
    assert any(later == "ok" for _, later in retried)


def test_what_the_limit_turns_away_changes_no_fate(client: httpx.Client) -> None:
    settings = FaultSettings(faults=0.5, kinds={"500": 1.0}, seed=5)
    with FaultServer(settings) as server:
        for _ in range(10):
            ask(client, server)
        undisturbed = fates(server)
    with FaultServer(settings) as server:
        for _ in range(10):
            server.settings = FaultSettings(limit=1, latency=0.02)
            server.in_flight += 1  # somebody else's
            assert ask(client, server).status_code == 429
            server.in_flight -= 1
            server.settings = settings
            ask(client, server)
        disturbed = fates(server)
    assert disturbed == [fate for free in undisturbed for fate in ("limit", free)]
    assert [entry.attempt for entry in server.log] == list(range(1, 21))


def test_a_request_meets_only_what_it_can(client: httpx.Client) -> None:
    kinds = {"fewer": 1.0, "duplicates": 1.0, "restart": 1.0}
    with FaultServer(FaultSettings(faults=1, kinds=kinds)) as server:
        question = [{"role": "user", "content": "How many?"}]
        for seed in range(20):
            ask(client, server, n=1, seed=seed, messages=question)
            ask(client, server, n=1, seed=seed)
    assert fates(server) == ["ok", "restart"] * 20


def test_unknown_kinds_and_shares_are_refused() -> None:
    with pytest.raises(ValueError, match="no such fault: smoke; there are 429"):
        FaultSettings(kinds={"smoke": 1})
    with pytest.raises(ValueError, match="no such fault: smoke"):
        FaultServer(script=["ok", "smoke"])
    with pytest.raises(ValueError, match="faults must be a share"):
        FaultSettings(faults=30)
    assert faults.weigh("wire,hang=0.2,500") == {**dict.fromkeys(faults.WIRE, 1.0), "hang": 0.2, "500": 1.0}


def test_rates_of_poor_texts_are_fixed_by_the_draw(client: httpx.Client) -> None:
    with FaultServer(FaultSettings(refusal_rate=0.2, restart_rate=0.3, duplicate_rate=0.25)) as server:
        drawn = [texts(ask(client, server, seed=100 * seed)) for seed in range(60)]
        assert drawn == [texts(ask(client, server, seed=100 * seed)) for seed in range(60)]
    assert set(fates(server)) == {"ok"}
    kinds: Counter[str] = sum((Counter(entry.texts) for entry in server.log[:60]), Counter())
    written = [text for reply in drawn for text in reply]
    assert 25 <= written.count(faults.REFUSAL) <= 75
    assert 45 <= written.count(PARTIAL) <= 105
    assert 6 * 3 <= kinds["duplicate"] <= 26 * 3
    assert all(
        len(set(reply)) == 1 for reply, entry in zip(drawn, server.log, strict=False) if "duplicate" in entry.texts
    )


def test_n_may_be_ignored(client: httpx.Client) -> None:
    with FaultServer(FaultSettings(n_honoured=False)) as server:
        assert len(texts(ask(client, server, n=4))) == 1
    assert (server.log[0].n, server.log[0].choices) == (4, 1)


# Load


def flood(server: FaultServer, count: int, seeds: int = 1000) -> list[httpx.Response]:
    async def all_at_once() -> list[httpx.Response]:
        url = f"{server.url}/chat/completions"
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=10) as client:
            return await asyncio.gather(*(client.post(url, json=body(seed=place % seeds)) for place in range(count)))

    return asyncio.run(all_at_once())


def test_the_limit_holds_and_answers_at_once() -> None:
    with FaultServer(FaultSettings(limit=8, latency=1.0)) as server:
        replies = flood(server, 40)
        assert server.counts == {"ok": 8, "limit": 32}
        assert server.most_in_flight == 8
        assert soon(lambda: server.in_flight == 0)
    refused = [reply for reply in replies if reply.status_code == 429]
    assert len(refused) == 32
    assert {reply.headers["Retry-After"] for reply in refused} == {"0.05"}
    assert all(entry.in_flight <= 8 for entry in server.log)
    assert fates(server)[:32] == ["limit"] * 32


def test_latency_and_jitter() -> None:
    with FaultServer(FaultSettings(latency=0.1, jitter=0.1), script=["429"]) as server:
        flood(server, 10)
        waits = sorted(entry.time - entry.arrived for entry in server.log)
        assert server.most_in_flight > 1
    assert waits[0] < 0.05
    assert 0.1 <= waits[1] < waits[-1] < 1


def test_requests_per_minute(client: httpx.Client) -> None:
    with FaultServer(FaultSettings(rpm=3)) as server:
        replies = [ask(client, server) for _ in range(5)]
        assert fates(server) == ["ok"] * 3 + ["rpm"] * 2
        assert 55 < float(replies[-1].headers["Retry-After"]) <= 60
        server.settings = FaultSettings(rpm=3, limit_says_when=False)
        assert "Retry-After" not in ask(client, server).headers


# Books


def cached(client: httpx.Client, server: FaultServer, text: str) -> int:
    usage = ask(client, server, text=text).json()["usage"]
    told = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= told <= usage["prompt_tokens"]
    return int(told)


def test_the_prompt_cache_counts_the_longest_common_prefix(client: httpx.Client) -> None:
    words = " ".join(map(str, range(2000)))
    with FaultServer(FaultSettings(cache=True)) as server:
        assert cached(client, server, words[:1000]) == 0
        assert 250 <= cached(client, server, words[:1000]) < 266
        assert 250 <= cached(client, server, words[:2000]) < 266
        assert 125 <= cached(client, server, words[:500] + "x" * 500) < 141
        assert cached(client, server, "x" + words) < 16
        assert server.billed["cached_tokens"] == sum(entry.cached_tokens for entry in server.log) > 0
        server.settings = FaultSettings(cache=True, cache_step=128, cache_least=1024)
        assert cached(client, server, words[:4000]) == 0
        assert cached(client, server, words[:4000]) == 0  # under the least
        assert cached(client, server, words[:6000]) == 0
        assert cached(client, server, words[:6000] + "x") == 1408
        server.settings = FaultSettings()
        assert cached(client, server, words[:6000]) == 0


def test_the_log_is_complete_and_ahead_of_the_reply(tmp_path: Path) -> None:
    kinds = dict.fromkeys(faults.KINDS, 1.0) | {"drip": 0, "hang": 0}

    def work(server: FaultServer, worker: int) -> None:
        with httpx.Client(timeout=5) as client:
            for index in range(40):
                try:
                    reply = ask(client, server, seed=1000 * worker + index % 30)
                except httpx.TransportError:
                    continue
                name = reply.headers["x-request-id"]
                assert any(name == f"req-{entry.request[:16]}-{entry.attempt}" for entry in server.log)

    path = tmp_path / "log.jsonl"
    with FaultServer(FaultSettings(faults=0.4, kinds=kinds, cache=True), log_file=path) as server:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, [server] * 4, range(4)))
        log, counts = server.log, server.counts
    written = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    assert written == [vars(entry) for entry in log]
    assert len(log) == counts.total() == 160
    assert Counter(entry.reply for entry in log) == counts
    assert len({(entry.request, entry.attempt) for entry in log}) == 160
    assert Counter(entry.attempt for entry in log) == {1: 120, 2: 40}
    assert server.billed["completion_tokens"] == sum(entry.completion_tokens for entry in log)
    assert all((entry.choices > 0) == (entry.completion_tokens > 0) for entry in log if entry.reply != "empty")


def test_a_request_sent_twice_at_once_is_two_attempts() -> None:
    with FaultServer(FaultSettings(latency=0.1)) as server:
        flood(server, 6, seeds=2)
    assert {(entry.seed, entry.attempt) for entry in server.log} == {(s, a) for s in (0, 1) for a in (1, 2, 3)}


def test_a_server_comes_back_at_the_same_address(client: httpx.Client) -> None:
    server = FaultServer()
    with server:
        ask(client, server)
        url = server.url
    with pytest.raises(httpx.TransportError):
        ask(client, server)
    with server:
        ask(client, server)
        assert server.url == url
        with pytest.raises(OSError, match="in use"), FaultServer(port=server.port):
            pass
    assert [entry.attempt for entry in server.log] == [1, 2]


def test_the_program(tmp_path: Path, client: httpx.Client) -> None:
    log = tmp_path / "log.jsonl"
    flags = [
        "--faults",
        "1",
        "--kinds",
        "529",
        "--script",
        "ok,reset",
        "--no-n-honoured",
        "--limit",
        "9",
        "--log",
        str(log),
    ]
    process = subprocess.Popen([sys.executable, faults.__file__, *flags], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("serving faults at ").strip()
        assert len(texts(client.post(f"{url}/chat/completions", json=body()))) == 1
        with pytest.raises(httpx.ReadError):
            client.post(f"{url}/chat/completions", json=body())
        assert client.post(f"{url}/chat/completions", json=body()).status_code == 529
        entries = [json.loads(line) for line in log.read_text(encoding="ascii").splitlines()]
        assert [(entry["reply"], entry["attempt"]) for entry in entries] == [("ok", 1), ("reset", 2), ("529", 3)]
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=10)
    assert (process.returncode, rest) == (0, "")
