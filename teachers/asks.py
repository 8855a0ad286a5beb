"""A query as it is sent: rendered messages, sampling, and the key of each of its draws. Shared by live and replay."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Literal, overload

from omniopd.store import NEVER_STORED, Draw
from omniopd.types import (
    AnswerQuery,
    Answers,
    Continuations,
    ContinueQuery,
    Message,
    Prompt,
    Query,
    Reply,
    ScoreQuery,
    Token,
    Usage,
)
from teachers import ladder
from teachers.ladder import Rung

KEY_VERSION = 2
SCORE, SCORE_VERSION = "score", 1  # the rung of kept scores, and the version of their keys


def digest(parts: Any) -> str:
    """SHA-256 over canonical JSON (sorted keys, no spaces, ASCII): the same parts give the same key anywhere."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def size(texts: Iterable[str]) -> int:
    """Bytes of some texts: what tokens are estimated from where no tokenizer is at hand."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


@dataclass(frozen=True, slots=True)
class Ask:
    """One rendered request, to be drawn n times. `seed + i` is the seed of draw i."""

    teacher: str
    rung: Rung
    messages: tuple[Message, ...]
    prefix: str
    max_tokens: int
    temperature: float | None
    top_p: float | None
    seed: int
    logprobs: int = 0
    template: str = ""

    @property
    def purpose(self) -> str:
        """What the ledger calls it."""
        return "answer" if self.rung == "answer" else "continue"

    def keys(self, n: int) -> list[str]:
        """The keys of draws 0 to n-1: everything that can change an answer, and the repeat index."""
        request = {
            "version": KEY_VERSION,
            "teacher": self.teacher,
            "rung": self.rung,
            "template": {"instruct": ladder.TEMPLATE_VERSION, "raw": self.template}.get(self.rung),
            "messages": [[message.role, message.content] for message in self.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "logprobs": self.logprobs,
        }
        return [digest({**request, "repeat": index}) for index in range(n)]


@dataclass(frozen=True, slots=True)
class ScoreAsk:
    """A response to be scored. `messages` end with it, as the teacher's own turn.

    `ids` are its tokens where they are of the teacher's vocabulary, and `after` those that stand before them and are only
    read; None: the teacher's tokenizer cuts its text, and the end of the turn is scored where it `closes`. Temperature is
    always 1, so none is named. `max_tokens` is what a server may write behind what it scores.
    """

    teacher: str
    messages: tuple[Message, ...]
    ids: tuple[int, ...] | None
    closes: bool
    top: int
    whole: bool
    after: tuple[int, ...] = ()
    max_tokens: ClassVar[int] = 1
    purpose: ClassVar[str] = SCORE

    @property
    def text(self) -> str:
        """The response."""
        return self.messages[-1].content

    def keys(self, n: int = 1) -> list[str]:
        """The key of its scores: everything that can change them. There is one row of scores, whatever n is."""
        request = {
            "version": SCORE_VERSION,
            "rung": SCORE,
            "teacher": self.teacher,
            "messages": [[message.role, message.content] for message in self.messages],
            "ids": self.ids,
            "closes": self.closes,
            "top": self.top,
            "whole": self.whole,
            **({"after": self.after} if self.after else {}),
        }
        return [digest(request)]


@dataclass(frozen=True, slots=True)
class Manner:
    """How a teacher is asked: all that decides an answer beside the query and the weights behind `fingerprint`.

    `vocabulary` is the digest of the teacher's, "" where its tokenizer is not at hand.
    """

    fingerprint: str
    rung: Literal["raw", "prefill", "instruct"]
    system: str | None
    temperature: float | None
    top_p: float | None
    logprobs: int = 0
    thinking_tokens: int = 0  # room for hidden thought, added to every limit
    template: str = ""
    vocabulary: str = ""

    @overload
    def ask(self, query: ContinueQuery | AnswerQuery) -> Ask: ...
    @overload
    def ask(self, query: ScoreQuery) -> ScoreAsk: ...
    @overload
    def ask(self, query: Query) -> Ask | ScoreAsk: ...
    def ask(self, query: Query) -> Ask | ScoreAsk:
        """Render a query. The text of the audited chunk is not looked at."""
        if isinstance(query, ScoreQuery):
            return ScoreAsk(
                teacher=self.fingerprint,
                messages=(*self._with_system(query.prompt.messages), Message("assistant", query.text)),
                ids=query.ids if query.vocabulary == self.vocabulary else None,
                closes=query.closes,
                top=query.top,
                whole=query.whole,
                after=query.after,
            )
        if isinstance(query, AnswerQuery):
            return self.render("answer", query.prompt, "", query.max_tokens, query.seed)
        prefix = query.chunk.prefix
        return self.render(self.rung if prefix else "plain", query.prompt, prefix, query.max_tokens, query.seed)

    def render(self, rung: Rung, prompt: Prompt, prefix: str, max_tokens: int, seed: int) -> Ask:
        """Render on a rung of one's own choice; `instruct` adds to the token limit what the echo costs."""
        if rung in ("raw", "prefill"):
            messages = ladder.render_prefill(prompt, prefix)
        elif rung == "instruct":
            messages = ladder.render_instruct(prompt, prefix)
            max_tokens += ladder.ECHO_TOKENS
        else:
            messages = ladder.render_answer(prompt)
        return Ask(
            teacher=self.fingerprint,
            rung=rung,
            messages=self._with_system(messages),
            prefix=prefix,
            max_tokens=max_tokens + self.thinking_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
            logprobs=self.logprobs,
            template=self.template,
        )

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if not self.system:
            return messages
        if messages and messages[0].role == "system":  # several APIs refuse a second system message
            return (Message("system", f"{self.system}\n\n{messages[0].content}"), *messages[1:])
        return (Message("system", self.system), *messages)


@dataclass(frozen=True, slots=True)
class Choice:
    """One text of a completion as a back end read it, before the ladder's rules.

    `finish` beside "stop" and "length": `filtered`, `refusal`, or `error` (ended by accident or for no stated reason).
    `tokens` are those of `text`, where log-probs were asked for and given.
    """

    text: str
    finish: Literal["stop", "length", "filtered", "refusal", "error"]
    hidden_reasoning: bool = False
    tokens: tuple[Token, ...] = ()


def tokens_of(choice: Choice, kept: str) -> list[Any]:
    """The tokens of the part of a reply that is kept, as the store holds them.

    Servers differ in what stands behind the text (an end token, an empty one): nothing of it is kept. Where the part begins
    inside a token (an echo that was cut off), or the first token does not open it, there are none.
    """
    skipped, tokens = len(choice.text) - len(kept), list(choice.tokens)
    while tokens and skipped > 0:
        skipped -= len(tokens.pop(0).text)
    if skipped or not tokens or not choice.text.endswith(kept) or not kept.startswith(tokens[0].text):
        return []
    ends = accumulate(len(token.text) for token in tokens)
    inside = [token for token, end in zip(tokens, ends, strict=True) if end - len(token.text) < len(kept)]
    return [[token.text, token.logprob, token.top] for token in inside]


def judge(choice: Choice, ask: Ask, model: str, prompt_tokens: int, completion_tokens: int) -> Draw:
    """A choice as a draw: its continuation with white space as sent, or the raw text with the rule that it broke."""
    text, hidden = choice.text, choice.hidden_reasoning
    finish: Literal["stop", "length"] = "length" if choice.finish == "length" else "stop"
    if choice.finish in NEVER_STORED:
        rejected: str | None = choice.finish
    else:
        if ask.rung == "instruct":
            text, thought = ladder.split_thought(text)
            hidden = hidden or thought
        rejected = ladder.validate(text, ask.prefix, ask.rung, hidden, finish)
        if rejected is None and ask.rung == "instruct":
            text = ladder.strip_echo(text, ask.prefix) or ""
    return Draw(
        text=text if rejected is None else choice.text,
        finish=finish,
        rung=ask.rung,
        model=model,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        time=round(time.time(), 3),
        rejected=rejected,
        tokens=tokens_of(choice, text) if rejected is None else [],
    )


def evidence(
    query: ContinueQuery | AnswerQuery, outcomes: Mapping[int, Draw | str], usage: Usage
) -> Continuations | Answers:
    """The evidence of a query from one outcome per draw: a draw, or the reason why there is none."""
    replies: list[Reply] = []
    rejected: Counter[str] = Counter()
    for index in range(query.n):
        outcome = outcomes[index]
        if isinstance(outcome, str):
            rejected[outcome] += 1
        elif outcome.rejected is not None:
            rejected[outcome.rejected] += 1
        else:
            tokens = tuple(Token(text, p, tuple((t, q) for t, q in top)) for text, p, top in outcome.tokens)
            replies.append(Reply(outcome.text, outcome.finish, tokens))
    if isinstance(query, ContinueQuery):
        return Continuations(query, tuple(replies), dict(rejected), usage)
    return Answers(query, tuple(replies), dict(rejected), usage)


def describe(query: Query) -> str:
    """A query in a few words, for messages."""
    if isinstance(query, ContinueQuery):
        return f"prompt '{query.prompt.id}', rollout {query.chunk.row}, chunk at token {query.chunk.start}"
    place = "scores of the response" if isinstance(query, ScoreQuery) else "whole answer"
    return f"prompt '{query.prompt.id}', rollout {query.row}, {place}"


def order(query: Query) -> tuple[int, int]:
    """Sort key: the rollout, then the place in it; what is about a whole response comes before any chunk."""
    return (query.chunk.row, query.chunk.start) if isinstance(query, ContinueQuery) else (query.row, -1)


def settings_of(manner: Manner) -> dict[str, Any]:
    """What a replay needs to rebuild the keys."""
    return {
        "rung": manner.rung,
        "system": manner.system,
        "temperature": manner.temperature,
        "top_p": manner.top_p,
        "logprobs": manner.logprobs,
        "thinking_tokens": manner.thinking_tokens,
        "template": ladder.TEMPLATE_VERSION,
        "chat_template": manner.template,
        "vocabulary": manner.vocabulary,
    }
