"""TOPD, the reconstruction: candidates, gate, false alarms, and guidance at forks through the real update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
import torch
from pydantic import TypeAdapter, ValidationError
from scored_by import scores_of
from torch import Tensor

from omniopd.composition import Composed, compose
from omniopd.losses import forward_kl, token_nll
from omniopd.method import Gradients, Method
from omniopd.parts import fork_guidance
from omniopd.parts.fork_guidance import ForkGuidance, ForkGuidanceSettings, candidates, decayed, percentile
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import Branch, Capabilities, Continuations, ContinueQuery, Evidence, Reply, Rollout, Signal
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

NO_GRADIENTS = cast(Gradients, None)
LOSSES = {0: {3: 5.0, 15: 4.0}, 1: {6: 3.0}}  # -lr of the made-up teacher; 0.1 elsewhere
TEXT = [20, 45, 70, 95, 120, 145, 170, 195]


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def config_of(**settings: Any) -> dict[str, Any]:
    return {"name": "topd", "parts": [{"name": "fork_guidance", "horizon": 6, **settings}]}


def built(student: Policy, **settings: Any) -> Method:
    return compose(TypeAdapter(tagged(METHODS)).validate_python(config_of(**settings)), student, 0)


def rows_of(student: Policy) -> list[Rollout]:
    """Rollouts of plain letters, so that their text is cut again as it was written."""
    texts = ["The answer is 12 + 7 = 19, so Tom has 19 apples. First, we add the two.", "Then we divide by three."]
    rows = [tiny.rollout(student, student.encode(text)[0]) for text in texts]
    return [*rows, tiny.rollout(student, [])]


def loss_at(row: int, t: int) -> float:
    return LOSSES.get(row, {}).get(t, 0.1)


def heard(
    method: Method, rows: Sequence[Rollout], reply: Callable[[ContinueQuery], Reply | None]
) -> tuple[list[Evidence], list[ContinueQuery]]:
    """All evidence of a step: scores first, then what the teacher goes on with."""
    first = scores_of(method.audit(rows, 1), lambda row, t: rows[row].logprobs[t] - loss_at(row, t))
    sites = [q for q in method.again(dict(enumerate(rows)), first, 1) if isinstance(q, ContinueQuery)]
    found: list[Evidence] = []
    for query in sites:
        said = reply(query)
        found.append(Continuations(query, (said,) if said else (), {} if said else {"empty": 1}))
    return [*first, *found], sites


def echo(query: ContinueQuery) -> Reply:
    """The teacher writes what the student wrote."""
    return Reply(query.chunk.text, "length")


def other(query: ContinueQuery) -> Reply:
    return Reply(" return x  # done and more of it", "length")


def learned(branch: Branch) -> tuple[int, ...]:
    return branch.ids[branch.context :]


# ------------------------------------------------------------------ pure functions


def test_golden_decay() -> None:
    omega = decayed(50, 0.97)

    assert (omega[0].item(), omega[-1].item()) == pytest.approx((0.038366, 0.008625), abs=1e-6)
    assert omega.sum().item() == pytest.approx(1)


def test_candidates_are_the_worst_apart_and_few() -> None:
    ranked = torch.full((40,), -1.0)
    ranked[[2, 4, 20, 30]] = torch.tensor([5.0, 6.0, 5.0, 1.0])

    assert candidates(ranked, 1.0, 8, 4) == [4, 20, 30]
    assert candidates(ranked, 1.0, 1, 4) == [2, 4, 20, 30]
    assert candidates(ranked, 1.0, 1, 3) == [2, 4, 20]
    assert candidates(ranked, 0.05, 1, 4) == [2, 4]  # the earlier one of two equals
    assert candidates(torch.tensor([math.inf, math.nan, 0.0, -1.0]), 1.0, 1, 4) == []
    assert candidates(torch.zeros(0), 0.1, 8, 4) == []


def test_percentile_is_numpys() -> None:
    assert percentile([1, 2, 3, 4], 30) == pytest.approx(1.9)
    assert percentile([7], 30) == 7
    assert percentile([], 30) == 0


def test_golden_z_scores_that_say_why_the_prototype_is_not_copied() -> None:
    """With n values no z-score exceeds sqrt(n - 1): a rule of mean + 2 std needs six of them. A percentile always fires."""
    for n, most in ((3, 1.414214), (6, 2.236068)):
        outlier = [0.0] * (n - 1) + [1.0]
        values = torch.tensor(outlier, dtype=torch.float64)
        largest = ((values - values.mean()) / values.std(correction=0)).max().item()
        assert largest == pytest.approx(most, abs=1e-6)
        assert (largest >= 2) == (n >= 6)
        assert percentile(outlier, 30) <= 1


def test_the_defaults_are_the_sheets_but_for_what_is_learned_at_a_fork() -> None:
    defaults = ForkGuidanceSettings()
    assert (defaults.horizon, defaults.share, defaults.spacing, defaults.most) == (50, 0.1, 8, 4)
    assert (defaults.mu, defaults.eps, defaults.percentile) == (0.1, 0.05, 30)
    assert (defaults.scale, defaults.rho, defaults.v_low, defaults.rank) == (0.5, 0.97, 0, "loss")
    assert defaults.mode == "hard_tokens"  # the sheet's teacher_prefix is not built


def test_a_token_of_the_teachers_is_a_draw_of_the_forward_kl() -> None:
    """Over all that it may write, the gradient of its cross-entropies is that of KL(q || p), the soft target."""
    torch.manual_seed(0)
    teacher, logits = torch.randn(2, 1, 7, dtype=torch.float64)
    logits.requires_grad_()
    logp, q = logits.log_softmax(-1)[0], teacher.softmax(-1)[0]
    one = torch.autograd.grad(sum(q[a] * token_nll(logp[a : a + 1], torch.ones(1)) for a in range(7)), logits)[0]
    other = torch.autograd.grad(forward_kl(teacher, logits).sum(), logits)[0]
    torch.testing.assert_close(one, other)


# ------------------------------------------------------------------ asking


def test_the_teacher_goes_on_once_from_each_place_of_high_loss(student: Policy) -> None:
    rows = rows_of(student)
    method = built(student)
    evidence, sites = heard(method, rows, other)

    assert [(q.row, q.chunk.start) for q in sites] == [(0, 3), (0, 15), (1, 6)]
    assert all(q.n == 1 and q.max_tokens == 7 and q.by == "fork_guidance" for q in sites)
    assert method.again(dict(enumerate(rows)), evidence, 1) == []
    assert len({q.seed for q in sites}) == len(sites)


def test_by_entropy_no_scores_are_needed(student: Policy) -> None:
    method = built(student, rank="entropy")
    assert isinstance(method, Composed)
    (part,) = method.parts
    rows = rows_of(student)

    assert part.needs == {"continuation"} and method.reads_entropy
    asked = part.again(dict(enumerate(rows)), [], 1)
    entropy = rows[1].entropy
    assert max(range(len(entropy)), key=entropy.__getitem__) in [q.chunk.start for q in asked if q.row == 1]  # type: ignore[union-attr]


# ------------------------------------------------------------------ reading


def test_a_teacher_that_writes_the_same_raises_false_alarms_only(student: Policy) -> None:
    rows = rows_of(student)
    method = built(student)
    signal = method.read(rows, heard(method, rows, echo)[0], 1)

    assert signal.branches == ()
    assert signal.stats["fork_cost"] == 0 and signal.stats["forks"] == 0
    masked = [(row, t) for row, mask in enumerate(signal.mask_BT) for t in range(len(mask)) if not mask[t]]
    assert masked == [(0, 3), (0, 15), (1, 6)]


def test_false_alarms_may_count_less_instead(student: Policy) -> None:
    rows = rows_of(student)
    plain, low = built(student, scale=0, v_low=1), built(student, v_low=0.25)
    evidence, _ = heard(low, rows, echo)
    was, now = plain.read(rows, evidence[:2], 1), low.read(rows, evidence, 1)

    assert all(bool(mask.all()) for mask in now.mask_BT)
    for row in (0, 1):
        ratio = now.values_BT[row] / was.values_BT[row]
        assert ratio.tolist() == pytest.approx([0.25 if t in LOSSES[row] else 1 for t in range(len(rows[row]))])


def test_at_forks_the_student_learns_the_teachers_words(student: Policy) -> None:
    rows = rows_of(student)
    method = built(student)
    evidence, sites = heard(method, rows, lambda q: echo(q) if q.chunk.start == 15 else other(q))
    signal = method.read(rows, evidence, 1)

    assert [branch.row for branch in signal.branches] == [0, 1]
    assert signal.branch_scale == 0.5
    assert signal.stats["fork_tokens"] == 5 + 6 + 6  # the last token of a text that was cut is left out
    assert signal.stats["fork_tokens_cap"] == 4 * 6 * 3
    for branch in signal.branches:
        assert 0 < len(learned(branch)) <= 6
        assert branch.weights == tuple(decayed(len(learned(branch)), 0.97).tolist())
        prefix = student.decode([*rows[branch.row].ids[: branch.at], *branch.ids[: branch.context]])
        assert prefix == next(q.chunk.prefix for q in sites if q.row == branch.row)
        assert " return x  # done".startswith(student.decode(list(learned(branch))))
    assert [t for t in range(len(rows[0])) if not signal.mask_BT[0][t]] == [15]
    assert bool(signal.mask_BT[1].all())


def test_a_candidate_of_which_nothing_came_is_left_as_it_is(student: Policy) -> None:
    rows = rows_of(student)
    method = built(student)
    signal = method.read(rows, heard(method, rows, lambda query: None)[0], 1)

    assert all(bool(mask.all()) for mask in signal.mask_BT) and signal.branches == ()
    assert (signal.stats["fork_holes"], signal.stats["fork_candidates"], signal.stats["fork_tokens"]) == (3, 3, 0)


def test_a_teacher_that_stops_at_once_teaches_the_end(student: Policy) -> None:
    rows = rows_of(student)
    method = built(student)
    signal = method.read(rows, heard(method, rows, lambda query: Reply("", "stop"))[0], 1)

    assert {learned(branch) for branch in signal.branches} == {(student.end_id,)}
    assert all(branch.weights == (1.0,) for branch in signal.branches)


def test_no_branch_goes_on_behind_the_end_of_a_rollout_that_was_cut(student: Policy) -> None:
    rows = rows_of(student)
    short = replace(rows[1], ids=rows[1].ids[:9], logprobs=rows[1].logprobs[:9], entropy=rows[1].entropy[:9])
    rows[1] = replace(short, ends=rows[1].ends[:9], text=rows[1].text[: rows[1].ends[8]])
    whole = [rows[0], replace(rows[1], finish="stop"), rows[2]]
    method = built(student, percentile=0)
    cut, free = (method.read(some, heard(method, some, other)[0], 1) for some in (rows, whole))
    one, two = (next(len(learned(b)) for b in signal.branches if b.row == 1) for signal in (cut, free))

    assert one == 9 - 6 < two


def test_the_gate_is_a_running_percentile_that_survives_a_restart(student: Policy) -> None:
    rows = rows_of(student)
    method, again = built(student, window=4), built(student, window=4)
    evidence, _ = heard(method, rows, lambda q: echo(q) if q.row else other(q))
    part = method.parts[0]  # type: ignore[attr-defined]
    assert isinstance(part, ForkGuidance)
    first = method.read(rows, evidence, 1)
    assert part.costs == []  # until the update is made
    method.after(rows, first, 1, NO_GRADIENTS)
    again.load_state_dict(method.state_dict())
    assert first.stats["fork_delta"] == percentile(part.costs, 30)
    assert len(part.costs) == 3

    later, restarted = method.read(rows, evidence, 2), again.read(rows, evidence, 2)
    method.after(rows, later, 2, NO_GRADIENTS)
    assert later.stats == restarted.stats
    assert len(part.costs) == 4  # the window


def test_the_order_of_the_evidence_changes_nothing(student: Policy) -> None:
    rows = rows_of(student)
    one, two = built(student), built(student)
    evidence, _ = heard(one, rows, lambda q: Reply(f" {q.chunk.start} apples", "stop"))
    there, back = one.read(rows, evidence, 1), two.read(rows, evidence[::-1], 1)

    assert there.branches == back.branches != ()
    assert all(torch.equal(a, b) for a, b in zip(there.mask_BT, back.mask_BT, strict=True))
    for method, signal in ((one, there), (two, back)):
        method.after(rows, signal, 1, NO_GRADIENTS)
    assert one.state_dict() == two.state_dict() != built(student).state_dict()


def test_the_embeddings_stay_the_initial_students(student: Policy) -> None:
    rows, first, second = rows_of(student), built(student), built(student)
    evidence, _ = heard(first, rows, other)
    before = first.read(rows, evidence, 1).stats["fork_cost"]
    with torch.no_grad():
        student.model.get_input_embeddings().weight.normal_()
    late = built(student)

    assert second.read(rows, evidence, 1).stats["fork_cost"] == before
    assert late.read(rows, evidence, 1).stats["fork_cost"] != before


def test_of_equal_costs_all_are_forks(student: Policy) -> None:
    """D >= delta, not above it: a single candidate is its own percentile."""
    rows = [rows_of(student)[1]]
    method = built(student)
    scores = scores_of(method.audit(rows, 1), lambda row, t: rows[0].logprobs[t] - loss_at(1, t))
    (site,) = method.again({0: rows[0]}, scores, 1)[:1]
    assert isinstance(site, ContinueQuery)
    signal = method.read(rows, [*scores, Continuations(site, (other(site),))], 1)

    assert signal.stats["forks"] == 1 and signal.stats["fork_delta"] == signal.stats["fork_cost"] > 0
    assert bool(signal.mask_BT[0].all())


def test_without_candidates_plain_distillation_is_left(student: Policy) -> None:
    rows = rows_of(student)
    plain, method = built(student, scale=0, v_low=1), built(student)
    scores = scores_of(method.audit(rows, 1), lambda row, t: rows[row].logprobs[t] + 0.1)
    assert method.again(dict(enumerate(rows)), scores, 1) == []
    was, now = plain.read(rows, scores, 1), method.read(rows, scores, 1)

    assert all(map(torch.equal, was.values_BT, now.values_BT)) and all(map(torch.equal, was.mask_BT, now.mask_BT))
    assert now.branches == ()
    assert (now.stats["fork_candidates"], now.stats["fork_cost"], now.stats["fork_delta"]) == (0, None, None)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "text", ["", " re", " return x  # done and more of it than the rollout has left to be compared with"]
)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_texts_of_two_lengths_are_compared_and_learned_without_a_number_that_is_none(
    student: Policy, text: str, finish: Any, exact: bool
) -> None:
    """Rollouts shorter than K, one of a single token, and a teacher that stops early or is cut."""
    rows = [*rows_of(student), tiny.rollout(student, student.encode("T")[0])]
    method = built(student, horizon=500, share=1.0, spacing=1, exact=exact)
    evidence, sites = heard(method, rows, lambda query: Reply(text, finish))
    signal = method.read(rows, evidence, 1)
    empty = finish == "length" and not text  # nothing that could be compared

    assert {query.row for query in sites} == {0, 1, 3}
    assert signal.stats["fork_holes"] == (len(sites) if empty else 0)
    assert empty or math.isfinite(signal.stats["fork_cost"] or math.nan)
    assert all(math.isfinite(number) for number in taught(student, method, rows, signal).values())


# ------------------------------------------------------------------ the update


def taught(student: Policy, method: Method, rows: Sequence[Rollout], signal: Signal) -> dict[str, float]:
    return Trainer(student, OptimizerSettings(), method.objective).accumulate(rows, signal)


def test_the_term_is_lambda_times_the_mean_over_forks_of_the_weighed_cross_entropy(student: Policy) -> None:
    rows = rows_of(student)
    method = built(student)
    signal = method.read(rows, heard(method, rows, other)[0], 1)
    terms = taught(student, method, rows, signal)

    each = []
    for branch in signal.branches:
        row = rows[branch.row]
        before = [*row.prompt_ids, *row.ids[: branch.at], *branch.ids[: branch.context]]
        logp, _ = tiny.dense(student.model, before, learned(branch))
        each.append(float((decayed(len(logp), 0.97) * -logp.double()).sum()))
    assert len(each) > 1
    assert terms["branch_loss"] == pytest.approx(0.5 * sum(each) / len(each), rel=1e-5)


def gradient(student: Policy) -> Tensor:
    return torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])


def test_the_gradient_is_that_of_both_terms_at_their_own_places_and_of_no_other(student: Policy) -> None:
    """Against both terms written out, position by position, by a dense forward pass for each text."""
    rows = rows_of(student)
    method = built(student)
    signal = method.read(rows, heard(method, rows, lambda q: echo(q) if q.chunk.start == 15 else other(q))[0], 1)
    taught(student, method, rows, signal)
    ours = gradient(student)
    student.model.zero_grad()

    def logp(before: Sequence[int], ids: Sequence[int]) -> Tensor:
        whole = student.model(input_ids=torch.tensor([[*before, *ids]])).logits[0].log_softmax(-1)
        return whole[len(before) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]

    count = sum(int(mask.sum()) for mask in signal.mask_BT)
    loss = torch.zeros(())
    for n, row in enumerate(rows[:2]):
        losses = torch.tensor([loss_at(n, t) for t in range(len(row))])
        if n == 0:
            losses[15] = 0  # the false alarm
        loss = loss + (losses * logp(row.prompt_ids, row.ids)).sum() / count
    for branch in signal.branches:
        row, omega = rows[branch.row], decayed(len(learned(branch)), 0.97).float()
        before = [*row.prompt_ids, *row.ids[: branch.at], *branch.ids[: branch.context]]
        loss = loss - 0.5 / len(signal.branches) * (omega * logp(before, learned(branch))).sum()
    loss.backward()
    assert len(signal.branches) == 2
    torch.testing.assert_close(ours, gradient(student), rtol=1e-3, atol=1e-6)


def test_where_both_write_the_same_an_open_gate_is_likelihood_of_the_students_own_next_tokens(
    student: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one-sample form of forward KL on positions t to t + K - 1."""
    rows = rows_of(student)
    method, plain = built(student), built(student, scale=0, v_low=1)
    monkeypatch.setattr(fork_guidance, "transport_cost", lambda *args, **how: 1.0)
    evidence, sites = heard(method, rows, echo)
    signal, reference = method.read(rows, evidence, 1), plain.read(rows, evidence[:2], 1)
    assert len(signal.branches) == len(sites) == 3
    taught(student, method, rows, signal)
    guided = gradient(student)

    values = [value.clone() for value in reference.values_BT]
    count = sum(int(mask.sum()) for mask in reference.mask_BT)
    for branch in signal.branches:
        first, row = branch.at + branch.context, rows[branch.row]
        assert learned(branch) == row.ids[first : first + len(learned(branch))]
        omega = decayed(len(learned(branch)), 0.97).float()
        values[branch.row][first : first + len(omega)] += 0.5 * count / 3 * omega
    taught(student, plain, rows, replace(reference, values_BT=tuple(values)))
    torch.testing.assert_close(guided, gradient(student), rtol=1e-3, atol=1e-6)


def test_a_teacher_of_text_alone_guides_beside_audits(student: Policy) -> None:
    """The base method's own continuations and those of the part do not meet."""
    base = {"name": "omniopd", "chunks": 2, "chunk_tokens": 5, "continuations": 4}
    config = {**base, "parts": [{"name": "fork_guidance", "rank": "entropy", "horizon": 6}]}
    rows = rows_of(student)
    plain, method = (compose(TypeAdapter(tagged(METHODS)).validate_python(one), student, 0) for one in (base, config))
    audits: list[Evidence] = [
        Continuations(q, (echo(q),) * q.n) for q in method.audit(rows, 1) if isinstance(q, ContinueQuery)
    ]
    further = [q for q in method.again(dict(enumerate(rows)), audits, 1) if isinstance(q, ContinueQuery)]
    found: list[Evidence] = [Continuations(q, (other(q),)) for q in further]
    was, now = plain.read(rows, audits, 1), method.read(rows, [*audits, *found], 1)

    assert method.needs == {"continuation"} and method.lacking(Capabilities(continuation="raw")) == []
    assert len(was.audits) == len(now.audits) == len(audits) > 0
    guided = [branch for branch in now.branches if branch.weights]
    assert len(now.branches) == len(was.branches) + len(guided) and guided


def test_the_control_deals_forks_out_among_candidates(student: Policy) -> None:
    rows = rows_of(student)
    chosen = set()
    for seed in range(8):
        config = TypeAdapter(tagged(METHODS)).validate_python({**config_of(), "control": "shuffled"})
        method = compose(config, student, seed)
        evidence, sites = heard(method, rows, lambda q: other(q) if (q.row, q.chunk.start) == (0, 3) else echo(q))
        (branch,) = method.read(rows, evidence, 1).branches
        chosen.add((branch.row, branch.at + branch.context))
    assert len(chosen) == len(sites) == 3


def test_soft_targets_are_refused(student: Policy) -> None:
    with pytest.raises(ValidationError, match="'ot_aligned' is not built"):
        built(student, mode="ot_aligned")


def test_two_terms_of_branches_keep_their_size(student: Policy) -> None:
    rows = rows_of(student)
    method = built(student)
    signal = method.read(rows, heard(method, rows, other)[0], 1)
    first = Branch(1, 2, (5, 6, 7), 2.0)
    alone = taught(student, method, rows, replace(signal, branches=(first,), branch_scale=3.0))["branch_loss"]
    guided = taught(student, method, rows, signal)["branch_loss"]

    class Base:
        """A method with a term of branches of its own."""

        def __getattr__(self, name: str) -> Any:
            return getattr(method.base, name)  # type: ignore[attr-defined]

        def read(self, *args: Any) -> Signal:
            return replace(method.base.read(*args), branches=(first,), branch_scale=3.0)  # type: ignore[attr-defined]

    both = built(student)
    both.base = Base()  # type: ignore[attr-defined]
    together = both.read(rows, heard(method, rows, other)[0], 1)
    assert taught(student, method, rows, together)["branch_loss"] == pytest.approx(alone + guided, rel=1e-5)
