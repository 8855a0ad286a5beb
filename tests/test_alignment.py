"""Chunks of two tokenizers over one text, against a reference that asks of every byte who spells it."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from itertools import accumulate, combinations_with_replacement, pairwise

import pytest
import real_tokenizers
import tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from omniopd.alignment import AlignedChunk, Alignment, align, align_scores
from omniopd.types import Rollout, ScoreQuery, TokenScores
from omniopd.vocabulary import Spelling, Vocabulary

MANY = 1 << 30  # tokens: no chunk is too long


def chunks(alignment: Alignment) -> list[tuple[int, int, int, int]]:
    return [dataclasses.astuple(chunk) for chunk in alignment.chunks]


def accounted(alignment: Alignment) -> bool:
    """Whether each of the student's tokens is in one chunk, or in one count."""
    spans = [(chunk.start, chunk.end) for chunk in alignment.chunks]
    inside = sum(end - start for start, end in spans)
    return spans == sorted(spans) and inside + sum(alignment.holes.values()) == alignment.tokens


def mirrored(alignment: Alignment) -> list[tuple[int, int, int, int]]:
    return [(t, u, s, e) for s, e, t, u in chunks(alignment)]


# Two partitions


def partition(draw: random.Random, size: int) -> list[int]:
    inner = draw.sample(range(1, size), draw.randrange(size)) if size > 1 else []
    return sorted({*inner, size} - {0})


def test_chunks_end_where_both_sides_have_an_end() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        size = draw.randrange(1, 40)
        a, b = partition(draw, size), partition(draw, size)
        alignment = align(a, b, max_tokens=MANY)
        assert [a[chunk.end - 1] for chunk in alignment.chunks] == sorted(set(a) & set(b))
        assert [b[chunk.teacher_end - 1] for chunk in alignment.chunks] == sorted(set(a) & set(b))
        assert chunks(alignment)[0][::2] == (0, 0) and chunks(alignment)[-1][1::2] == (len(a), len(b))
        assert all(left[1::2] == right[::2] for left, right in pairwise(chunks(alignment)))
        assert chunks(align(b, a, max_tokens=MANY)) == mirrored(alignment)
        assert alignment.coverage == 1.0


def test_share_of_tokens_and_of_single_pairs() -> None:
    alignment = align([1, 2, 4, 5], [1, 3, 4, 5])
    assert chunks(alignment) == [(0, 1, 0, 1), (1, 3, 1, 3), (3, 4, 3, 4)]
    assert alignment.coverage == 1.0 and alignment.one_to_one == 2 / 3
    nothing = align([], [])
    assert (nothing.coverage, nothing.one_to_one, nothing.tokens, nothing.holes) == (0.0, 0.0, 0, {})


def test_x1_a_chunk_with_too_many_tokens_costs_only_itself() -> None:
    student = [1, *range(2, 9), 9]
    alignment = align(student, [1, 8, 9], max_tokens=6)
    assert chunks(alignment) == [(0, 1, 0, 1), (8, 9, 2, 3)]
    assert alignment.holes == {"too_long": 7} and accounted(alignment)
    assert align([1, 8, 9], student, max_tokens=6).holes == {"too_long": 1}
    assert align(student, [1, 8, 9], max_tokens=7).holes == {}


@pytest.mark.parametrize(
    ("student", "broken", "teacher", "kept", "holes"),
    [
        ([2, None, 5, 6], (0, 1, 1, 0), [2, 5, 6], [(0, 1, 0, 1), (3, 4, 2, 3)], {"broken": 2}),
        ([2, None, 5, 6], (0, 1, 1, 0), [1, 2, 4, 6], [(0, 1, 0, 2)], {"broken": 3}),
        ([2, 5, 6], (0, 1, 0), [2, 5, 6], [(0, 1, 0, 1), (2, 3, 2, 3)], {"broken": 1}),
        ([2, 5, 6], (), [2, None, 5, 6], [(0, 1, 0, 1), (2, 3, 3, 4)], {"broken": 1}),
        ([2, None, None], (0, 1, 1), [2], [(0, 1, 0, 1)], {"broken": 2}),
        ([2, 5, 7], (), [2, None, None], [(0, 1, 0, 1)], {"broken": 2}),
        ([2, None, 5], (0, 1, 1), [2], [(0, 1, 0, 1)], {"broken": 2}),
    ],
)
def test_a_broken_stretch_costs_only_its_own_chunk(
    student: list[int | None],
    broken: tuple[int, ...],
    teacher: list[int | None],
    kept: list[tuple[int, int, int, int]],
    holes: dict[str, int],
) -> None:
    alignment = align(student, teacher, student_broken=[bool(b) for b in broken])
    assert chunks(alignment) == kept and alignment.holes == holes and accounted(alignment)


@pytest.mark.parametrize(
    ("student", "teacher", "kept", "holes"),
    [
        ([0, 1, 2], [1, 2], [(1, 2, 0, 1), (2, 3, 1, 2)], {"control": 1}),  # before the text
        ([1, 2], [0, 1, 2], [(0, 1, 1, 2), (1, 2, 2, 3)], {}),
        ([1, 1, 2], [1, 2], [(0, 1, 0, 1), (2, 3, 1, 2)], {"control": 1}),  # between two chunks
        ([1, 2, 2], [1, 2, 2], [(0, 1, 0, 1), (1, 2, 1, 2)], {"control": 1}),  # behind the text
        ([1, 1, 2, 3], [2, 3], [(3, 4, 1, 2)], {"control": 3}),  # in the midst of a chunk
        ([2, 3], [1, 1, 2, 3], [(1, 2, 3, 4)], {"control": 1}),
    ],
)
def test_tokens_of_no_width_belong_to_no_chunk(
    student: list[int], teacher: list[int], kept: list[tuple[int, int, int, int]], holes: dict[str, int]
) -> None:
    alignment = align(student, teacher)
    assert chunks(alignment) == kept and alignment.holes == holes and accounted(alignment)


def test_a_row_that_ends_early_costs_only_the_rest() -> None:
    alignment = align([1, 2, 4, 5, 6], [2, 3])
    assert chunks(alignment) == [(0, 2, 0, 1)] and alignment.holes == {"unmatched": 3}


# The sheet's table of texts, each pair of kinds

TEXTS = {
    "empty": ("", 0),
    "leading spaces": ("  x", 3),
    "digits": ("1234567", 7),
    "cjk": ("東京", 6),
    "skin tone": ("\U0001f44b\U0001f3fd", 8),
    "joined emoji": ("\U0001f468\u200d\U0001f469\u200d\U0001f467", 18),
    "composed": ("caf\u00e9", 5),
    "combining": ("cafe\u0301", 6),
    "arabic": ("\u0645\u0631\u062d\u0628\u0627", 10),
    "crlf": ("a\r\nb", 4),
    "tabs": ("\t\tx", 3),
    "newlines": ("\n\n\n", 3),
    "no-break space": ("a\u00a0b", 4),
    "replacement character": ("a\ufffdb", 5),
    "byte name": ("<0x41>", 6),
    "sentencepiece mark": ("\u2581x", 4),
    "byte-level mark": ("\u0120x", 3),
    "control as text": ("<|im_end|>", 10),
    "indented code": ("def f(x):\n    if x:\n\t\treturn  x\n", 32),
}
KINDS = {
    "byte-level": tiny.byte_level,
    "pieces": tiny.pieces,
    "pieces with a space": lambda: tiny.pieces(True),
    "smollm2": real_tokenizers.smollm2,
    "mistral": real_tokenizers.mistral,
    "tekken": real_tokenizers.tekken,
}
_BUILT: dict[str, Vocabulary] = {}


def vocabulary(kind: str) -> Vocabulary:
    if kind not in _BUILT:
        _BUILT[kind] = Vocabulary(KINDS[kind]())
    return _BUILT[kind]


def byte_owners(spelling: Spelling) -> list[int | None]:
    """Which token spells each byte of the text; None where that can't be said. Broken tokens own nothing."""
    owners: list[int | None] = [None] * len(spelling.text.encode())
    last = 0
    for i, (end, broken) in enumerate(zip(spelling.ends, spelling.broken, strict=True)):
        if end is not None:
            owners[last:end] = [None if broken else i] * (end - last)
            last = end
    return owners


def assert_tiles(spelling: Spelling, words: Vocabulary) -> None:
    """Sound tokens say what the text says, right where they say it, and with broken stretches they cover all of it."""
    raw, last = spelling.text.encode(), 0
    for i, (id, end, broken) in enumerate(zip(spelling.ids, spelling.ends, spelling.broken, strict=True)):
        if end is None:
            assert broken
            continue
        said = (
            words.bytes_of[id].removeprefix(b" ") if last == 0 and end < len(words.bytes_of[id]) else words.bytes_of[id]
        )
        assert broken or said == raw[last:end], (i, said, raw[last:end])
        last = end
    assert last == len(raw) or spelling.ends[-1:] in ((None,), ())


@pytest.mark.parametrize("pair", combinations_with_replacement(KINDS, 2), ids=" and ".join)
def test_x2_every_kind_against_every_kind(pair: tuple[str, str]) -> None:
    ours, theirs = map(vocabulary, pair)
    for name, (text, size) in TEXTS.items():
        assert len(text.encode()) == size, name
        a, b = ours.cut(text), theirs.cut(text)
        assert_tiles(a, ours)
        assert_tiles(b, theirs)
        alignment = align(a.ends, b.ends, student_broken=a.broken, max_tokens=MANY)
        mine, yours = byte_owners(a), byte_owners(b)
        for chunk in alignment.chunks:
            own = {i for i, owner in enumerate(mine) if owner is not None and chunk.start <= owner < chunk.end}
            other = {i for i, o in enumerate(yours) if o is not None and chunk.teacher_start <= o < chunk.teacher_end}
            assert own == other and own, name
        assert accounted(alignment)
        if name != "sentencepiece mark":  # which SentencePiece takes for a space
            idle = sum(end == 0 for end in a.ends)  # the space before a text
            assert alignment.holes == ({"control": idle} if idle else {}), name
        back = align(b.ends, a.ends, student_broken=b.broken, max_tokens=MANY)
        assert mirrored(back) == chunks(alignment) or any(a.broken) or any(b.broken), name
        if pair[0] == pair[1] and alignment.chunks:
            assert alignment.one_to_one == 1.0


# Rollouts and what a teacher scored of them


def rollout(ids: Sequence[int], *, closes: bool = False) -> Rollout:
    nothing = (0.0,) * len(ids)
    return Rollout(tiny.prompt(), (), tuple(ids), nothing, nothing, (), "", "stop" if closes else "length")


def scored(
    written: Rollout, student: Vocabulary, teacher: Vocabulary, *, reach: int | None = None, replay: bool = False
) -> TokenScores:
    """As a teacher scores it: the ids of its own vocabulary as they are, else its own cut with its own end of turn."""
    closes = written.finish == "stop"
    text = student.spell(written.ids).text
    query = ScoreQuery(written.prompt, 0, written.ids, student.digest, text, closes)
    if student.digest == teacher.digest:
        ids, ends = written.ids, student.spell(written.ids).ends
    else:
        cut = teacher.cut(text)
        ids, ends = cut.ids, cut.ends
        if closes:
            ids, ends = (*ids, teacher.turn_ends[0]), (*ends, len(text.encode()))
    ids, ends = ids[:reach], ends[:reach]
    values = tuple(map(float, range(len(ids))))
    return TokenScores(query, ids, ends, values, vocabulary=None if replay else teacher)


def ends_with(words: Vocabulary, text: str) -> Rollout:
    return rollout([*words.cut(text).ids, words.turn_ends[0]], closes=True)


@pytest.mark.parametrize("replay", [False, True])
def test_the_same_vocabulary_is_one_to_one_whatever_the_ids(replay: bool) -> None:
    words = vocabulary("byte-level")
    ids = random.Random(1).choices(range(words.size), k=50)
    written = rollout([*ids, words.turn_ends[0]], closes=True)
    alignment = align_scores(written, scored(written, words, words, replay=replay), words)
    assert chunks(alignment) == [(t, t + 1, t, t + 1) for t in range(51)]
    assert alignment.holes == {} and alignment.coverage == alignment.one_to_one == 1.0
    short = align_scores(written, scored(written, words, words, reach=20), words)
    assert len(short.chunks) == 20 and short.holes == {"unmatched": 31} and accounted(short)


@pytest.mark.parametrize("replay", [False, True])
def test_equal_ids_of_another_vocabulary_are_not_the_same_tokens(replay: bool) -> None:
    def words(vocab: dict[str, int]) -> Vocabulary:
        tokenizer = Tokenizer(models.BPE(vocab, [pair for pair in [("a", "b"), ("b", "b")] if "".join(pair) in vocab]))
        tokenizer.decoder = decoders.Fuse()
        return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer))

    student, teacher = words({"a": 0, "bb": 1, "b": 2}), words({"ab": 0, "b": 1, "a": 2})
    written = rollout([0, 1])
    scores = scored(written, student, teacher, replay=replay)
    assert scores.ids == written.ids and scores.query.text == "abb"
    assert chunks(align_scores(written, scores, student)) == [(0, 2, 0, 2)]


def test_a_lossy_vocabulary_does_for_a_teacher_of_the_same() -> None:
    words = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, []))))
    assert words.lossy
    written = rollout([0, 1])
    query = ScoreQuery(written.prompt, 0, written.ids, words.digest, "a b", False)
    scores = TokenScores(query, (0, 1), (None, None), (-1.0, -1.0), vocabulary=words)
    assert align_scores(written, scores, words).one_to_one == 1.0


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize(
    "pair", [("byte-level", "pieces"), ("pieces with a space", "byte-level"), ("tekken", "mistral")]
)
def test_r2_an_end_goes_with_an_end_by_role(pair: tuple[str, str], replay: bool) -> None:
    student, teacher = map(vocabulary, pair)
    if not teacher.turn_ends or not student.turn_ends:
        pytest.skip("no end of turn")
    written = ends_with(student, "The answer is 19.")
    scores = scored(written, student, teacher, replay=replay)
    alignment = align_scores(written, scores, student)
    n, m = len(written.ids), len(scores.ids)
    assert chunks(alignment)[-1] == (n - 1, n, m - 1, m)
    assert scores.ids[m - 1] == teacher.turn_ends[0] and written.ids[n - 1] == student.turn_ends[0]
    assert chunks(alignment)[-2][1::2] == (n - 1, m - 1) and accounted(alignment)


def test_an_empty_answer_is_its_end() -> None:
    student, teacher = vocabulary("byte-level"), vocabulary("pieces")
    written = rollout([student.turn_ends[0]], closes=True)
    alignment = align_scores(written, scored(written, student, teacher), student)
    assert chunks(alignment) == [(0, 1, 0, 1)] and alignment.holes == {}
    nothing = rollout([])
    assert align_scores(nothing, scored(nothing, student, teacher), student).chunks == ()


def test_x5_other_control_tokens_have_no_teacher() -> None:
    student, teacher = vocabulary("byte-level"), vocabulary("pieces")
    user = student.tokenizer.convert_tokens_to_ids("<|user|>")
    ids = [*student.cut("one ").ids, user, *student.cut("two").ids, student.turn_ends[0]]
    written = rollout(ids, closes=True)
    alignment = align_scores(written, scored(written, student, teacher), student)
    place = ids.index(user)
    assert alignment.holes.get("control") and accounted(alignment)
    assert not any(chunk.start <= place < chunk.end for chunk in alignment.chunks)
    assert alignment.coverage < 1


@pytest.mark.parametrize("reach", [0, 1, 3, -1])
def test_a_teachers_row_that_was_cut_off_costs_only_the_rest(reach: int) -> None:
    student, teacher = vocabulary("byte-level"), vocabulary("pieces")
    written = ends_with(student, "The train leaves at noon")
    whole = align_scores(written, scored(written, student, teacher), student, max_tokens=MANY)
    scores = scored(written, student, teacher, reach=reach)
    alignment = align_scores(written, scores, student, max_tokens=MANY)
    kept = [chunk for chunk in whole.chunks if chunk.teacher_end <= len(scores.ids)]
    assert list(alignment.chunks) == kept and accounted(alignment)
    assert alignment.holes == {"unmatched": len(written.ids) - sum(c.end - c.start for c in kept)}


def test_x4_a_rollout_cut_inside_a_character() -> None:
    student, teacher = vocabulary("byte-level"), vocabulary("pieces")
    single = {piece: id for id, piece in enumerate(student.bytes_of) if len(piece) == 1}
    half = [single[bytes([byte])] for byte in "\U0001f44b".encode()[:3]]
    written = rollout([*student.cut("noon").ids, *half])
    scores = scored(written, student, teacher)
    assert scores.query.text == "noon"
    alignment = align_scores(written, scores, student)
    assert alignment.holes == {"broken": 3} and accounted(alignment)
    assert alignment.chunks[-1].end == len(written.ids) - 3
    closed = rollout([*written.ids, student.turn_ends[0]], closes=True)
    alignment = align_scores(closed, scored(closed, student, teacher), student)
    assert alignment.holes == {"broken": 3} and alignment.chunks[-1].start == len(written.ids)


def test_x3_scores_of_another_text_are_refused() -> None:
    """Not cut to the shorter, not searched for: text and lengths must agree."""
    student, teacher = vocabulary("byte-level"), vocabulary("pieces")
    written = rollout(student.cut("The answer is 19.").ids)
    scores = scored(written, student, teacher)
    longer = dataclasses.replace(scores, ends=(*scores.ends[:-1], 18))
    other = dataclasses.replace(scores, query=dataclasses.replace(scores.query, text="Q: The answer is 19."))
    for wrong in (longer, other):
        with pytest.raises(ValueError, match="another text"):
            align_scores(written, wrong, student)


def test_the_chunks_likelihoods_add_up() -> None:
    """What the teacher gave the text is what its chunks hold, the holes apart."""
    student, teacher = vocabulary("byte-level"), vocabulary("pieces")
    written = ends_with(student, "First, we add the two numbers. 東京 😀\n")
    scores = scored(written, student, teacher)
    alignment = align_scores(written, scores, student, max_tokens=MANY)
    assert alignment.holes == {}
    inside = [scores.logprobs[t] for c in alignment.chunks for t in range(c.teacher_start, c.teacher_end)]
    assert math.fsum(inside) == math.fsum(scores.logprobs)


def test_positions_behind_many_holes_are_still_right() -> None:
    """A canary: each sound token of the teacher lands on the student's token with the same last byte."""
    student, teacher = vocabulary("byte-level"), vocabulary("pieces")
    single = {piece: id for id, piece in enumerate(student.bytes_of) if len(piece) == 1}
    stray = single[b"\xf0"]
    ids = [id for word in ("one ", "two", " 東京") * 20 for id in (*student.cut(word).ids, stray)]
    written = rollout(ids)
    scores = scored(written, student, teacher)
    spelling = student.spell(ids)
    alignment = align_scores(written, scores, student, max_tokens=MANY)
    assert alignment.coverage > 0.5 and set(alignment.holes) == {"broken"} and accounted(alignment)
    raw = spelling.text.encode()
    for chunk in alignment.chunks:
        said = b"".join(student.bytes_of[id] for id in ids[chunk.start : chunk.end])
        assert said == b"".join(teacher.bytes_of[id] for id in scores.ids[chunk.teacher_start : chunk.teacher_end])
        end = spelling.ends[chunk.end - 1]
        assert end is not None and raw[:end].endswith(said)


def test_a_chunk_is_a_pair_of_spans() -> None:
    assert chunks(align([3], list(accumulate([1, 1, 1])))) == [dataclasses.astuple(AlignedChunk(0, 1, 0, 3))]
