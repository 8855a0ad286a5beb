"""What the calls of one teacher may cost, and what they did cost, as the ledger keeps it."""

from __future__ import annotations

import time
from typing import Any

from omniopd.ledger import Ledger, Price
from omniopd.store import Booking
from omniopd.types import Usage
from teachers.asks import Ask, ScoreAsk, size
from teachers.wire import Completion, Outcome

BYTES_PER_TOKEN = 2  # of a prompt, before any reply has told: nearly every tokenizer needs more bytes for a token


class Meter:
    """Tokens and money of one teacher. How many tokens a prompt's bytes are, the replies so far tell.

    `price` is None where no price is known: then nothing is counted but tokens.
    """

    def __init__(self, ledger: Ledger, teacher: str, model: str, own: Price | None) -> None:
        """`teacher` is its fingerprint, `own` the price in its settings.

        Raises:
            ConfigError: there is a budget but no price.
        """
        self._run, self._teacher = ledger.run, teacher
        self.price, self._price_from = ledger.price(model, own)
        self._bytes_per_token = float(BYTES_PER_TOKEN)
        self._hidden_tokens = 0  # more tokens than bytes: text that the server adds to every prompt

    def most(self, ask: Ask | ScoreAsk, draws: int, prompts: int = 1) -> float:
        """USD that this many draws can cost at most, if the prompt is read so many times for them."""
        if self.price is None:
            return 0.0
        tokens = _bytes(ask) / self._bytes_per_token + self._hidden_tokens
        prompt = int(1.1 * tokens) + 64  # the template's own tokens
        return self.price.most(prompt * prompts, ask.max_tokens * draws)

    def booking(self, ask: Ask | ScoreAsk, outcome: Outcome[Any], draws: int) -> Booking:
        """A call as the ledger keeps it; a reply that tells no usage is booked as an estimate.

        `outcome.value` is a `Completion`, `Scores`, or None for a call that was dropped.
        """
        completion, sent = outcome.value, _bytes(ask)
        usage = completion.usage if completion else Usage()
        estimated = usage is None
        if usage is None:
            texts = [choice.text for choice in completion.choices] if isinstance(completion, Completion) else []
            usage = Usage(prompt_tokens=sent // 3 + 1, completion_tokens=size(texts) // 3 + 1)
        elif usage.prompt_tokens:
            self._bytes_per_token = min(self._bytes_per_token, max(1.0, sent / usage.prompt_tokens))
            self._hidden_tokens = max(self._hidden_tokens, usage.prompt_tokens - sent)
        return Booking(
            run=self._run,
            teacher=self._teacher,
            purpose=ask.purpose,
            model=completion.model if completion else "",
            draws=draws,
            attempts=outcome.attempts,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cache_read_tokens=usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            cost_usd=self.price.cost(usage) if self.price else 0.0,
            price=self._price_from,
            time=round(time.time(), 3),
            request_id=completion.request_id if completion else "",
            reason=None if completion else outcome.reason,
            estimated=estimated,
        )


def usage_of(booking: Booking) -> Usage:
    """What a booked call used."""
    return Usage(
        calls=booking.attempts,
        prompt_tokens=booking.prompt_tokens,
        completion_tokens=booking.completion_tokens,
        cost_usd=booking.cost_usd,
        cache_read_tokens=booking.cache_read_tokens,
        cache_write_tokens=booking.cache_write_tokens,
        reasoning_tokens=booking.reasoning_tokens,
    )


def _bytes(ask: Ask | ScoreAsk) -> int:
    return size(message.content for message in ask.messages)
