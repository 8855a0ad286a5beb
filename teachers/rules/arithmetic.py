"""Judges answers to the generated arithmetic problems (`evals/tasks/arithmetic.py`), as `omniopd.judging` asks for it.

It sees what a model would see: question and response, never the reference. Right results it works out from the question's
sentences; a question of another kind it does not grade. So it is a judge without error, better than any model.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence

from omniopd.judging import BEST, sections
from omniopd.registry import RULES
from omniopd.types import Message

_START = re.compile(r"\w+ has (\d+) \w+(?: with (\d+) \w+ in each)?\.")
_CHANGES = {
    "+": re.compile(r"\w+ (?:buys|finds|gives \w+) (\d+) more\."),
    "-": re.compile(r"\w+ (?:gives|loses|sells) (\d+)(?: to \w+)?\."),
    "*": re.compile(r"Then \w+ (doubles|triples) that number\."),
}
_FACTORS = {"doubles": 2, "triples": 3}
_DO = {"+": operator.add, "-": operator.sub, "*": operator.mul}
_EQUATION = re.compile(r"(\d+) ?([-+*]) ?(\d+) ?= ?(\d+)")
_STATED = re.compile(r"(?:=|\bis|\bmakes|\bleaves) ?(\d+)")
_MARK = re.compile(r"#### ?(-?\d+)\s*$")

STATES, ENDS, MARKED, HOLDS = (
    "It states the result {}.",
    "Its final answer is {}.",
    'It marks its final answer with "####".',
    "Every equation in it holds.",
)


@RULES.register("arithmetic")
class ArithmeticJudge:
    """Grades, writes rubrics, and checks criteria."""

    version = 1

    def answer(self, messages: Sequence[Message], seed: int) -> str:
        """See `Rule`; "" to whatever is no judge's task."""
        asked = messages[-1].content
        questions, responses = sections(asked, "question"), sections(asked, "response")
        if criteria := sections(asked, "criteria"):
            return _checked(criteria[0], responses[0])
        if answers := sections(asked, "answer"):
            return _rubric(answers, responses)
        return _graded(questions[0], responses[0]) if questions and responses else ""


def results(question: str) -> list[int] | None:
    """The result of each step that a question tells of, the last one its answer; None for a question of another kind."""
    told = [sentence.strip() for sentence in re.findall(r"[^.?]+[.?]", question)]
    start = _START.fullmatch(told[0]) if told else None
    if start is None or not told[-1].startswith("How many"):
        return None
    first, each = start.groups()
    total = int(first) * int(each or 1)
    steps = [] if each is None else [total]
    for sentence in told[1:-1]:
        matches = ((sign, pattern.fullmatch(sentence)) for sign, pattern in _CHANGES.items())
        change = next(((sign, match.group(1)) for sign, match in matches if match), None)
        if change is None:
            return None
        sign, amount = change
        total = _DO[sign](total, _FACTORS.get(amount) or int(amount))
        steps.append(total)
    return steps or None


def right_steps(steps: Sequence[int], response: str) -> int:
    """How many steps a response gets right: results that stand in it in their order, and the last as its final answer."""
    at = right = 0
    for result in steps[:-1]:
        found = re.compile(rf"\b{result}\b").search(response, at)
        if found:
            at, right = found.end(), right + 1
    final = _MARK.search(response)
    return right + (final is not None and int(final.group(1)) == steps[-1])


def _graded(question: str, response: str) -> str:
    steps = results(question)
    if not steps:
        return "This is no question that I can grade."
    right = right_steps(steps, response)
    return f"{right} of {len(steps)} steps are right.\nGrade: {round(BEST * right / len(steps))}"


def _rubric(answers: Sequence[str], responses: Sequence[str]) -> str:
    """What the answer that most references end with says; twice the weight where fewer than half of the responses say it."""
    finals = Counter(match.group(1) for answer in answers if (match := _MARK.search(answer)))
    if not finals:
        return "The reference answers come to no result."
    final = finals.most_common(1)[0][0]
    model = next(answer for answer in answers if (match := _MARK.search(answer)) and match.group(1) == final)
    between = [number for number in dict.fromkeys(_STATED.findall(model)) if number != final]
    criteria = {STATES.format(number): 2 for number in between} | {ENDS.format(final): 3, MARKED: 1, HOLDS: 1}
    lines = []
    for criterion, weight in criteria.items():
        met = sum(bool(_met(criterion, response)) for response in responses)
        lines.append(f"[{weight * (1 + (2 * met < len(responses)))}] {criterion}")
    return "\n".join(lines)


def _checked(criteria: str, response: str) -> str:
    lines = []
    for line in criteria.splitlines():
        number, _, criterion = line.partition(": ")
        met = _met(criterion, response)
        lines.append(f"{number}: {'unknown' if met is None else 'yes' if met else 'no'}")
    return "\n".join(lines)


def _met(criterion: str, response: str) -> bool | None:
    """Whether a response meets a criterion of this file's wording; None for any other."""
    final, stated = _MARK.search(response), re.search(r"-?\d+", criterion)
    if criterion == MARKED:
        return final is not None
    if criterion == HOLDS:
        return all(_DO[sign](int(a), int(b)) == int(c) for a, sign, b, c in _EQUATION.findall(response))
    if stated and criterion == ENDS.format(stated.group()):
        return final is not None and final.group(1) == stated.group()
    if stated and criterion == STATES.format(stated.group()):
        return re.search(rf"\b{stated.group()}\b", response) is not None
    return None
