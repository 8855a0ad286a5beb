"""Scores by weights in this process equal the dense reference, whatever else is in the batch."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from omniopd.errors import TeacherError
from omniopd.model import logits_of
from omniopd.store import Store
from omniopd.types import ScoreQuery, TokenScores
from omniopd.vocabulary import Vocabulary
from teachers import forward
from teachers.engine import Given
from teachers.transformers import TransformersConfig, TransformersTeacher

Folder = Callable[..., Path]
TEXT = "The answer is 12 + 7 = 19."
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("gpt2", {}),
    ("gemma2", {}),  # caps its logits
    ("granite", {"logits_scaling": 8.0}),
    ("cohere", {"logit_scale": 0.5}),
    ("mistral", {"sliding_window": 4}),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}),
]


def query(text: str = TEXT, *, row: int = 0, closes: bool = True, **settings: Any) -> ScoreQuery:
    """The response as the byte-level tokenizer's own model would have written it."""
    vocabulary = Vocabulary(tiny.byte_level())
    ids = tuple(tiny.byte_level().encode(text, add_special_tokens=False))
    end = (tiny.byte_level().eos_token_id,) if closes else ()
    return ScoreQuery(tiny.prompt(), row, (*ids, *end), vocabulary.digest, text, closes, **settings)


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., TransformersTeacher]]:
    made: list[TransformersTeacher] = []

    def build(path: Path, store: str = "", **settings: Any) -> TransformersTeacher:
        kept = Store(tmp_path / f"{store or len(made)}.sqlite")
        made.append(TransformersTeacher(TransformersConfig(path=str(path), **settings), kept))
        return made[-1]

    yield build
    for teacher in made:
        asyncio.run(teacher.close())


def gather(teacher: Any, *queries: ScoreQuery) -> list[TokenScores]:
    return asyncio.run(teacher.gather(list(queries)))


@torch.no_grad()
def dense(teacher: TransformersTeacher, asked: ScoreQuery, ids: tuple[int, ...]) -> torch.Tensor:
    """Log-probs [n, V] at each place of the response: one row, no padding, the model's own forward pass."""
    prompt = teacher.backend.chat.ids(asked.prompt.messages)  # type: ignore[attr-defined]
    logits = teacher.backend.engine.model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0]  # type: ignore[attr-defined]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


@pytest.mark.parametrize(("kind", "settings"), FAMILIES)
def test_every_family_scores_as_its_own_forward_pass(
    tiny_folder: Folder, make: Any, kind: str, settings: dict[str, Any]
) -> None:
    teacher = make(tiny_folder("byte_level", kind, **settings))
    asked = query(top=4, whole=True)
    (found,) = gather(teacher, asked)
    rows = dense(teacher, asked, asked.ids)
    own = rows.gather(1, torch.tensor(asked.ids)[:, None])[:, 0]
    assert found.ids == asked.ids
    assert list(found.logprobs) == pytest.approx(own.tolist(), abs=1e-5)
    best = rows.topk(4)
    assert [list(place) for place in found.top] == best.indices.tolist()
    assert [list(place.values()) for place in found.top] == [
        pytest.approx(row, abs=1e-5) for row in best.values.tolist()
    ]
    said = found.distributions
    assert said is not None and said.hidden.shape == (len(asked.ids), 16)
    whole = said.head(said.hidden[2:5]).double().log_softmax(-1)
    torch.testing.assert_close(whole, rows[2:5], atol=1e-5, rtol=0)


def test_o14_a_teacher_is_frozen_and_its_distributions_carry_no_gradient(tiny_folder: Folder, make: Any) -> None:
    teacher = make(tiny_folder("byte_level", "gemma2"))
    (found,) = gather(teacher, query(whole=True))
    said = found.distributions
    assert not any(weight.requires_grad for weight in teacher.backend.engine.model.parameters())
    assert not teacher.backend.engine.model.training
    student = torch.randn(len(found.ids), 320, requires_grad=True)
    loss = (student.softmax(-1) * (student.log_softmax(-1) - said.head(said.hidden).log_softmax(-1))).sum()
    loss.backward()  # an inference tensor would refuse to be kept for this
    assert said.hidden.grad_fn is None and student.grad is not None


@pytest.mark.parametrize("batch_tokens", [1, 60, 1_000_000])
@pytest.mark.parametrize("width", [3, 512])
def test_neither_neighbours_nor_padding_nor_slices_move_a_score(
    tiny_folder: Folder, monkeypatch: pytest.MonkeyPatch, batch_tokens: int, width: int
) -> None:
    monkeypatch.setattr(forward, "SLICE", width)
    model = tiny.model(tiny.byte_level(), "qwen3")
    logits = logits_of(model)
    assert logits is not None
    rows = [
        Given(tuple(range(5, 5 + length)), start, 2) for length, start in [(30, 4), (8, 1), (31, 30), (19, 9), (8, 8)]
    ]
    together = forward.score(model, logits, rows, batch_tokens=batch_tokens)
    for row, scores in zip(rows, together, strict=True):
        own, _ = tiny.dense(model, row.ids[: row.start], row.ids[row.start :])
        assert list(scores.logprobs) == pytest.approx(own.tolist(), abs=1e-5)
        assert len(scores.top) == len(scores.logprobs) == len(row.ids) - row.start
        assert scores.usage.prompt_tokens == len(row.ids)
    assert together[4].logprobs == ()  # trap R11: nothing is asked of it, and x[-0:] would be all


def test_each_row_gets_what_it_asked_for_and_all_share_a_head() -> None:
    model = tiny.model(tiny.byte_level())
    logits = logits_of(model)
    assert logits is not None
    rows = [Given((7, 8, 9), 1), Given((9, 8, 7, 6), 2, top=3, whole=True), Given((5, 5), 1, top=1, whole=True)]
    plain, three, one = forward.score(model, logits, rows, batch_tokens=100)
    assert [len(place) for scores in (plain, three, one) for place in scores.top] == [0, 0, 3, 3, 1]
    assert plain.distributions is None and three.distributions is not None and one.distributions is not None
    assert three.distributions.head is one.distributions.head
    assert len(three.distributions.hidden) == 2 and len(one.distributions.hidden) == 1


def test_r1_nothing_precedes_the_first_token_of_all() -> None:
    model = tiny.model(tiny.byte_level())
    logits = logits_of(model)
    assert logits is not None
    whole, rest = forward.score(model, logits, [Given((7, 8, 9), 0, 1), Given((7, 8, 9), 1, 1)], batch_tokens=100)
    assert whole.logprobs[0] is None and whole.top[0] == {}
    assert whole.since(1).logprobs == rest.logprobs and whole.since(1).top == rest.top


def test_r1_a_copy_teacher_is_sure_of_every_token_and_a_token_late_of_none() -> None:
    """It gives the actual next token 1 - 1e-6. After token i it expects i + 1: no layers, a word is its own direction, the
    head turns it by one."""
    width = len(tiny.byte_level())
    model = tiny.model(tiny.byte_level(), hidden_size=width, num_hidden_layers=0)
    sure = math.log((width - 1) * (1 - 1e-6) / 1e-6) / math.sqrt(width)  # a one-hot row's norm becomes sqrt(width)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(width))
        model.get_output_embeddings().weight.copy_(sure * torch.eye(width).roll(1, 0))
    logits = logits_of(model)
    assert logits is not None
    rows = [Given(tuple(range(start, start + 12)), cut) for start, cut in ((5, 4), (40, 1), (100, 7))]
    for row, found in zip(rows, forward.score(model, logits, rows, batch_tokens=100), strict=True):
        assert found.logprobs == pytest.approx([-1e-6] * (12 - row.start), rel=0.3)
    (late,) = forward.score(model, logits, [Given((7, 8, 8, 9, 10), 2)], batch_tokens=100)
    assert late.logprobs[0] is not None and late.logprobs[0] < -15
    assert late.logprobs[1:] == pytest.approx([-1e-6] * 2, rel=0.3)


def test_r6_r7_the_temperature_of_writing_moves_no_score(tiny_folder: Folder, make: Any) -> None:
    path = tiny_folder()
    plain, cool = make(path), make(path, temperature=0.7, top_p=0.5)
    (one,), (other,) = gather(plain, query(top=3)), gather(cool, query(top=3))
    assert (one.logprobs, one.top) == (other.logprobs, other.top)
    rows = dense(plain, query(), query().ids)
    cooled = (rows / 0.7).log_softmax(-1).gather(1, torch.tensor(query().ids)[:, None])[:, 0]
    assert max(abs(a - b) for a, b in zip(cooled.tolist(), one.logprobs, strict=True)) > 0.1  # it would have shown


def test_s14_what_exceeds_the_context_is_a_counted_hole(tiny_folder: Folder, make: Any) -> None:
    teacher = make(tiny_folder())
    prompt = len(teacher.backend.chat.ids(tiny.prompt().messages))
    fits = replace(query(), ids=(7,) * (256 - prompt), text="", closes=False)
    good, hole = gather(teacher, fits, replace(fits, row=1, ids=(*fits.ids, 7)))
    assert (len(good.ids), good.rejected) == (256 - prompt, {})
    assert (hole.ids, hole.logprobs, hole.rejected) == ((), (), {"context_overflow": 1})


def test_r10_a_value_that_is_no_number_stays_none(tiny_folder: Folder, make: Any) -> None:
    teacher = make(tiny_folder(), store="nan")
    with torch.no_grad():
        teacher.backend.engine.model.get_output_embeddings().weight[40] = math.nan  # every softmax has it in its sum
    (found,) = gather(teacher, query())
    assert all(math.isnan(value) for value in found.logprobs)
    (again,) = gather(teacher, query())
    assert again.usage.cached_calls == 1 and all(math.isnan(value) for value in again.logprobs)


def test_r10_a_token_that_is_ruled_out_is_minus_infinity_kept_and_read(tiny_folder: Folder, make: Any) -> None:
    teacher = make(tiny_folder())
    banned = query().ids[3]
    logits = teacher.backend.engine.logits

    def without(hidden: torch.Tensor) -> torch.Tensor:
        return logits(hidden).index_fill(1, torch.tensor([banned]), -math.inf)

    teacher.backend.engine.logits = without
    for found in (*gather(teacher, query(top=320)), *gather(teacher, query(top=320))):
        assert [math.isinf(value) for value in found.logprobs] == [one == banned for one in query().ids]
        assert all(banned not in place and len(place) == 319 for place in found.top)


def test_whole_distributions_are_never_kept_and_computed_again(tiny_folder: Folder, make: Any) -> None:
    teacher = make(tiny_folder())
    (first,), (second,) = gather(teacher, query(whole=True)), gather(teacher, query(whole=True))
    assert teacher._store.stats().answers == 0
    assert (first.usage.calls, second.usage.calls) == (1, 1)
    assert torch.equal(first.distributions.hidden, second.distributions.hidden)  # type: ignore[union-attr]
    assert first.logprobs == second.logprobs


def test_s10_kept_scores_need_no_model(tiny_folder: Folder, make: Any) -> None:
    path = tiny_folder()
    (first,) = gather(make(path, store="kept"), query(top=2))
    again = make(path, store="kept")
    again.backend.engine.model = None
    (second,) = gather(again, query(top=2))
    assert second.usage.cached_calls == 1
    assert replace(first, usage=second.usage, vocabulary=None).logprobs == second.logprobs
    assert (first.ids, first.ends, first.top) == (second.ids, second.ends, second.top)


def test_s7_other_weights_are_another_teacher(tiny_folder: Folder, tmp_path: Path, make: Any) -> None:
    path = tiny.saved(tmp_path / "model", tiny.byte_level())
    (first,) = gather(make(path, store="kept"), query())
    tiny.saved(tmp_path / "model", tiny.byte_level(), seed=1)
    (second,) = gather(make(path, store="kept"), query())
    assert second.usage.calls == 1 and first.logprobs != second.logprobs


def test_promises_agree_with_what_is_built(tiny_folder: Folder, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make(tiny_folder(), logprobs=3)
    monkeypatch.setattr("teachers.transformers.AutoModelForCausalLM", None)  # no weights are looked at
    promised = TransformersTeacher.promises(teacher._config)
    assert promised == teacher.capabilities
    assert (promised.score, promised.topk, promised.logits, promised.continuation) == (True, 320, True, "raw")
    assert promised.vocabulary == Vocabulary(tiny.byte_level()).digest


def test_a_model_of_unusual_build_draws_but_offers_no_scores(
    tiny_folder: Folder, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.transformers.logits_of", lambda model: None)
    teacher = make(tiny_folder())
    offered = teacher.capabilities
    assert (offered.score, offered.topk, offered.logits) == (False, 0, False)
    with pytest.raises(TeacherError, match=r"^teacher\.type: .*no log-probs of given text"):
        gather(teacher, query())


def test_the_settings_that_a_replay_needs_are_kept(tiny_folder: Folder, make: Any) -> None:
    teacher = make(tiny_folder())
    gather(teacher, query())
    settings = teacher._store.teachers()[teacher.fingerprint]
    assert settings["score"] is True and settings["topk"] == 320
    assert settings["vocabulary"] == query().vocabulary
    assert json.dumps(settings)
