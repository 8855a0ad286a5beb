"""The rules for going on from a prefix: pure functions, each reject reason by itself."""

from __future__ import annotations

import pytest

from omniopd.types import Message, Prompt
from teachers import ladder

PROMPT = Prompt("p", (Message("system", "Be brief."), Message("user", "What is {prefix} of 6 and 7?")))
PREFIX = "Let us multiply six by seven, step by step.\nFirst, six times five is thirty, so that"


def test_prefill_leaves_the_assistant_turn_open() -> None:
    assert ladder.render_prefill(PROMPT, PREFIX) == (*PROMPT.messages, Message("assistant", PREFIX))


def test_instruct_shows_the_partial_text_and_asks_for_its_echo() -> None:
    system, turn = ladder.render_instruct(PROMPT, PREFIX)
    assert system == PROMPT.messages[0]
    assert turn.role == "user"
    assert turn.content.startswith("What is {prefix} of 6 and 7?")  # marks inside the task are text
    assert f"<begun>\n{PREFIX}\n</begun>" in turn.content
    assert turn.content.endswith(f"<last_piece>{ladder.echo_of(PREFIX)}</last_piece>")
    assert PREFIX.endswith(ladder.echo_of(PREFIX))
    assert 20 <= len(ladder.echo_of(PREFIX)) <= ladder.ECHO_CHARS


def test_l20_nested_prefixes_share_the_opening_of_the_request() -> None:
    short, long = (ladder.render_instruct(PROMPT, PREFIX[:size])[-1].content for size in (43, len(PREFIX)))
    assert long.startswith(short[: short.index("\n</begun>")])


def test_an_empty_prefix_is_a_plain_question_on_every_rung() -> None:
    assert ladder.render_prefill(PROMPT, "") == ladder.render_instruct(PROMPT, "") == PROMPT.messages


@pytest.mark.parametrize("rest", [" 30, and", "\n\nthen", "abc", "", "  two spaces"])
@pytest.mark.parametrize("lead", ["", "\n", " "])
def test_l15_the_echo_is_stripped_and_white_space_stays(rest: str, lead: str) -> None:
    assert ladder.strip_echo(lead + ladder.echo_of(PREFIX) + rest, PREFIX) == rest
    assert ladder.strip_echo(PREFIX + rest, PREFIX) == rest  # more echo than asked
    assert ladder.strip_echo(PREFIX[-15:] + rest, PREFIX) == rest  # less echo than asked


def test_no_echo_is_none_and_a_chance_overlap_is_no_echo() -> None:
    assert ladder.strip_echo("that makes forty-two", PREFIX) is None
    assert ladder.strip_echo("", PREFIX) is None


def test_text_that_repeats_itself_keeps_its_continuation() -> None:
    prefix = "ha " * 60 + "ha"
    assert ladder.strip_echo(ladder.echo_of(prefix) + " ha ha", prefix) == " ha ha"


def test_a_short_prefix_is_its_own_echo() -> None:
    assert ladder.echo_of("So") == "So"
    assert ladder.strip_echo("So it is", "So") == " it is"
    assert ladder.strip_echo("Thus it is", "So") is None
    assert ladder.validate("So it is", "So", "instruct") is None


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
@pytest.mark.parametrize("rung", ["answer", "plain", "prefill", "instruct"])
def test_l14_empty_text_is_empty_or_only_reasoning(text: str, rung: ladder.Rung) -> None:
    assert ladder.validate(text, PREFIX, rung) == "empty"
    assert ladder.validate(text, PREFIX, rung, hidden_reasoning=True) == "only_reasoning"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry \u2014 I cannot assist with this request.",
        "I can't continue this text.",
        "Sorry, I am unable to provide that.",
        "As an AI language model, I do not",
        "I must respectfully decline.",
    ],
)
def test_l13_refusals(text: str) -> None:
    for rung in ("answer", "plain", "prefill", "instruct"):
        assert ladder.validate(text, PREFIX, rung) == "refusal"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        " I can't help but notice that 30",
        " we cannot continue this way",
        "I continue with 30",
        " sorry state",
        "I am 30",
    ],
)
def test_l13_plain_prose_is_no_refusal_and_no_meta(text: str) -> None:
    assert ladder.validate(text, PREFIX, "prefill") is None


def test_l13_restart() -> None:
    reply = "Let us multiply six by seven, step by step. First, 6 times five is thirty, so"
    assert ladder.validate(reply, PREFIX, "prefill") == "restart"
    assert ladder.validate("\n" + reply[:50], PREFIX, "prefill") == "restart"
    assert ladder.validate(reply, PREFIX, "instruct") == "restart"
    assert ladder.validate(ladder.echo_of(PREFIX) + " " + reply, PREFIX, "instruct") == "restart"
    assert ladder.validate(" we add six times two, which is twelve", PREFIX, "prefill") is None
    assert ladder.validate(PREFIX[:39], PREFIX[:39], "prefill") is None  # too short a prefix to tell
    assert ladder.validate("Let us", PREFIX, "prefill") is None  # too short a reply to tell


@pytest.mark.parametrize(
    "text",
    [
        "Here is the continuation: so that",
        "Sure! Here's the rest of the solution.",
        "Continuing from where it breaks off,",
        "I'll continue from that point:",
        "Continuation: 30",
    ],
)
def test_l13_meta_talk(text: str) -> None:
    assert ladder.validate(text, PREFIX, "prefill") == "meta"
    assert ladder.validate(text, PREFIX, "instruct") == "meta"
    assert ladder.validate(text, "", "plain") is None


def test_l13_no_echo_is_asked_of_instruct_only() -> None:
    assert ladder.validate(" thirty, and", PREFIX, "instruct") == "no_echo"
    assert ladder.validate(" thirty, and", PREFIX, "prefill") is None
    assert ladder.validate(ladder.echo_of(PREFIX), PREFIX, "instruct") == "empty"


def test_a_whole_answer_that_was_cut_is_no_answer_but_a_continuation_may_be_cut() -> None:
    assert ladder.validate("text", "", "answer", finish="length") == "cut"
    assert ladder.validate("text", "", "plain", finish="length") is None
    assert ladder.validate("text", PREFIX, "prefill", finish="length") is None


def test_l14_thinking_left_in_the_text() -> None:
    assert ladder.split_thought("<think>hm</think>\n\nso") == ("so", True)
    assert ladder.split_thought("<think>hm, and hm") == ("", True)
    assert ladder.split_thought("so <think>") == ("so <think>", False)
