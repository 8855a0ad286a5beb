"""The questions of a probe beside "does it answer?" and "does it go on literally?": a short function each.

Nothing is believed that was not seen. Servers take fields and ignore them, so each question is put in such a way that the
reply shows whether the field did anything. One that can't tell says so: unknown is an answer, a guess is none.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, cycle, islice
from statistics import median
from typing import NamedTuple

from omniopd.errors import TeacherError
from omniopd.types import Message, Prompt, Usage
from teachers import ladder
from teachers.asker import LONG, SHORT, Asker
from teachers.asks import Ask, Choice
from teachers.gathering import first_error
from teachers.rung import COUNTED, Unanswered, continuation
from teachers.scoring import Scores, scorer_of
from teachers.wire import Call, Malformed, RefusedRequest

DRAWS = 6
SINGLE = 3
PAIRS = 5
LUCK = 0.1  # how likely it may be at most that seeds which do nothing look as if they did
BURST = 8
TOP_K = (100, 20, 5, 1)  # tried from above: the first that is taken shows the ceiling
CACHE_WORDS = (1_500, 120)  # a prompt of that length is asked twice; the shorter one where the longer does not fit
SURE = -0.02  # nats: a likeliest token above that looks the same at any temperature
SAME = 0.02  # nats between two values that should be one
RESCORED = 0.05  # nats between two scores of one text: served models are not bit-exact
OPEN = Prompt("probe-open", (Message("user", "Say the first word that comes to your mind."),))


class Seen(NamedTuple):
    """What a question brought: yes, no, or no way to tell (None); what was seen; a number where there is one."""

    yes: bool | None
    what: str
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """A question: the name of its finding, and the calls that it takes at most."""

    name: str
    calls: int
    put: Callable[[Asker], Awaitable[Seen]]


CHECKS: list[Check] = []


def check(name: str, calls: int) -> Callable[[Callable[[Asker], Awaitable[Seen]]], Callable[[Asker], Awaitable[Seen]]]:
    """Enter a question into `CHECKS`, which are put in the order of this file."""

    def enter(put: Callable[[Asker], Awaitable[Seen]]) -> Callable[[Asker], Awaitable[Seen]]:
        CHECKS.append(Check(name, calls, put))
        return put

    return enter


# ---------------------------------------------------------------------- text


@check("half_word", calls=2)
async def half_word(asker: Asker) -> Seen:
    """Does a prefix that ends inside a word go on inside it? An audited chunk may begin anywhere."""
    rung = asker.literal
    if rung is None or rung == "instruct":
        return Seen(None, "there is no rung that goes on literally")
    text = await asker.text(asker.greedy(asker.ask(LONG)))
    word = max(re.finditer(r"\w{4,}", text), key=lambda found: (found[0].isalpha(), len(found[0])), default=None)
    if word is None:
        return Seen(None, f"its answer {text[:40]!r} has no word to cut")
    cut = (word.start() + word.end()) // 2
    ask = asker.greedy(asker.manner.render(rung, asker.prompt, text[:cut], SHORT, seed=0))
    said = continuation(await asker.text(ask), text[:cut], rung)
    return Seen(said.startswith(text[cut : word.end()]), f"after {text[:cut][-12:]!r} it wrote {said[:12]!r}")


@check("token_limit", calls=1)
async def token_limit(asker: Asker) -> Seen:
    """Is the token limit kept to the token?"""
    completion = await asker.one(replace(asker.ask(5), max_tokens=5))
    choice, written = completion.choices[0], completion.usage.completion_tokens if completion.usage else None
    what = f"{'no usage is told' if written is None else f'{written} tokens'}, ended by {choice.finish}"
    if (written or 0) > 5 or len(choice.text) > 200:
        return Seen(False, what, written)
    return Seen(True if choice.finish == "length" else None, what, written)


@check("no_thinking", calls=1)
async def no_thinking(asker: Asker) -> Seen:
    """Is there no hidden reasoning, as configured, so that a small token limit holds visible text?"""
    completion = await asker.one(asker.ask(64))
    choice, hidden = completion.choices[0], (completion.usage or Usage()).reasoning_tokens
    text, thought = ladder.split_thought(choice.text)
    what = f"{hidden} hidden tokens, visible text {text[:30]!r}{' after a thought' if thought else ''}"
    quiet = not (hidden or thought or choice.hidden_reasoning)
    return Seen(bool(text.strip()) or None if quiet else False, what, hidden)


# ---------------------------------------------------------------------- draws


@check("temperature", calls=2 * DRAWS)
async def temperature(asker: Asker) -> Seen:
    """Does temperature 0 make draws equal that differ above it? The value is the rate of duplicates above it."""
    ask = asker.ask(SHORT)
    if ask.temperature == 0:
        ask = replace(ask, temperature=1.0)
    kinds = len(set(await asker.texts(ask, range(21, 21 + DRAWS))))
    rate = 1 - kinds / DRAWS
    if ask.temperature is None:
        return Seen(None, f"none is sent; duplicate rate {rate:.0%}", rate)
    greedy = Counter(await asker.texts(asker.greedy(ask), range(31, 31 + DRAWS)))
    what = f"{len(greedy)} different of {DRAWS} at 0, {kinds} at {ask.temperature:g}; duplicate rate {rate:.0%}"
    if greedy.most_common(1)[0][1] < DRAWS - 1:  # a near tie may fall the other way once: servers are not bit-exact
        return Seen(False, what, rate)
    return Seen(True if kinds > len(greedy) else None, what, rate)


@check("seed", calls=2 * PAIRS)
async def seed(asker: Asker) -> Seen:
    """Does each of a few seeds repeat its draw, where other seeds bring other draws?"""
    if not asker.teacher.seeded:
        asked = getattr(getattr(asker.backend, "config", None), "seed", False)
        return Seen(False, "the server refuses it") if asked else Seen(None, "none is sent (teacher.seed: false)")
    ask, seeds = asker.ask(SHORT), range(11, 11 + PAIRS)
    first, again = await asker.texts(ask, seeds), await asker.texts(ask, seeds)
    repeated = sum(one == other for one, other in zip(first, again, strict=True))
    others = [one == other for one, other in combinations(first, 2)]
    chance = sum(others) / len(others)  # that two draws are one text, whatever the seed
    what = f"{repeated} of {PAIRS} seeds repeated their draw, {chance:.0%} of other pairs were alike"
    if repeated < PAIRS - 1:
        return Seen(False, what)
    return Seen(True if repeated == PAIRS and chance**PAIRS < LUCK else None, what)


@check("n", calls=1 + SINGLE)
async def several(asker: Asker) -> Seen:
    """Does one call bring several draws, and not one draw several times?"""
    ask = asker.ask(SHORT)
    if ask.temperature == 0:
        return Seen(None, "at temperature 0 all draws are the same")
    texts = [choice.text for choice in (await asker.one(ask, n=3)).choices]
    what = f"{len(texts)} of 3 choices"
    if len(texts) == 3 and len(set(texts)) == 1 and len(set(await asker.texts(ask, range(51, 51 + SINGLE)))) > 1:
        return Seen(False, f"{what}, all of one text, where single draws differ", 1)
    return Seen(len(texts) == 3, what, len(texts))


# ---------------------------------------------------------------------- log-probs


@check("gen_logprobs", calls=len(TOP_K) + 1)
async def gen_logprobs(asker: Asker) -> Seen:
    """Log-probs of what it writes: are they there, and with how many alternatives at most?"""
    refused = ""
    for top in sorted({*TOP_K, asker.teacher.manner.logprobs} - {0}, reverse=True):
        try:
            choice = (await asker.one(replace(asker.ask(SHORT), logprobs=top))).choices[0]
        except RefusedRequest as refusal:
            refused = str(refusal)
            continue
        except Unanswered as silent:
            return Seen(False, f"no reply that can be read ({silent.detail or silent.reason})")
        if wrong := implausible(choice):
            return Seen(False, wrong)
        given = max(len(token.top) for token in choice.tokens)
        return Seen(True, f"{len(choice.tokens)} tokens, at most {given} alternatives each", given)
    return Seen(False, f"refused: {refused}")


def implausible(choice: Choice) -> str:
    """What gives log-probs away that are missing or made up."""
    values = [token.logprob for token in choice.tokens]
    if not values:
        return "accepted, but the reply holds none"
    if any(value > 1e-6 for value in values):
        return "log-probs above 0"
    if len(values) > 3 and len(set(values)) == 1:
        return f"all log-probs are {values[0]:g}"
    if not choice.text.startswith(choice.tokens[0].text):
        return f"their first token, {choice.tokens[0].text!r}, does not open the reply"
    return ""


@check("logprobs_before_temperature", calls=4)
async def logprobs_scale(asker: Asker) -> Seen:
    """Do log-probs belong to the model, or to its distribution after temperature?"""
    ask = replace(asker.ask(4), logprobs=1)
    if ask.temperature is None:
        return Seen(None, "no temperature is sent")
    what = "there are none to compare"
    for asked in (ask, replace(ask, messages=OPEN.messages)):
        warm, cool = [await _likeliest(asker, replace(asked, temperature=heat)) for heat in (1.0, 0.5)]
        if warm is None or cool is None:
            return Seen(None, what)
        what = f"likeliest first token {warm:.3f} at temperature 1, {cool:.3f} at 0.5"
        if warm < SURE:
            return Seen(abs(warm - cool) < SAME, what)
    return Seen(None, f"{what}: too sure to tell")


async def _likeliest(asker: Asker, ask: Ask) -> float | None:
    try:
        tokens = (await asker.one(ask)).choices[0].tokens
    except (RefusedRequest, Unanswered):
        return None
    return max((value for _, value in tokens[0].top), default=None) if tokens else None


@check("prompt_logprobs", calls=3)
async def prompt_logprobs(asker: Asker) -> Seen:
    """Log-probs of given tokens: does each belong to its own token, and is it the same when asked again?

    Another last token must change the last value and no other: a row that is shifted by one gives itself away.
    """
    scorer, chat = scorer_of(asker.backend), getattr(asker.backend, "chat", None)
    if chat is None and (scorer or "raw" in getattr(asker.backend, "ladder", ())):
        return Seen(None, "set teacher.tokenizer to try")
    if chat is None or not asker.teacher.capabilities.score:
        return Seen(False, "this type of teacher has none")
    ask = asker.manner.render("prefill", asker.prompt, f"{COUNTED} 5", 1, seed=0)
    ids = chat.ids(ask.messages, open_turn=True)
    other = next(token for token in ids if token != ids[-1])
    try:
        first, again, changed = [await asker.scores(ask, row) for row in (ids, ids, (*ids[:-1], other))]
    except (Malformed, Unanswered) as problem:
        return Seen(False, str(getattr(problem, "detail", problem)))
    wrong = _shifted(first, again, changed)
    return Seen(not wrong, wrong or f"{len(ids) - 1} values, each of its own token")


def _shifted(first: Scores, again: Scores, changed: Scores) -> str:
    """What gives a row of scores away; `changed` scores the same tokens but for the last."""
    own, repeated, other = ([value for value in said.logprobs if value is not None] for said in (first, again, changed))
    if (apart := _apart(own, repeated)) > RESCORED:
        return f"a value differs by {apart:.2f} when asked again"
    if _apart(own[:-1], other[:-1]) > RESCORED:
        return "another last token changes values before it: they are not those of their own tokens"
    if _apart(own[-1:], other[-1:]) == 0:
        return "another last token changes no value: they are not those of their own tokens"
    return ""


def _apart(ones: Sequence[float], others: Sequence[float]) -> float:
    return max((abs(one - other) for one, other in zip(ones, others, strict=True)), default=0.0)


# ---------------------------------------------------------------------- counts and money


@check("usage", calls=0)
async def usage(asker: Asker) -> Seen:
    """Does it say what a call used?"""
    told = asker.first.usage
    if told is None:
        return Seen(False, "replies tell no usage; costs are estimates")
    return Seen(True, f"{told.prompt_tokens} in, {told.completion_tokens} out")


@check("tokenizer", calls=0)
async def tokenizer(asker: Asker) -> Seen:
    """Does the tokenizer at hand render a chat into as many tokens as the server counts?"""
    chat, told = getattr(asker.backend, "chat", None), asker.first.usage
    if chat is None or told is None:
        return Seen(None, "there is none (teacher.tokenizer)" if chat is None else "replies tell no usage")
    own = len(chat.ids(asker.ask(1).messages))
    return Seen(own == told.prompt_tokens, f"{own} tokens here, {told.prompt_tokens} by the server", own)


@check("prompt_cache", calls=2 * len(CACHE_WORDS))
async def prompt_cache(asker: Asker) -> Seen:
    """Does a second identical long prompt come from a prompt cache, and is that told? The value is the tokens served."""
    reason = ""
    for size in CACHE_WORDS:
        ask = asker.manner.render("answer", long_prompt(asker.prompt, size), "", 4, seed=0)
        try:
            cold, warm = [(await asker.one(ask)).usage or Usage() for _ in range(2)]
        except Unanswered as silent:
            reason = silent.reason
            continue
        read, unseen = warm.cache_read_tokens, cold.cache_read_tokens
        if unseen > cold.prompt_tokens / 2:
            return Seen(
                False, f"{unseen} of {cold.prompt_tokens} tokens that were never sent before are told as cached"
            )
        return Seen(
            read > unseen, f"{read} of {warm.prompt_tokens} tokens of a repeated prompt came from the cache", read
        )
    return Seen(None, f"the long prompt was not answered ({reason})")


def long_prompt(prompt: Prompt, size: int) -> Prompt:
    """So many words of a prompt, over and over, opened by one that nobody has seen before."""
    words = [str(time.time_ns()), *prompt.messages[-1].content.split()]
    text = " ".join(islice(cycle(words), size))[: 8 * size]
    return Prompt("probe-cache", (Message("user", text),))


# ---------------------------------------------------------------------- manners


@check("unknown_field_refused", calls=1)
async def unknown_field(asker: Asker) -> Seen:
    """Is an unknown field refused? Where it is ignored, so may be any other."""

    def with_field(call: Call) -> Call:
        return replace(call, body={**call.body, "omniopd_unknown_field": 1})

    try:
        outcome = await asker.altered(asker.ask(4), with_field)
    except RefusedRequest as refusal:
        return Seen(True, str(refusal))
    if outcome is None or outcome.value is None:
        return Seen(None, "not asked over HTTP" if outcome is None else f"no answer ({outcome.reason})")
    return Seen(False, "silently ignored: believe no field that is not proved here")


@check("wrong_model_refused", calls=1)
async def wrong_model(asker: Asker) -> Seen:
    """Is a wrong model name an error that would end a run before it pays for the wrong teacher?"""
    own, wrong = getattr(asker.backend, "model", None), "no-such-model-7f3a"

    def with_model(call: Call) -> Call:
        body = {name: wrong if value == own else value for name, value in call.body.items()}
        if body != call.body:
            return replace(call, body=body)
        before, named, after = call.url.rpartition(f"/{own}")
        return replace(call, url=f"{before}/{wrong}{after}") if named else call

    try:
        outcome = await asker.altered(asker.ask(4), with_model)
    except TeacherError as refusal:
        return Seen(True, str(refusal))
    if outcome is None or outcome.value is None:
        return Seen(None, "not asked over HTTP" if outcome is None else f"no answer ({outcome.reason})")
    return Seen(False, f"it answered all the same, as '{outcome.value.model}'")


@check("burst", calls=BURST)
async def burst(asker: Asker) -> Seen:
    """Are a few calls at once answered? The value is the seconds that one takes by itself."""
    alone = median(asker.seconds)

    async def answered(seed: int) -> bool:
        return (await asker.draw(asker.ask(SHORT), 1, seed)).value is not None

    began = time.monotonic()
    try:
        async with asyncio.TaskGroup() as group:
            sent = [group.create_task(answered(41 + i)) for i in range(BURST)]
    except BaseExceptionGroup as failures:
        raise first_error(failures) from None
    good = sum(task.result() for task in sent)
    return Seen(good == BURST, f"{good} of {BURST} in {time.monotonic() - began:.2f} s, one {alone:.2f} s", alone)
