"""OmniOPD: where it asks, what the teacher gets to see, and where the numbers land."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from omniopd.methods.omniopd import OmniOPD, OmniOPDConfig
from omniopd.objective import Objective
from omniopd.registry import METHODS
from omniopd.settings import tagged
from omniopd.types import AnswerQuery, Answers, Continuations, ContinueQuery, Evidence, Reply, Rollout, Signal
from omniopd.verification.weights import geometric_mean, smoothed
from students.policy import Policy
from students.trainer import OptimizerSettings, Trainer

TEXT = (
    "The answer is 12 + 7 = 19, so Tom has 19 apples.\nFirst, we add 東京 and 😀 the two numbers. Then return x  # done"
)


@pytest.fixture(scope="module", params=["byte_level", "pieces"])
def student(request: pytest.FixtureRequest, tiny_folder: Callable[..., Path]) -> Policy:
    return tiny.policy(tiny_folder(request.param, "qwen3"))


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def rollout_of(student: Policy, text: str = TEXT, name: str = "p", peaks: Sequence[int] | None = None) -> Rollout:
    """The student's rollout of a text that ends; `peaks` puts the entropy there, the first the highest."""
    ids = [*student.encode(text)[0], student.end_id]
    rollout = tiny.rollout(student, ids, tiny.prompt(name=name), finish="stop")
    if peaks is None:
        return rollout
    return replace(rollout, entropy=tuple(10.0 - peaks.index(t) if t in peaks else 0.1 for t in range(len(ids))))


def method_of(student: Policy, seed: int = 0, **config: Any) -> OmniOPD:
    defaults = {"chunks": 3, "chunk_tokens": 5, "continuations": 4}
    return OmniOPD(OmniOPDConfig(**{**defaults, **config}), student, seed)


def said(query: Any, *texts: str, finish: str = "stop", **rejected: int) -> Continuations:
    return Continuations(query, tuple(Reply(text, finish) for text in texts), rejected)  # type: ignore[arg-type]


def echo(query: Any) -> Continuations:
    """A teacher that says what the student said, and then more."""
    return said(query, *[query.chunk.text + " and more"] * query.n)


def used(method: OmniOPD, evidence: Sequence[Continuations], signal: Signal) -> int:
    """Chunks on which some token is audited."""
    chunks = [e.query.chunk for e in evidence]
    return sum(bool(signal.mask_BT[c.row][c.start : c.end].any()) for c in chunks)


# ------------------------------------------------------------------ configuration


def built(**config: Any) -> Objective:
    from pydantic import TypeAdapter

    return TypeAdapter(tagged(METHODS)).validate_python(config)  # type: ignore[no-any-return]


def test_the_papers_preset() -> None:
    paper = built(name="omniopd/paper")
    shown = paper.model_dump()
    assert (shown["chunks"], shown["chunk_tokens"], shown["continuations"], shown["selector"]) == (
        10,
        50,
        10,
        "entropy",
    )
    assert shown["score"] == {"name": "edit_distance"}
    (signal,) = shown["signals"]
    assert (signal["name"], signal["alpha"], signal["centred"], signal["form"]) == (
        "likelihood_weight",
        1.0,
        False,
        "weight",
    )
    assert (shown["anchor"]["beta"], shown["anchor"]["where"]) == (0.1, "unaudited")
    assert (shown["lead"], shown["calibrate"], shown["placebo"]) == (0, False, "none")


def test_our_own_defaults_and_shorthand() -> None:
    ours = built(name="omniopd").model_dump()
    assert [s["name"] for s in ours["signals"]] == ["continuation_likelihood"]
    assert ours["score"] == {"name": "token_agreement"}
    assert built(name="omniopd", signals="survival") == built(name="omniopd", signals=[{"name": "survival"}])
    assert built(name="omniopd", chunk_tokens=50).reply_tokens == 79  # type: ignore[attr-defined]
    assert built(name="omniopd", teacher_tokens=9).reply_tokens == 9  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="signals"):
        built(name="omniopd", signals=[])


# ------------------------------------------------------------------ asking


def test_eight_4_a_peak_of_entropy_opens_a_chunk_and_its_value_lands_on_it(student: Policy) -> None:
    """The canary: entropies that peak at given tokens, verdicts that tell the chunks apart."""
    rows = [rollout_of(student, peaks=[17, 3, 30]), rollout_of(student, name="q", peaks=[9])]
    method = method_of(student, chunks=3, signals=[{"name": "likelihood_weight", "alpha": 1.0}], score="edit_distance")
    queries = method.audit(rows, 1)
    asked = {(q.chunk.row, q.chunk.start): q for q in queries}  # type: ignore[union-attr]
    assert {(0, 3), (0, 17), (0, 30), (1, 9)} <= set(asked)
    agree = {(0, 3): 4, (0, 17): 3, (0, 30): 2, (1, 9): 4}
    evidence = []
    for place, query in asked.items():
        k = agree.get(place, 0)
        chunk = query.chunk  # type: ignore[union-attr]
        assert rows[chunk.row].text.startswith(chunk.prefix + chunk.text)
        evidence.append(said(query, *[chunk.text] * k, *["\x00" * len(chunk.text)] * (4 - k)))
    signal = method.read(rows, evidence, 1)
    for (row, start), query in asked.items():
        pi_bar = geometric_mean(rows[row].logprobs[start : start + 5])
        weight = smoothed(agree.get((row, start), 0), 4, pi_bar, 1.0)
        assert signal.values_BT[row][start : start + 5].tolist() == pytest.approx([weight] * 5)
        assert query.chunk.end == start + 5  # type: ignore[union-attr]
    audited = {(row, t) for row, start in asked for t in range(start, start + 5)}
    assert {(b, t) for b, mask in enumerate(signal.mask_BT) for t in mask.nonzero()[:, 0].tolist()} == audited
    assert all(value[~mask].abs().sum() == 0 for value, mask in zip(signal.values_BT, signal.mask_BT, strict=True))
    assert signal.coverage == len(audited) / sum(map(len, rows))


def test_eight_4_survival_values_land_on_the_token_where_replies_part(student: Policy) -> None:
    (row,) = rows = [rollout_of(student, peaks=[8])]
    method = method_of(student, chunks=1, signals=["survival"], chunk_tokens=6)
    (query,) = method.audit(rows, 1)
    chunk = query.chunk  # type: ignore[union-attr]
    parts = (
        chunk.text[: chunk.ends[3]] + "\x00\x00\x00\x00\x00\x00"
    )  # agrees with four tokens, then says something else
    signal = method.read(rows, [said(query, *[parts] * 4)], 1)
    values, p = signal.values_BT[0][8:14].tolist(), [math.exp(lp) for lp in row.logprobs[8:14]]
    assert values[4] == pytest.approx(max(-5, torch.tensor((p[4] / 5) / p[4]).log().item()), abs=1e-5)
    for j in range(4):
        assert values[j] == pytest.approx(min(5, torch.tensor((4 + p[j]) / 5 / p[j]).log().item()), abs=1e-5)
    assert signal.mask_BT[0][8:14].tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("selector", ["entropy", "random"])
@pytest.mark.parametrize("lead", [0, 1, 7])
def test_no_chunk_opens_before_the_lead(student: Policy, selector: str, lead: int) -> None:
    rows = [rollout_of(student, peaks=[0, lead, 20, 2])]
    starts = [q.chunk.start for q in method_of(student, chunks=99, lead=lead, selector=selector).audit(rows, 1)]  # type: ignore[union-attr]
    assert min(starts) >= lead
    assert selector == "random" or {lead, 20} <= set(starts)


@pytest.mark.parametrize("selector", ["entropy", "random"])
def test_l20_queries_ascend_and_never_hold_the_audited_text(student: Policy, selector: str) -> None:
    rows = [rollout_of(student), rollout_of(student, TEXT[:60], "q"), rollout_of(student, name="r")]
    queries = method_of(student, chunks=4, selector=selector).audit(rows, 7)
    chunks = [q.chunk for q in queries]  # type: ignore[union-attr]
    assert [(c.row, c.start) for c in chunks] == sorted((c.row, c.start) for c in chunks)
    assert {c.row for c in chunks} == {0, 1, 2}
    for query, chunk in zip(queries, chunks, strict=True):
        row = rows[chunk.row]
        assert isinstance(query, ContinueQuery) and query.prompt is row.prompt
        assert chunk.end - chunk.start == 5 and chunk.end <= len(row)  # L11
        assert chunk.prefix == row.text[: len(chunk.prefix)] == chunk.prefix.rstrip()  # L15
        assert len(chunk.prefix) <= (row.ends[chunk.start - 1] if chunk.start else 0)
        assert (query.n, query.max_tokens) == (4, int(1.5 * 5) + 4)
        assert 0 <= query.seed < 2**31
    spans = [(c.row, t) for c in chunks for t in range(c.start, c.end)]
    assert len(spans) == len(set(spans))
    assert len({q.seed for q in queries}) == len(queries)


def test_asking_is_named_by_seed_and_step(student: Policy) -> None:
    rows = [rollout_of(student)]
    first = method_of(student, selector="random").audit(rows, 1)
    assert first == method_of(student, selector="random").audit(rows, 1)
    assert first != method_of(student, selector="random").audit(rows, 2)
    assert first != method_of(student, selector="random", seed=1).audit(rows, 1)
    by_entropy = [method_of(student, seed=seed).audit(rows, 1) for seed in (0, 1)]
    assert [q.chunk for q in by_entropy[0]] == [q.chunk for q in by_entropy[1]]  # type: ignore[union-attr]
    assert [q.seed for q in by_entropy[0]] != [q.seed for q in by_entropy[1]]


def test_l11_rollouts_shorter_than_a_chunk_are_not_asked_about(llama: Policy) -> None:
    short = tiny.rollout(llama, (20, 21, 22, 23))
    empty = tiny.rollout(llama, ())
    exact = tiny.rollout(llama, (20, 21, 22, 23, 24))
    assert method_of(llama, lead=1).audit([short, empty, exact], 1) == []
    method = method_of(llama, lead=0)
    queries = method.audit([short, empty, exact], 1)
    assert [(q.chunk.row, q.chunk.start) for q in queries] == [(2, 0)]  # type: ignore[union-attr]
    signal = method.read([short, empty, exact], [echo(queries[0])], 1)
    assert [len(v) for v in signal.values_BT] == [4, 0, 5]
    assert [int(m.sum()) for m in signal.mask_BT] == [0, 0, 5]
    assert method.read([short, empty], [], 1).coverage == 0.0
    assert method.read([], [], 1).coverage == 0.0


# ------------------------------------------------------------------ holes

SIGNALS = ["continuation_likelihood", "likelihood_weight", "survival"]


@pytest.mark.parametrize("name", SIGNALS)
def test_eight_5_every_chunk_is_used_or_dropped_with_a_reason(student: Policy, name: str) -> None:
    rows = [rollout_of(student), rollout_of(student, name="q")]
    method = method_of(student, chunks=4, continuations=4, signals=[name])
    queries = method.audit(rows, 1)
    assert len(queries) == 8
    chunk = queries[6].chunk  # type: ignore[union-attr]
    scripts: list[Callable[[Any], Continuations]] = [
        echo,
        lambda q: said(q, refusal=4),
        lambda q: said(q, "x", refusal=1, empty=2),
        lambda q: said(q, "x", "y", restart=2),  # half is enough
        lambda q: said(q),  # no reply, and no reason
        lambda q: said(q, "x", "y", "z", meta=1),
        lambda q: said(q, *[chunk.text[:0]] * 4, finish="length"),  # cut before they said anything
        echo,
    ]
    evidence = [script(query) for script, query in zip(scripts, queries, strict=True)]
    signal = method.read(rows, evidence, 1)
    assert dict(signal.drops) == {"refusal": 1, "empty": 1, "silent": 2}
    assert dict(signal.rejects) == {"refusal": 5, "empty": 2, "restart": 2, "meta": 1}
    assert sum(signal.drops.values()) + used(method, evidence, signal) == len(queries)
    for i in (1, 2, 4, 6):
        hole = queries[i].chunk  # type: ignore[union-attr]
        assert not signal.mask_BT[hole.row][hole.start : hole.end].any()
        assert not signal.values_BT[hole.row][hole.start : hole.end].any()
    shown = [c for record in signal.audits for c in record["chunks"]]
    reasons = {(c["dropped"]) for c in shown if c["dropped"]}
    assert reasons == set(signal.drops) and len(shown) == 8


def test_l3_a_refusal_leaves_sum_and_count(llama: Policy) -> None:
    """'Sheet' test 2: three of ten rollouts invalid is n_eff 7, not seven matches of ten."""
    rows = [rollout_of(llama, peaks=[4])]
    method = method_of(llama, chunks=1, continuations=10, signals=["likelihood_weight"])
    (query,) = method.audit(rows, 1)
    text = query.chunk.text  # type: ignore[union-attr]
    signal = method.read(rows, [said(query, *[text] * 7, refusal=3)], 1)
    pi_bar = geometric_mean(rows[0].logprobs[4:9])
    assert signal.values_BT[0][4].item() == pytest.approx((7 + pi_bar) / 8)
    assert signal.stats["n_eff"] == 7


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("mute", [2, 3])
def test_l4_replies_that_were_cut_before_they_said_a_token_do_not_make_a_verdict(
    llama: Policy, name: str, mute: int
) -> None:
    """Four valid replies of four, but one that says something is not half of them."""
    rows = [rollout_of(llama, peaks=[4])]
    method = method_of(llama, chunks=1, signals=[name])
    (query,) = method.audit(rows, 1)
    replies = (*[Reply("", "length")] * mute, *[Reply("xyz and so on", "stop")] * (4 - mute))
    signal = method.read(rows, [replace(said(query), replies=replies)], 1)
    assert dict(signal.drops) == ({"silent": 1} if mute == 3 else {})
    assert used(method, [said(query)], signal) == (mute == 2)


@pytest.mark.parametrize("name", SIGNALS)
def test_l4_a_step_of_refusals_is_silent(student: Policy, name: str) -> None:
    rows = [rollout_of(student)]
    method = method_of(student, signals=[name])
    queries = method.audit(rows, 1)
    signal = method.read(rows, [said(q, refusal=4) for q in queries], 1)
    assert (signal.coverage, signal.branches, signal.drops["refusal"]) == (0.0, (), len(queries))
    assert not any(value.any() for value in signal.values_BT)
    assert all(number is None or number == number for number in signal.stats.values())
    json.dumps(list(signal.audits), allow_nan=False)


def test_reading_is_pure_and_its_records_are_json(student: Policy) -> None:
    rows = [rollout_of(student), rollout_of(student, name="q")]
    method = method_of(student, signals=["likelihood_weight", "survival"])
    evidence = [echo(q) for q in method.audit(rows, 1)]
    first, second = method.read(rows, evidence, 1), method.read(rows, evidence, 1)
    assert all(map(torch.equal, first.values_BT, second.values_BT)) and first.audits == second.audits
    assert json.loads(json.dumps(list(first.audits), allow_nan=False)) == list(first.audits)


def test_replies_that_the_score_cannot_tell_apart_give_the_same_signal(student: Policy) -> None:
    """Their order, and what they say beside the chunk, is nothing to the published weight."""
    rows = [rollout_of(student)]
    method = method_of(student, score="edit_distance", signals=["likelihood_weight"])
    queries = method.audit(rows, 1)

    def values(*replies: Callable[[str], str]) -> Sequence[torch.Tensor]:
        found = [said(q, *(reply(q.chunk.text) for reply in replies)) for q in queries]  # type: ignore[union-attr]
        return method.read(rows, found, 1).values_BT

    whole, half, nothing = (lambda t: t), (lambda t: t[: len(t) // 2]), (lambda t: "\x00" * len(t))
    longer, other = (lambda t: t + " and more"), (lambda t: "\x01" * len(t))
    one = values(whole, half, nothing, nothing)
    assert all(map(torch.equal, one, values(other, longer, nothing, half)))
    assert not torch.equal(one[0], values(whole, whole, nothing, nothing)[0])


def test_evidence_of_another_kind_is_left_alone(llama: Policy) -> None:
    rows = [rollout_of(llama)]
    answers: Evidence = Answers(AnswerQuery(rows[0].prompt, 0, 1, 9, 0), (Reply("x", "stop"),))
    assert method_of(llama).read(rows, [answers], 1).coverage == 0.0


# ------------------------------------------------------------------ signals together


def test_values_of_several_signals_add_up_with_their_weights_and_are_what_is_shown(student: Policy) -> None:
    rows = [rollout_of(student)]
    alone = {name: method_of(student, signals=[name]) for name in ("likelihood_weight", "survival")}
    both = method_of(
        student, signals=[{"name": "likelihood_weight", "weight": 0.5}, {"name": "survival", "weight": 3.0}]
    )
    evidence = [said(q, q.chunk.text, q.chunk.text[:3], "x" * 40, "") for q in both.audit(rows, 1)]  # type: ignore[union-attr]
    parts = {name: method.read(rows, evidence, 1) for name, method in alone.items()}
    signal = both.read(rows, evidence, 1)
    expected = 0.5 * parts["likelihood_weight"].values_BT[0] + 3.0 * parts["survival"].values_BT[0]
    torch.testing.assert_close(signal.values_BT[0], expected)
    assert torch.equal(signal.mask_BT[0], parts["likelihood_weight"].mask_BT[0] | parts["survival"].mask_BT[0])
    for chunk in signal.audits[0]["chunks"]:
        assert chunk["values"] == pytest.approx(signal.values_BT[0][chunk["start"] : chunk["end"]].tolist(), abs=1e-6)


def test_branches_carry_the_weight_of_their_signal(student: Policy) -> None:
    rows = [rollout_of(student)]
    method = method_of(student, signals=[{"name": "continuation_likelihood", "weight": 0.25}, "survival"])
    queries = method.audit(rows, 1)
    signal = method.read(rows, [said(q, " is it", " is it", " so far", "!") for q in queries], 1)
    assert signal.branch_scale == 0.25
    assert len(signal.branches) == 3 * len(queries) and sorted({b.weight for b in signal.branches}) == [1.0, 2.0]
    for branch, query in zip(signal.branches[::3], queries, strict=True):
        chunk = query.chunk  # type: ignore[union-attr]
        assert branch.ids[-1] == student.end_id
        spelled = student.decode([*rows[0].ids[: branch.at], *branch.ids[:-1]])
        assert spelled == chunk.prefix + " is it"
    assert method_of(student, signals=["survival"]).read(rows, [echo(q) for q in queries], 1).branch_scale == 0


def test_a_reply_that_could_not_speak_has_no_score_in_the_record(llama: Policy) -> None:
    """Scores stand beside the replies that they belong to."""
    rows = [rollout_of(llama, peaks=[4])]
    method = method_of(llama, chunks=1, score="edit_distance", signals=["likelihood_weight"])
    (query,) = method.audit(rows, 1)
    text = query.chunk.text  # type: ignore[union-attr]
    mute = Reply("", "length")
    evidence = replace(said(query), replies=(mute, Reply(text, "stop"), Reply("\x00" * len(text), "stop")))
    (record,) = method.read(rows, [evidence], 1).audits[0]["chunks"]
    assert [reply.get("score") for reply in record["replies"]] == [None, 1.0, 0.0]
    assert [reply.get("agreed") for reply in record["replies"]] == [None, 5, 0]


def test_the_record_of_a_rollout_spells_its_text(student: Policy) -> None:
    (row,) = rows = [rollout_of(student)]
    method = method_of(student, signals=["survival"])
    (record,) = method.read(rows, [echo(q) for q in method.audit(rows, 1)], 1).audits
    assert (record["text"], record["finish"], record["prompt_id"]) == (TEXT, "stop", "p")
    assert [c["start"] for c in record["chunks"]] == sorted(c["start"] for c in record["chunks"])
    for chunk in record["chunks"]:
        assert TEXT[chunk["char_start"] : chunk["char_end"]] == chunk["text"] == "".join(chunk["tokens"])
        assert len(chunk["values"]) == len(chunk["tokens"]) == chunk["end"] - chunk["start"]
        assert chunk["entropy"] == row.entropy[chunk["start"]] and chunk["dropped"] is None


# ------------------------------------------------------------------ controls


@pytest.mark.parametrize("name", ["likelihood_weight", "survival"])
def test_l19_placebos_keep_the_mask_and_lose_what_was_said(student: Policy, name: str) -> None:
    rows = [rollout_of(student), rollout_of(student, name="q")]
    kinds = {kind: method_of(student, placebo=kind, signals=[name]) for kind in ("none", "shuffle", "constant")}
    queries = kinds["none"].audit(rows, 1)
    evidence = [
        said(q, *[q.chunk.text + "."] * (i % 5), *["\x00" * 40] * (4 - i % 5))  # type: ignore[union-attr]
        for i, q in enumerate(queries)
    ]
    read = {kind: method.read(rows, evidence, 1) for kind, method in kinds.items()}
    flat = {kind: torch.cat([v[m] for v, m in zip(s.values_BT, s.mask_BT, strict=True)]) for kind, s in read.items()}
    assert not torch.allclose(flat["shuffle"][: len(flat["none"])], flat["none"][: len(flat["shuffle"])])
    assert len(flat["constant"]) == len(flat["none"])
    torch.testing.assert_close(flat["constant"], flat["none"].mean().expand(len(flat["none"])))
    assert all(torch.equal(a, b) for a, b in zip(read["constant"].mask_BT, read["none"].mask_BT, strict=True))
    if name == "likelihood_weight":
        k = [sorted(c["k"] for r in read[kind].audits for c in r["chunks"]) for kind in ("none", "shuffle")]
        assert k[0] == k[1]


def test_l19_shuffled_texts_go_to_other_chunks_and_constant_ones_are_the_students_own(llama: Policy) -> None:
    rows = [rollout_of(llama), rollout_of(llama, name="q")]
    queries = method_of(llama).audit(rows, 1)
    evidence = [said(q, *[f" reply {i}"] * 4) for i, q in enumerate(queries)]

    def taught(kind: str) -> list[str]:
        signal = method_of(llama, placebo=kind).read(rows, evidence, 1)
        assert len(signal.branches) == len(queries)
        return [
            llama.decode([*rows[b.row].ids[: b.at], *b.ids]).removeprefix(q.chunk.prefix)  # type: ignore[union-attr]
            for b, q in zip(signal.branches, queries, strict=True)
        ]

    own = [f" reply {i}" for i in range(len(queries))]
    assert taught("none") == own
    dealt = taught("shuffle")
    assert sorted(dealt) == sorted(own) and not any(a == b for a, b in zip(dealt, own, strict=True))
    for text, query in zip(taught("constant"), queries, strict=True):
        assert query.chunk.text.startswith(text.rstrip("\ufffd"))  # type: ignore[union-attr]


def test_l2_calibration_measures_from_the_chance_floor_up(llama: Policy) -> None:
    rows = [rollout_of(llama), rollout_of(llama, TEXT[::-1], "q")]
    plain, calibrated = (
        method_of(llama, calibrate=on, score="edit_distance", signals=[{"name": "likelihood_weight", "alpha": 0.0}])
        for on in (False, True)
    )
    queries = plain.audit(rows, 1)
    evidence = [said(q, *[q.chunk.text[:4] + "e a o"] * 4) for q in queries]  # type: ignore[union-attr]
    raw, above = plain.read(rows, evidence, 1), calibrated.read(rows, evidence, 1)
    floor = raw.stats["chance_floor"]
    assert floor is not None and 0 < floor < 1 and above.stats["chance_floor"] == floor
    for before, after in zip(raw.audits[0]["chunks"], above.audits[0]["chunks"], strict=True):
        assert after["score"] == pytest.approx(max(0.0, (before["score"] - floor) / (1 - floor)))


def test_l16_duplicates_are_counted_for_the_log(llama: Policy) -> None:
    rows = [rollout_of(llama)]
    method = method_of(llama)
    signal = method.read(rows, [said(q, "a", "a", "a", "b") for q in method.audit(rows, 1)], 1)
    assert signal.stats["duplicate_rate"] == 0.5


def test_l17_short_chunks_and_l6_a_missing_anchor_are_cautioned_against(student: Policy) -> None:
    assert method_of(student, chunk_tokens=40).cautions() == []
    assert "chunk_tokens=39" in method_of(student, chunk_tokens=39).cautions()[0]
    bare = method_of(student, chunk_tokens=40, anchor={"beta": 0, "allow_none": True})
    assert "anchor.beta=0" in bare.cautions()[0]


def test_neutral_no_chunks_and_no_anchor_ask_nothing_and_learn_nothing(student: Policy) -> None:
    method = method_of(student, anchor={"beta": 0, "allow_none": True})
    method.config = method.config.model_copy(update={"chunks": 0})
    rows = [rollout_of(student), rollout_of(student, name="q")]
    assert method.audit(rows, 1) == []
    signal = method.read(rows, [], 1)
    trainer = Trainer(student, OptimizerSettings(), method.objective)
    terms = trainer.accumulate(rows, signal)
    assert terms["loss"] == 0.0
    assert all(p.grad is None or not p.grad.any() for p in trainer.trained)
