"""ROPD: rubrics from the teacher's answers and the group's rollouts, checks of each rollout, centred rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from pydantic import ValidationError

from omniopd.groups import centred, reward_signal
from omniopd.judging import is_check, is_rubric, sections
from omniopd.methods.ropd import Ropd, RopdConfig, weighted_share
from omniopd.types import AnswerQuery, Answers, Evidence, Message, Prompt, Query, Reply, Rollout, Signal
from students.policy import Policy

Says = Callable[[AnswerQuery], str | None]
RUBRIC = "[3] One.\n[2] Two.\n[1] Three.\n[1] Four."


@pytest.fixture
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


def rows_of(student: Policy, names: str = "aaabbb") -> list[Rollout]:
    torch.manual_seed(0)
    ids = [[*torch.randint(5, 200, (4 + n,)).tolist(), student.end_id] for n in range(len(names))]
    prompts = [Prompt(name, (Message("user", f"What is {name}?"),), reference=name) for name in names]
    return [tiny.rollout(student, one, prompt, finish="stop") for one, prompt in zip(ids, prompts, strict=True)]


def ropd(student: Policy, **settings: Any) -> Ropd:
    return Ropd(RopdConfig(**settings), student, 0)


def say(queries: Sequence[Query], says: Says) -> list[Evidence]:
    found: list[Evidence] = []
    for query in queries:
        assert isinstance(query, AnswerQuery)
        text = says(query)
        replies = () if text is None else tuple(Reply(text, "stop") for _ in range(query.n))
        found.append(Answers(query, replies, {} if replies else {"empty": query.n}))
    return found


def whole(method: Ropd, rows: Sequence[Rollout], says: Says) -> tuple[list[Evidence], Signal]:
    """All rounds of a step."""
    by_row = dict(enumerate(rows))
    evidence = say(method.before({row: one.prompt for row, one in by_row.items()}, 1), says)
    evidence += say(method.audit(rows, 1), says)
    while more := method.again(by_row, evidence, 1):
        evidence += say(more, says)
    return evidence, method.read(rows, evidence, 1)


def judge(check: Mapping[int, str | None], rubric: str | None = RUBRIC) -> Says:
    def says(query: AnswerQuery) -> str | None:
        if is_rubric(query.prompt):
            return rubric
        return check.get(query.row) if is_check(query.prompt) else f"answer to {query.prompt.id}"

    return says


def marks(*verdicts: object) -> str:
    return "\n".join(f"{n}: {'yes' if met else 'no'}" for n, met in enumerate(verdicts, 1) if met is not None)


def values(signal: Signal) -> list[float]:
    return [value[0].item() for value in signal.values_BT]


def test_golden_weighted_share() -> None:
    assert weighted_share((3, 2, 1), (True, False, True)) == pytest.approx(0.6666666667, abs=1e-10)
    assert weighted_share((3, 2, 1), (True, None, False)) == pytest.approx(3 / 4)  # it leaves both sums
    assert weighted_share((3, 2), (None, None)) is None and weighted_share((), ()) is None


def test_each_round_asks_what_it_needs(student: Policy) -> None:
    rows = rows_of(student)
    evidence, _ = whole(ropd(student, answers=2), rows, judge({row: marks(1, 0, 1, 0) for row in range(6)}))
    asked = [one.query for one in evidence if isinstance(one, Answers)]
    answers, rubrics, checks = asked[:2], asked[2:4], asked[4:]
    assert [(q.prompt.id, q.row, q.n, q.judge) for q in answers] == [("a", 0, 2, False), ("b", 3, 2, False)]
    assert [(q.row, q.n, q.judge) for q in rubrics] == [(0, 1, True), (3, 1, True)]
    written = rubrics[1].prompt.messages[0].content
    assert sections(written, "answer") == ["answer to b"] * 2
    assert sections(written, "response") == [row.text for row in rows[3:]]
    assert [(q.row, q.judge) for q in checks] == [(row, True) for row in range(6)]
    assert sections(checks[4].prompt.messages[0].content, "response") == [rows[4].text]
    assert sections(checks[4].prompt.messages[0].content, "criteria") == ["1: One.\n2: Two.\n3: Three.\n4: Four."]
    assert len({q.seed for q in answers}) == 2


def test_answers_are_the_same_whenever_a_prompt_comes(student: Policy) -> None:
    prompts = {row: one.prompt for row, one in enumerate(rows_of(student))}
    method = ropd(student)
    assert method.before(prompts, 1) == method.before(prompts, 9)


def test_golden_scores_are_centred_in_their_group(student: Policy) -> None:
    rows = rows_of(student, "aaaa")
    rubric = "[1] One.\n[1] Two.\n[1] Three."
    checks = {0: marks(1, 1, 0), 1: marks(1, 0, 0), 2: marks(1, 1, 1), 3: marks(0, 0, 0)}
    _, signal = whole(ropd(student, min_criteria=3), rows, judge(checks, rubric))
    assert values(signal) == pytest.approx([1 / 6, -1 / 6, 0.5, -0.5])
    assert signal.coverage == 1 and signal.stats["reward_mean"] == pytest.approx(0.5)
    assert signal.stats["rubric_criteria"] == 3 and signal.stats["criteria_unmarked"] == 0
    _, equal = whole(ropd(student, min_criteria=3), rows, judge({row: marks(1, 0, 1) for row in range(4)}, rubric))
    assert values(equal) == [0.0] * 4 and equal.coverage == 1


def test_a_missing_verdict_leaves_both_sums_and_none_at_all_masks(student: Policy) -> None:
    rows = rows_of(student, "aaaa")
    checks = {0: marks(1, None, 0, 0), 1: "I can't say.", 2: None, 3: marks(0, 0, 0, 0)}
    _, signal = whole(ropd(student), rows, judge(checks))
    assert values(signal) == pytest.approx([0.3, 0.0, 0.0, -0.3])  # 3 of 5, and none of 7
    assert [bool(mask.any()) for mask in signal.mask_BT] == [True, False, False, True]
    assert signal.drops == {"no verdict": 2} and signal.rejects == {"empty": 1}
    assert signal.stats["criteria_unmarked"] == pytest.approx(9 / 16)


@pytest.mark.parametrize("rubric", [None, "no criteria", "[1] One.\n[1] Two.\n[1] Three."])
def test_no_rubric_is_no_verdict(student: Policy, rubric: str | None) -> None:
    rows = rows_of(student)
    evidence, signal = whole(ropd(student), rows, judge({}, rubric))
    assert signal.drops == {"no rubric": 6} and signal.coverage == 0
    assert not any(is_check(one.query.prompt) for one in evidence)


def test_no_answer_is_no_rubric(student: Policy) -> None:
    evidence, signal = whole(ropd(student), rows_of(student), lambda query: None)
    assert signal.drops == {"no answer": 6} and len(evidence) == 2


def test_one_criterion_that_is_the_verifier_is_grpo_on_the_verifier(student: Policy) -> None:
    rows = [*rows_of(student), tiny.rollout(student, [], rows_of(student)[0].prompt)]
    right = [True, False, False, True, True, False]
    checks = {row: marks(one) for row, one in enumerate(right)}
    _, signal = whole(ropd(student, min_criteria=1), rows, judge(checks, "[7] It is right."))
    reference = reward_signal(rows, [*map(float, right), None], centred)
    assert all(map(torch.equal, signal.values_BT, reference.values_BT))
    assert all(map(torch.equal, signal.mask_BT, reference.mask_BT))
    assert [v[0].item() for v in signal.values_BT[:6]] == pytest.approx([2 / 3, -1 / 3, -1 / 3, 1 / 3, 1 / 3, -2 / 3])


def test_control_the_rubric_is_that_of_another_prompt(student: Policy) -> None:
    rows = rows_of(student)

    def says(query: AnswerQuery) -> str | None:
        if is_rubric(query.prompt):
            return f"[1] About {query.prompt.id[0]}."
        return marks(True) if is_check(query.prompt) else "answer"

    for control, given in (("none", "aaabbb"), ("shuffled", "bbbaaa")):
        evidence, _ = whole(ropd(student, min_criteria=1, control=control), rows, says)
        checks = [one.query.prompt.messages[0].content for one in evidence if is_check(one.query.prompt)]
        assert [sections(check, "criteria")[0] for check in checks] == [f"1: About {name}." for name in given]


def test_settings_that_can_never_hold_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_criteria: 13 is more than max_criteria, 12; lower it"):
        RopdConfig(min_criteria=13)


def test_it_says_what_it_needs_and_which_wordings_it_uses(student: Policy) -> None:
    method = ropd(student)
    assert method.needs == {"answer", "judge", "group"} and method.one_process
    assert "wordings " in method.describe()


def test_the_defaults_are_the_official_codes() -> None:
    config = RopdConfig()
    assert (config.answers, config.min_criteria, config.max_criteria) == (4, 4, 12)
