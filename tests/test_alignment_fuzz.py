"""Two thousand texts for every pair of tokenizers: emoji, combining marks, scripts, white space, digits, code, halves."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest
import real_tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omniopd.alignment import Alignment, align
from omniopd.vocabulary import Spelling, Vocabulary

TEXTS = 2000
MANY = 1 << 30
PARTS = [
    *("the answer is", " 12 + 7 = 19", "Hello", " world", "naïve café", "I'll", "don't", "$3.50", "x²", "½"),
    *("\U0001f600", "\U0001f44b\U0001f3fd", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "❤\ufe0f", "🇯🇵", "\U0001f3fd"),
    *("e\u0301", "o\u0308\u0323", "n\u0303", "\u0301", "क्षि", "한국", "\u1112\u1161\u11ab", "ﬁ", "Å", "\u212b"),
    *("東京", "は大きい", "你好，世界。", "مرحبا", "שלום", "Привет", "ไทย"),
    *("\r\n", "\n", "\n\n\n", "\r", "\t", "\t\t", " ", "  ", "    ", "\u00a0", "\u2028", "\u200b", "\ufeff", "\x00", "\x0b"),
    *("1234567890123456789", "3.14159", "0x1F", "1,000,000", "007"),
    *("def f(x):\n    return x\n", "if (a && b) {\r\n\tc++;\r\n}", '<p id="a">', "\\frac{1}{2}", "#!/bin/sh", "====="),
    *("\ufffd", "\u2581", "\u2581x", "\u0120", "\u010a", "<0x41>", "<|im_end|>", "</s>", "[INST]", "<unk>", "##ing"),
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=6)), max_size=10).map("".join)


@pytest.fixture(scope="module")
def kinds() -> dict[str, Vocabulary]:
    return {
        "smollm2": Vocabulary(real_tokenizers.smollm2()),
        "mistral": Vocabulary(real_tokenizers.mistral()),
        "tekken": Vocabulary(real_tokenizers.tekken()),
        "student": Vocabulary(real_tokenizers.demo("student")),
        "teacher": Vocabulary(real_tokenizers.demo("teacher")),
    }


Chunks = list[tuple[tuple[int, ...], tuple[int, ...]]]


def by_bytes(student: Spelling, teacher: Spelling) -> Chunks:
    """The reference: a chunk goes on from byte to byte as long as either side's token does.

    Each byte has the tokens that spell it, all of a stretch where that can't be told. The chunks are the runs of bytes
    between places where both change; those that touch a broken token are left out.
    """
    mine, yours = _tokens_of_bytes(student), _tokens_of_bytes(teacher)
    chunks: Chunks = []
    size = min(len(mine), len(yours))
    start = 0
    for place in range(1, size + 1):
        goes_on = [place < len(row) and row[place] == row[place - 1] for row in (mine, yours)]
        if any(goes_on):
            continue
        own = tuple(sorted({token for tokens in mine[start:place] for token in tokens}))
        other = tuple(sorted({token for tokens in yours[start:place] for token in tokens}))
        if not (any(student.broken[t] for t in own) or any(teacher.broken[t] for t in other)):
            chunks.append((own, other))
        start = place
    return chunks


def _tokens_of_bytes(spelling: Spelling) -> list[tuple[int, ...]]:
    rows: list[tuple[int, ...]] = []
    waiting: tuple[int, ...] = ()
    for token, end in enumerate(spelling.ends):
        waiting += (token,)
        if end is not None:
            rows += [waiting] * (end - len(rows))
            waiting = ()
    return rows


def assert_tiles(spelling: Spelling, words: Vocabulary) -> None:
    """Token by token the text's own bytes, from its first to its last; only broken tokens may say something else."""
    raw, at = spelling.text.encode(), 0
    for id, end, broken in zip(spelling.ids, spelling.ends, spelling.broken, strict=True):
        if end is None:
            assert broken
            continue
        said = words.bytes_of[id]
        before_the_text = at == 0 and said == b" " + raw[:end]
        assert broken or said == raw[at:end] or before_the_text, (said, raw[at:end])
        at = end
    if spelling.ids and spelling.ends[-1] is not None:  # text that no token spells at all leaves nothing to lay
        assert at == len(raw)


def assert_aligned(student: Spelling, teacher: Spelling) -> Alignment:
    """The chunks are the reference's, and every token of the student's is in one or counted."""
    alignment = align(student.ends, teacher.ends, student_broken=student.broken, max_tokens=MANY)
    spans = [(tuple(range(c.start, c.end)), tuple(range(c.teacher_start, c.teacher_end))) for c in alignment.chunks]
    assert spans == by_bytes(student, teacher)
    assert sum(len(own) for own, _ in spans) + sum(alignment.holes.values()) == len(student.ids)
    return alignment


stable = settings(
    max_examples=TEXTS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_x1_x2_every_pair_on_whole_texts(kinds: dict[str, Vocabulary]) -> None:
    @stable
    @given(texts)
    def every_pair(text: str) -> None:
        cuts = [words.cut(text) for words in kinds.values()]
        for cut, words in zip(cuts, kinds.values(), strict=True):
            assert_tiles(cut, words)
            assert words.controls.isdisjoint(cut.ids)
        for mine, yours in combinations_with_replacement(cuts, 2):
            there, back = assert_aligned(mine, yours), assert_aligned(yours, mine)
            assert [(c.teacher_start, c.teacher_end, c.start, c.end) for c in back.chunks] == [
                (c.start, c.end, c.teacher_start, c.teacher_end) for c in there.chunks
            ]
            assert mine is not yours or there.one_to_one == 1.0 or not there.chunks

    every_pair()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_x4_every_pair_on_a_rollout_that_a_limit_cut(kinds: dict[str, Vocabulary]) -> None:
    """The student's ids end anywhere, inside a character too; the teacher cuts what is left of its text."""
    halves = 0

    @stable
    @given(texts, st.integers(1, 20))
    def every_pair(text: str, dropped: int) -> None:
        nonlocal halves
        for words in kinds.values():
            written = words.spell(words.cut(text).ids[:-dropped])
            assert_tiles(written, words)
            halves += written.ends[-1:] == (None,)
            for teacher in kinds.values():
                assert_aligned(written, teacher.cut(written.text))

    every_pair()
    assert halves > TEXTS / 10
