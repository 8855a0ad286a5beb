"""BPM's target: where a position reads the teacher, against enumerating the teacher's strings."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_vocabulary import toy

from omniopd.losses.cross_tokenizer import mapped_divergence
from omniopd.losses.divergence import forward_kl, generalised_jsd
from omniopd.targets.bpm import BytePrefixTarget, Place, places
from omniopd.types import Distributions
from omniopd.vocabulary_map import NONE, VocabularyMap

NO_IDS = torch.zeros(0, dtype=torch.long)


TEACHER = toy(b"ab", b"abc", b"b", b"c", b"ca", b"\xff")
STUDENT = toy(b"a", b"ab", b"b", b"bc", b"c")
WORDS = VocabularyMap(TEACHER, STUDENT, STUDENT.size - 1)
V, W = STUDENT.size, TEACHER.size


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(logits: Tensor) -> Distributions:
    return Distributions(logits, lambda rows: rows)


def target_of(
    where: list[Place | None], logits: Tensor, words: VocabularyMap = WORDS, beta: float = 0.0
) -> BytePrefixTarget:
    return BytePrefixTarget(where, given(logits), words, beta)


# ------------------------------------------------------------------ places


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ([b"ab"], [b"ab"], [(3, b"", True)]),
        ([b"a", b"b", b"c"], [b"abc"], [(3, b"", True), (3, b"a", True), (3, b"ab", True)]),
        ([b"abc"], [b"a", b"bc"], [(3, b"", True)]),
        ([b"a", b"bc", b"d"], [b"ab", b"cd"], [(3, b"", True), (3, b"a", True), (4, b"c", False)]),
        ([b""], [b""], [(3, b"", True)]),
    ],
    ids=["equal", "inside one", "student's longer", "across", "end of the turn"],
)
def test_places(student: list[bytes], teacher: list[bytes], expected: list[tuple[int, bytes, bool]]) -> None:
    assert places(student, teacher, 3) == [Place(*place) for place in expected]


def test_places_of_random_cuts_spell_the_text_before_them() -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = bytes(draw.choices(b"abc", k=9))
        sides = [sorted({9, *draw.sample(range(1, 9), draw.randint(0, 8))}) for _ in range(2)]
        student, teacher = ([text[a:b] for a, b in itertools.pairwise([0, *side])] for side in sides)
        for i, place in enumerate(places(student, teacher, 0)):
            before = b"".join(student[:i])
            assert b"".join(teacher[: place.row]) + place.spelled == before
            assert len(place.spelled) < len(teacher[place.row])
            assert place.exact == (len(before) < len(teacher[0]))


# ------------------------------------------------------------------ the target


def test_golden_target_of_a_row() -> None:
    q = torch.tensor([[0.4, 0.2, 0.1, 0.25, 0.0, 0.05, 0.0]], dtype=torch.float64)
    target, residual, _ = target_of([], q.log()).mapped([Place(0, b"", True)], drawn(1, V))
    torch.testing.assert_close(target[0], torch.tensor([0, 0.6, 0.1, 0, 0.25, 0], dtype=torch.float64))
    assert residual.item() == pytest.approx(0.05)


def test_inside_a_token_the_target_is_the_teachers_conditional_distribution() -> None:
    """After "a": only ab and abc go on, with b and bc; in a vocabulary where no token ends inside "a" that is exact."""
    q = torch.tensor([[0.4, 0.2, 0.1, 0.2, 0.05, 0.03, 0.02]], dtype=torch.float64)
    target, residual, _ = target_of([], q.log()).mapped([Place(0, b"a", True)], drawn(1, V))
    torch.testing.assert_close(target[0], torch.tensor([0, 0, 2 / 3, 1 / 3, 0, 0], dtype=torch.float64))
    assert residual.item() == 0
    # after "ab" the token ab itself is over: what comes next was not asked
    target, residual, _ = target_of([], q.log()).mapped([Place(0, b"ab", True)], drawn(1, V))
    torch.testing.assert_close(target[0], torch.tensor([0, 0, 0, 0, 1 / 3, 0], dtype=torch.float64))
    assert residual.item() == pytest.approx(2 / 3)


class Strings:
    """A teacher over random next-token tables: every string of tokens has a probability."""

    def __init__(self, words: tuple[bytes, ...], seed: int) -> None:
        self.words, self.rows, self.seed = words, {}, seed

    def row(self, path: tuple[int, ...]) -> Tensor:
        if path not in self.rows:
            self.rows[path] = drawn(len(self.words), seed=hash((self.seed, *path)) % 2**31).softmax(-1)
        return self.rows[path]

    def paths(self, prefix: bytes) -> list[tuple[tuple[int, ...], float]]:
        """Every way to spell the prefix: tokens up to the one that reaches its end, with the probability."""
        found, open_ = [], [((), b"", 1.0)]
        while open_:
            path, spelled, p = open_.pop()
            if len(spelled) >= len(prefix) > 0:
                found.append((path, p))
                continue
            for id, word in enumerate(self.words):
                longer = spelled + word
                if longer.startswith(prefix) or prefix.startswith(longer):
                    open_.append(((*path, id), longer, p * float(self.row(path)[id])))
        return found


def conditional(model: Strings, prefix: bytes, paths: list[tuple[tuple[int, ...], float]], student: Any) -> Tensor:
    """P(student token that opens what remains of the token that reaches the prefix's end), last entry: none."""
    found = torch.zeros(student.size + 1, dtype=torch.float64)
    for path, p in paths:
        rest = b"".join(model.words[id] for id in path)[len(prefix) :]
        fits = [(len(s), id) for id, s in enumerate(student.bytes_of) if s and rest.startswith(s)]
        found[max(fits)[1] if fits else -1] += p
    return found / found.sum()


def test_exact_where_no_token_of_the_teacher_ends_inside_the_prefix() -> None:
    """Against all strings of the teacher: tokens with "a" inside, none of which is "a" itself."""
    words = (b"abb", b"ab", b"aab", b"b", b"ba", b"bb")
    teacher = toy(*words)
    student = toy(b"a", b"b", b"bb", b"ab")
    laid = VocabularyMap(teacher, student, student.size - 1)
    for seed in range(5):
        model = Strings(words, seed)
        row = torch.cat([model.row(()), torch.zeros(1, dtype=torch.float64)]).log()[None]
        for prefix in (b"a", b"aa", b"ab"):
            expected = conditional(model, prefix, model.paths(prefix), student)
            target, residual, _ = target_of([], row, laid).mapped([Place(0, prefix, True)], drawn(1, student.size))
            torch.testing.assert_close(target[0], expected[:-1], atol=1e-12, rtol=1e-10)
            assert float(residual) == pytest.approx(float(expected[-1]), abs=1e-12)


def test_the_realised_cut_bounds_the_prefix_from_below_and_conditions_the_target() -> None:
    """Student a|bc|..., teacher ab|c...: one step is realised. Its product is a lower bound, and cancels in the target."""
    words = (b"a", b"ab", b"b", b"bc", b"c", b"ca", b"cb")
    teacher, student = toy(*words), toy(b"a", b"b", b"bc", b"c")
    laid = VocabularyMap(teacher, student, student.size - 1)
    (place,) = places([b"a", b"bc", b"a"], [b"ab", b"ca"], 0)[2:]
    assert place == Place(1, b"c", False)
    slack = []
    for seed in range(5):
        model = Strings(words, seed)
        every = model.paths(b"abc")
        cut = [(path, p) for path, p in every if path[0] == 1 and words[path[1]].startswith(b"c")]
        mass = float(model.row((1,))[[4, 5, 6]].sum())
        assert sum(p for _, p in cut) == pytest.approx(float(model.row(())[1]) * mass)
        slack.append(sum(p for _, p in every) - sum(p for _, p in cut))
        rows = torch.stack([model.row(()), model.row((1,))])
        rows = torch.cat([rows, torch.zeros(2, 1, dtype=torch.float64)], 1).log()
        target, residual, _ = target_of([], rows, laid).mapped([place], drawn(1, student.size))
        expected = conditional(model, b"abc", cut, student)
        torch.testing.assert_close(target[0], expected[:-1], atol=1e-12, rtol=1e-10)
        assert float(residual) == pytest.approx(float(expected[-1]), abs=1e-12)
    assert min(slack) > 0


def test_mass_is_conserved_at_every_place_in_fp32() -> None:
    where = [Place(row, spelled, True) for row in range(4) for spelled in (b"", b"a", b"ab", b"c", b"b")]
    target, residual, _ = target_of([], 3 * drawn(4, W).float()).mapped(where, drawn(1, V).float())
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.sum(-1) + residual, torch.ones(len(where)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("wider", [0, 5])
def test_r12_padding_of_either_output_layer_means_nothing(wider: int) -> None:
    """Probability on ids past the teacher's vocabulary is nobody's; ids past the student's get none."""
    rows, where = drawn(2, W), [Place(0, b"", True), Place(1, b"a", True)]
    plain, lost, _ = target_of([], rows).mapped(where, drawn(1, V))
    padded = torch.cat([rows, torch.full((2, wider), 9.0, dtype=torch.float64)], 1)
    target, residual, _ = target_of([], padded).mapped(where, drawn(1, V + wider))
    assert torch.equal(target[:, :V], plain)
    assert torch.equal(residual, lost)
    assert target[:, V:].sum() == 0


def test_a_teachers_output_layer_narrower_than_its_toy() -> None:
    """Ids that it lacks have no probability; here the end of the turn."""
    target, residual, _ = target_of([], drawn(1, W - 1)).mapped([Place(0, b"", True)], drawn(1, V))
    assert target[0, V - 1] == 0
    assert float(target.sum() + residual) == pytest.approx(1)


def test_a_students_output_layer_narrower_than_its_toy() -> None:
    target, residual, _ = target_of([], drawn(1, W)).mapped([Place(0, b"", True)], drawn(1, V - 1))
    whole, lost, _ = target_of([], drawn(1, W)).mapped([Place(0, b"", True)], drawn(1, V))
    assert torch.equal(target, whole[:, :-1])
    torch.testing.assert_close(residual, lost + whole[:, -1])


# ------------------------------------------------------------------ the divergence


def mixed(beta: float = 0.0) -> tuple[BytePrefixTarget, list[Place | None]]:
    """Six positions on four rows of the teacher, of which the third is masked."""
    where = [
        Place(0, b"", True), Place(1, b"", True), None, Place(2, b"a", True), Place(2, b"ab", True), Place(3, b"", True)
    ]  # fmt: skip
    return target_of(where, drawn(4, W), beta=beta), where


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_divergence_position_by_position_against_a_loop(beta: float) -> None:
    target, where = mixed(beta)
    logits = drawn(6, V, seed=1)
    found = target.divergence(logits, NO_IDS, 0)
    for t, place in enumerate(where):
        if place is None:
            assert found[t] == 0
        else:
            mass, residual, image = target.mapped([place], logits)
            expected = mapped_divergence(mass, residual, logits[t : t + 1], beta, image)[0]
            torch.testing.assert_close(found[t], expected)
            assert bool(image.all()) == (place.spelled == b"")
    assert target.blocks == ()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_o9_slices_give_what_the_whole_gives(size: int) -> None:
    target, _ = mixed()
    whole = drawn(6, V, seed=1).requires_grad_()
    parts = whole.detach().clone().requires_grad_()
    expected = target.divergence(whole, NO_IDS, 0)
    found = torch.cat([target.divergence(parts[at : at + size], NO_IDS, at) for at in range(0, 6, size)])
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-12)
    weights = drawn(6, seed=2)
    (weights * expected).sum().backward()
    (weights * found).sum().backward()
    torch.testing.assert_close(parts.grad, whole.grad, atol=1e-14, rtol=1e-12)
    assert whole.grad is not None
    assert whole.grad[2].abs().max() == 0


def test_the_gradient_goes_to_the_students_own_rows_by_finite_differences() -> None:
    target, _ = mixed(0.4)
    logits = drawn(6, V, seed=1)
    assert torch.autograd.gradcheck(lambda x: target.divergence(x, NO_IDS, 0), logits.requires_grad_())


def test_an_identical_vocabulary_is_the_divergence_of_one_tokenizer() -> None:
    """Also without the shortcut that methods take: residual 0, each token its own counterpart."""
    one = VocabularyMap(STUDENT, STUDENT, STUDENT.size - 1)
    assert one.identity
    rows, logits = drawn(4, V), drawn(4, V, seed=1)
    where: list[Place | None] = [Place(t, b"", True) for t in range(4)]
    for beta, same in ((0.0, forward_kl(rows, logits)), (0.5, generalised_jsd(rows, logits, 0.5))):
        found = target_of(where, rows, one, beta).divergence(logits, NO_IDS, 0)
        torch.testing.assert_close(found, same, atol=1e-14, rtol=1e-12)


def test_a_self_teacher_gives_zero_and_a_shifted_one_does_not() -> None:
    """The canary: rows that are one place late must show."""
    one = VocabularyMap(STUDENT, STUDENT, STUDENT.size - 1)
    logits = 2 * drawn(5, V)
    where: list[Place | None] = [Place(t, b"", True) for t in range(5)]
    own = target_of(where, logits, one).divergence(logits.clone().requires_grad_(), NO_IDS, 0)
    assert own.detach().abs().max() < 1e-14
    late = target_of(where, logits.roll(1, 0), one).divergence(logits, NO_IDS, 0)
    assert late.min() > 0.1


def test_nothing_to_say_is_zeros() -> None:
    found = target_of([None, None], drawn(1, W)).divergence(drawn(2, V).float(), NO_IDS, 0)
    assert found.tolist() == [0, 0]


def test_o11_rows_stay_finite_where_the_teacher_is_certain() -> None:
    """All probability on one token, in one row on a token that maps to nothing."""
    rows = torch.full((2, W), -math.inf)
    rows[0, 1] = 0.0
    rows[1, 5] = 0.0
    assert int(WORDS.prefix[5]) == NONE
    logits = drawn(3, V).float().requires_grad_()
    where = [Place(0, b"", True), Place(1, b"", True), Place(0, b"ab", True)]
    found = target_of(list(where), rows).divergence(logits, NO_IDS, 0)
    found.sum().backward()
    logp = logits.detach().log_softmax(-1)
    torch.testing.assert_close(found.detach(), torch.stack([-logp[0, 1], torch.zeros(()), -logp[2, 4]]))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# ------------------------------------------------------------------ the boundary behind a token that opens longer ones


def test_behind_a_token_that_opens_longer_ones_these_have_their_part() -> None:
    """The student is behind "ab", which the teacher cut as one token: it could have been "abc"."""
    rows = drawn(2, W).softmax(-1)
    ab, abc = float(rows[0, 0]), float(rows[0, 1])
    plain, lost, _ = target_of([], rows.log()).mapped([Place(1, b"", False)], drawn(1, V))
    target, residual, _ = target_of([], rows.log()).mapped([Place(1, b"", False, before=b"ab")], drawn(1, V))
    expected = plain[0] * ab / (ab + abc)
    expected[4] += abc / (ab + abc)  # the student's "c"
    torch.testing.assert_close(target[0], expected)
    assert float(residual) == pytest.approx(float(lost) * ab / (ab + abc))
    assert float(target.sum() + residual) == pytest.approx(1)


def test_behind_a_token_that_opens_nothing_the_row_is_as_it_was() -> None:
    rows = drawn(2, W)
    plain = target_of([], rows).mapped([Place(1, b"", False)], drawn(1, V))
    behind = target_of([], rows).mapped([Place(1, b"", False, before=b"abc")], drawn(1, V))
    assert all(torch.equal(one, other) for one, other in zip(plain, behind, strict=True))


def test_places_say_what_the_teacher_wrote_before_each_boundary() -> None:
    found = places([b"a", b"b", b"c", b"c"], [b"ab", b"c", b"c"], 3, b"zz")
    assert [place.before for place in found] == [b"zz", b"", b"ab", b"c"]
