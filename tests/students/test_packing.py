"""Trees: a rollout and its branches in one row give the numbers and gradients of separate rows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniopd.types import Branch, Rollout
from students.batches import Batch, micro_batches, tensors
from students.packing import Own, Row, build_rows
from students.policy import Policy
from students.terms import Coefficients
from students.trainer import Learner


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def student(request: pytest.FixtureRequest, llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder, attention=request.param)


@pytest.fixture(scope="module")
def plain(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def bare(prompt_ids: tuple[int, ...], ids: tuple[int, ...]) -> Rollout:
    zeros = (0.0,) * len(ids)
    return Rollout(tiny.prompt(), prompt_ids, ids, zeros, zeros, (0,) * len(ids), "", "length")


ROLLOUTS = [
    bare((3, 9, 40), tuple(range(20, 32))),
    bare((3, 7), (50, 51, 52)),
    bare((3, 8, 8, 8, 8), ()),
    bare((3, 99), (60, 61, 62, 63, 64, 65)),
]
BRANCHES = [
    Branch(0, 5, (70, 71, 72, 73), 1.0),
    Branch(3, 2, (80, 81), 2.0),
    Branch(0, 0, (74, 75, 1), 1.0),  # a whole answer
    Branch(0, 5, (70, 76), 0.5),  # at the same place as another
    Branch(0, 12, (77, 78, 1), 1.0),  # at the very end
    Branch(0, 3, (23, 24, 90, 91), 1.0, context=2),  # repeats two tokens of the prefix
    Branch(2, 0, (92, 93, 94), 1.0),  # beside an empty rollout
    Branch(1, 1, (95,), 1.0),  # a single token
    Branch(1, 2, (96, 97), 1.0, context=1),
]


def numbers(student: Policy, rows: list[Row], own: int, learned: int) -> tuple[Tensor, Tensor]:
    """log p of all response tokens and of all learned branch tokens, by their site numbers."""
    model = student.causal_lm
    found = torch.zeros(own), torch.zeros(learned)
    if rows:
        batch = packed(rows)
        hidden, head = student.states(model, tensors(batch, model.dtype, model.device))
        logp = head(hidden).log_softmax(-1)
        told: tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor]]] = [], []
        for row, (b, column) in zip(batch.rows, batch.places, strict=True):
            if row.own:
                at = column + row.own.start
                told[0].extend((row.own.first + t, logp[b, at + t, token]) for t, token in enumerate(row.own.ids))
            told[1].extend((n, logp[b, column + i, token]) for i, token, n in row.branch_sites)
        for numbered, sites in zip(found, told, strict=True):
            assert sorted(n for n, _ in sites) == list(range(len(numbered)))
            for n, value in sites:
                numbered[n] = value
    return found


def packed(rows: list[Row]) -> Batch:
    """All rows in one batch of two bins, or of one."""
    return Batch.of([half for half in (rows[::2], rows[1::2]) if half])


def reference(student: Policy, rollouts: list[Rollout], branches: list[Branch]) -> tuple[Tensor, Tensor]:
    """The same one sequence at a time, with gradient: the slow reference."""

    def line(before: tuple[int, ...], ids: tuple[int, ...]) -> Tensor:
        logits = student.model(input_ids=torch.tensor([[*before, *ids]])).logits[0, len(before) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids, dtype=torch.long)[:, None])[:, 0]

    own = [line(r.prompt_ids, r.ids) for r in rollouts if r.ids]
    learned = [line((*rollouts[b.row].prompt_ids, *rollouts[b.row].ids[: b.at]), b.ids)[b.context :] for b in branches]
    return torch.cat([*own, torch.zeros(0)]), torch.cat([*learned, torch.zeros(0)])


def gradient(student: Policy, loss: Tensor) -> Tensor:
    student.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in student.model.parameters()])


def check(student: Policy, rollouts: list[Rollout], branches: list[Branch], trees: bool) -> None:
    """Every log p, and a random mixture of them all as the learner sums it, with its gradient."""
    own, learned = sum(map(len, rollouts)), sum(len(b.ids) - b.context for b in branches)
    rows = build_rows(rollouts, branches, trees=trees)
    separate = reference(student, rollouts, branches)
    for ours, truth in zip(numbers(student, rows, own, learned), separate, strict=True):
        torch.testing.assert_close(ours.detach(), truth.detach(), atol=2e-5, rtol=1e-5)
    torch.manual_seed(0)
    mix = torch.randn(own), torch.randn(learned)
    silent = torch.zeros(own)
    loss, terms, _ = Learner(student)(
        packed(rows) if trees else Batch.of([[row] for row in rows]), Coefficients(mix[0], silent, silent, mix[1]), ()
    )
    expected = [-(m * logp).sum() for m, logp in zip(mix, separate, strict=True)]
    assert terms[:2].tolist() == pytest.approx([term.item() for term in expected], abs=5e-4)
    torch.testing.assert_close(
        gradient(student, loss), gradient(student, expected[0] + expected[1]), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("trees", [True, False])
def test_packed_equals_separate_in_value_and_gradient(student: Policy, trees: bool) -> None:
    check(student, ROLLOUTS, BRANCHES, trees)


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda b: f"row{b.row}-at{b.at}-{len(b.ids)}ids-{b.context}context")
def test_each_branch_alone_equals_separate(plain: Policy, branch: Branch) -> None:
    check(plain, ROLLOUTS, [branch], trees=True)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), trees=st.booleans(), words=st.sampled_from([2, 3, 300]))
def test_random_trees_equal_separate_rows(plain: Policy, seed: int, trees: bool, words: int) -> None:
    """With few different tokens branches often agree with the rollout and with one another."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(2, 2 + words) for _ in range(rng.randint(low, high)))

    rollouts = [bare(ids(1, 5), ids(0, 9)) for _ in range(rng.randint(1, 3))]
    branches = []
    for _ in range(rng.randint(1, 6)):
        row = rng.randrange(len(rollouts))
        body = ids(1, 6)
        at = rng.randint(0, len(rollouts[row]))
        branches.append(Branch(row, at, body, rng.random(), context=rng.randrange(len(body))))
    check(plain, rollouts, branches, trees)


def test_qwen3_trees_equal_separate_rows(qwen_folder: Path) -> None:
    check(tiny.policy(qwen_folder), ROLLOUTS, BRANCHES, trees=True)


def test_a_token_sees_its_ancestors_only() -> None:
    (row,) = build_rows([bare((3, 4), (5, 6))], [Branch(0, 1, (7, 8, 9), 1.0)], trees=True)
    assert (row.ids, row.parents) == ([3, 4, 5, 6, 7, 8], [-1, 0, 1, 2, 2, 4])  # 9 is predicted, and predicts nothing
    assert row.own == Own(rollout=0, ids=(5, 6), start=1, first=0)
    assert row.branch_sites == [(2, 7, 0), (4, 8, 1), (5, 9, 2)]
    inputs = tensors(Batch.of([[row]]), torch.float32, torch.device("cpu"))
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 3, 3, 4]]
    seen = (inputs["attention_mask"][0, 0] == 0).int().tolist()
    assert seen[3] == [1, 1, 1, 1, 0, 0]
    assert seen[5] == [1, 1, 1, 0, 1, 1]


def test_the_shared_prefix_is_held_once_in_trees_and_each_time_in_rows() -> None:
    trees = build_rows(ROLLOUTS, BRANCHES, trees=True)
    rows = build_rows(ROLLOUTS, BRANCHES, trees=False)
    assert (len(trees), len(rows)) == (4, 3 + len(BRANCHES))  # the empty rollout alone predicts nothing
    assert sum(len(r.ids) for r in trees) < sum(len(r.ids) for r in rows)
    assert all(row.is_line for row in rows)
    assert not trees[0].is_line


def test_what_branches_have_in_common_is_held_once() -> None:
    same = [Branch(0, 1, (6, 7, 8), 1.0), Branch(0, 1, (6, 7, 9, 1), 1.0), Branch(0, 1, (5, 6, 7), 1.0)]
    (row,) = build_rows([bare((3, 4), (5, 6))], same, trees=True)
    assert row.ids == [3, 4, 5, 6, 7, 9, 5, 6]
    assert [predicts for predicts, _, _ in row.branch_sites] == [2, 3, 4, 2, 3, 4, 5, 2, 6, 7]


def test_rows_that_predict_nothing_are_left_out() -> None:
    assert build_rows([bare((3, 4), ())], [], trees=True) == []
    assert micro_batches([], 10) == []


@given(st.lists(st.integers(1, 40), max_size=20), st.integers(1, 120), st.booleans())
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], budget: int, forests: bool) -> None:
    rows = [Row([i] * length) for i, length in enumerate(lengths)]
    batches = micro_batches(rows, budget, forests=forests, hidden=64)
    assert sorted(row.ids[0] for batch in batches for row in batch.rows) == list(range(len(rows)))
    for batch in batches:
        assert batch.bins * batch.width <= budget or len(batch.rows) == 1
        assert batch.padding == batch.bins * batch.width - sum(map(len, batch.rows)) >= 0
        held = [
            (bin_, column + i)
            for row, (bin_, column) in zip(batch.rows, batch.places, strict=True)
            for i in range(len(row))
        ]
        assert len(set(held)) == len(held)  # nothing stands upon anything else
        assert all(bin_ < batch.bins and column < batch.width for bin_, column in held)
        assert not batch.masked or forests


def test_bins_are_filled_where_lengths_differ_and_lines_of_nearly_one_length_need_no_mask() -> None:
    """The lengths of a step of the demo, and twice the same length but for a token."""
    lengths = [45, 48, 48, 48, 49, 50, 50, 51, 51, 51, 51, 52, 53, 54, 54, 54]
    lengths += [56, 57, 58, 60, 60, 62, 65, 67, 68, 68, 69, 71, 71, 78, 81, 86]
    rows = [Row([1] * length) for length in lengths]
    (plain,) = micro_batches(rows, 16_384)
    (filled,) = micro_batches(rows, 16_384, forests=True, hidden=128)
    assert not plain.masked and plain.padding > 0.3 * plain.bins * plain.width
    assert filled.masked and filled.padding < 0.12 * filled.bins * filled.width
    assert filled.work(128) < 0.9 * plain.work(128)
    (even,) = micro_batches([Row([1] * length) for length in (60, 59, 60, 60)], 16_384, forests=True, hidden=128)
    assert not even.masked and (even.bins, even.width) == (4, 60)
    assert "attention_mask" not in tensors(even, torch.float32, torch.device("cpu"))
    narrow = micro_batches(rows, 16_384, forests=True, hidden=2)  # of attention alone a wide mask is the most
    assert all(batch.bins == len(batch.rows) for batch in narrow)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_mask_shows_each_token_its_ancestors(seed: int) -> None:
    """Random forests against the ancestors, walked one by one."""
    rng = random.Random(seed)
    rows = []
    for _ in range(rng.randint(1, 4)):
        row = Row([rng.randrange(9) for _ in range(rng.randint(1, 5))])
        for _ in range(rng.randrange(8)):
            row.append(rng.randrange(9), rng.randrange(len(row)))
        rows.append(row)
    rows[0].append(11, 0)
    rows[0].append(12, 0)  # a tree for sure, so that there is a mask
    batch = packed(rows)
    inputs = tensors(batch, torch.float32, torch.device("cpu"))
    seen = inputs["attention_mask"][:, 0] == 0
    expected = torch.eye(batch.width, dtype=torch.bool).repeat(batch.bins, 1, 1)
    for row, (b, column) in zip(batch.rows, batch.places, strict=True):
        for i, token in enumerate(row.ids):
            assert inputs["input_ids"][b, column + i] == token
            depth, ancestor = -1, i
            while ancestor >= 0:
                expected[b, column + i, column + ancestor] = True
                depth, ancestor = depth + 1, row.parents[ancestor]
            assert inputs["position_ids"][b, column + i] == depth
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("trees", [True, False])
def test_o12_bins_give_the_loss_and_gradient_of_one_row_each(llama_folder: Path, trees: bool) -> None:
    """Trees and lines of many lengths, in float64."""
    student = tiny.policy(llama_folder)
    student.model.double()
    rng = random.Random(1)
    lengths = [rng.randint(1, 30) for _ in range(12)]
    rollouts = [bare((3, 9), tuple(rng.randrange(2, 300) for _ in range(length))) for length in lengths]
    branches = [Branch(n, lengths[n] // 2, (7, 8, 9, 10), 1.0) for n in range(0, 12, 3)] if trees else []
    torch.manual_seed(0)
    mix = Coefficients(
        torch.randn(sum(lengths)), torch.zeros(sum(lengths)), torch.zeros(sum(lengths)), torch.randn(4 * len(branches))
    )
    rows = build_rows(rollouts, branches, trees=True)
    learner, results = Learner(student), []
    filled = micro_batches(rows, 200, forests=True, hidden=128)
    assert any(len(batch.rows) > batch.bins > 1 for batch in filled)
    for batches in (filled, [Batch.of([[row]]) for row in rows]):
        parts = [learner(batch, mix, ()) for batch in batches]
        loss = torch.stack([part for part, _, _ in parts]).sum()
        results.append((loss.item(), gradient(student, loss)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-6, rtol=1e-6)


def test_o13_padding_and_its_neighbours_change_nothing(plain: Policy) -> None:
    """The pad id is 0 and rows are padded on the right with it; a real token 0 and a final end token count as any."""
    rollouts = [bare((0, 3, 0), (0, 5, 1)), bare((3,), tuple(range(30, 45)))]
    rows = build_rows(rollouts, [], trees=True)
    together, _ = numbers(plain, rows, 18, 0)
    alone = torch.cat([numbers(plain, build_rows([r], [], trees=True), len(r), 0)[0] for r in rollouts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    truth, _ = reference(plain, rollouts, [])
    torch.testing.assert_close(together, truth, atol=1e-5, rtol=1e-5)
    assert rows[0].own == Own(0, (0, 5, 1), start=2, first=0)  # the end token is predicted like any other


def test_o13_a_line_beside_a_tree_is_masked_alike(plain: Policy) -> None:
    check(plain, [ROLLOUTS[1], ROLLOUTS[0]], [Branch(1, 4, (70, 71), 1.0)], trees=True)
