"""Texts to learn from, with their counts."""

from __future__ import annotations

from omniopd.signals.continuation_likelihood import ContinuationLikelihood
from omniopd.types import Chunk, Reply
from omniopd.verification.audit import Audit, ChunkSignal, Verdict
from omniopd.verification.text import BROKEN

CHUNK = Chunk(0, 0, 2, "", "ab", (1, 2))


def read(*replies: Reply) -> ChunkSignal:
    audit = Audit(CHUNK, (-1.0, -1.0), Verdict((), (len(replies), 0, 0), (len(replies), 0), replies))
    (signal,) = ContinuationLikelihood(ContinuationLikelihood.Config()).read([audit])
    return signal


def test_duplicates_are_merged_with_their_counts() -> None:
    signal = read(Reply("x", "stop"), Reply("y", "stop"), Reply("x", "stop"), Reply("x", "length"))
    assert signal.targets == ((Reply("x", "stop"), 2.0), (Reply("y", "stop"), 1.0), (Reply("x", "length"), 1.0))
    assert sum(weight for _, weight in signal.targets) == 4


def test_the_students_tokens_are_audited_and_carry_no_value() -> None:
    signal = read(Reply("x", "stop"))
    assert (signal.values, signal.mask) == ((0.0, 0.0), (True, True))


def test_empty_texts_are_dropped_and_half_characters_too() -> None:
    signal = read(Reply("", "stop"), Reply(BROKEN, "length"), Reply("x" + BROKEN, "length"))
    assert signal.targets == ((Reply("x", "length"), 1.0),)


def test_r10_nothing_to_learn_from_is_a_hole() -> None:
    for signal in (read(), read(Reply("", "length"))):
        assert (signal.mask, signal.targets) == ((False, False), ())
