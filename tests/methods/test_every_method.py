"""What holds for every registered method and part, those that come tomorrow among them.

Each is led through a whole step but for writing: its own questions, answered by a made-up teacher, round after round, what it
measures, its reading, and the gradient of the real update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from apart import apart
from pydantic import TypeAdapter
from torch import Tensor

from omniopd.composition import Composed, compose
from omniopd.method import Method
from omniopd.part import Part, PartSettings, Place
from omniopd.registry import METHODS, PARTS
from omniopd.selftest import mirror
from omniopd.selftest.rehearsal import rehearsed
from omniopd.settings import tagged
from omniopd.types import (
    Answers,
    Capabilities,
    ContinueQuery,
    Evidence,
    Prompt,
    Query,
    Reply,
    Rollout,
    Signal,
    TokenScores,
)
from students.policy import Policy, StudentSettings
from students.trainer import OptimizerSettings, Trainer
from students.view import StudentView

GROUP = 2  # rollouts of each prompt
Change = Callable[[TokenScores], TokenScores]
SLOTS = {"sampling", "audit", "evidence", "alignment", "signal", "credit", "objective", "schedule"}

# Settings of parts whose defaults are made for thousands of tokens: without them nothing would happen on a few.
SHORT: dict[str, dict[str, Any]] = {
    "kl_stop": {"window": 2, "low_windows": 1, "exempt": 0, "threshold": 100.0, "warmup_steps": 0, "k": 8},
    "lookahead": {"min_tokens": 0, "k": 3, "tau": 0.0},
    "f_divergence": {"divergence": "forward_kl"},
    "rock_tokens": {"mine_steps": 1, "types": 3, "skip": 0},
    "teachability": {"k": 4},
}
PLAIN_WITHIN_A_FAMILY = "dpca"  # with a teacher of the same tokenizer, as here
UNSEEN = {"rock_tokens", "kl_stop", "soda"}  # one finds rocks first, one cuts all alike here, one's pairs begin alike
ALL = [*METHODS.names(), *(f"opd + {name}" for name in PARTS.names())]


def parts_of(name: str) -> list[str]:
    """The parts of a method's defaults, or the one that is put on plain distillation."""
    method, _, part = name.partition(" + ")
    return [part] if part else [part.name for part in METHODS.get(method).Config().parts]


def config_of(name: str) -> dict[str, Any]:
    """The config of a method with its defaults, or of a part on plain distillation."""
    parts = [{"name": part, **SHORT.get(part, {})} for part in parts_of(name)]
    return {"name": name.partition(" + ")[0], "parts": parts}


def right(prompt: Prompt, text: str) -> bool:
    """A verifier: of every text the same, and of some yes."""
    return sum(map(ord, text)) % 2 == 0


@pytest.fixture(scope="module")
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder, max_new_tokens=64)


@pytest.fixture(scope="module")
def anchored(llama_folder: Path) -> Policy:
    """With the initial student beside the present one."""
    return Policy(StudentSettings(path=str(llama_folder), max_new_tokens=64), anchored=True)


def written(student: Policy, lengths: Sequence[int], finish: str = "stop") -> list[Rollout]:
    """Rollouts of random tokens, `GROUP` of each prompt, with everything that a sampler can tell of them."""
    torch.manual_seed(4)
    rows = []
    for row, length in enumerate(lengths):
        asked = replace(tiny.prompt(f"What is {row // GROUP} + 7?", f"p{row // GROUP}"), reference="7")
        ids = torch.randint(5, 200, (length,)).tolist()
        ends = finish == "stop" and length > 0
        one = tiny.rollout(student, [*ids[:-1], student.end_id] if ends else ids, asked, "stop" if ends else "length")
        logp = _logp(student, one) if length else torch.zeros(0, 1)
        top = [list(zip(*(x.tolist() for x in reversed(place.topk(8))), strict=True)) for place in logp]
        rows.append(replace(one, top=tuple(map(tuple, top))))
    return rows


@torch.no_grad()
def _logp(student: Policy, rollout: Rollout) -> Tensor:
    whole = torch.tensor([[*rollout.prompt_ids, *rollout.ids]])
    return student.model(input_ids=whole).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)


def built(
    student: Policy, config: Mapping[str, Any], check: Callable[[Prompt, str], bool] = right, group: int = GROUP
) -> Method:
    return compose(TypeAdapter(tagged(METHODS)).validate_python(dict(config)), student, 0, check, group)


def rows_for(method: Method, rows: Sequence[Rollout]) -> Sequence[Rollout]:
    """The rollouts, of no tokens where the student writes none."""
    if method.on_policy:
        return rows
    return [replace(row, ids=(), logprobs=(), entropy=(), ends=(), text="", top=(), finish="length") for row in rows]


def said(student: Policy, rows: Sequence[Rollout], queries: Sequence[Query], change: Change) -> list[Evidence]:
    """What the made-up teacher says; a judge's reply holds a rubric, marks and a grade that depend on what it is asked."""
    found = mirror.evidence(student, rows, queries, change)
    return [
        replace(one, replies=(_judged(one),)) if isinstance(one, Answers) and one.query.judge else one for one in found
    ]


def _judged(one: Answers) -> Reply:
    number = sum(map(ord, one.query.prompt.messages[-1].content))
    rubric = [f"[{1 + (number + place) % 9}] Criterion {place}." for place in range(4 + number % 3)]
    marks = [f"{place}: {'yes' if number % (place + 1) else 'no'}" for place in range(1, 7)]
    return Reply("\n".join([*rubric, *marks, f"Grade: {3 + number % 7}"]), "stop")


@dataclass
class Taught:
    """A step: what was read and what it does to the weights."""

    method: Method
    rollouts: list[Rollout]
    evidence: list[Evidence]
    signal: Signal
    loss: float
    gradient: Tensor


def taught(
    student: Policy,
    config: Mapping[str, Any],
    rows: Sequence[Rollout],
    change: Change = mirror.disagreeing,
    check: Callable[[Prompt, str], bool] = right,
    group: int = GROUP,
) -> Taught:
    method = built(student, config, check, group)
    rows = rows_for(method, rows)

    def answer(queries: Sequence[Query]) -> list[Evidence]:
        return said(student, rows, queries, change)

    measured, evidence = rehearsed(method, rows, answer, StudentView(student, rows))
    signal = method.read(measured, evidence, 1)
    trainer = Trainer(student, OptimizerSettings(), method.objective)
    loss = trainer.accumulate(measured, signal)["loss"]
    grads = [p.grad.flatten() for p in trainer.trained if p.grad is not None]
    return Taught(method, measured, evidence, signal, loss, torch.cat(grads) if grads else torch.zeros(1))


# ------------------------------------------------------------------ what each says of itself


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_says_what_it_is(name: str, student: Policy) -> None:
    method = METHODS.get(name)
    assert issubclass(method, Method)
    module = __import__(method.__module__, fromlist=["_"])
    assert module.__doc__ and method.__doc__ and method.Config.__doc__
    assert method.paper or not any(isinstance(part, dict) or part for part in method.Config().parts)  # type: ignore[call-arg]
    config = TypeAdapter(tagged(METHODS)).validate_python({"name": name})
    assert config.name == name
    again = TypeAdapter(tagged(METHODS)).validate_python(config.model_dump(mode="json"))
    assert again == config, "its settings do not survive config.yaml"
    built = compose(config, student, 0, right, GROUP)
    assert built.describe() and all(built.cautions() or [True])
    assert {part.config.name for part in getattr(built, "parts", ())} == {
        part.name for part in config.parts if not part.neutral
    }


@pytest.mark.parametrize("name", PARTS.names())
def test_a_part_says_what_it_is(name: str) -> None:
    part = PARTS.get(name)
    assert issubclass(part, Part) and issubclass(part.Config, PartSettings)
    module = __import__(part.__module__, fromlist=["_"])
    assert module.__doc__ and part.__doc__ and part.Config.__doc__
    assert module.__name__.rsplit(".", 1)[-1] == name, "a file has the name of its part"
    assert part.slots and set(part.slots) <= SLOTS
    assert isinstance(part.place, Place)
    for field_name, field in part.Config.model_fields.items():
        assert field.description or field_name == "name", f"{name}.{field_name} has no description"
    neutral = part.neutral
    assert len(neutral.split()) > 3 if isinstance(neutral, str) else part.Config(**neutral).neutral
    assert not part.Config().neutral, "by default it does something"
    for other in [*part.refuses, *part.warns]:
        PARTS.get(other)


# ------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", ALL)
def test_reading_twice_is_reading_once(name: str, anchored: Policy) -> None:
    """The same rollouts, evidence and state give the same signal, and reading leaves the state as it is: a step whose update
    fails is read again. What changes the state is `after`."""
    found = taught(anchored, config_of(name), written(anchored, [13, 5, 9, 8]))
    before = found.method.state_dict()
    again = found.method.read(found.rollouts, found.evidence, 1)
    assert _same(again, found.signal)
    assert str(found.method.state_dict()) == str(before)


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_and_padding_change_nothing(name: str, anchored: Policy) -> None:
    """One row after another without padding, against all in one padded batch."""
    rows = written(anchored, [13, 5, 9, 8])
    settings = anchored.settings
    found = []
    for tokens in (1, 100_000):
        anchored.settings = settings.model_copy(update={"micro_batch_tokens": tokens})
        try:
            found.append(taught(anchored, config_of(name), rows))
        finally:
            anchored.settings = settings
    one, other = found
    assert _alike(one.signal, other.signal)
    assert one.loss == pytest.approx(other.loss, abs=1e-5, rel=1e-5)
    scale = max(1.0, float(other.gradient.abs().max()))
    torch.testing.assert_close(one.gradient / scale, other.gradient / scale, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_the_order_of_prompts_changes_nothing(name: str, anchored: Policy) -> None:
    """Where the row names the random draws of a method, other rows draw otherwise; of the others nothing moves."""
    rows = written(anchored, [13, 5, 9, 8])
    order = [2, 3, 0, 1]
    one, other = (taught(anchored, config_of(name), chosen) for chosen in (rows, [rows[i] for i in order]))
    asked = [{_unnumbered(e.query) for e in found.evidence} for found in (one, other)]
    if asked[0] != asked[1]:
        assert any("seed" in question for question in asked[0]), "only seeds may depend on the row"
        return
    moved = replace(
        other.signal,
        values_BT=tuple(other.signal.values_BT[order.index(i)] for i in range(len(rows))),
        mask_BT=tuple(other.signal.mask_BT[order.index(i)] for i in range(len(rows))),
        weights_BT=tuple(other.signal.weights_BT[order.index(i)] for i in range(len(rows)))
        if other.signal.weights_BT
        else (),
    )
    assert _alike(moved, one.signal)
    assert one.loss == pytest.approx(other.loss, abs=1e-5, rel=1e-5)


def _unnumbered(query: Query) -> str:
    """A question without the place of its rollout."""
    if isinstance(query, ContinueQuery):
        return repr(replace(query, chunk=replace(query.chunk, row=0)))
    return repr(replace(query, row=0))


def _same(one: Signal, other: Signal) -> bool:
    lists = [(one.values_BT, other.values_BT), (one.mask_BT, other.mask_BT), (one.weights_BT, other.weights_BT)]
    equal = all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in lists)
    return equal and one.branches == other.branches and one.branch_scale == other.branch_scale


def _alike(one: Signal, other: Signal) -> bool:
    """Decisions equal, numbers to 1e-5 of fp32 log-probs that other batches round otherwise."""
    assert all(map(torch.equal, one.mask_BT, other.mask_BT))
    for a, b in [(one.values_BT, other.values_BT), (one.weights_BT, other.weights_BT)]:
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    assert len(one.branches) == len(other.branches)
    return True


# ------------------------------------------------------------------ several processes


@pytest.mark.parametrize("control", ["none", "shuffled"])
@pytest.mark.parametrize("name", ALL)
def test_three_processes_read_what_one_reads(name: str, control: str, anchored: Policy) -> None:
    """Two steps, so that what is learned of the first is compared, too: none has all rows of a prompt, or all prompts. What
    needs them says so, and several processes are refused (test_matrix.py)."""
    rows = written(anchored, [13, 5, 9, 8, 6, 7])
    alone, *three = (built(anchored, {**config_of(name), "control": control}) for _ in range(4))
    if alone.one_process:
        return
    rows = list(rows_for(alone, rows))

    def answer(queries: Sequence[Query]) -> list[Evidence]:
        return said(anchored, rows, queries, mirror.disagreeing)

    for step in (1, 2):
        (expected,) = apart([alone], anchored, rows, answer, step)
        found = apart(three, anchored, rows, answer, step)
        assert {row: wish for one in found for row, wish in one.wishes.items()} == expected.wishes
        for one in found:
            signal, whole = one.signal, expected.signal
            assert _alike(signal, whole)
            assert [(b.row, b.at, b.ids) for b in signal.branches] == [(b.row, b.at, b.ids) for b in whole.branches]
            assert (signal.drops, signal.rejects, signal.spoken) == (whole.drops, whole.rejects, whole.spoken)
            assert signal.branch_scale == pytest.approx(whole.branch_scale, abs=1e-5)
            assert dict(signal.stats) == pytest.approx(dict(whole.stats), abs=1e-4)
            assert dict(one.figures) == pytest.approx(dict(expected.figures), abs=1e-4)


# ------------------------------------------------------------------ edge cases


def nothing(scores: TokenScores) -> TokenScores:
    return TokenScores(scores.query, rejected={"error": 1})


def impossible(scores: TokenScores) -> TokenScores:
    return replace(scores, logprobs=(-math.inf,) * len(scores.ids))


def half_impossible(scores: TokenScores) -> TokenScores:
    heard = mirror.disagreeing(scores)
    return replace(heard, logprobs=tuple(-math.inf if i % 2 else value for i, value in enumerate(heard.logprobs)))


def half_missing(scores: TokenScores) -> TokenScores:
    heard = mirror.disagreeing(scores)
    return replace(heard, logprobs=tuple(math.nan if i % 2 else value for i, value in enumerate(heard.logprobs)))


def constant(scores: TokenScores) -> TokenScores:
    return replace(scores, logprobs=(-1.0,) * len(scores.ids))


def certain(scores: TokenScores) -> TokenScores:
    """No entropy at all on the teacher's side."""
    top = tuple({id: 0.0} for id in scores.ids) if scores.top else ()
    return replace(scores, logprobs=(0.0,) * len(scores.ids), top=top)


def itself(scores: TokenScores) -> TokenScores:
    return scores


EDGES: dict[str, dict[str, Any]] = {
    "the teacher says nothing": {"change": nothing},
    "the teacher rules all out": {"change": impossible},
    "the teacher rules half out": {"change": half_impossible},
    "half is missing": {"change": half_missing},
    "constant scores": {"change": constant},
    "a certain teacher": {"change": certain},
    "the teacher is the student": {"change": itself},
    "nobody has written": {"lengths": [0, 0, 0, 0]},
    "one has not written": {"lengths": [0, 7, 3, 0]},
    "one token each": {"lengths": [1, 1, 1, 1]},
    "one rollout": {"lengths": [6], "group": 1},
    "all right": {"check": lambda prompt, text: True},
    "all wrong": {"check": lambda prompt, text: False},
    "all cut": {"finish": "length"},
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ALL)
def test_no_edge_makes_a_number_that_is_none(name: str, edge: str, anchored: Policy) -> None:
    """composition.md, 6.4: masks, weights and gradients stay finite, nothing raises, and no loss is without a gradient."""
    how = dict(EDGES[edge])
    rows = written(anchored, how.pop("lengths", [9, 4, 6, 5]), how.pop("finish", "stop"))
    found = taught(anchored, config_of(name), rows, **how)
    signal = found.signal
    for values, mask in zip(signal.values_BT, signal.mask_BT, strict=True):
        assert bool(values.isfinite().all()) and bool((values[~mask] == 0).all())
    assert all(bool((weights.isfinite() & (weights >= 0)).all()) for weights in signal.weights_BT)
    assert all(math.isfinite(branch.weight) for branch in signal.branches)
    assert math.isfinite(found.loss) and bool(found.gradient.isfinite().all())
    assert abs(found.loss) < 1e-6 or bool(found.gradient.any()), "a loss without a gradient"
    assert all(value is None or math.isfinite(value) for value in signal.stats.values())
    assert 0 <= signal.coverage <= 1


# ------------------------------------------------------------------ what it does


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("opd", PLAIN_WITHIN_A_FAMILY)])
def test_on_these_rows_it_does_something(name: str, anchored: Policy) -> None:
    """Else the tests above would say nothing of it: it writes, asks or reads otherwise than plain distillation."""
    rows = written(anchored, [13, 5, 9, 8])
    found, plain = taught(anchored, config_of(name), rows), taught(anchored, {"name": "opd"}, rows)
    prompts = {row: rollout.prompt for row, rollout in enumerate(rows)}
    writes = found.method.writings(prompts, found.evidence, 1) or found.method.budget(1) > 0
    state = str(found.method.state_dict())
    found.method.after(found.rollouts, found.signal, 1, Trainer(anchored, OptimizerSettings(), found.method.objective))
    learns = str(found.method.state_dict()) != state
    assert writes or learns or found.signal.targets or not _same(found.signal, plain.signal)


ON_POSITIONS = (Place.MASK, Place.WEIGHT, Place.TRANSFORM, Place.BONUS)


@pytest.mark.parametrize("name", ALL)
def test_the_control_deals_out_what_is_decided_and_nothing_else(name: str, anchored: Policy) -> None:
    """So that a comparison runs a control of every method that has one, and of no other."""
    found = []
    for lengths in ([13, 5, 9, 8], [9, 12, 4, 10]):
        rows = written(anchored, lengths)
        plain, control = (taught(anchored, {**config_of(name), "control": kind}, rows) for kind in ("none", "shuffled"))
        found.append(_same(plain.signal, control.signal) and plain.loss == control.loss)
    if plain.method.decides:
        assert not all(found) or UNSEEN & {name, *parts_of(name)}
    else:
        assert all(found)


@pytest.mark.parametrize("name", [name for name in PARTS.names() if PARTS.get(name).place in ON_POSITIONS])
def test_a_part_leaves_the_likelihood_of_right_rollouts_alone(
    name: str, anchored: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """composition.md, 5: trust in positions concerns the branch that is distilled, even where the teacher scored both."""
    monkeypatch.setattr(PARTS.get("correctness_router"), "spares_right", False)
    rows = [replace(row, top=()) for row in written(anchored, [13, 5, 9, 8])]
    joined = {"name": "opd", "parts": ["correctness_router", *config_of(f"opd + {name}")["parts"]]}
    alone = {"name": "opd", "parts": ["correctness_router"]}
    verdicts = dict(zip([row.text for row in rows], (True, False, False, True), strict=True))

    def check(prompt: Prompt, text: str) -> bool:
        return verdicts[text]

    one, other = (taught(anchored, config, rows, check=check).signal for config in (joined, alone))
    for row in (0, 3):
        assert torch.equal(one.values_BT[row], other.values_BT[row])
        assert torch.equal(one.mask_BT[row], other.mask_BT[row]) and bool(one.mask_BT[row].all())


def test_a_fork_keeps_its_guidance_where_its_own_token_is_masked(anchored: Policy) -> None:
    """composition.md, 5: both rank places of high loss."""
    rows = written(anchored, [13, 5, 9, 8])
    fork, few = {"name": "fork_guidance", "horizon": 6}, {"name": "teachability", "k": 4, "rho": 0.1}
    both, alone = (taught(anchored, {"name": "opd", "parts": parts}, rows).signal for parts in ([fork, few], [fork]))
    assert [(b.row, b.at, b.ids) for b in both.branches] == [(b.row, b.at, b.ids) for b in alone.branches] != []
    masked = [branch for branch in both.branches if not both.mask_BT[branch.row][branch.at]]
    assert masked, "no fork is masked"


def test_a_fork_behind_a_cut_is_dropped(anchored: Policy) -> None:
    """composition.md, 5: nothing branches off where the rollout is no longer learned."""
    rows = written(anchored, [13, 5, 9, 8])
    fork, stop = (
        {"name": "fork_guidance", "horizon": 6, "spacing": 1, "share": 1.0, "most": 64},
        {"name": "kl_stop", **SHORT["kl_stop"], "exempt": 4},
    )
    both, alone = (taught(anchored, {"name": "opd", "parts": parts}, rows).signal for parts in ([fork, stop], [fork]))
    asked, cut, forks = (both.stats[name] or 0 for name in ("fork_candidates", "fork_cut", "forks"))
    assert (asked, 0) == (alone.stats["fork_candidates"], alone.stats["fork_cut"])
    assert 0 < cut < asked and 0 < len(both.branches) == forks <= asked - cut
    assert {(b.row, b.at, b.context) for b in both.branches} <= {(b.row, b.at, b.context) for b in alone.branches}


# ------------------------------------------------------------------ what it needs


@pytest.mark.parametrize("name", ALL)
def test_a_teacher_without_anything_is_refused_with_what_is_lacking(name: str, anchored: Policy) -> None:
    config = TypeAdapter(tagged(METHODS)).validate_python(config_of(name))
    method = compose(config, anchored, 0, right, GROUP)
    nobody = Capabilities(answer=False)
    everything = Capabilities(
        continuation="raw", score=True, topk=10_000, logits=True, hidden=True, decode=True,
        vocabulary=anchored.vocabulary.digest,
    )  # fmt: skip
    assert method.lacking(everything) == []
    assert method.lacking(nobody)


def test_parts_act_in_the_fixed_order_whatever_the_order_of_their_names(anchored: Policy) -> None:
    names = ["whiten", "entropy_weights", "trajectory_filter"]
    config = TypeAdapter(tagged(METHODS)).validate_python({"name": "opd", "parts": names})
    built = compose(config, anchored, 0)
    assert isinstance(built, Composed)
    assert [part.config.name for part in built.parts] == ["trajectory_filter", "entropy_weights", "whiten"]
