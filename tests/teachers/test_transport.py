"""What the transport does about each fault, and that the key appears nowhere."""

from __future__ import annotations

import asyncio
import email.utils
import logging
import time
import traceback
from typing import Any

import pytest

from omniopd.errors import ConfigError, TeacherError
from omniopd.types import Continuations
from teachers.openai import OpenAIConfig
from teachers.transport import LONGEST_RETRY_AFTER_S, retry_after


def gather(teacher: Any, *queries: Any) -> list[Any]:
    return asyncio.run(teacher.gather(list(queries)))


def balanced(evidence: Continuations) -> bool:
    return len(evidence.replies) + sum(evidence.rejected.values()) == evidence.query.n


def good(bench: Any) -> Any:
    return bench.say(" thirty", " 30", "\nthirty", " 6", finish="length")


def test_retry_after_values() -> None:
    later = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert retry_after("7") == 7
    assert 25 < retry_after(later) <= 30
    for useless in (None, "", "-3", "soon", "nan", "inf", "1m30s", email.utils.formatdate(0), "Mon, 99 Foo 2020"):
        assert retry_after(useless) == 0


def test_429_waits_as_long_as_the_server_says(bench: Any) -> None:
    limited = bench.Said(429, {"error": {"message": "slow down"}}, {"Retry-After": "7"})
    script = bench.Script([limited, good(bench)])
    (evidence,) = gather(bench.teacher(script), bench.continue_query())
    assert len(evidence.replies) == 4
    assert evidence.usage.calls == 2
    assert bench.waits == [7.0]


def test_429_without_a_word_backs_off_with_a_low_ceiling(bench: Any) -> None:
    script = bench.Script([bench.Said(429, {"error": "busy"})] * 9 + [good(bench)])
    (evidence,) = gather(bench.teacher(script, max_attempts=10), bench.continue_query())
    assert len(evidence.replies) == 4
    assert len(bench.waits) == 9
    assert 0.2 < bench.waits[0] <= 0.5
    assert max(bench.waits) <= 20


def test_a_server_that_asks_for_a_long_rest_is_not_asked_again(bench: Any) -> None:
    limited = bench.Said(429, {}, {"Retry-After": str(LONGEST_RETRY_AFTER_S + 1)})
    script = bench.Script(lambda body: limited if body["seed"] == 1 else good(bench))
    first, second = gather(
        bench.teacher(script), bench.continue_query(row=0, seed=1), bench.continue_query(row=1, seed=2)
    )
    assert (first.rejected, second.rejected) == ({"error": 4}, {})
    assert bench.waits == []


def faults(bench: Any) -> dict[str, Any]:
    return {
        "truncated JSON": bench.Said(body=b'{"choices": [{"message": {"content": " thi'),
        "wrong content type": bench.Said(body=good(bench).body, kind="text/html"),
        "a page": bench.Said(body=b"<html>hello</html>", kind="text/html"),
        "no choices": bench.Said(body={"choices": []}),
        "no choices at all": bench.Said(body={"ok": True}),
        "a list": bench.Said(body=[1, 2]),
        "null": bench.Said(body=None),
        "a choice without a message": bench.Said(body={"choices": [{"text": "x"}]}),
        "content that is no text": bench.Said(body={"choices": [bench.choice(7)]}),
        "not UTF-8": bench.Said(body=b'{"choices": "\xff\xfe"}'),
        "500": bench.Said(500, {"error": {"message": "boom"}}),
        "529": bench.Said(529, {}),
        "error inside a 200": bench.Said(200, {"error": {"message": "upstream", "code": 502}}),
    }


@pytest.mark.parametrize(
    "name",
    [
        "truncated JSON",
        "wrong content type",
        "a page",
        "no choices",
        "no choices at all",
        "a list",
        "null",
        "a choice without a message",
        "content that is no text",
        "not UTF-8",
        "500",
        "529",
        "error inside a 200",
    ],
)
def test_l3_a_passing_fault_is_retried_and_a_lasting_one_is_a_counted_hole(bench: Any, name: str) -> None:
    fault = faults(bench)[name]
    (evidence,) = gather(bench.teacher(bench.Script([fault, fault, good(bench)])), bench.continue_query())
    assert (len(evidence.replies), evidence.rejected, evidence.usage.calls) == (4, {}, 3)
    script = bench.Script(lambda body: fault if body["seed"] == 1 else good(bench))
    queries = bench.continue_query(row=0, seed=1), bench.continue_query(row=1, seed=2)
    broken, whole = gather(bench.teacher(script, max_attempts=3), *queries)
    assert broken.rejected == {"error": 4}
    assert balanced(broken)
    assert len(whole.replies) == 4
    assert script.calls == 4
    assert bench.store.stats().holes == {"error": 4}


def test_nothing_but_faults_is_an_error_that_names_the_server(bench: Any) -> None:
    script = bench.Script([bench.Said(500, {"error": {"message": "boom"}})])
    with pytest.raises(TeacherError, match=r"unreachable: none of 2 calls .*127\.0\.0\.1:9/v1.*boom"):
        gather(bench.teacher(script, max_attempts=2), bench.continue_query(row=0), bench.continue_query(row=1, seed=5))


def test_a_dead_server_ends_a_long_step_early(bench: Any) -> None:
    script = bench.Script([bench.Said(503, {})])
    queries = [bench.continue_query(row=row, seed=row * 100) for row in range(50)]
    with pytest.raises(TeacherError, match="unreachable"):
        gather(bench.teacher(script, max_attempts=2, concurrency=4), *queries)
    assert script.calls < 50


def test_connection_refused_names_the_address(bench: Any) -> None:
    with pytest.raises(TeacherError, match=r"http://127\.0\.0\.1:9/v1/chat/completions can't be reached") as error:
        gather(bench.teacher(max_attempts=3), bench.continue_query())
    assert "teacher.base_url" in str(error.value)
    assert len(bench.waits) == 2


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, {"error": {"message": "Incorrect API key provided: sk-CanaryKey-5f2d81c09a7e"}}, "OMNI_TEST_KEY"),
        (403, {"error": {"message": "no access"}}, "OMNI_TEST_KEY"),
        (404, {"error": {"message": "no such model"}}, "teacher.model"),
        (404, b"<html>", "teacher.base_url"),
        (301, b"", "teacher.base_url"),
        (402, {"error": {"message": "balance"}}, "no money left"),
        (429, {"error": {"type": "insufficient_quota", "message": "pay"}}, "no money left"),
        (400, {"error": {"message": "Use 'max_completion_tokens' instead", "param": "max_tokens"}}, "max_tokens_field"),
        (400, {"error": {"message": "Cannot set continue_final_message"}}, "teacher.continuation: instruct"),
        (422, {"detail": [{"loc": ["body", "n"]}]}, "correct the settings"),
    ],
)
def test_what_the_user_must_mend_ends_the_step_at_once(bench: Any, status: int, body: Any, words: str) -> None:
    script = bench.Script([bench.Said(status, body)])
    with pytest.raises(TeacherError) as error:
        gather(bench.teacher(script), bench.continue_query())
    assert words in str(error.value)
    assert bench.CANARY not in str(error.value)
    assert "\n" not in str(error.value)
    assert script.calls == 1


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (400, {"code": "context_length_exceeded", "message": "too long"}, "context_overflow"),
        (400, {"message": "This model's maximum context length is 512 tokens"}, "context_overflow"),
        (413, {"message": "large"}, "context_overflow"),
        (400, {"code": "content_filter", "message": "no"}, "filtered"),
    ],
)
def test_s14_what_can_never_be_answered_is_dropped_under_its_own_reason(
    bench: Any, status: int, error: Any, reason: str
) -> None:
    (evidence,) = gather(bench.teacher(bench.Script([bench.Said(status, {"error": error})])), bench.continue_query())
    assert evidence.rejected == {reason: 4}
    assert bench.waits == []


def test_the_first_fatal_error_ends_the_rest_and_keeps_what_arrived(bench: Any) -> None:
    script = bench.Script(
        lambda body: good(bench) if body["seed"] < 300 else bench.Said(401, {"error": {"message": "expired"}})
    )
    queries = [bench.continue_query(row=0, start=start, seed=100 * start) for start in (1, 2, 3, 4, 5)]
    with pytest.raises(TeacherError, match="expired"):
        gather(bench.teacher(script), *queries)
    assert script.calls == 3
    assert bench.store.stats().answers == 8


def test_s13_a_slow_reply_within_the_time_out_is_paid_once(bench: Any) -> None:
    slow = good(bench)
    slow.delay_s = 0.4
    script = bench.Script([slow])
    with bench.serving(script) as url:
        teacher = bench.teacher(base_url=url, timeout_s=5, price={"prompt": 10, "completion": 100})
        (evidence,) = gather(teacher, bench.continue_query())
    assert (script.calls, evidence.usage.calls, len(evidence.replies)) == (1, 1, 4)
    assert evidence.usage.cost_usd == pytest.approx((100 * 10 + 10 * 100) / 1e6)


def test_a_reply_slower_than_the_time_out_is_tried_again(bench: Any) -> None:
    slow = good(bench)
    slow.delay_s = 1.0
    script = bench.Script([slow, good(bench)])
    with bench.serving(script) as url:
        (evidence,) = gather(bench.teacher(base_url=url, timeout_s=0.2), bench.continue_query())
    assert (script.calls, len(evidence.replies)) == (2, 4)


def test_a_connection_that_breaks_in_the_middle_is_tried_again(bench: Any) -> None:
    cut = good(bench)
    cut.promised = 10_000
    script = bench.Script([cut, good(bench)])
    with bench.serving(script) as url:
        (evidence,) = gather(bench.teacher(base_url=url, timeout_s=0.5), bench.continue_query())
    assert (script.calls, len(evidence.replies)) == (2, 4)


def test_concurrency_is_bounded_and_gathers_may_run_in_loops_of_their_own(bench: Any) -> None:
    now, most = 0, 0

    def answer(body: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.02)
        now -= 1
        return good(bench)

    with bench.serving(bench.Script(answer)) as url:
        teacher = bench.teacher(base_url=url, concurrency=3)
        for step in range(2):
            queries = [bench.continue_query(row=row, seed=1000 * step + 10 * row) for row in range(9)]
            assert all(len(evidence.replies) == 4 for evidence in gather(teacher, *queries))
    assert most <= 3


def test_the_key_is_sent_and_is_nowhere_else(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = bench.say(f" the key is {bench.CANARY}", " 30")
    script = bench.Script([bench.Said(500, {"error": {"message": bench.CANARY}}), echo])
    teacher = bench.teacher(script, continuation="auto")
    gather(teacher, bench.continue_query(n=2))
    assert all(headers["authorization"] == f"Bearer {bench.CANARY}" for headers in script.headers)
    written = [repr(teacher), repr(vars(teacher)), repr(vars(teacher._backend)), repr(teacher._transport.__dict__)]
    for fault in (bench.Said(401, {"error": bench.CANARY}), bench.Said(400, {"error": {"message": bench.CANARY}})):
        with pytest.raises(TeacherError) as caught:
            gather(bench.teacher(bench.Script([fault])), bench.continue_query(seed=999))
        frames = [frame for frame, _ in traceback.walk_tb(caught.tb) if "tests" not in frame.f_code.co_filename]
        assert any("transport.py" in frame.f_code.co_filename for frame in frames)
        written += [str(caught.value), *(repr(frame.f_locals) for frame in frames)]
    bench.store.close()
    stored = b"".join(path.read_bytes() for path in bench.path.parent.iterdir())
    assert bench.CANARY not in "".join(written) + caplog.text
    assert bench.CANARY.encode() not in stored
    assert b"***" in stored  # the reply that held it is there


def test_no_key_is_needed_where_the_config_says_so(bench: Any) -> None:
    script = bench.Script([good(bench)])
    gather(bench.teacher(script, api_key_env=None), bench.continue_query())
    assert "authorization" not in script.headers[0]


def test_a_missing_or_broken_key_is_a_config_error_before_any_call(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMNI_TEST_KEY")
    with pytest.raises(ConfigError, match=r"teacher\.api_key_env: .*OMNI_TEST_KEY is not set"):
        bench.teacher()
    monkeypatch.setenv("OMNI_TEST_KEY", "sk-secret\nvalue-é")
    with pytest.raises(ConfigError, match="OMNI_TEST_KEY holds characters") as error:
        bench.teacher()
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "https://user:hunter2secret@host/v1"},
        {"base_url": "https://host/v1?key=hunter2secret"},
        {"api_key_env": "sk-hunter2secret"},
        {"api_key": "hunter2secret"},
        {"base_url": "ftp://hunter2secret"},
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_quoted(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error") as error:
        OpenAIConfig(model="m", **settings)
    assert "hunter2secret" not in str(error.value)
