"""Completed characters against decoding every prefix; cutting text; comparable pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import pytest
import regex  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from omniopd.types import Chunk, Finish, Reply
from omniopd.verification.text import BROKEN, char_ends, comparable, cut, reached

CORPUS = ["Tom has 12 apples and 7 pears, so 12+7=19.", "naïve café  costs 5 €", "日本語 text\r\n😀👍🏽 end", "x = x"]
SMOLLM = Path(__file__).resolve().parents[3] / "shared" / "tokenizers" / "smollm2" / "tokenizer.json"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace(*, strip: bool) -> Tokenizer:
    """SentencePiece style: with `strip` the first space of a decoded text is dropped, as Llama's decoder does."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    special = ["<unk>", "<end>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["▁", *(chr(code) for code in range(33, 127))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS[:1], trainer)
    return tokenizer


@lru_cache
def tokenizer(kind: str) -> Tokenizer:
    if kind == "smollm2":
        if not SMOLLM.exists():
            pytest.skip("SmolLM2's tokenizer is not here")
        return Tokenizer.from_file(str(SMOLLM))
    made = {"byte_level": byte_level, "metaspace": lambda: metaspace(strip=False)}
    return made.get(kind, lambda: metaspace(strip=True))()


def id_of(kind: str, token: str) -> int:
    found = tokenizer(kind).token_to_id(token)
    assert found is not None
    return found


def decoder(kind: str) -> Callable[[list[int]], str]:
    """Special tokens add no text. The byte pieces must, though the trainer could only be given them as special."""
    inner = tokenizer(kind)
    silent = {inner.token_to_id(token) for token in ("<end>", "<unk>", "<|im_end|>")}
    return lambda ids: inner.decode([i for i in ids if i not in silent], skip_special_tokens=False)


def brute_force(ids: list[int], decode: Callable[[list[int]], str]) -> list[int]:
    prefixes: Iterable[int] = (len(decode(ids[: t + 1]).rstrip(BROKEN)) for t in range(len(ids)))
    return list(accumulate(prefixes, max))


KINDS = ["byte_level", "metaspace", "metaspace_strip", "smollm2"]
TEXT = st.lists(
    st.sampled_from([*"a1 +=.\n\r", "é", "e\u0301", "日", "€", "😀", "👍🏽", "👩‍👩‍👧", "▁", BROKEN]), max_size=25
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(text=TEXT)
def test_char_ends_of_text_equal_brute_force(kind: str, text: str) -> None:
    decode = decoder(kind)
    ids = tokenizer(kind).encode(text, add_special_tokens=False).ids
    ends = char_ends(ids, decode)
    assert ends == brute_force(ids, decode)
    whole = decode(ids).rstrip(BROKEN)
    assert (ends[-1] if ends else 0) == len(whole)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_char_ends_of_any_ids_equal_brute_force(kind: str, data: st.DataObject) -> None:
    known = st.integers(0, min(tokenizer(kind).get_vocab_size(), 400) - 1)
    ids = data.draw(st.lists(known, max_size=20))
    assert char_ends(ids, decoder(kind)) == brute_force(ids, decoder(kind))


@pytest.mark.parametrize("kind", ["metaspace", "metaspace_strip"])
def test_bytes_that_break_their_neighbours_are_measured_by_the_definition(kind: str) -> None:
    """Byte fallback decodes a run of bytes as a whole: one stray byte turns the two valid characters before it."""
    decode = decoder(kind)
    ids = [*(id_of(kind, f"<0x{byte:02X}>") for byte in (0xC3, 0xA9, 0xC3, 0xA9, 0xE2)), id_of(kind, "a")]
    assert decode(ids) == BROKEN * 5 + "a"
    assert char_ends(ids, decode) == brute_force(ids, decode) == [0, 1, 1, 2, 2, 6]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "metaspace_strip"])
def test_x4_a_response_that_ends_inside_an_emoji(kind: str) -> None:
    decode, ids = decoder(kind), tokenizer(kind).encode("a😀", add_special_tokens=False).ids
    assert len(ids) > 3
    assert char_ends(ids[:-1], decode) == [1] * (len(ids) - 1)
    assert char_ends(ids, decode) == [*[1] * (len(ids) - 1), 2]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace_strip"])
def test_char_ends_decodes_a_long_text_in_short_windows(kind: str) -> None:
    """Linear work, also where tokens without text stand between words: the slow way is for broken bytes alone."""
    inner, end = decoder(kind), id_of(kind, "<end>")
    ids = [
        i for word in (" ".join(CORPUS) * 20).split(" ") for i in (*tokenizer(kind).encode(" " + word).ids, end, end)
    ]
    work: list[int] = []

    def decode(some: list[int]) -> str:
        work.append(len(some))
        return inner(some)

    assert char_ends(ids, decode) == brute_force(ids, inner)
    assert inner(ids).strip().startswith("Tom has")
    assert len(ids) > 500
    assert len(work) <= 2 * len(ids) + 1
    assert sum(work) < 8 * len(ids)


@pytest.mark.parametrize(
    ("text", "length", "kept"),
    [
        ("abc", 5, "abc"),
        ("abc", 3, "abc"),
        ("abc", 2, "ab"),
        ("abc", 0, ""),
        ("ae\u0301b", 2, "a"),
        ("ae\u0301b", 3, "ae\u0301"),
        ("a\r\nb", 2, "a"),
        ("👩‍👩‍👧!", 4, ""),
        ("🇩🇪🇫🇷", 3, "🇩🇪"),
    ],
)
def test_l12_cut_keeps_graphemes_whole(text: str, length: int, kept: str) -> None:
    assert cut(text, length) == kept


@given(TEXT, st.integers(0, 30))
def test_l12_cut_is_the_longest_that_fits(text: str, length: int) -> None:
    graphemes = regex.findall(r"\X", text)
    fitting = [beginning for beginning in accumulate(graphemes, initial="") if len(beginning) <= length]
    assert cut(text, length) == fitting[-1]


def pair(text: str, reply: str, finish: Finish, *, closes: bool = False) -> tuple[Chunk, Reply]:
    """A chunk of one token per character (and the end token), against a reply."""
    ends = (*range(1, len(text) + 1), *([len(text)] if closes else []))
    return Chunk(0, 4, 4 + len(ends), "", text, ends, closes), Reply(reply, finish)


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_l12_a_longer_reply_is_cut(finish: Finish) -> None:
    chunk, reply = pair("12+7", "12+7=19", finish)
    assert comparable(chunk, reply) == (chunk, Reply("12+7", "length"))


def test_l12_a_teacher_that_stopped_early_stays_short() -> None:
    chunk, reply = pair("12+7", "12", "stop")
    assert comparable(chunk, reply) == (chunk, reply)


def test_l12_a_censored_reply_shortens_the_chunk() -> None:
    chunk, reply = pair("12+7", "12", "length", closes=True)
    shorter, same = comparable(chunk, reply)
    assert (shorter.text, shorter.ends, shorter.closes) == ("12", (1, 2), False)
    assert (shorter.start, shorter.end) == (4, 6)
    assert same == reply


def test_a_reply_cut_exactly_at_the_end_leaves_the_closing_token_unknown() -> None:
    shorter, _ = comparable(*pair("12", "12", "length", closes=True))
    assert (shorter.text, shorter.ends, shorter.closes) == ("12", (1, 2), False)


def test_half_a_character_at_the_token_limit_was_not_reached() -> None:
    assert reached(Reply("a" + BROKEN, "length")) == "a"
    assert reached(Reply("a" + BROKEN, "stop")) == "a" + BROKEN
    shorter, reply = comparable(*pair("a😀b", "a" + BROKEN, "length"))
    assert (shorter.text, reply.text) == ("a", "a")


@given(TEXT, TEXT, st.sampled_from(["stop", "length"]), st.booleans())
def test_l12_pairs_have_equal_length_unless_somebody_stopped(
    text: str, said: str, finish: Finish, closes: bool
) -> None:
    chunk, reply = comparable(*pair(text, said, finish, closes=closes))
    assert len(reply.text) <= len(chunk.text)
    assert text.startswith(chunk.text)
    assert said.startswith(reply.text)
    assert max(chunk.ends, default=0) <= len(chunk.text)
    assert chunk.end - chunk.start == len(chunk.ends)
    if reply.finish == "length" and len(said.rstrip(BROKEN)) <= len(text):
        assert len(reply.text) == len(chunk.text)
