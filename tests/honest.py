"""A chat server that does what it is asked, and lies in the points that a test names: what a probe is tried on.

    Honest()                      # keeps every promise
    Honest("seed", "n")           # takes both fields and ignores them
    Honest(counts=False)          # can't count to ten, as small models can't

It speaks OpenAI's format with vLLM's additions: an open assistant turn, token ids as a prompt, log-probs of both kinds.
`Honest()(body)` is a status and a payload. A token is a word of at most six letters with the space before it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from omniopd.chat import ChatTemplate
from omniopd.types import Message

LIES = {
    "blank": "its answers are white space",
    "n": "one choice, whatever n",
    "n_same": "n choices of one text",
    "n_refused": "n above 1 is refused",
    "seed": "ignored",
    "seed_refused": "refused",
    "temperature": "ignored",
    "temperature_0_refused": "0 is refused",
    "limit": "ignored",
    "restart": "an open turn is closed, and the answer begins anew",
    "open_turn_refused": "an open turn is refused",
    "logprobs_refused": "refused",
    "logprobs_ignored": "taken, and none returned",
    "logprobs_equal": "all the same",
    "logprobs_positive": "above 0",
    "logprobs_after": "of the distribution after temperature",
    "logprobs_strange": "in a shape of its own",
    "scores_ignored": "none returned",
    "scores_equal": "all the same",
    "scores_late": "each belongs to the token before",
    "scores_early": "each belongs to the token after",
    "scores_change": "others when asked again",
    "usage": "none told",
    "count": "three tokens more than there are",
    "cache": "not told",
    "cache_always": "told of a prompt that is new",
    "unknown": "an unknown field is ignored",
    "model": "answers by any name",
    "thinking": "hidden reasoning takes the budget",
    "thinking_told": "hidden reasoning, and text",
    "thinking_text": "a thought opens the text",
    "long_filtered": "long prompts are filtered",
}
FIELDS = {"model", "messages", "prompt", "n", "seed", "temperature", "top_p", "max_tokens", "logprobs", "top_logprobs"}
FIELDS |= {
    "add_generation_prompt",
    "continue_final_message",
    "stream",
    "echo",
    "prompt_logprobs",
    "chat_template_kwargs",
}
FIELDS |= {"top_k", "min_p", "repetition_penalty"}
TEN = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
WORDS = (
    *("amber", "basket", "candle", "distant", "ember", "falcon", "garden", "harbour", "island", "jacket", "kettle"),
    *("lantern", "meadow", "number", "orange", "pepper", "quarry", "ribbon", "silver", "timber", "umbrella", "velvet"),
    *("window", "yellow", "zephyr", "anchor", "bridge", "copper", "dragon", "engine"),
)
LIKELIEST = -0.4  # the first token's, at temperature 1
MOST_LOGPROBS = 20


def unit(*parts: Any) -> float:
    """A number from 0 to 1 that is fixed by the parts."""
    return int(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:13], 16) / 16**13


class Honest:
    """The server. `bodies` are the requests that it got."""

    def __init__(self, *lies: str, counts: bool = True, chat: ChatTemplate | None = None, name: str = "honest") -> None:
        """`counts`: whether it can count; `chat`: its template, for token ids and to count tokens as it does."""
        assert not set(lies) - set(LIES), f"no such lie: {set(lies) - set(LIES)}"
        self.lies, self.counts, self.chat, self.name = set(lies), counts, chat, name
        self.bodies: list[dict[str, Any]] = []
        self._seen: set[str] = set()
        self._never_twice = itertools.count()

    def __call__(self, body: dict[str, Any]) -> tuple[int, Any]:
        self.bodies.append(body)
        refused = self._refused(body)
        if refused is not None:
            return refused
        if body.get("prompt_logprobs") is not None or body.get("echo"):
            return 200, self._scores(body)
        question, partial = self._read(body)
        if "long_filtered" in self.lies and len(question) > 500:
            return 400, _error("flagged", "content_filter")
        one = "n" in self.lies
        choices = [self._choice(body, question, partial, draw) for draw in range(1 if one else body.get("n") or 1)]
        payload: dict[str, Any] = {"model": self.name, "choices": choices}
        if "usage" not in self.lies:
            payload["usage"] = self._usage(body, question + partial, choices)
        return 200, payload

    # What is refused

    def _refused(self, body: Mapping[str, Any]) -> tuple[int, Any] | None:
        if body["model"] != self.name and "model" not in self.lies:
            return 404, _error(f"The model '{body['model']}' does not exist", "model_not_found")
        if (strange := sorted(body.keys() - FIELDS)) and "unknown" not in self.lies:
            return 400, _error(f"Unrecognized request argument: {strange[0]}", param=strange[0])
        asked = _top(body)
        told = {
            "seed_refused": ("seed", body.get("seed") is not None, "seed is not supported"),
            "n_refused": ("n", (body.get("n") or 1) > 1, "n must be 1"),
            "temperature_0_refused": ("temperature", body.get("temperature") == 0, "temperature must be above 0"),
            "open_turn_refused": ("continue_final_message", body.get("continue_final_message"), "not supported"),
            "logprobs_refused": ("logprobs", asked is not None, "logprobs are not supported"),
        }
        for lie, (param, sent, message) in told.items():
            if lie in self.lies and sent:
                return 400, _error(message, param=param)
        if asked is not None and asked > MOST_LOGPROBS:
            return 400, _error(f"top_logprobs must be at most {MOST_LOGPROBS}", param="top_logprobs")
        return None

    # What is written

    def _read(self, body: Mapping[str, Any]) -> tuple[str, str]:
        """The question, and the partial answer to go on from."""
        if "prompt" in body:
            assert self.chat is not None
            prompt = body["prompt"]
            text = prompt if isinstance(prompt, str) else str(self.chat.tokenizer.decode(prompt))
            question, _, partial = text.partition("[/INST]")
            return question.rpartition("[INST]")[2], partial
        turns = [(turn["role"], turn["content"]) for turn in body["messages"]]
        partial = turns.pop()[1] if turns[-1][0] == "assistant" else ""
        return "\n".join(content for _, content in turns), partial

    def _choice(self, body: Mapping[str, Any], question: str, partial: str, draw: int) -> dict[str, Any]:
        seed = None if "seed" in self.lies else body.get("seed")
        named = next(self._never_twice) if seed is None else seed + (0 if "n_same" in self.lies else draw)
        heat = 1.0 if "temperature" in self.lies else body.get("temperature", 1.0)
        text = self._text(question, "" if "restart" in self.lies else partial, named if heat else None)
        limit = 80 if "limit" in self.lies else body["max_tokens"]
        tokens = re.findall(r"\s*\S{1,6}", text)
        finish = "length" if len(tokens) > limit else "stop"
        tokens = tokens[:limit]
        message = {"role": "assistant", "content": "".join(tokens)}
        if "thinking" in self.lies:
            message |= {"content": "", "reasoning_content": "Let me think."}
        if "thinking_told" in self.lies:
            message["reasoning_content"] = "Let me think."
        if "thinking_text" in self.lies:
            message["content"] = "<think>Hm.</think>" + message["content"]
        choice = {"message": message, "text": message["content"], "finish_reason": finish}
        asked = _top(body)
        if asked is not None and "logprobs_ignored" not in self.lies:
            values = self._values(tokens, float(body.get("temperature") or 1.0))
            choice["logprobs"] = (
                "on request" if "logprobs_strange" in self.lies else _shape(body, tokens, values, asked)
            )
        return choice

    def _text(self, question: str, partial: str, named: int | None) -> str:
        """What it writes after a partial answer. `named` decides the draw; None: the likeliest."""
        if "blank" in self.lies:
            return "   "
        begun = re.search(r"<begun>\n(.*)\n</begun>\n<last_piece>(.*)</last_piece>", question, re.DOTALL)
        if begun:
            return begun[2] + self._text(question[: begun.start()], begun[1], named)
        whole = TEN if "from 1 to 10" in question and self.counts else self._words("likeliest", question)
        if whole.startswith(partial) and (named is None or whole == TEN):
            return whole[len(partial) :]
        return (" " if partial else "") + self._words(named, question, partial)

    def _words(self, *name: Any) -> str:
        return " ".join(WORDS[int(unit(*name, place) * len(WORDS))] for place in range(40))

    def _values(self, tokens: Sequence[str], heat: float) -> list[float]:
        """The log-prob of each written token, which is the likeliest one."""
        if "logprobs_equal" in self.lies:
            return [-0.5] * len(tokens)
        if "logprobs_positive" in self.lies:
            return [0.5] * len(tokens)
        values = [LIKELIEST, *(LIKELIEST - unit(token, place) for place, token in enumerate(tokens[1:]))]
        return [value / heat if "logprobs_after" in self.lies else value for value in values][: len(tokens)]

    # What is counted

    def _usage(self, body: Mapping[str, Any], text: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        read = self._tokens(body) + (3 if "count" in self.lies else 0)
        known, unseen = text in self._seen, "cache_always" in self.lies
        self._seen.add(text)
        cached = 0 if "cache" in self.lies else read * 9 // 10 if known or unseen else 0
        thought = 8 if {"thinking", "thinking_told"} & self.lies else 0
        written = sum(len(re.findall(r"\s*\S{1,6}", choice["message"]["content"])) for choice in choices)
        return {
            "prompt_tokens": read,
            "completion_tokens": written + thought,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    def _tokens(self, body: Mapping[str, Any]) -> int:
        if isinstance(body.get("prompt"), list):
            return len(body["prompt"])
        if self.chat is None or "prompt" in body:
            return len(json.dumps(body.get("messages") or body["prompt"])) // 4
        turns = [Message(turn["role"], turn["content"]) for turn in body["messages"]]
        return len(self.chat.ids(turns, open_turn=turns[-1].role == "assistant"))

    # What is said of given tokens

    def _scores(self, body: Mapping[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        values = [
            -0.1 - 4 * unit(ids[: place + 1]) for place in range(len(ids) + 1)
        ]  # of each token after those before it
        if "scores_equal" in self.lies:
            values = [-0.7] * len(values)
        if "scores_late" in self.lies:
            values = [values[0], *values[:-1]]
        if "scores_early" in self.lies:
            values = [*values[1:], -0.9]
        if "scores_change" in self.lies:
            values = [value - next(self._never_twice) for value in values]
        best = -0.05
        if "scores_ignored" in self.lies:
            said: dict[str, Any] = {"text": ""}
        elif body.get("echo"):
            rows = [None, *values[1:]]
            tops = [None, *({"x": best} for _ in values[1:])]
            said = {"text": "", "logprobs": {"tokens": ["x"] * len(rows), "token_logprobs": rows, "top_logprobs": tops}}
        else:
            places = [
                {str(own): {"logprob": value}, "1000000": {"logprob": best}}
                for own, value in zip(ids, values, strict=False)
            ]
            said = {"text": "", "prompt_logprobs": [None, *places[1:]]}
        return {"model": self.name, "choices": [said | {"finish_reason": "length"}]}


def _error(message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "code": code, "param": param, "type": "invalid_request_error"}}


def _top(body: Mapping[str, Any]) -> int | None:
    """How many alternatives a request asks for; None for no log-probs."""
    if "messages" in body:
        return body.get("top_logprobs") if body.get("logprobs") else None
    return body.get("logprobs")


def _shape(body: Mapping[str, Any], tokens: Sequence[str], values: Sequence[float], top: int) -> dict[str, Any]:
    """Log-probs in the shape of the chat route, or of the completion route."""
    others = [(f"~{i}", -5.0 - i) for i in range(top - 1)]
    if "messages" not in body:
        tops = [{token: value, **dict(others)} for token, value in zip(tokens, values, strict=True)]
        return {"tokens": list(tokens), "token_logprobs": list(values), "top_logprobs": tops}
    content = []
    for token, value in zip(tokens, values, strict=True):
        tops = [{"token": name, "logprob": logprob} for name, logprob in [(token, value), *others]]
        content.append({"token": token, "logprob": value, "top_logprobs": tops[:top]})
    return {"content": content}
