"""What is kept of a reply's tokens: those of the text that is kept, and of nothing before or behind it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from omniopd.types import Token
from teachers.asks import Choice, tokens_of


def choice(text: str, *tokens: str) -> Choice:
    return Choice(text, "stop", tokens=tuple(Token(one, -0.5 * i, ((one, -0.5 * i),)) for i, one in enumerate(tokens)))


@pytest.mark.parametrize(
    ("said", "kept", "texts"),
    [
        (choice(" 17. 4", " 17", ".", " 4"), " 17. 4", [" 17", ".", " 4"]),
        (choice(" 17. 4", " 17", ".", " 4", "</s>"), " 17. 4", [" 17", ".", " 4"]),  # vLLM
        (choice(" 17. 4", " 17", ".", " 4", ""), " 17. 4", [" 17", ".", " 4"]),  # llama.cpp
        (choice("echo 17", "echo", " 17"), " 17", [" 17"]),  # an echo that was cut off
        (choice("echo 17", "ec", "ho 1", "7"), " 17", []),  # it ended inside a token
        (choice("17", " 17"), "17", []),  # tokens of another text
        (choice("17"), "17", []),  # none were given
    ],
)
def test_tokens_of_the_part_that_is_kept(said: Choice, kept: str, texts: list[str]) -> None:
    assert [token[0] for token in tokens_of(said, kept)] == texts


def test_the_anchor_token_comes_from_the_server_into_the_evidence_and_out_of_the_store(bench: Any) -> None:
    def token(text: str, value: float, other: str) -> dict[str, Any]:
        top = [{"token": text, "logprob": value}, {"token": other, "logprob": value - 1}]
        return {"token": text, "logprob": value, "top_logprobs": top}

    said = bench.say(" thirty", finish="length")
    said.body["choices"][0]["logprobs"] = {"content": [token(" thir", -0.25, " 30"), token("ty", -0.01, "teen")]}
    script = bench.Script([said])
    for _ in range(2):  # live, then from the store
        teacher = bench.teacher(script, logprobs=2)
        (found,) = asyncio.run(teacher.gather([bench.continue_query(n=1)]))
        assert found.replies[0].tokens[0] == Token(" thir", -0.25, ((" thir", -0.25), (" 30", -1.25)))
        assert len(found.replies[0].tokens) == 2
    assert script.calls == 1
    assert (script.bodies[0]["logprobs"], script.bodies[0]["top_logprobs"]) == (True, 2)
