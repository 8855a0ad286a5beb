"""The look that settles `continuation: auto`: does an open assistant turn go on literally, or does it start over?"""

from __future__ import annotations

import logging
from typing import Literal

from omniopd.errors import TeacherError
from omniopd.types import Message, Prompt
from teachers.asks import Manner
from teachers.transport import Session
from teachers.wire import Backend, Outcome, RefusedRequest

log = logging.getLogger(__name__)

COUNT = Prompt("continuation-check", (Message("user", "Count from 1 to 10 in digits, separated by commas."),))
COUNTED, NEXT = "1, 2, 3, 4,", "5"
MAX_TOKENS = 16


async def look(session: Session, backend: Backend, manner: Manner) -> tuple[Literal["prefill", "instruct"], Outcome]:
    """One tiny live check. Anything but the next number means `instruct`, the rung that every chat model has.

    A model too small to count is so put on `instruct`: name `continuation: prefill` for one's own server.

    Raises:
        TeacherError: the teacher can't be reached or does not answer.
    """
    ask = manner.render("prefill", COUNT, COUNTED, MAX_TOKENS, seed=0)
    try:
        outcome = await session.call(backend.body(ask, 1, ask.seed))
    except RefusedRequest as refusal:
        log.info("continuation: instruct (the open assistant turn was refused: %s)", refusal)
        return "instruct", Outcome(attempts=1, reason="refused")
    if outcome.completion is None:
        raise TeacherError(
            f"teacher at {backend.url} did not answer the continuation check ({outcome.detail}); "
            "check the server, or name the rung in teacher.continuation"
        )
    said = outcome.completion.choices[0].text
    rung: Literal["prefill", "instruct"] = "prefill" if said.lstrip().startswith(NEXT) else "instruct"
    log.info("continuation: %s (after '%s' the teacher wrote %r)", rung, COUNTED, said[:40])
    return rung, outcome
