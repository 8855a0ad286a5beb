"""What does a live teacher really do? A few dozen small calls, each answer a finding: confirmed, refuted or unknown.

probe ── checks: one question each ── Asker (books every call) ──▶ Session
  └────▶ findings.Record, kept in the store: `continuation: auto` takes its rung from it, and a run refuses the
         settings of its config that `findings.disproved` names
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

from omniopd.errors import TeacherError
from omniopd.types import Prompt, Usage
from teachers.asker import LONG, Asker
from teachers.asks import Ask
from teachers.checks import CACHE_WORDS, CHECKS, Check, Seen, long_prompt
from teachers.client import ApiTeacher
from teachers.findings import Finding, Record, Verdict
from teachers.ladder import ECHO_TOKENS, Rung
from teachers.rung import COUNT, COUNTED, LOOK_CALLS, Unanswered, look
from teachers.wire import RefusedRequest

FRAME = 16  # tokens that a chat template puts around a message
_VERDICTS: dict[bool | None, Verdict] = {True: "confirmed", False: "refuted", None: "unknown"}


async def probe(teacher: ApiTeacher, prompt: Prompt, progress: Callable[[int], None] | None = None) -> Record:
    """Probe a live teacher with a prompt of the run's own; keeps the record in the teacher's store.

    Args:
        progress: hears how many of `questions(teacher)` are answered.

    Raises:
        TeacherError: it can't be reached, or refuses the key, the model or the settings.
        BudgetSpent: there is no money left for it.
    """
    before, findings = teacher.probed, list[Finding]()
    async with teacher.backend.session() as session:
        asker = Asker(teacher, session, prompt)
        for done, question in enumerate(questions(teacher), start=1):
            findings.append(await _find(asker, question))
            if progress is not None:
                progress(done)
    record = Record(
        fingerprint=teacher.fingerprint,
        at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        model=asker.first.model,
        rung=_best(teacher.backend.rungs, findings),
        findings=tuple(findings),
        usage=teacher.probed - before,
    )
    teacher.keep_probe(record.to_json())
    return record


def questions(teacher: ApiTeacher) -> list[Check]:
    """All questions to this teacher, in order."""

    def going_on(rung: Rung) -> Check:
        return Check(f"continuation.{rung}", LOOK_CALLS, lambda asker: _goes_on(asker, rung))

    return [Check("answer", 1, _answers), *map(going_on, teacher.backend.rungs), *CHECKS]


def at_most(teacher: ApiTeacher, prompt: Prompt, size: Callable[[str], int]) -> Usage:
    """The most that a probe of this teacher uses, if its server keeps token limits; `size` estimates a text's tokens."""
    manner, calls = teacher.manner, sum(question.calls for question in questions(teacher))

    def read(ask: Ask) -> int:
        return sum(size(message.content) + FRAME for message in ask.messages)

    begun = ((prompt, "word " * LONG), (COUNT, COUNTED))  # a half answer is shorter
    longest = max(read(manner.render(rung, *one, LONG, 0)) for rung in teacher.backend.rungs for one in begun)
    cached = 2 * sum(read(manner.render("answer", long_prompt(prompt, words), "", 4, 0)) for words in CACHE_WORDS)
    return Usage(
        calls=calls,
        prompt_tokens=calls * longest + cached,
        completion_tokens=calls * (LONG + ECHO_TOKENS + manner.thinking_tokens),
    )


async def _find(asker: Asker, question: Check) -> Finding:
    try:
        seen = await question.put(asker)
    except RefusedRequest as refusal:
        seen = Seen(False, f"refused: {refusal}")
    except Unanswered as silent:
        if silent.reason == "error":  # the server is gone, and would be for the next question
            raise
        seen = Seen(None, f"no answer ({silent.reason})")
    what = "".join(letter if letter.isprintable() else " " for letter in seen.what)  # it may hold a server's words
    return Finding(question.name, _VERDICTS[seen.yes], " ".join(what.split()), seen.value)


async def _answers(asker: Asker) -> Seen:
    """Reachable, key accepted, model there. A teacher that refuses the plain question can't be used as configured."""
    try:
        asker.first = await asker.one(asker.ask(LONG))
    except RefusedRequest as refusal:
        raise TeacherError(str(refusal)) from None
    text, model = asker.first.choices[0].text, asker.first.model
    return Seen(bool(text.strip()), f"answers{f' as {model!r}' if model else ''}: {text[:60]!r}")


async def _goes_on(asker: Asker, rung: Rung) -> Seen:
    """Does this rung go on literally?"""
    seen = await look(asker.draw, asker.manner, rung, asker.prompt)
    if seen.literal and asker.literal is None:
        asker.literal = rung
    return Seen(seen.literal, seen.why)


def _best(rungs: tuple[Rung, ...], findings: list[Finding]) -> Rung:
    """The best rung that was proved; the last needs no proof."""
    proved = {finding.name for finding in findings if finding.verdict == "confirmed"}
    return next((rung for rung in rungs if f"continuation.{rung}" in proved), rungs[-1])
