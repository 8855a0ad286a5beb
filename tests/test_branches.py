"""The teacher's text in the student's tokens: what a branch spells, whatever the tokenizer and the characters."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from omniopd.branches import continuation_branch, retokenized
from omniopd.chat import ChatTemplate
from omniopd.types import Branch, Reply, Rollout
from omniopd.verification.chunks import cut_chunk
from omniopd.verification.text import char_ends
from students.policy import Policy


class Text:
    """A tokenizer as a policy offers it, without the model."""

    encode, decode = Policy.encode, Policy.decode

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.chat = tokenizer, ChatTemplate(tokenizer)
        self.end_id = tokenizer.eos_token_id
        self.end_ids = {self.end_id}


TEXTS = {
    "byte_level": Text(tiny.byte_level()),
    "pieces": Text(tiny.pieces()),
    "dummy_space": Text(tiny.pieces(dummy_space=True)),
}
SNIPPETS = ["The", " answer", " is", " 12", "7", " + ", "=", "\n\n", "\t", "  ", " ", "return x", ".", "naïve", "é"]
SNIPPETS += ["東京", "は", "😀", "👍🏽", "e\u0301", "\u200d", "<|end|>", "</s>", "[INST]", "<s>", "<0x41>"]
texts = st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join)
kinds = st.sampled_from(sorted(TEXTS))


def written(text: Text, ids: list[int]) -> Rollout:
    zeros = (0.0,) * len(ids)
    ends = tuple(char_ends(ids, text.decode))
    return Rollout(tiny.prompt(), (5,), tuple(ids), zeros, zeros, ends, text.decode(ids), "length")


def branch_of(text: Text, rollout: Rollout, prefix: str, reply: Reply) -> Branch | None:
    return continuation_branch(rollout, 3, prefix, reply, 2.0, text)  # type: ignore[arg-type]


def check(text: Text, rollout: Rollout, prefix: str, reply: Reply) -> None:
    branch = branch_of(text, rollout, prefix, reply)
    whole = prefix + reply.text
    if branch is None:
        assert reply.finish == "length" and reply.text == ""
        return
    assert (branch.row, branch.weight) == (3, 2.0)
    assert 0 <= branch.at <= len(rollout) and 0 <= branch.context < len(branch.ids)
    assert branch.at == 0 or rollout.ends[branch.at - 1] <= len(prefix)  # nothing of the chunk is in front of it
    spelled = [*rollout.ids[: branch.at], *branch.ids]
    if reply.finish == "stop":
        assert spelled.pop() == text.end_id
        assert text.decode(spelled) == whole
    else:
        assert whole.startswith(text.decode(spelled).rstrip("\ufffd"))
        assert len(text.encode(whole)[0]) - len(spelled) in (0, 1)
    assert text.end_id not in spelled
    ids, spans = text.encode(whole)
    first = next((i for i, (_, end) in enumerate(spans) if end > len(prefix)), len(ids))
    assert branch.at + branch.context == first  # each token that writes a character of the reply is learned
    read = text.decode([*rollout.ids[: branch.at], *branch.ids[: branch.context]])
    assert len(read.rstrip("\ufffd")) <= len(prefix)  # every character of the reply is learned


@settings(max_examples=150, deadline=None)
@given(kind=kinds, own=texts, reply=texts, finish=st.sampled_from(["stop", "length"]), place=st.floats(0, 1))
def test_prefix_and_branch_spell_prefix_and_reply(kind: str, own: str, reply: str, finish: str, place: float) -> None:
    """The student wrote in its tokenizer's own way."""
    text = TEXTS[kind]
    rollout = written(text, text.encode(own)[0])
    start = int(place * len(rollout))
    prefix = cut_chunk(rollout, 0, start, 1).prefix if start < len(rollout) else rollout.text
    check(text, rollout, prefix, Reply(reply, finish))  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(kind=kinds, seed=st.integers(0, 10**6), reply=texts, finish=st.sampled_from(["stop", "length"]))
def test_r4_also_after_ids_that_the_tokenizer_would_not_write(kind: str, seed: int, reply: str, finish: str) -> None:
    """Ids at random: broken characters, halves of words, control tokens."""
    text, rng = TEXTS[kind], random.Random(seed)
    rollout = written(text, [rng.randrange(len(text.tokenizer)) for _ in range(rng.randint(1, 12))])
    chunk = cut_chunk(rollout, 0, rng.randrange(len(rollout)), 1)
    check(text, rollout, chunk.prefix, Reply(reply, finish))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", sorted(TEXTS))
def test_a_branch_shares_all_of_a_prefix_that_it_can(kind: str) -> None:
    text = TEXTS[kind]
    rollout = written(text, text.encode("The answer is 12 + 7 = 19.")[0])
    start = next(t for t, end in enumerate(rollout.ends) if rollout.text[:end].endswith("is"))
    branch = branch_of(text, rollout, "The answer is", Reply(" 12 + 8", "stop"))
    assert branch is not None and (branch.at, branch.context) == (start + 1, 0)
    assert branch.ids == (*text.encode("The answer is 12 + 8")[0][start + 1 :], text.end_id)


def test_r4_a_prefix_that_is_cut_otherwise_is_repeated_as_context() -> None:
    text = TEXTS["byte_level"]
    letters = [text.encode(c)[0][0] for c in "The"]
    rollout = written(text, [*letters, *text.encode(" answer is 12")[0]])
    branch = branch_of(text, rollout, "The", Reply(" train", "stop"))
    assert text.encode("The")[0] != letters
    assert branch is not None and branch.at == 0 and branch.context == len(text.encode("The")[0])
    assert text.decode(list(branch.ids[branch.context :])) == " train"
    clean = branch_of(text, written(text, text.encode("The answer")[0]), "The", Reply(" train", "stop"))
    assert clean is not None
    assert retokenized([branch, clean, branch]) == 2


def test_a_word_begun_by_the_student_is_learned_whole() -> None:
    """The prefix ends inside what the tokenizer writes as one token; that token is learned in its place."""
    text = TEXTS["byte_level"]
    whole = text.encode("the answer")[0]
    assert len(whole) < len(text.encode("the ans")[0]) + len(text.encode("wer")[0])
    rollout = written(text, text.encode("the ans")[0])
    branch = branch_of(text, rollout, "the ans", Reply("wer", "stop"))
    assert branch is not None and branch.context == 0
    assert [*rollout.ids[: branch.at], *branch.ids] == [*whole, text.end_id]


def test_bytes_that_two_characters_share_belong_to_the_reply() -> None:
    """Two emoji differ in their last byte only; the first three are the teacher's words all the same."""
    text = TEXTS["byte_level"]
    rollout = written(text, text.encode("The 🤀")[0])
    branch = branch_of(text, rollout, "The ", Reply("🤁", "stop"))
    assert branch is not None and (branch.at, branch.context) == (len(text.encode("The ")[0]), 0)
    assert rollout.ids[branch.at : -1] == branch.ids[:-2] != ()


def test_a_reply_cut_by_the_limit_loses_its_last_token_and_teaches_no_end() -> None:
    text = TEXTS["byte_level"]
    rollout = written(text, text.encode("The answer")[0])
    ids = text.encode("The answer is 12 + 7")[0][len(rollout) :]
    branch = branch_of(text, rollout, "The answer", Reply(" is 12 + 7", "length"))
    assert branch is not None and list(branch.ids) == ids[:-1]
    single = branch_of(text, rollout, "The answer", Reply(" ", "length"))
    assert single is not None and list(single.ids) == text.encode(" ")[0]  # all that there is


def test_an_empty_reply_teaches_the_end_or_nothing() -> None:
    text = TEXTS["byte_level"]
    rollout = written(text, text.encode("The answer")[0])
    stopped = branch_of(text, rollout, "The answer", Reply("", "stop"))
    assert stopped is not None and (stopped.at, stopped.ids, stopped.context) == (len(rollout), (text.end_id,), 0)
    assert branch_of(text, rollout, "The answer", Reply("", "length")) is None


@pytest.mark.parametrize("kind", sorted(TEXTS))
def test_a_teacher_cannot_write_control_tokens(kind: str) -> None:
    text = TEXTS[kind]
    controls = {i: t.content for i, t in text.tokenizer.added_tokens_decoder.items() if t.special}
    rollout = written(text, text.encode("The answer")[0])
    for name in controls.values():
        branch = branch_of(text, rollout, "The answer", Reply(f" is {name} 12", "stop"))
        assert branch is not None
        assert not set(branch.ids[:-1]) & set(controls)
        assert text.decode([*rollout.ids[: branch.at], *branch.ids]) == f"The answer is {name} 12"


def test_the_policy_is_the_same_text(tiny_folder: Callable[..., Path]) -> None:
    """What is tested here without a model is what a run uses."""
    student = tiny.policy(tiny_folder())
    text = "The <|end|> 東京 12"
    assert student.encode(text) == TEXTS["byte_level"].encode(text)
    assert student.end_id == TEXTS["byte_level"].end_id
