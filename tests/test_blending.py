"""The blend of student and teacher: nearest to the teacher, inside its budget, and drawn as it is said."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel

from omniopd.blending import BETA, LEFT, SPENT, STUDENT, kl, one_stop, trb_mix
from omniopd.errors import TeacherError
from omniopd.sampling import Blend, Draw, Guide, Request, named_seed, sample
from omniopd.store import Store
from omniopd.types import Message, Prompt, ScoreQuery, TokenScores
from teachers.given import passage
from teachers.transformers import TransformersConfig, TransformersTeacher

END, LAST = 1, 2  # the student's end of a text, and the teacher's
PROMPTS = [(5, 9, 40), (7,), (30, 31, 32, 33, 34, 35, 36), (12, 80)]
LONGER = [(60, *prompt, 61) for prompt in PROMPTS]  # as the teacher reads them
S = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()
T = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64).log()
SIBLING = Path(__file__).resolve().parents[1] / "examples" / "demo" / "sibling"


def pairs(rows: int = 64, width: int = 7, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    student, teacher = logits.log_softmax(-1)
    return student, teacher


# ------------------------------------------------------------------ the mixture


@pytest.mark.parametrize(
    ("eps", "beta", "mu", "left"),
    [
        (0.001, 0.033956, (0.68107, 0.20788, 0.11104), 1.110229),
        (0.01, 0.103256, (0.63987, 0.22351, 0.13662), 0.989284),
        (0.05, 0.217935, (0.56489, 0.24665, 0.18846), 0.782502),
        (0.5, 0.620918, (0.28110, 0.26887, 0.45003), 0.171284),
        (2.0, 1.0, (0.1, 0.2, 0.7), 0.0),
    ],
)
def test_the_table_of_the_paper_sheet(eps: float, beta: float, mu: Sequence[float], left: float) -> None:
    mixed, found = trb_mix(S[None], T[None], eps)

    assert found.item() == pytest.approx(beta, abs=1e-6)
    assert mixed[0].exp().tolist() == pytest.approx(mu, abs=1e-5)
    assert kl(mixed, T[None]).item() == pytest.approx(left, abs=1e-6)


def test_the_whole_way_and_its_small_budget_slope() -> None:
    assert kl(T, S).item() == pytest.approx(1.167546, abs=1e-6)
    ratio = T - S
    variance = float((S.exp() * (ratio - (S.exp() * ratio).sum()) ** 2).sum())
    assert variance == pytest.approx(1.666089, abs=1e-6)
    for eps, rough in ((0.001, 0.034647), (0.01, 0.109563), (0.05, 0.244991), (0.5, 0.774731)):
        assert math.sqrt(2 * eps / variance) == pytest.approx(rough, abs=1e-6)
    mixed, beta = trb_mix(S, T, 1e-8)
    assert beta.item() == pytest.approx(math.sqrt(2e-8 / variance), rel=1e-3)
    assert (kl(S, T) - kl(mixed, T)).item() == pytest.approx(math.sqrt(2e-8 * variance), rel=1e-3)  # what eps buys


def test_the_budgets_derivative_is_beta_times_a_variance() -> None:
    def spent(beta: float) -> float:
        mu = ((1 - beta) * S + beta * T).log_softmax(-1)
        return kl(mu, S).item()

    mu = (0.6 * S + 0.4 * T).softmax(-1)
    ratio = T - S
    variance = float((mu * (ratio - (mu * ratio).sum()) ** 2).sum())
    assert 0.4 * variance == pytest.approx(1.0750633, abs=1e-7)
    assert (spent(0.4 + 1e-6) - spent(0.4 - 1e-6)) / 2e-6 == pytest.approx(1.0750633, abs=1e-6)


def test_without_a_budget_the_students_own_tensor_comes_back() -> None:
    student, teacher = pairs()
    mixed, beta = trb_mix(student, teacher, 0.0)

    assert mixed is student
    assert not beta.any()


def test_a_large_budget_is_the_teacher_and_the_same_two_stay_what_they_are() -> None:
    student, teacher = pairs()
    mixed, beta = trb_mix(student, teacher, 1e3)
    assert torch.equal(mixed, teacher)
    assert bool((beta == 1).all())
    same, _ = trb_mix(student, student, 0.02)
    assert torch.equal(same, student)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_budget_holds_and_is_used_up_between_the_ends(dtype: torch.dtype) -> None:
    student, teacher = (one.to(dtype) for one in pairs(512))
    for eps in (0.001, 0.02, 0.3):
        mixed, beta = trb_mix(student, teacher, eps)
        spent = kl(mixed.double(), student.double())
        assert float(spent.max()) <= eps + 1e-6
        between = (beta > 0) & (beta < 1)
        assert bool(between.any())
        torch.testing.assert_close(spent[between], torch.full_like(spent[between], eps), atol=2e-6, rtol=0)
        assert mixed.exp().sum(-1).tolist() == pytest.approx([1.0] * 512, abs=1e-5)


def test_no_other_distribution_inside_the_budget_is_nearer_to_the_teacher() -> None:
    generator = torch.Generator().manual_seed(3)
    feasible = 0
    for seed in range(20):
        student, teacher = pairs(1, 4, 1.0, seed)
        mixed, _ = trb_mix(student, teacher, 0.05)
        best = kl(mixed, teacher).item()
        around = mixed + 0.3 * torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
        others = around.log_softmax(-1)
        inside = others[kl(others, student.expand_as(others)) <= 0.05]
        feasible += len(inside)
        assert float(kl(inside, teacher.expand_as(inside)).min()) >= best - 1e-9
    assert feasible > 50_000


def test_more_budget_is_nearer_to_the_teacher() -> None:
    student, teacher = pairs()
    found = [trb_mix(student, teacher, eps) for eps in (0.001, 0.01, 0.1, 0.5, 2.0)]
    for (less, low), (more, high) in pairwise(found):
        assert bool((high >= low).all())
        assert bool((kl(more, teacher) <= kl(less, teacher) + 1e-12).all())


def test_what_one_side_rules_out_stays_out_and_nothing_is_nan() -> None:
    nothing = -torch.inf
    student = torch.tensor([[0.0, 0.0, nothing, 0.0], [0.0, nothing, nothing, 0.0], [0.0, 1.0, nothing, 2.0]])
    teacher = torch.tensor([[0.0, nothing, 0.0, 1.0], [nothing, 0.0, 0.0, nothing], [1.0, 1.0, nothing, 0.0]])
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    for eps in (0.01, 0.5, 50.0):
        mixed, beta = trb_mix(student, teacher, eps)
        assert not mixed.isnan().any()
        assert bool((kl(mixed, student) <= eps + 1e-6).all())
        assert bool((mixed[student == nothing] == nothing).all())
    assert mixed[0, 1] == nothing  # beta > 0: the teacher's zero
    assert beta[1] == 0  # nothing is shared: the student itself
    assert torch.equal(mixed[1], student[1])


def test_the_sampled_gradient_needs_the_ratio() -> None:
    """Expected ascent on the student's logits of `log T - log S` as the advantage, tokens drawn from mu."""
    p = S.exp()
    score = torch.eye(3, dtype=torch.float64) - p  # d log p(a) / d logits
    exact = (p[:, None] * (T - S)[:, None] * score).sum(0)
    assert exact.tolist() == pytest.approx([-0.545, 0.234, 0.311], abs=1e-3)
    for eps, biased in ((0.05, [-0.586, 0.147, 0.440]), (0.02, [-0.568, 0.180, 0.388])):
        mu = trb_mix(S, T, eps)[0]
        unweighted = (mu.exp()[:, None] * (T - S)[:, None] * score).sum(0)
        weighted = (mu.exp()[:, None] * ((S - mu).exp() * (T - S))[:, None] * score).sum(0)
        assert unweighted.tolist() == pytest.approx(biased, abs=1e-3)
        torch.testing.assert_close(weighted, exact)


def test_the_ratio_is_that_of_the_closed_form() -> None:
    mixed, beta = trb_mix(S, T, 0.05)
    normaliser = ((1 - beta) * S + beta * T).logsumexp(-1).exp()
    torch.testing.assert_close((S - mixed).exp(), normaliser * (beta * (S - T)).exp())


def test_a_texts_budget_is_the_sum_of_its_tokens() -> None:
    student, teacher = pairs(4, 3, 3.0, seed=5)  # a first token, and a second after each
    mixed, beta = trb_mix(student, teacher, 0.02)
    assert bool(((beta > 0) & (beta < 1)).all())
    joint = sum(
        float(
            mixed[0, a].exp()
            * mixed[1 + a, b].exp()
            * (mixed[0, a] + mixed[1 + a, b] - student[0, a] - student[1 + a, b])
        )
        for a in range(3)
        for b in range(3)
    )
    assert joint == pytest.approx(0.04, abs=1e-7)


def test_all_ends_are_one_event_and_the_students_id_stands_for_it() -> None:
    logp = torch.randn(5, 6, dtype=torch.float64).log_softmax(-1)
    joined = one_stop(logp, [4, 1, 2])

    torch.testing.assert_close(joined[:, 4].exp(), logp[:, [4, 1, 2]].exp().sum(-1))
    assert bool((joined[:, [1, 2]] == -torch.inf).all())
    assert torch.equal(joined[:, [0, 3, 5]], logp[:, [0, 3, 5]])
    torch.testing.assert_close(joined.exp().sum(-1), torch.ones(5, dtype=torch.float64))
    assert one_stop(logp, [4]) is logp


# ------------------------------------------------------------------ the sampler


@pytest.fixture(scope="module")
def student() -> PreTrainedModel:
    return tiny.model(tiny.byte_level())


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """Of another width: its output layer has padding."""
    return tiny.model(tiny.byte_level(), "qwen3", seed=1, vocab_size=len(tiny.byte_level()) + 24)


def requests(draws: int = 1, limit: int = 12) -> list[Request]:
    both = zip(PROMPTS, LONGER, strict=True)
    return [Request(p, named_seed("test", i), limit, draws, guide_ids=q) for i, (p, q) in enumerate(both)]


def blend(teacher: PreTrainedModel, budget: float, ends: Sequence[int] = (END, LAST)) -> Blend:
    return Blend(Guide(teacher, frozenset(ends), lambda prompt: (), nullcontext()), budget, END)


@torch.no_grad()
def logits_after(model: PreTrainedModel, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """[T, V] before each of `ids`: one row, no cache, no padding."""
    return model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()


def test_what_is_drawn_is_the_blend_of_both_models_at_every_token(
    student: PreTrainedModel, teacher: PreTrainedModel
) -> None:
    width = len(tiny.byte_level())
    own_ends, their_ends = [END, *range(100, 120)], [LAST, *range(120, 140)]  # so many that some texts end soon
    ends = [*own_ends, *their_ends]
    drawn = sample(student, requests(draws=2), own_ends, blend=blend(teacher, 0.1, their_ends))
    lengths = set()
    for own, longer, draws in zip(PROMPTS, LONGER, drawn, strict=True):
        for draw in draws:
            logs, logt = (
                one_stop(logits_after(model, prompt, draw.ids)[:, :width].log_softmax(-1), ends)
                for model, prompt in ((student, own), (teacher, longer))
            )
            mixed, beta = trb_mix(logs, logt, 0.1)
            at = torch.tensor(draw.ids)[:, None]
            for found, expected in (
                (draw.logprobs, mixed.gather(1, at)[:, 0]),
                (draw.facts[STUDENT], logs.gather(1, at)[:, 0]),
                (draw.facts[BETA], beta),
                (draw.facts[SPENT], kl(mixed, logs)),
                (draw.facts[LEFT], kl(mixed, logt)),
            ):
                torch.testing.assert_close(torch.tensor(found), expected, atol=2e-4, rtol=1e-3)
            assert not {*ends[1:]} & {*draw.ids}
            assert (draw.finish == "stop") == (draw.ids[-1] == END)
            lengths.add(len(draw.ids))
    assert len(lengths) > 1  # rows left while others went on


def test_a_large_budget_draws_what_the_teacher_would(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    def ids(draws: list[list[Draw]]) -> list[tuple[int, ...]]:
        return [draw.ids for some in draws for draw in some]

    alone = [replace(request, prompt_ids=request.guide_ids) for request in requests()]
    blended = ids(sample(student, requests(), [END], blend=blend(student, 1e9, [END])))
    assert blended == ids(sample(student, alone, [END]))
    assert blended != ids(sample(student, requests(), [END]))


def test_a_blended_row_does_not_depend_on_its_batch(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    whole = sample(student, requests(), [END], blend=blend(teacher, 0.1))
    parts = sample(student, requests(), [END], blend=blend(teacher, 0.1), batch_tokens=1)
    for (one,), (other,) in zip(whole, parts, strict=True):
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_without_a_budget_there_is_no_blend_and_the_teacher_computes_nothing() -> None:
    assert Blend.of(object(), 0.0, END) is None  # type: ignore[arg-type]


def test_the_teacher_has_its_turn_for_itself(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    turn = threading.Lock()
    held: list[bool] = []
    hook = teacher.register_forward_pre_hook(lambda module, args: held.append(turn.locked()))
    sample(student, requests(), [END], blend=Blend(Guide(teacher, frozenset(), lambda prompt: (), turn), 0.1, END))
    hook.remove()
    assert held
    assert all(held)
    assert not turn.locked()


def test_a_text_that_the_teacher_has_no_room_for_is_refused(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    narrow = replace(blend(teacher, 0.1), guide=replace(blend(teacher, 0.1).guide, context=20))
    with pytest.raises(TeacherError, match=r"context of 20 \(21 in all\); lower student\.max_new_tokens"):
        sample(student, requests(), [END], blend=narrow)
    fits = replace(narrow, guide=replace(narrow.guide, context=21))
    assert sample(student, requests(), [END], blend=fits)


# ------------------------------------------------------------------ the teacher's side


def test_a_teacher_in_this_process_offers_its_weights_behind_its_own_prompt(tmp_path: Path) -> None:
    teacher = TransformersTeacher(
        TransformersConfig(path=str(SIBLING), system="Be brief."), Store(tmp_path / "s.sqlite")
    )
    prompt = Prompt("p", (Message("user", "How many apples does Ann have?"),))
    query = ScoreQuery(prompt, 0, (40, 41, 42), teacher.capabilities.vocabulary, "", False)
    (scores,) = asyncio.run(teacher.gather([query]))
    guide = teacher.guide

    assert teacher.capabilities.decode
    assert guide.context == guide.model.config.max_position_embeddings
    assert TransformersTeacher.promises(TransformersConfig(path=str(SIBLING))).decode
    assert guide.prompt_ids(prompt) == passage(teacher.manner.ask(query), teacher.backend.chat).prompt_ids
    assert isinstance(scores, TokenScores)
    logp = logits_after(guide.model, guide.prompt_ids(prompt), query.ids).log_softmax(-1)
    own = logp.gather(1, torch.tensor(query.ids)[:, None])[:, 0]
    assert own.tolist() == pytest.approx(scores.logprobs, abs=1e-4)
    asyncio.run(teacher.close())
