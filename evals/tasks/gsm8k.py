"""GSM8K (Cobbe et al. 2021): grade-school word problems, 7,473 to train on and 1,319 held out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field

from evals.checking import is_right
from evals.data import Row, load
from evals.holdout import hold_out
from omniopd.registry import TASKS
from omniopd.settings import Settings
from omniopd.types import Message, Prompt

_NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)\s*$")
_FILES = {"train": "train.jsonl", "test": "test.jsonl"}


@TASKS.register("gsm8k")
class Gsm8k:
    """The published splits: train to train on, test held out. `extras` holds the worked solution."""

    class Config(Settings):
        """Where GSM8K is, and how much of it to use."""

        type: Literal["gsm8k"] = "gsm8k"
        path: str = Field(
            default="openai/gsm8k",
            description="hub id, or a folder with train.jsonl and test.jsonl, or one file (a tenth is held out)",
        )
        train_size: int | None = Field(
            default=None, gt=0, description="the first so many training problems; null for all"
        )
        heldout_size: int | None = Field(
            default=None, gt=0, description="the first so many held-out problems; null for all"
        )
        system: str | None = Field(default=None, description="a system message to open every prompt with")

    def __init__(self, config: Config) -> None:
        train, heldout = _load(config)
        self.train = train[: config.train_size]
        self.heldout = heldout[: config.heldout_size]

    def check(self, prompt: Prompt, text: str) -> bool | None:
        """Whether the text's final answer is the number after the `####` of the solution."""
        return is_right(str(prompt.reference), text)


def _load(config: Gsm8k.Config) -> tuple[list[Prompt], list[Prompt]]:
    place = Path(config.path).expanduser()
    if place.is_file():
        rows = [_prompt(row, f"gsm8k/{index}", config.system) for index, row in enumerate(load(config.path))]
        return hold_out(rows, max(1, len(rows) // 10), config.path)
    train, heldout = (_split(config, split, place) for split in _FILES)
    return train, heldout


def _split(config: Gsm8k.Config, split: str, place: Path) -> list[Prompt]:
    path = str(place / _FILES[split]) if place.is_dir() else config.path
    rows = load(path, subset="main", split=split)
    return [_prompt(row, f"gsm8k/{split}/{index}", config.system) for index, row in enumerate(rows)]


def _prompt(row: Row, id_: str, system: str | None) -> Prompt:
    question, solution = row.text("question"), row.text("answer")
    number = _NUMBER.search(solution)
    if number is None:
        raise row.wrong("answer", "does not end in '#### NUMBER'; add the final answer, or use `type: jsonl`")
    messages: tuple[Message, ...] = (Message("user", question),)
    if system is not None:
        messages = (Message("system", system), *messages)
    return Prompt(id_, messages, number[1].replace(",", ""), {"solution": solution})
