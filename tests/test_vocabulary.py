"""The bytes that tokens spell: real tokenizers of three kinds, invalid bytes, changed text, and what is refused."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import real_tokenizers
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from omniopd.chat import ChatTemplate
from omniopd.errors import ConfigError
from omniopd.types import Message
from omniopd.vocabulary import Vocabulary

KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level": tiny.byte_level,
    "pieces": tiny.pieces,
    "pieces with a space": lambda: tiny.pieces(True),
    "smollm2": real_tokenizers.smollm2,
    "mistral": real_tokenizers.mistral,
    "tekken": real_tokenizers.tekken,
    "demo student": lambda: real_tokenizers.demo("student"),
    "demo teacher": lambda: real_tokenizers.demo("teacher"),
}
WITH_SPACE = {"pieces with a space", "mistral"}
EMOJI = "\U0001f44b"


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


_BUILT: dict[str, Vocabulary] = {}


def vocabulary(kind: str) -> Vocabulary:
    if kind not in _BUILT:
        _BUILT[kind] = Vocabulary(KINDS[kind]())
    return _BUILT[kind]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


# What tokens spell


def test_ids_spell_what_the_tokenizer_decodes(kind: str) -> None:
    words = vocabulary(kind)
    draw = random.Random(0)
    for _ in range(300):
        ids = draw.choices(range(words.size), k=draw.randrange(12))
        text = decode(words.tokenizer, ids)
        if "\ufffd" not in text:
            spelling = words.spell(ids)
            assert spelling.text == text and not any(spelling.broken)
            assert (spelling.ends or (0,))[-1] == len(text.encode())


TEXTS = [
    "The answer is 12 + 7 = 19.\n",
    "naïve café, 東京 👍🏽",
    "def f(x):\n\treturn  x\r\n",
    "مرحبا",
    "a\u00a0b \ufffd c",
]


@pytest.mark.parametrize("text", TEXTS)
def test_r4_every_end_is_the_length_of_the_decoded_prefix(kind: str, text: str) -> None:
    words = vocabulary(kind)
    cut = words.cut(text)
    assert cut.text == words.spell(cut.ids).text == text
    assert cut.ends == words.spell(cut.ids).ends and cut.ends[-1] == len(text.encode()) and not any(cut.broken)
    for i, end in enumerate(cut.ends):
        prefix = decode(words.tokenizer, list(cut.ids[: i + 1]))
        if "\ufffd" not in prefix:
            assert end == len(prefix.encode())


def test_x2_a_mark_is_three_bytes_and_spells_one() -> None:
    words = vocabulary("mistral")
    id = words.tokenizer.convert_tokens_to_ids("▁world")
    assert words.bytes_of[id] == b" world"
    assert words.bytes_of[words.tokenizer.convert_tokens_to_ids("<0xF0>")] == b"\xf0"


@pytest.mark.parametrize(
    ("kind", "token", "spelled"),
    [
        ("smollm2", "Ġworld", b" world"),
        ("smollm2", "Ċ", b"\n"),
        ("smollm2", "Ã©", "é".encode()),
        ("demo teacher", "▁apples", b" apples"),
        ("demo teacher", "<0x0A>", b"\n"),
    ],
)
def test_bytes_of_a_token(kind: str, token: str, spelled: bytes) -> None:
    words = vocabulary(kind)
    id = words.tokenizer.convert_tokens_to_ids(token)
    assert id != words.tokenizer.unk_token_id and words.bytes_of[id] == spelled


def test_an_added_token_spells_what_the_decoder_makes_of_it() -> None:
    for kind in ("smollm2", "demo teacher"):
        tokenizer = copy.deepcopy(KINDS[kind]())
        tokenizer.add_tokens([AddedToken("né ▁x", special=False), AddedToken("né", special=False)])
        words = Vocabulary(tokenizer)
        for text in ("a né ▁x b", "a né!"):
            ids = list(words.cut(text).ids)
            assert words.size - 1 in ids or words.size - 2 in ids
            assert words.spell(ids).text == decode(tokenizer, ids)


def test_a_control_token_and_padding_spell_nothing(kind: str) -> None:
    words = vocabulary(kind)
    control = min(words.controls)
    ids = [control, *words.cut("one").ids, control, *words.cut(" two").ids, words.size, words.size + 99]
    spelling = words.spell(ids)
    assert words.bytes_of[control] == b""
    assert spelling.text == decode(words.tokenizer, ids[:-2])
    assert spelling.ends[0] == 0 and spelling.ends[-3:] == (len(spelling.text.encode()),) * 3


def test_the_space_before_a_text_has_no_width() -> None:
    words = vocabulary("mistral")
    assert words.tokenizer.convert_ids_to_tokens(list(words.cut("Hello world").ids)) == ["▁Hello", "▁world"]
    assert words.cut("Hello world").ends == (5, 11) == words.spell(words.cut("Hello world").ids).ends
    alone = words.cut("1")
    assert words.tokenizer.convert_ids_to_tokens(list(alone.ids)) == ["▁", "1"] and alone.ends == (0, 1)
    assert words.spell(alone.ids[1:]).ends == (1,)


def test_without_such_a_space_nothing_is_dropped() -> None:
    words = vocabulary("demo teacher")
    assert words.spell(words.cut(" two").ids).text == " two"
    assert words.cut(" two").ends[-1] == 4


# Bytes that make no character


def byte_ids(words: Vocabulary, spelled: bytes) -> list[int]:
    single = {piece: id for id, piece in enumerate(words.bytes_of) if len(piece) == 1}
    return [single[bytes([byte])] for byte in spelled]


def test_x4_half_an_emoji_at_the_end_is_left_out(kind: str) -> None:
    words = vocabulary(kind)
    ids = [*words.cut("ab").ids, *byte_ids(words, EMOJI.encode()[:3])]
    spelling = words.spell(ids)
    assert spelling.text == "ab"
    assert spelling.ends[-4:] == (2, None, None, None) and spelling.broken[-4:] == (False, True, True, True)


def test_x4_bytes_in_the_midst_are_broken_and_offsets_go_on_behind_them(kind: str) -> None:
    words = vocabulary(kind)
    ids = [*byte_ids(words, b"a\xf0\x9fb"), *byte_ids(words, EMOJI.encode()), *byte_ids(words, b"\x9f\x80c")]
    spelling = words.spell(ids)
    assert (
        spelling.text
        == f"a\ufffdb{EMOJI}\ufffd\ufffdc"
        == (b"a\xf0\x9fb" + EMOJI.encode() + b"\x9f\x80c").decode(errors="replace")
    )
    assert spelling.ends == (1, None, 4, 5, 6, 7, 8, 9, None, 15, 16)
    assert [i for i, broken in enumerate(spelling.broken) if broken] == [1, 2, 8, 9]


def test_a_real_replacement_character_is_not_broken(kind: str) -> None:
    words = vocabulary(kind)
    spelling = words.spell(words.cut("a\ufffdb").ids)
    assert spelling.text == "a\ufffdb" and not any(spelling.broken) and spelling.ends[-1] == 5


def test_a_token_that_ends_in_half_a_character_has_no_end() -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ð": 2, "að": 3}, [("a", "ð")]))  # ð is the byte f0
    tokenizer.decoder = decoders.ByteLevel()
    words = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    last = words.spell([1, 3])
    assert (last.text, last.ends, last.broken) == ("ba", (1, None), (False, True))
    amid = words.spell([1, 3, 1])
    assert (amid.text, amid.ends, amid.broken) == ("ba\ufffdb", (1, 5, 6), (False, True, False))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 255), max_size=12), st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_any_bytes_in_any_tokens(spelled: list[int], widths: list[int]) -> None:
    """Reference: a byte is sound where the text up to it, decoded alone, says what the whole text says."""
    raw = bytes(spelled)
    words = vocabulary("byte-level")
    spelling = words.spell(byte_ids(words, raw))
    whole = raw.decode(errors="ignore")
    assert spelling.text.replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert raw.decode(errors="replace").startswith(spelling.text)
    text = spelling.text.encode()
    for i, (end, broken) in enumerate(zip(spelling.ends, spelling.broken, strict=True)):
        assert broken or (end is not None and text[end - 1 : end] == raw[i : i + 1])
    known = [end for end in spelling.ends if end is not None]
    assert known == sorted(set(known)) and (not known or known[-1] <= len(text))


# Text that a tokenizer does not keep


@pytest.mark.parametrize("text", ["<|im_end|>", "</s>", "[INST]", "<unk>", "<s> a </s>", "<|user|>"])
def test_no_text_becomes_a_control_token(kind: str, text: str) -> None:
    words = vocabulary(kind)
    cut = words.cut(text)
    assert words.controls.isdisjoint(cut.ids) and words.spell(cut.ids).text == text


def test_no_controls_name_becomes_the_control(kind: str) -> None:
    words = vocabulary(kind)
    for id in words.controls:
        name = str(words.tokenizer.convert_ids_to_tokens(id))
        assert words.controls.isdisjoint(words.cut(name).ids)


def test_r2_a_cut_text_opens_with_no_token_of_the_tokenizers_own() -> None:
    words = vocabulary("mistral")
    assert words.tokenizer("Hello").input_ids[0] == words.tokenizer.bos_token_id, "or the test shows nothing"
    assert words.tokenizer.bos_token_id not in words.cut("Hello").ids


def with_normaliser(*normaliser: Any) -> Vocabulary:
    tokenizer = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Sequence(list(normaliser))
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_what_nfc_changes_is_broken_and_nothing_else() -> None:
    words = with_normaliser(normalizers.NFC())
    assert words.lossy == ""
    text = "xy cafe\u0301 , xyz cafe\u0301"
    cut = words.cut(text)
    spoken = b"".join(words.bytes_of[id] for id in cut.ids)
    assert spoken == "xy caf\u00e9 , xyz caf\u00e9".encode()
    raw, start = text.encode(), 0
    for id, end, broken in zip(cut.ids, cut.ends, cut.broken, strict=True):
        assert broken or end is not None
        if not broken:
            assert words.bytes_of[id] == raw[end - len(words.bytes_of[id]) : end]
        start = start if end is None else end
    behind = text.encode().index(b" ,")
    assert cut.ends[cut.broken.index(True) - 1] == raw.index("e\u0301".encode())
    sound_again = cut.ends.index(None, cut.broken.index(True))
    assert cut.broken[sound_again:].count(True) < len(cut.ids) / 2
    assert any(end is not None and end > behind and not b for end, b in zip(cut.ends, cut.broken, strict=True))
    assert cut.ends[-1] is None and cut.broken[-1]


def test_a_broken_stretch_always_shows_as_a_none() -> None:
    words = vocabulary("demo teacher")
    for text in ("a ▁x b", "▁", "x▁"):
        cut = words.cut(text)
        assert any(cut.broken) and None in cut.ends
    assert words.cut("a ▁x b").ends[0] == 1 and words.cut("a ▁x b").ends[-1] == 8
    assert words.cut(f"▁{EMOJI} 1").ends == (None, None, None, None, 7, 8, 9), "no end inside a character"


def test_text_without_tokens_is_broken_not_lost() -> None:
    cut = Vocabulary(tiny.letters()).cut("abéc")
    assert (cut.ends, cut.broken) == ((1, 2, None), (False, False, True))


def test_offsets_that_leave_white_space_out_do_no_harm() -> None:
    """Llama 3 and others have a post-processor that trims offsets."""
    tokenizer = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trimmed = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    text = "e\u0301  a  b\n\n c"
    assert trimmed.cut(text) == with_normaliser(normalizers.NFC()).cut(text)


# What is refused


def built(model: Any, decoder: Any, pre_tokenizer: Any = None, normalizer: Any = None) -> Vocabulary:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


WORDS = {"[UNK]": 0, "a": 1, "b": 2}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: built(models.WordPiece(WORDS, unk_token="[UNK]"), decoders.WordPiece()), "decoder (WordPiece)"),
        (lambda: built(models.BPE(WORDS, []), decoders.BPEDecoder()), "decoder (BPEDecoder)"),
        (lambda: built(models.BPE(WORDS, []), decoders.Replace("_", " ")), "decoder (Replace)"),
        (lambda: built(models.Unigram([("a", -1.0), ("<u>", -9.0)], 1, False), decoders.Metaspace()), "single bytes"),
        (lambda: built(models.BPE(WORDS, [], unk_token="[UNK]"), decoders.Fuse()), "single bytes"),
        (
            lambda: built(models.BPE(WORDS, []), decoders.ByteLevel(), pre_tokenizers.WhitespaceSplit()),
            "leaves white space out",
        ),
        (lambda: with_normaliser(normalizers.Lowercase()), "normaliser makes ' a"),
        (lambda: with_normaliser(normalizers.NFD(), normalizers.StripAccents()), "normaliser makes"),
        (lambda: with_normaliser(normalizers.Strip()), "normaliser makes"),
    ],
    ids=["wordpiece", "suffixes", "replace", "unigram", "unknown", "split", "lower case", "accents", "strip"],
)
def test_a_lossy_vocabulary_says_why(make: Callable[[], Vocabulary], reason: str) -> None:
    words = make()
    assert reason in words.lossy and "\n" not in words.lossy
    for ask in (lambda: words.bytes_of, lambda: words.spell([1]), lambda: words.cut("a")):
        with pytest.raises(ConfigError, match="can't be laid over"):
            ask()


def test_a_tokenizer_without_a_decoder_is_refused() -> None:
    words = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(WORDS, []))))
    assert "decoder (none)" in words.lossy


def test_the_kinds_are_not_refused(kind: str) -> None:
    assert vocabulary(kind).lossy == ""


# Whether ids mean the same


def test_the_digest_is_of_the_ids_meaning() -> None:
    same = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tiny.byte_level().backend_tokenizer))
    assert same.digest == Vocabulary(tiny.byte_level()).digest
    bare = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert Vocabulary(PreTrainedTokenizerFast(tokenizer_object=bare)).digest == same.digest, "cuts do not change ids"
    assert len({vocabulary(kind).digest for kind in KINDS}) == len(KINDS)


def test_the_digest_tells_ids_flags_and_decoders_apart() -> None:
    def digest(vocab: dict[str, int], decoder: Any, special: str = "") -> str:
        tokenizer = Tokenizer(models.BPE(vocab, []))
        tokenizer.decoder = decoder
        tokenizer.add_special_tokens([special] if special else [])
        return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).digest

    plain = digest({"a": 0, "b": 1}, decoders.Fuse())
    assert plain == digest({"b": 1, "a": 0}, decoders.Fuse())
    others = [
        digest({"a": 1, "b": 0}, decoders.Fuse()),
        digest({"a": 0, "b": 1, "c": 2}, decoders.Fuse()),
        digest({"a": 0, "b": 1}, decoders.Fuse(), special="b"),
        digest({"a": 0, "b": 1}, decoders.ByteLevel()),
    ]
    assert len({plain, *others}) == 5


# How an answer ends


@pytest.mark.parametrize(
    ("make", "end"),
    [
        (tiny.byte_level, "<|end|>"),
        (tiny.pieces, "</s>"),
        (tiny.letters, "<end>"),
        (lambda: real_tokenizers.demo("student"), "<|end|>"),
        (lambda: real_tokenizers.demo("teacher"), "</s>"),
    ],
)
def test_the_end_of_a_turn(make: Callable[[], PreTrainedTokenizerBase], end: str) -> None:
    chat = ChatTemplate(make())
    assert chat.end_of_turn == chat.tokenizer.convert_tokens_to_ids(end)


def templated(template: str, **special: str) -> ChatTemplate:
    backend = Tokenizer.from_str(tiny.byte_level().backend_tokenizer.to_str())
    return ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special))


def test_the_end_of_a_turn_is_what_the_template_writes_not_the_end_of_texts() -> None:
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    chat = templated(turns, eos_token="<|pad|>")
    end, pad = chat.tokenizer.convert_tokens_to_ids(["<|end|>", "<|pad|>"])
    assert chat.end_of_turn == end and chat.vocabulary.turn_ends == (end, pad)
    assert chat.ids([Message("user", "a"), Message("assistant", "b")])[-2] == end


def test_of_two_names_at_one_place_the_longer_is_meant() -> None:
    chat = templated("{% for m in messages %}{{ m.content }}<|end|>!{% endfor %}", eos_token="<|pad|>")
    chat.tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>!"]})
    longer = ChatTemplate(chat.tokenizer)
    assert longer.end_of_turn == longer.tokenizer.convert_tokens_to_ids("<|end|>!") != chat.end_of_turn


def test_a_template_without_closing_falls_back_on_the_end_of_texts() -> None:
    for template in ("{% for m in messages %}{{ m.content }}{% endfor %}", "{{ raise_exception('no') }}"):
        chat = templated(template, eos_token="<|pad|>")
        assert chat.end_of_turn == chat.tokenizer.convert_tokens_to_ids("<|pad|>")
    with pytest.raises(ConfigError, match="eos_token"):
        _ = templated("{% for m in messages %}{{ m.content }}{% endfor %}").end_of_turn
