"""Generated arithmetic word problems with worked answers in two styles.

The same problem can be answered *tersely* ("12+7=19. 19-5=14. #### 14") or in a *wordy* manner ("Ann starts with 12
apples. ..."). Train and held-out problems are kept apart by a hash of the question's text, so that no held-out
question can appear in training, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from pydantic import Field

from evals.checking import is_right
from omniopd.registry import TASKS
from omniopd.settings import Settings
from omniopd.types import Message, Prompt

Split = Literal["train", "heldout"]

_PEOPLE = {
    "Ann": "she", "Ben": "he", "Carla": "she", "Dan": "he", "Emma": "she", "Finn": "he", "Gina": "she", "Hugo": "he",
    "Iris": "she", "Jack": "he", "Kim": "she", "Leo": "he", "Mia": "she", "Noah": "he", "Olga": "she", "Paul": "he",
}  # fmt: skip
_THINGS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stickers")
_BOXES = ("bags", "boxes", "jars", "packs")
_LARGEST = 99  # no number in a worked answer exceeds this


@dataclass(frozen=True)
class Problem:
    """One word problem: its text, the number it asks for, and a worked answer in either style."""

    question: str
    answer: int
    terse: str
    wordy: str


def generate(rng: random.Random) -> Problem:
    """Draw one problem of two to four steps; every intermediate result is a whole number from 1 to 99."""
    name, thing = rng.choice(list(_PEOPLE)), rng.choice(_THINGS)
    told, terse, wordy = [], [], []
    if rng.random() < 0.5:
        boxes, each = rng.randint(2, 9), rng.randint(2, 9)
        box = rng.choice(_BOXES)
        total = boxes * each
        told.append(f"{name} has {boxes} {box} with {each} {thing} in each.")
        terse.append(f"{boxes}*{each}={total}.")
        wordy.append(f"The {boxes} {box} hold {boxes} times {each}, which makes {total} {thing}.")
        steps = rng.randint(1, 3)
    else:
        total = rng.randint(5, 60)
        told.append(f"{name} has {total} {thing}.")
        wordy.append(f"At the start {name} has {total} {thing}.")
        steps = rng.randint(2, 3)
    for _ in range(steps):
        text, sign, amount, result, words = _change(rng, name, thing, total)
        told.append(text)
        terse.append(f"{total}{sign}{amount}={result}.")
        wordy.append(words)
        total = result
    told.append(f"How many {thing} does {name} have now?")
    mark = f"#### {total}"
    return Problem(
        question=" ".join(told),
        answer=total,
        terse=" ".join([*terse, mark]),
        wordy=" ".join([*wordy, f"So the answer is {total}.", mark]),
    )


def _change(rng: random.Random, name: str, thing: str, total: int) -> tuple[str, str, int, int, str]:
    """One event of the story: its sentence, the sign, the amount, the result and the wordy working."""
    pronoun = _PEOPLE[name].capitalize()
    friend = rng.choice([person for person in _PEOPLE if person != name])
    kinds = []
    if total <= _LARGEST - 2:
        kinds.append("gain")
    if total >= 4:
        kinds += ["give", "lose"]
    if total * 3 <= _LARGEST:
        kinds.append("multiply")
    kind = rng.choice(kinds)
    if kind == "gain":
        amount = rng.randint(2, min(50, _LARGEST - total))
        result = total + amount
        text = rng.choice(
            (f"{name} buys {amount} more.", f"{friend} gives {name} {amount} more.", f"{name} finds {amount} more.")
        )
        return text, "+", amount, result, f"{pronoun} gets {amount} more, and {total} plus {amount} is {result}."
    if kind == "multiply":
        factor, word = rng.choice(((2, "doubles"), (3, "triples")))
        result = total * factor
        return f"Then {name} {word} that number.", "*", factor, result, f"That number times {factor} is {result}."
    amount = rng.randint(1, total - 1)
    result = total - amount
    text = (
        f"{name} gives {amount} to {friend}."
        if kind == "give"
        else rng.choice((f"{name} loses {amount}.", f"{name} sells {amount}."))
    )
    return text, "-", amount, result, f"{pronoun} parts with {amount}, and {total} minus {amount} leaves {result}."


def split_of(question: str) -> Split:
    """Which split a question belongs to: one in ten is held out, by the SHA-256 of its text."""
    return "heldout" if hashlib.sha256(question.encode()).digest()[0] % 10 == 0 else "train"


def problems(split: Split, seed: int) -> Iterator[Problem]:
    """An endless stream of distinct problems of one split, reproducible by seed."""
    rng = random.Random(f"arithmetic/{split}/{seed}")
    seen: set[str] = set()
    while True:
        problem = generate(rng)
        if split_of(problem.question) == split and problem.question not in seen:
            seen.add(problem.question)
            yield problem


@TASKS.register("arithmetic")
class Arithmetic:
    """The generated problems as a task. `extras` holds both worked answers, for scripted teachers."""

    class Config(Settings):
        """Sizes of the two splits, and the seed from which both are drawn, each in a stream of its own."""

        type: Literal["arithmetic"] = "arithmetic"
        train_size: int = Field(default=4000, gt=0)
        heldout_size: int = Field(default=500, gt=0)
        seed: int = 0

    def __init__(self, config: Config) -> None:
        self.train = _prompts("train", config.seed, config.train_size)
        self.heldout = _prompts("heldout", config.seed, config.heldout_size)

    def check(self, prompt: Prompt, text: str) -> bool | None:
        """Whether the text's final answer is the number asked for."""
        return is_right(str(prompt.reference), text)


def _prompts(split: Split, seed: int, size: int) -> list[Prompt]:
    return [
        Prompt(
            id=f"arithmetic/{split}/{seed}/{index}",
            messages=(Message("user", problem.question),),
            reference=str(problem.answer),
            extras={"terse": problem.terse, "wordy": problem.wordy},
        )
        for index, problem in enumerate(islice(problems(split, seed), size))
    ]
