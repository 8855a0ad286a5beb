"""Rock tokens: how they are found, and that their prediction, not what follows it, is weakened."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import TypeAdapter
from scored_by import scored, scores_of

from omniopd.composition import compose
from omniopd.errors import ConfigError
from omniopd.method import Method
from omniopd.parts.rock_tokens import LOSS, RockTokens
from omniopd.registry import METHODS
from omniopd.rocks import RockList, TokenType, contexts_of, heaviest, matched_random, mine_rock_tokens, recurring
from omniopd.settings import tagged
from omniopd.types import Capabilities, Rollout, Signal
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer
from students.view import StudentView

A, B, ROCK = 20, 21, 22
TYPES = (
    TokenType(id=1, frequency=10, loss=0.25),
    TokenType(id=2, frequency=1, loss=2.0),
    TokenType(id=3, frequency=30, loss=0.05),
)


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


@pytest.fixture
def listed(student: Policy, tmp_path: Path) -> Path:
    """A list of one rock."""
    path = tmp_path / "rocks.json"
    types = (TokenType(id=ROCK, frequency=4, loss=1.0, knock_out=-0.02), TokenType(id=A, frequency=4, loss=0.0))
    RockList(vocabulary=student.vocabulary.digest, checkpoint="step-10", types=types).save(path)
    return path


def built(student: Policy, control: str = "none", form: str = "sampled", **part: Any) -> Method:
    config = {"name": "rock_tokens", "control": control, "form": form, "parts": [{"name": "rock_tokens", **part}]}
    return compose(TypeAdapter(tagged(METHODS)).validate_python(config), student, 0)


def part_of(method: Method) -> RockTokens:
    (part,) = method.parts  # type: ignore[attr-defined]
    assert isinstance(part, RockTokens)
    return part


def read(method: Method, rows: Sequence[Rollout], step: int = 1) -> Signal:
    return method.read(rows, scores_of(method.audit(rows, step), lambda row, t: -1.0 - t), step)


def taught(student: Policy, rows: Sequence[Rollout], signal: Signal) -> tuple[float, list[torch.Tensor]]:
    trainer = Trainer(student, OptimizerSettings(), METHODS.get("opd").Config())
    loss = trainer.accumulate(rows, signal)["loss"]
    return loss, [p.grad.clone() for p in student.model.parameters() if p.grad is not None]


def occurrences(
    counts: dict[int, tuple[int, float, int]], similar: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A corpus: of each type (occurrences, mean loss, how many are persistent); `similar` contexts of type 1 are alike."""
    ids, losses, contexts = [], [], []
    for id, (number, mean, high) in counts.items():
        low = (mean * number - 3 * high) / max(1, number - high) if high else mean
        for place in range(number):
            ids.append(id)
            losses.append(3.0 if place < high else low)
            contexts.append(torch.eye(16)[0 if id == 1 and place < similar else place % 16])
    return torch.tensor(ids), torch.tensor(losses), torch.tensor(losses), torch.stack(contexts)


# ------------------------------------------------------------------ mining


def test_the_sheets_scores_rank_by_mass_not_by_mean() -> None:
    assert [one.score for one in TYPES] == pytest.approx([2.5, 2.0, 1.5])
    assert heaviest(TYPES, 3) == (1, 2, 3)
    assert sorted(TYPES, key=lambda one: -one.loss)[0].id == 2


def test_what_does_not_recur_is_no_rock() -> None:
    recurring_one = TYPES[0].model_copy(update={"recurrence": 0.8})
    single = TYPES[1].model_copy(update={"recurrence": 0.0})
    assert (recurring_one.score, single.score) == (pytest.approx(2.0), 0)
    assert heaviest([recurring_one, single], 5) == (1,)


def test_mining_counts_persistent_occurrences_in_similar_contexts() -> None:
    ids, before, after, contexts = occurrences({1: (10, 2.5, 8), 2: (1, 3.0, 1), 3: (30, 0.05, 0)})
    found = {one.id: one for one in mine_rock_tokens(ids, before, after, contexts)}
    assert {id: one.frequency for id, one in found.items()} == {1: 10, 2: 1, 3: 30}
    assert {id: one.recurrence for id, one in found.items()} == pytest.approx({1: 0.8, 2: 0.0, 3: 0.0})
    assert found[1].loss == pytest.approx(2.5)
    assert heaviest(list(found.values()), 5) == (1,)


def test_an_occurrence_that_was_learned_or_has_another_context_does_not_count() -> None:
    ids, before, after, contexts = occurrences({1: (10, 2.5, 8), 3: (30, 0.05, 0)}, similar=5)
    (one, _) = mine_rock_tokens(ids, before, after, contexts)
    assert one.recurrence == 0.5
    after = torch.where((ids == 1) & (torch.arange(len(ids)) < 2), 0.0, after)  # two were learned
    (one, _) = mine_rock_tokens(ids, before, after, contexts)
    assert one.recurrence == pytest.approx(0.3)


def test_mining_does_not_depend_on_the_order_of_occurrences() -> None:
    corpus = occurrences({1: (10, 2.5, 8), 2: (1, 3.0, 1), 3: (30, 0.05, 0)})
    order = torch.randperm(41, generator=torch.Generator().manual_seed(0))
    moved = mine_rock_tokens(*(side[order] for side in corpus))
    assert [one.recurrence for one in moved] == [one.recurrence for one in mine_rock_tokens(*corpus)]


def test_contexts_that_are_nothing_are_like_nothing() -> None:
    assert recurring(torch.zeros(4, 3), 0.8, 0.3) == 0
    assert recurring(torch.ones(1, 3), 0.8, 0.3) == recurring(torch.zeros(0, 3), 0.8, 0.3) == 0
    assert recurring(torch.ones(4, 3), 0.8, 0.3) == 4
    assert recurring(torch.eye(3)[[0, 0, 1]], 0.8, 0.5) == 2  # each of the two has one alike among two others


def test_the_unpublished_thresholds_are_the_sheets() -> None:
    """The upper fifth of losses, a cosine of 0.8, three in ten of the others."""
    ids = torch.cat([torch.zeros(11, dtype=torch.long), torch.arange(1, 45)])  # 11 of 55: the upper fifth
    losses = torch.cat([torch.full((11,), 2.0), torch.linspace(0, 1.9, 44)])

    def kept(alike: int, cosine: float, after: torch.Tensor = losses) -> float:
        """Recurrence of 11 occurrences, of which groups of `alike + 1` have that cosine to one another."""
        shared, own = math.sqrt(cosine), math.sqrt(1 - cosine)
        contexts = torch.zeros(55, 80)
        for place in range(11):
            contexts[place, place // (alike + 1)], contexts[place, 20 + place] = shared, own
        return mine_rock_tokens(ids, losses, after, contexts)[0].recurrence

    assert kept(10, 0.81) == 1 and kept(10, 0.79) == 0
    assert kept(3, 0.9) == pytest.approx(8 / 11) and kept(2, 0.9) == 0  # 3 of 10 others alike, or 2
    lower = losses.clone()
    lower[5:11] = 1.55  # in the upper three tenths
    assert kept(10, 0.9, lower) == pytest.approx(5 / 11)


def test_a_hundred_types_by_context_of_a_list_and_behind_the_five_most_frequent_online(
    student: Policy, tmp_path: Path
) -> None:
    types = tuple(
        TokenType(id=id, frequency=1000 - id, loss=1.0 + id, recurrence=0.5 + (id % 2) / 2) for id in range(150)
    )
    RockList(vocabulary=student.vocabulary.digest, checkpoint="step-10", types=types).save(tmp_path / "list.json")
    by_context = sorted(types, key=lambda one: -one.loss * one.frequency * one.recurrence)
    found = part_of(built(student, source=str(tmp_path / "list.json")))
    assert found.rocks == {one.id for one in by_context[:100]}
    assert (found.config.weight, found.config.renormalise) == (0.1, "none")
    online = part_of(built(student, mine_steps=1))
    row = tiny.rollout(student, [id for id in range(20, 30) for _ in range(30 - id)])
    online.after([replace(row, facts={LOSS: (1.0,) * len(row)})], Signal((), ()), 1, None)  # type: ignore[arg-type]
    assert online.rocks == set(range(25, 30))


def test_a_context_is_the_mean_of_the_tokens_around() -> None:
    embedding = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([3, 1, 4, 1, 5])
    found = contexts_of(ids, embedding, window=2)
    for t in range(5):
        around = [int(ids[i]) for i in range(max(0, t - 2), min(5, t + 3)) if i != t]
        torch.testing.assert_close(found[t], embedding[around].mean(0))
    assert bool((contexts_of(ids[:1], embedding) == 0).all())
    long = torch.arange(20) % 10
    moved = [contexts_of(long.index_fill(0, torch.tensor([place]), 9), embedding)[0] for place in (8, 10)]
    assert not torch.equal(moved[0], contexts_of(long, embedding)[0])  # eight tokens on either side
    assert torch.equal(moved[1], contexts_of(long, embedding)[0])


def test_the_simple_selection_leaves_the_most_frequent_types_out() -> None:
    assert heaviest(TYPES, 5, skip=1) == (1, 2)
    assert heaviest(TYPES, 1, skip=2) == (2,)


@pytest.mark.parametrize("seed", range(5))
def test_random_types_have_as_many_occurrences_as_the_rocks(seed: int) -> None:
    types = [TokenType(id=id, frequency=1 + 400 // (id + 1), loss=(id % 7) / 10) for id in range(300)]
    rocks = heaviest(types, 20, skip=5)
    often = {one.id: one.frequency for one in types}
    drawn = matched_random(types, rocks, seed)
    wanted, got = (sum(often[id] for id in ids) for ids in (rocks, drawn))
    assert abs(got - wanted) <= 0.05 * wanted
    assert not set(drawn) & set(rocks)
    assert len(set(drawn)) == len(drawn) < 2 * len(rocks)
    assert matched_random(types[::-1], rocks, seed) == drawn
    assert matched_random(types, rocks, seed + 100) != drawn


# ------------------------------------------------------------------ the weight


def test_the_prediction_of_a_rock_is_frozen_and_what_follows_it_is_not(student: Policy, listed: Path) -> None:
    rows = [tiny.rollout(student, [A, ROCK, B])]
    signal = read(built(student, source=str(listed), weight=0.0), rows)
    plain = read(compose(METHODS.get("opd").Config(), student, 0), rows)
    assert [v == p for v, p in zip(signal.values_BT[0].tolist(), plain.values_BT[0].tolist(), strict=True)] == [
        True,
        False,
        True,
    ]
    assert signal.values_BT[0][1] == 0
    assert signal.mask_BT[0].all()
    assert signal.stats["rock_share"] == pytest.approx(1 / 3)

    def alone(place: int) -> list[torch.Tensor]:
        only = torch.zeros(3).index_fill_(0, torch.tensor([place]), 1.0)
        return taught(student, rows, replace(signal, values_BT=(signal.values_BT[0] * only,)))[1]

    assert all(not bool(gradient.any()) for gradient in alone(1))
    assert any(bool(gradient.any()) for gradient in alone(2))


def test_in_the_dense_form_it_is_the_divergence_at_that_place(student: Policy, teacher: Policy, listed: Path) -> None:
    rows = [tiny.rollout(student, [A, ROCK, B])]
    method = built(student, form="dense", source=str(listed), weight=0.0)
    signal = method.read(rows, [scored(teacher, query) for query in method.audit(rows, 1)], 1)
    assert signal.weights_BT[0].tolist() == [1, 0, 1]


@pytest.mark.parametrize("renormalise", ["none", "sum_w"])
@pytest.mark.parametrize("types", [(), (TokenType(id=ROCK, frequency=4, loss=0.0),)], ids=["empty", "weightless"])
def test_a_list_without_rocks_is_plain_to_the_last_bit(
    student: Policy, tmp_path: Path, caplog: pytest.LogCaptureFixture, types: tuple[TokenType, ...], renormalise: str
) -> None:
    RockList(vocabulary=student.vocabulary.digest, checkpoint="step-10", types=types).save(tmp_path / "list.json")
    method = built(student, source=str(tmp_path / "list.json"), weight=0.0, renormalise=renormalise)
    rows = [tiny.rollout(student, [A, ROCK, B]), tiny.rollout(student, [ROCK])]
    found, plain = (read(one, rows) for one in (method, compose(METHODS.get("opd").Config(), student, 0)))
    assert all(torch.equal(a, b) for a, b in zip(found.values_BT, plain.values_BT, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found.mask_BT, plain.mask_BT, strict=True))
    assert f"no token type is heavy enough, of {len(types)} that occur" in caplog.text


def test_without_renormalising_the_loss_keeps_its_divisor_and_is_linear_in_the_weight(
    student: Policy, listed: Path
) -> None:
    rows = [tiny.rollout(student, [ROCK, ROCK])]
    losses = [
        taught(student, rows, read(built(student, source=str(listed), weight=w), rows))[0] for w in (0.1, 0.2, 0.4)
    ]
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(4 * losses[0], rel=1e-5)


@pytest.mark.parametrize("form", ["sampled", "dense"])
def test_divided_by_the_sum_of_weights_the_loss_does_not_change_with_their_scale(
    student: Policy, teacher: Policy, listed: Path, form: str
) -> None:
    rows = [tiny.rollout(student, [ROCK, ROCK, ROCK])]

    def loss(weight: float, renormalise: str) -> float:
        method = built(student, form=form, source=str(listed), weight=weight, renormalise=renormalise)
        return taught(student, rows, method.read(rows, [scored(teacher, q) for q in method.audit(rows, 1)], 1))[0]

    assert loss(0.1, "sum_w") == pytest.approx(loss(0.4, "sum_w"), rel=1e-5)
    assert loss(0.1, "none") == pytest.approx(0.1 * loss(0.1, "sum_w"), rel=1e-5)


def test_divided_by_the_sum_of_weights_others_gain_what_rocks_lose(student: Policy, listed: Path) -> None:
    rows = [tiny.rollout(student, [A, ROCK, B, B])]
    plain, weighed = (
        read(built(student, source=str(listed), weight=0.2, renormalise=how), rows).values_BT[0]
        for how in ("none", "sum_w")
    )
    torch.testing.assert_close(weighed, plain * 4 / 3.2)


@pytest.mark.parametrize("renormalise", ["none", "sum_w"])
def test_a_step_of_frozen_tokens_only_teaches_nothing(student: Policy, listed: Path, renormalise: str) -> None:
    rows = [tiny.rollout(student, [ROCK] * 3), tiny.rollout(student, [])]
    signal = read(built(student, source=str(listed), weight=0.0, renormalise=renormalise), rows)
    loss, gradients = taught(student, rows, signal)
    assert loss == 0
    assert all(not bool(gradient.any()) for gradient in gradients)


# ------------------------------------------------------------------ the list


def test_a_list_for_another_tokenizer_is_refused(student: Policy, listed: Path) -> None:
    text = json.loads(listed.read_text())
    listed.write_text(json.dumps({**text, "vocabulary": "0123"}))
    with pytest.raises(ConfigError, match=r"another tokenizer \(0123\) than the student's"):
        built(student, source=str(listed))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("[]", "no list of token types"),
        ("\xff", "no list"),
        ('{"vocabulary": "v", "types": []}', "no list"),  # of which student, at which step?
    ],
)
def test_a_list_that_can_not_be_read_is_refused(
    student: Policy, tmp_path: Path, content: str | None, said: str
) -> None:
    path = tmp_path / "list.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=said):
        built(student, source=str(path))


def test_a_type_that_the_student_needs_is_a_caution(student: Policy, listed: Path) -> None:
    assert any(
        f"accuracy falls without 1 of the listed types (ids {ROCK})" in said
        for said in built(student, source=str(listed)).cautions()
    )
    assert not any("accuracy falls" in said for said in built(student).cautions())


@pytest.mark.parametrize(("delta", "pillars"), [(-0.01, (ROCK,)), (-0.009, ()), (0.02, ()), (None, ())])
def test_a_pillar_costs_a_point_of_accuracy(
    student: Policy, tmp_path: Path, delta: float | None, pillars: tuple[int, ...]
) -> None:
    types = (TokenType(id=ROCK, frequency=4, loss=1.0, knock_out=delta), TokenType(id=A, frequency=4, loss=1.0))
    RockList(vocabulary=student.vocabulary.digest, checkpoint="step-10", types=types).save(tmp_path / "list.json")
    assert part_of(built(student, source=str(tmp_path / "list.json"))).pillars == pillars


def test_a_list_needs_nothing_of_the_teacher_and_mining_needs_its_distributions(student: Policy, listed: Path) -> None:
    offered = Capabilities(score=True, vocabulary=student.vocabulary.digest)
    assert built(student, source=str(listed)).lacking(offered) == []
    assert built(student, loss="sampled").lacking(offered) == []
    assert built(student).lacking(offered) == ["logits"]


# ------------------------------------------------------------------ mined on the way


def mined(student: Policy, **part: Any) -> tuple[Method, list[Rollout]]:
    """A method at the end of its two steps of mining: B is the heaviest type, A the most frequent."""
    method = built(student, mine_steps=2, types=1, skip=1, **part)
    row = tiny.rollout(student, [A, A, A, B, B, ROCK])
    rows = [replace(row, facts={LOSS: (9.0, 9.0, 9.0, 2.0, 3.0, float("nan"))})]
    for step in (1, 2):
        signal = read(method, rows, step)
        plain = read(compose(METHODS.get("opd").Config(), student, 0), rows)
        assert torch.equal(signal.values_BT[0], plain.values_BT[0])
        method.after(rows, signal, step, None)  # type: ignore[arg-type]
    return method, rows


def test_the_first_steps_are_plain_and_mined(student: Policy) -> None:
    method, rows = mined(student)
    assert part_of(method).rocks == {B}
    assert part_of(method).mined == {A: (6, 54.0), B: (4, 10.0)}
    weighed, plain = (
        read(one, rows).values_BT[0] for one in (method, compose(METHODS.get("opd").Config(), student, 0))
    )
    assert (weighed / plain).tolist() == pytest.approx([1, 1, 1, 0.1, 0.1, 1])
    before = dict(part_of(method).mined)
    method.after(rows, read(method, rows), 3, None)  # type: ignore[arg-type]
    assert part_of(method).mined == before


def test_the_random_control_weakens_another_type(student: Policy, caplog: pytest.LogCaptureFixture) -> None:
    method, _ = mined(student, selection="random")
    assert part_of(method).rocks == frozenset()  # the only other type has 6 occurrences, not 4
    assert "the random types have 0% of the rocks' occurrences" in caplog.text
    part = part_of(built(student, mine_steps=1, types=1, skip=0, selection="random"))
    row = tiny.rollout(student, [A, A, B, B, ROCK])
    part.after([replace(row, facts={LOSS: (9.0, 9.0, 2.0, 3.0, 1.0)})], Signal((), ()), 1, None)  # type: ignore[arg-type]
    assert part.rocks == {B}


def test_what_is_mined_survives_a_restart(student: Policy) -> None:
    method, rows = mined(student)
    state = method.state_dict()
    resumed = built(student, mine_steps=2, types=1, skip=1)
    assert part_of(resumed).rocks is None
    resumed.load_state_dict(state)
    assert torch.equal(read(resumed, rows).values_BT[0], read(method, rows).values_BT[0])
    assert part_of(resumed).mined == part_of(method).mined


@pytest.mark.parametrize("loss", ["exact", "sampled"])
def test_a_tokens_loss_is_measured_while_types_are_mined(student: Policy, teacher: Policy, loss: str) -> None:
    rows = [tiny.rollout(student, [A, ROCK, B, A])]
    method = built(student, loss=loss, mine_steps=1)
    evidence = [scored(teacher, query) for query in method.audit(rows, 1)]
    view = StudentView(student, rows)
    found = list(method.measure({0: rows[0]}, evidence, view)[0][LOSS])
    with torch.no_grad():
        whole = torch.tensor([[*rows[0].prompt_ids, *rows[0].ids]])
        p, q = (
            m.model(input_ids=whole).logits[0].log_softmax(-1)[len(rows[0].prompt_ids) - 1 : -1]
            for m in (student, teacher)
        )
    ids = torch.tensor(rows[0].ids)[:, None]
    expected = (p.exp() * (p - q)).sum(-1) if loss == "exact" else (p - q).gather(1, ids)[:, 0]
    assert found == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-4)
    measured = [replace(rows[0], facts={LOSS: tuple(found)})]
    method.after(measured, method.read(measured, evidence, 1), 1, None)  # type: ignore[arg-type]
    assert not method.measure({0: rows[0]}, evidence, view)


def test_the_control_puts_the_same_weights_elsewhere(student: Policy, listed: Path) -> None:
    rows = [tiny.rollout(student, [ROCK, ROCK, A, B, A, B, A, B, A, B])]
    method = built(student, control="shuffled", source=str(listed), weight=0.0)
    places = [tuple((read(method, rows, step).values_BT[0] == 0).nonzero()[:, 0].tolist()) for step in range(1, 6)]
    assert all(len(one) == 2 for one in places)
    assert len(set(places)) > 1
