"""Two vocabularies laid over each other: longest prefixes, equal tokens, ends of a turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_level, pieces
from tokenizers import normalizers
from toy_vocabulary import toy
from transformers import AutoTokenizer

from omniopd.errors import ConfigError
from omniopd.vocabulary import Vocabulary
from omniopd.vocabulary_map import NONE, VocabularyMap, spellers, vocabulary_map

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"


def lay(teacher: Any, student: Any) -> VocabularyMap:
    return VocabularyMap(teacher, student, student.size - 1)


def slow_prefix(word: bytes, student: Any) -> int:
    """Every student token tried."""
    fits = [(len(s), id) for id, s in enumerate(student.bytes_of) if s and word[: len(s)] == s]
    return max(fits)[1] if fits else NONE


def test_golden_map() -> None:
    words = lay(toy("ab", "abc", "b", "c", b"\xff"), toy("a", "ab", "b", "bc", "c"))
    assert words.prefix.tolist() == [1, 1, 2, 4, NONE, 5]  # the last is the end of the turn
    assert words.matched.tolist() == [[0, 2, 3, 5], [1, 2, 4, 5]]
    assert not words.identity


def test_longest_prefix_against_trying_every_token() -> None:
    teacher, student = Vocabulary(pieces()), Vocabulary(byte_level())
    words = VocabularyMap(teacher, student, 1)
    mapped = [id for id in range(teacher.size) if teacher.bytes_of[id]]
    assert len(mapped) > 300
    for id in mapped:
        assert words.prefix[id] == slow_prefix(teacher.bytes_of[id], student)


@pytest.mark.parametrize("spelled", ["t", " th", " t", "\n"])
def test_what_remains_of_a_token_against_trying_every_token(spelled: str) -> None:
    teacher, student = Vocabulary(byte_level()), Vocabulary(pieces())
    words, opening = VocabularyMap(teacher, student, 2), spelled.encode()
    ids, students, _ = words.after(opening)
    expected = [id for id, word in enumerate(teacher.bytes_of) if word.startswith(opening)]
    assert sorted(ids.tolist()) == expected
    assert expected
    for id, mapped in zip(ids.tolist(), students.tolist(), strict=True):
        rest = teacher.bytes_of[id][len(opening) :]
        spells = student.bytes_of[mapped] if mapped != NONE else b""
        assert spells == max((s for s in student.bytes_of if rest.startswith(s)), key=len)
        assert words.student_of(id, opening) == mapped


def test_a_token_of_which_nothing_remains_has_no_counterpart() -> None:
    words = lay(toy("a", "ab", "abc", "b"), toy("a", "b", "bc"))
    ids, students, _ = words.after(b"ab")
    assert dict(zip(ids.tolist(), students.tolist(), strict=True)) == {1: NONE, 2: NONE}  # "c" opens no student token
    ids, students, _ = words.after(b"a")
    assert dict(zip(ids.tolist(), students.tolist(), strict=True)) == {0: NONE, 1: 1, 2: 2}


def test_nothing_spelled_is_the_whole_vocabulary() -> None:
    words = lay(toy("a", "ab"), toy("a", "b"))
    ids, students, _ = words.after(b"")
    assert ids.tolist() == [0, 1, 2]
    assert students is words.prefix


def test_bytes_after_the_last_word_do_not_fall_off_the_end() -> None:
    words = lay(toy(b"\xff", b"\xff\xff", b"\xffa"), toy("a", b"\xff"))
    ids, students, _ = words.after(b"\xff")
    assert dict(zip(ids.tolist(), students.tolist(), strict=True)) == {0: NONE, 1: 1, 2: 0}
    assert lay(toy("a"), toy("b")).after(b"z")[0].tolist() == []


def test_one_vocabulary_is_its_own_counterpart_controls_included() -> None:
    vocabulary = Vocabulary(byte_level())
    words = VocabularyMap(vocabulary, Vocabulary(byte_level()), 1)
    assert words.identity
    assert torch.equal(words.prefix, torch.arange(vocabulary.size))
    assert torch.equal(words.matched, torch.arange(vocabulary.size).repeat(2, 1))
    assert words.student_of(3) == 3


def test_only_ends_of_a_turn_map_between_control_tokens() -> None:
    teacher, student = Vocabulary(byte_level()), Vocabulary(pieces())
    end = student.tokenizer.eos_token_id
    words = VocabularyMap(teacher, student, end)
    controls = sorted(teacher.controls)
    mapped = {id: int(words.prefix[id]) for id in controls}
    assert mapped.pop(teacher.tokenizer.eos_token_id) == end
    assert set(mapped.values()) == {NONE}
    pairs = dict(words.matched.T.tolist())
    assert pairs[teacher.tokenizer.eos_token_id] == end
    assert not set(controls) - {teacher.tokenizer.eos_token_id} & set(pairs)


def test_x2_equal_tokens_are_equal_bytes_between_families() -> None:
    """The space is written as one character in one family and as another in the other; neither occurs in the text."""
    teacher, student = Vocabulary(byte_level()), Vocabulary(pieces())
    theirs, ours = VocabularyMap(teacher, student, 2).matched.tolist()
    assert len(set(theirs)) == len(theirs) > 100
    assert len(set(ours)) == len(ours)
    spelled = [(teacher.bytes_of[t], student.bytes_of[s]) for t, s in zip(theirs, ours, strict=True)]
    assert all(a == b for a, b in spelled)
    assert (b" the", b" the") in spelled
    in_both = set(spellers(teacher)) & set(spellers(student))
    assert len(in_both) == len(theirs) - 1  # and the end of the turn


def test_of_two_tokens_for_one_byte_the_fallback_is_taken_last() -> None:
    vocabulary = Vocabulary(pieces())
    found = spellers(vocabulary)
    tokens = vocabulary.tokenizer.convert_ids_to_tokens([found[b"a"], found[b"\xe2"]])
    assert tokens == ["a", "<0xE2>"]
    first = toy("a", "a", names={0: "<0x61>"})
    assert spellers(first) == {b"a": 1}


def test_every_end_of_a_turn_maps_and_the_first_is_the_counterpart() -> None:
    """As with models whose turns end otherwise than their documents."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "student")
    tokenizer.eos_token = "<|pad|>"
    vocabulary = Vocabulary(tokenizer)
    closing, end_of_text = vocabulary.turn_ends
    words = VocabularyMap(vocabulary, Vocabulary(pieces()), 2)
    assert int(words.prefix[closing]) == int(words.prefix[end_of_text]) == 2
    pairs = dict(words.matched.T.tolist())
    assert pairs[closing] == 2
    assert end_of_text not in pairs


def test_a_pair_is_laid_once() -> None:
    pair = Vocabulary(byte_level()), Vocabulary(pieces())
    first = vocabulary_map(*pair, 2)
    assert vocabulary_map(Vocabulary(byte_level()), Vocabulary(pieces()), 2) is first
    assert vocabulary_map(*pair, 0) is not first
    assert vocabulary_map(*reversed(pair), 2) is not first


def test_the_demo_models_map_nearly_whole() -> None:
    student, teacher = (Vocabulary(AutoTokenizer.from_pretrained(DEMO / side)) for side in ("student", "teacher"))
    words = VocabularyMap(teacher, student, student.tokenizer.eos_token_id)
    unmapped = [id for id in range(teacher.size) if words.prefix[id] == NONE]
    assert set(unmapped) == teacher.controls - {teacher.tokenizer.eos_token_id}  # the student has every byte
    assert 0.5 < len(words.matched[0]) / teacher.size < 1


def test_lossy_vocabularies_are_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "student")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    lossy, other = Vocabulary(tokenizer), Vocabulary(pieces())
    for pair in ((lossy, other), (other, lossy)):
        with pytest.raises(ConfigError, match="normaliser"):
            VocabularyMap(*pair, 1)
