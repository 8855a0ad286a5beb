"""Log-probs of given tokens, where a server has them: how they are asked for and read.

Servers differ in shape, and some go wrong without an error: the slot of the first token, which nothing precedes, is
dropped and shifts the row by one; the given token is not the first entry of its place; the field is ignored. Every reader
ends in `checked`, which refuses what can't be true. A missing value is an error, never a zero; a token that the model
rules out has the log-prob -inf, which is a value.

Every request is for temperature 1, whatever `teacher.temperature` says: that one is for text that the teacher writes, and
no division makes log-probs of one temperature into those of another (traps R6, R7).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from omniopd.chat import ChatTemplate
from omniopd.types import Distributions, Usage
from teachers.formats import read_usage, word
from teachers.wire import Call, Malformed, Outcome

if TYPE_CHECKING:
    from teachers.openai import OpenAIConfig

ECHO_TOP = 5  # what completion routes give at most
ROUNDING = 1e-2  # nats above 0 that low precision may make of a certain token
RULED_OUT = -9999.0  # what vLLM writes for -inf, which JSON does not have


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model says of T given tokens, in nats at temperature 1.

    `logprobs` [T]: of each token after those before it; None for a first one, which nothing precedes. `top` [T]: the k
    likeliest ids at each place with their log-probs, the given one only where it is among them. `distributions` [T] where
    they were asked for. `usage` is that of the call, `model` and `request_id` what the server calls them.
    """

    logprobs: tuple[float | None, ...]
    top: tuple[Mapping[int, float], ...]
    distributions: Distributions | None = None
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    request_id: str = ""

    def since(self, start: int) -> Scores:
        """The same of the tokens from `start` on."""
        return replace(self, logprobs=self.logprobs[start:], top=self.top[start:])


@runtime_checkable
class Scoring(Protocol):
    """A session that may have given tokens scored."""

    async def score(self, ids: Sequence[int], start: int, top: int, whole: bool) -> Outcome[Scores]:
        """What the teacher's model gives each of `ids[start:]` after all ids before it, and the `top` likeliest there.

        Args:
            whole: the whole distributions too; only weights in this process have them.

        Raises:
            TeacherError: this teacher scores nothing, or can't be used at all.
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    """Something that can have given tokens scored."""

    def score_call(self, ids: Sequence[int], k: int) -> Call:
        """The request for the log-probs of these ids, and of the k likeliest at each place."""
        ...

    def read_scores(self, payload: Any, ids: Sequence[int], k: int) -> Scores:
        """Read its reply.

        Raises:
            Malformed: it holds no scores, or not those of these ids.
        """
        ...


def scorer_of(backend: object) -> Scorer | None:
    """What scores given tokens with this back end; None where nothing does."""
    return backend if isinstance(backend, Scorer) else getattr(backend, "scorer", None)


def checked(ids: Sequence[int], logprobs: Sequence[Any], top: Sequence[Mapping[int, float]], k: int) -> Scores:
    """Scores from what a server said of each place, the first included; what it says of that one means nothing.

    -inf is a value of a given token, and leaves an alternative out.

    Raises:
        Malformed: another number of places than of ids, a place without a value, or values that no model gives.
    """
    for what, places in (("log-probs", logprobs), ("alternatives", top)):
        if len(places) != len(ids):
            raise Malformed(f"{what} of {len(places)} tokens for the {len(ids)} that were sent")
    for place, value in enumerate(logprobs[1:], start=1):
        if not isinstance(value, int | float) or math.isnan(value):
            raise Malformed(f"no log-prob for token {place} of {len(ids)}")
        if value > ROUNDING:
            raise Malformed(f"log-prob {value:g} for token {place} of {len(ids)}")
    values = [float(value) for value in logprobs[1:]]
    if len(values) > 1 and len(set(values)) == 1:
        raise Malformed(f"the same log-prob, {values[0]:g}, for every token")
    return Scores((None, *values), ({}, *(likeliest(place, k) for place in top[1:])))


def likeliest(place: Mapping[int, float], k: int) -> dict[int, float]:
    """The k likeliest of a place's ids, best first, without those that the model rules out.

    Servers give k entries, or k + 1 where the given token is none of the likeliest (trap R13).
    """
    best = sorted(place.items(), key=lambda entry: -entry[1])[:k]
    return {token: value for token, value in best if value > -math.inf}


@contextmanager
def reading() -> Iterator[None]:
    """Turns the ways in which a reply of another shape fails to be read into `Malformed`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise Malformed(f"scores in another shape ({type(error).__name__}: {error})") from None


def told(scores: Scores, payload: Any, ids: Sequence[int]) -> Scores:
    """Scores with what a reply in OpenAI's shape tells beside them; where it tells no usage, what was sent is known."""
    usage = read_usage(payload.get("usage")) or Usage(prompt_tokens=len(ids), completion_tokens=1)
    return replace(scores, usage=usage, model=word(payload, "model"), request_id=word(payload, "id"))


class EchoScorer:
    """Scores by a completion route in OpenAI's shape that says the prompt back with its log-probs (`echo`).

    Together takes text only and answers beside the choices; others take ids and answer in the choice. Alternatives are
    named by their text: one that is no single token of `teacher.tokenizer` is left out of `top`.
    """

    def __init__(self, config: OpenAIConfig, chat: ChatTemplate) -> None:
        self._config, self._chat = config, chat

    def score_call(self, ids: Sequence[int], k: int) -> Call:
        """See `Scorer`."""
        config, prompt = self._config, list(ids)
        text = self._chat.unopened(str(self._chat.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)))
        body = {
            "model": config.model,
            "prompt": text if config.preset == "together" else prompt,
            "max_tokens": 1,  # some refuse 0
            "temperature": 1.0,
            "top_p": 1.0,
            "echo": True,
            "logprobs": k,
        }
        return Call(f"{config.base_url}/completions", body | config.extra_body, len(ids) + 1)

    def read_scores(self, payload: Any, ids: Sequence[int], k: int) -> Scores:
        """See `Scorer`."""
        with reading():
            beside = payload.get("prompt")
            said = (beside[0] if beside else payload["choices"][0]).get("logprobs")
            values = said.get("token_logprobs") if said else None
            if not values or len(values) < len(ids) - 1:
                raise Malformed("no log-probs of the prompt: the endpoint ignores echo or logprobs")
            # With a token of its own behind the prompt, a row that lost its first slot has the right length.
            spare = len(values) - len(ids)
            if spare != (0 if beside else 1) and (spare or values[0] is not None):
                raise Malformed(f"log-probs of {len(values)} tokens for the {len(ids)} that were sent and one more")
            if [int(one) for one in (said.get("token_ids") or ids)[: len(ids)]] != list(ids):
                raise Malformed("scores of other tokens than those that were sent")
            places = said.get("top_logprobs")
            named = places[: len(ids)] if isinstance(places, list) else [None] * len(ids)
            scores = checked(ids, values[: len(ids)], [self._by_id(place or {}) for place in named], k)
        return told(scores, payload, ids)

    def _by_id(self, place: Mapping[str, float]) -> dict[int, float]:
        found = ((self._chat.tokenizer.encode(text, add_special_tokens=False), value) for text, value in place.items())
        return {ids[0]: float(value) for ids, value in found if len(ids) == 1}
