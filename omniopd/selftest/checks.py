"""The checks of `omniopd selftest`: a short function each, in the order in which they are shown.

Each looks at one way in which distillation goes wrong without an error. One that can't be made with this method or teacher
says why: skipped is an answer, passed is not assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from omniopd.losses import token_logp
from omniopd.method import Method
from omniopd.registry import METHODS
from omniopd.selftest import mirror
from omniopd.selftest.bench import Bench, unchanged
from omniopd.selftest.dense import dense_update
from omniopd.selftest.landing import landing
from omniopd.types import Evidence, Rollout, TokenScores, asked_by
from students.batches import Batch, tensors
from students.packing import build_rows

FORMS: tuple[dict[str, Any], ...] = (
    {"name": "opd", "form": "sampled"},
    {"name": "opd", "form": "dense"},
    {"name": "opd", "form": "dense", "support": "teacher", "k": 8},
)
KINKED = ("uld",)  # methods whose loss is an L1: where both sides agree its slope is 1 or -1, as rounding has it
GAP = {"float32": (1e-3, 2e-2), "bfloat16": (5e-2, 1.0)}  # nats between sampler and update: mean and largest
AGAIN = 0.05  # nats between two scores of one text: served models are not bit-exact
TEXT_ONLY = "the method reads no scores of given text"


class Seen(NamedTuple):
    """What a check found: passed, failed, or not made (None); and the figures, or why not."""

    passed: bool | None
    what: str


@dataclass(frozen=True, slots=True)
class Check:
    """A check and its name in the table."""

    name: str
    look: Callable[[Bench], Seen]


CHECKS: list[Check] = []


def check(name: str) -> Callable[[Callable[[Bench], Seen]], Callable[[Bench], Seen]]:
    """Enter a check into `CHECKS`."""

    def enter(look: Callable[[Bench], Seen]) -> Callable[[Bench], Seen]:
        CHECKS.append(Check(name, look))
        return look

    return enter


# ---------------------------------------------------------------------- the update


@check("teacher = student")
def self_teacher(bench: Bench) -> Seen:
    """Does a teacher that is the student leave it as it is, where one that disagrees moves it? (traps O4, O6, X5)"""
    if not bench.scored:
        return Seen(None, "text has no zero: its controls are runs (omniopd controls)")
    found, passed = [], True
    for name, method in _forms(bench):
        same, other = (bench.push(bench.read(change, method)) for change in (unchanged, mirror.disagreeing))
        left = (
            abs(same.loss / other.loss)
            if getattr(method.objective, "name", "") in KINKED
            else same.norm / max(other.norm, 1e-12)
        )
        passed &= other.norm > 0 and left <= bench.tolerance
        found.append(f"{name}: loss {same.loss:.1e}, gradient {same.norm:.1e}, another teacher's {other.norm:.1e}")
    return Seen(passed, "; ".join(found))


def _forms(bench: Bench) -> Iterator[tuple[str, Method]]:
    """The run's method, and the forms of plain distillation that it is not, under the same objective.

    Without its parts: some of them (likelihood of right answers, say) move a student that agrees with its teacher.
    """
    own = bench.run.config.method
    yield f"this {own.name}{'' if bench.bare is bench.method else ' without its parts'}", bench.bare
    for form in FORMS:
        config = METHODS.get("opd").Config.model_validate({**form, "anchor": own.anchor, "reduction": own.reduction})
        if config.model_dump() != {**own.model_dump(), "parts": []}:
            name = " ".join(["opd", form["form"], *(["top-k"] if "k" in form else [])])
            yield name, METHODS.build(config, bench.run.policy, bench.run.config.seed)


@check("micro-batches")
def micro_batches(bench: Bench) -> Seen:
    """Is it one update, however the step is cut? (traps O12, S4)"""
    signal = bench.read(mirror.disagreeing)
    pushes = []
    for ways in (1, 2, 4):
        with bench.settings(micro_batch_tokens=bench.budget(signal, ways)):
            pushes.append(bench.push(signal))
    if not pushes[0].norm:
        return Seen(None, "these rollouts give no signal")
    apart = max(pushes[0].apart(push) for push in pushes[1:])
    return Seen(apart <= bench.tolerance, f"1, 2 and 4 of them: loss and gradient differ by {apart:.1e}")


@check("slices")
def slices(bench: Bench) -> Seen:
    """Is the update over slices of the vocabulary's logits that over all of them at once? (traps O9, O11)"""
    signal = bench.read(mirror.disagreeing)
    with bench.settings(slice_tokens=7):
        sliced = bench.push(signal)
    apart = sliced.apart(dense_update(bench, signal))
    if not sliced.norm:
        return Seen(None, "these rollouts give no signal")
    return Seen(apart <= bench.tolerance, f"slices of 7 and plain logits: loss and gradient differ by {apart:.1e}")


@check("positions")
def positions(bench: Bench) -> Seen:
    """Does what is said of a place land on the token of that place? (traps R1, X1, X4)"""
    if not bench.scored:
        return Seen(None, TEXT_ONLY)
    head = bench.run.policy.causal_lm.get_output_embeddings().weight
    _, made_up = bench.asked(lambda scores: mirror.canary(scores, head), bench.bare)
    parts: dict[str, tuple[Sequence[Rollout], Sequence[Evidence]]] = {"the student's tokens": (bench.short, made_up)}
    if bench.first and "aligned_share" in bench.read_live().stats:
        parts["the teacher's tokens"] = (bench.rollouts, bench.first)
    found, passed = [], True
    for whose, (rollouts, evidence) in parts.items():
        landed, astray = landing(bench.bare, rollouts, asked_by(evidence), head)
        passed &= landed > 0 and not astray
        found.append(f"{landed} of {landed + astray} in {whose} land on their own")
    return Seen(passed, "; ".join(found))


@check("sampler = update")
def agreement(bench: Bench) -> Seen:
    """Are the log-probs that the sampler recorded those of the update's forward pass? (trap S1)"""
    if not sum(map(len, bench.short)):
        return Seen(None, "the student writes nothing")
    policy = bench.run.policy
    batch = Batch.of([[row] for row in build_rows(bench.short, (), trees=False)])
    places, ids, _ = (numbers.to(policy.causal_lm.device) for numbers in batch.own_sites())
    with torch.no_grad(), policy.learning(), policy.computing():
        inputs = tensors(batch, policy.causal_lm.dtype, policy.causal_lm.device)
        again = token_logp(policy.causal_lm(**inputs, use_cache=False).logits.flatten(0, 1)[places], ids)
    recorded = [value for rollout in bench.short for value in rollout.logprobs]
    gaps = (again.cpu() - torch.tensor(recorded)).abs()
    mean, largest = float(gaps.mean()), float(gaps.max())
    most = GAP[bench.run.config.student.compute_dtype]
    return Seen(mean <= most[0] and largest <= most[1], f"gap {mean:.1e} nats in the mean, {largest:.1e} at most")


# ---------------------------------------------------------------------- the teacher


@check("prompts")
def prompts(bench: Bench) -> Seen:
    """Are both shown the same text, with at most one beginning-of-text token? (traps R2, R3, R5)"""
    chat, prompt = bench.run.policy.chat, bench.run.task.train[0]
    ids, text = list(chat.ids(prompt.messages)), chat.text(prompt.messages)
    if ids != chat.tokenizer(text, add_special_tokens=False).input_ids:
        return Seen(False, "the student's prompt as ids is not its prompt as text")
    opening = ids[:2].count(chat.tokenizer.bos_token_id)
    if bench.shown is None:
        return Seen(opening < 2, f"the student's has {opening} BOS; the teacher does not tell what it is shown")
    what = "; ".join(bench.shown.differences) or f"the same text; the student's has {opening} BOS"
    return Seen(opening < 2 and not bench.shown.differences, what)


@check("coverage")
def coverage(bench: Bench) -> Seen:
    """About how many of the student's tokens does the teacher speak, and why not about the others? (traps R10, X5)"""
    if not bench.first:
        return Seen(None, "these rollouts bring no queries")
    signal = bench.read_live()
    share = signal.coverage if bench.method.on_policy else 1 - signal.drops.total() / len(bench.first)
    least = max(bench.method.min_coverage, 1e-9)
    aligned = {"aligned_share": "aligned", "one_to_one_share": "one to one"}
    figures = [f"{share:.0%} of the {'tokens' if bench.method.on_policy else 'answers'}"]
    figures += [f"{said:.0%} {name}" for key, name in aligned.items() if (said := signal.stats.get(key)) is not None]
    holes = ", ".join(f"{reason} {count}" for reason, count in (signal.drops + signal.rejects).most_common())
    return Seen(share >= least, "; ".join([*figures, f"holes: {holes}" if holes else "no holes"]))


@check("scored twice")
def scored_twice(bench: Bench) -> Seen:
    """Does the live teacher give one text the same values again? (traps R9, R14)"""
    pairs = [
        (one, other)
        for one, other in zip(bench.first, bench.again, strict=False)
        if isinstance(one, TokenScores) and isinstance(other, TokenScores) and one.ids and other.ids
    ]
    if not pairs:
        return Seen(None, TEXT_ONLY if not bench.scored else "the teacher gave no scores")
    if any(one.ids != other.ids for one, other in pairs):
        return Seen(False, "it scored other tokens the second time")
    gaps = [
        abs(a - b)
        for one, other in pairs
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
        if a == a and b == b
    ]
    largest = max(gaps, default=float("inf"))
    return Seen(largest <= AGAIN, f"{len(gaps)} values, at most {largest:.1e} nats apart")
