"""Your own prompts: a JSONL or Parquet file, or a data set on the hub, with a prompt or a chat column."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from evals.checking import is_right
from evals.data import Row, kind_of, load
from evals.holdout import digest, hold_out, without
from omniopd.errors import ConfigError, DataError
from omniopd.registry import TASKS
from omniopd.settings import Settings
from omniopd.types import Message, Prompt, Role

_log = logging.getLogger(__name__)


@TASKS.register("jsonl")
class Jsonl:
    """Prompts from rows. A prompt that is held out is never trained on, even where both files hold it."""

    class Config(Settings):
        """Which data, and which of its columns."""

        type: Literal["jsonl"] = "jsonl"
        path: str = Field(description="a local .jsonl or .parquet file, or a hub id")
        subset: str | None = Field(default=None, description="for a hub id: the name of its configuration")
        split: str = Field(default="train", description="for a hub id: the split to train on")
        prompt: str = Field(default="prompt", description="the column that holds the question as text")
        messages: str | None = Field(
            default=None,
            description="the column that holds a chat instead: [{role, content}, ...]; a closing answer is cut off",
        )
        answer: str | None = Field(
            default="answer", description="the column of reference answers; null if there are none"
        )
        id: str | None = Field(default=None, description="a column of unique ids; null to derive them from the prompts")
        extras: list[str] = Field(default=[], description="columns that only teachers may see, as to route by them")
        system: str | None = Field(default=None, description="a system message for every prompt that has none")
        train_size: int | None = Field(
            default=None, gt=0, description="the first so many training prompts; null for all"
        )
        heldout_path: str | None = Field(default=None, description="a file or hub id of held-out prompts")
        heldout_split: str = Field(default="test", description="for a hub id in heldout_path: its split")
        heldout_size: int | None = Field(
            default=None,
            gt=0,
            description="how many prompts to hold out of `path` (by hash), or to take of heldout_path",
        )

        @model_validator(mode="after")
        def _one_home_of_prompts(self) -> Jsonl.Config:
            # by value: a resolved config, read again, has every field set
            if self.messages is not None and self.prompt != type(self).model_fields["prompt"].default:
                raise ValueError("set `prompt` (a text column) or `messages` (a chat column), not both")
            return self

    def __init__(self, config: Config) -> None:
        self._config = config
        train = _read(config, config.path, config.split)
        heldout: list[Prompt] = []
        if config.heldout_path is not None:
            heldout = _read(config, config.heldout_path, config.heldout_split)[: config.heldout_size]
            train = _apart(train, heldout, config.path)
        elif config.heldout_size is not None:
            train, heldout = hold_out(train, config.heldout_size, config.path)
        self.train, self.heldout = train[: config.train_size], heldout

    def check(self, prompt: Prompt, text: str) -> bool | None:
        """Whether the text's final answer equals the reference answer.

        Raises:
            ConfigError: the prompt has no reference answer.
        """
        if prompt.reference is None:
            raise ConfigError(
                f"task.answer: prompt {prompt.id} has no reference answer to check against; evaluation needs an "
                "`answer` column (set task.answer to its name), or leave evaluation off"
            )
        return is_right(prompt.reference, text)


def _read(config: Jsonl.Config, path: str, split: str) -> list[Prompt]:
    rows = load(path, config.subset, split)
    chats = [_messages(row, config) for row in rows]
    ids = _derived_ids(chats) if config.id is None else _given_ids(rows, config.id)
    return [
        Prompt(id_, chat, _reference(row, config.answer), {column: row.cell(column) for column in config.extras})
        for row, chat, id_ in zip(rows, chats, ids, strict=True)
    ]


def _messages(row: Row, config: Jsonl.Config) -> tuple[Message, ...]:
    if config.messages is None:
        hint = f"; for chats set `messages: {config.prompt}`" if isinstance(row.cell(config.prompt), list) else ""
        chat = [Message("user", row.text(config.prompt, hint))]
    else:
        chat = _chat(row, config.messages)
    if config.system is not None and chat[0].role != "system":
        chat.insert(0, Message("system", config.system))
    return tuple(chat)


def _chat(row: Row, column: str) -> list[Message]:
    """The chat up to its last user turn: a closing assistant turn is what the student shall write itself."""
    turns = row.cell(column)
    if not isinstance(turns, list):
        raise row.wrong(column, f"holds {kind_of(turns)}, not a list of {{role, content}}")
    chat = [_turn(row, column, number, turn) for number, turn in enumerate(turns, start=1)]
    if chat and chat[-1].role == "assistant":
        chat.pop()
    if not chat or chat[-1].role != "user":
        raise row.wrong(column, "asks nothing: the chat (without a closing assistant turn) must end with a user turn")
    return chat


def _turn(row: Row, column: str, number: int, turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
        raise row.wrong(column, f"has a turn {number} without text; write {{role: ..., content: TEXT}}")
    role: Role = turn.get("role", "")
    if role not in get_args(Role):
        raise row.wrong(column, f"has role {role!r} in turn {number}; known: {', '.join(get_args(Role))}")
    return Message(role, turn["content"])


def _reference(row: Row, column: str | None) -> str | None:
    if column is None:
        return None
    value = row.cell(column, "; set `answer` to the right one, or to null if there are no reference answers")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise row.wrong(column, f"holds {kind_of(value)}, not text or a number")
    if not str(value).strip():
        raise row.wrong(column, "is empty; fill it in, or write null if the answer is unknown")
    return str(value)


def _derived_ids(chats: list[tuple[Message, ...]]) -> list[str]:
    """Ids that don't depend on where a row stands; the second of two equal prompts gets a "-2"."""
    seen: Counter[str] = Counter()
    ids = []
    for chat in chats:
        key = digest(chat)[:16]
        seen[key] += 1
        ids.append(key if seen[key] == 1 else f"{key}-{seen[key]}")
    return ids


def _given_ids(rows: list[Row], column: str) -> list[str]:
    first: dict[str, str] = {}
    for row in rows:
        value = row.cell(column)
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise row.wrong(column, f"holds {kind_of(value)}, not an id (text or a whole number)")
        if str(value) in first:
            raise row.wrong(column, f"repeats the id {value!r} of {first[str(value)]}; make ids unique or unset `id`")
        first[str(value)] = row.where
    return list(first)


def _apart(train: list[Prompt], heldout: list[Prompt], path: str) -> list[Prompt]:
    kept = without(train, heldout)
    if not kept:
        raise DataError(f"{path}: every prompt is also held out, which leaves none to train on; hold out fewer")
    if len(kept) < len(train):
        _log.warning("%s: %d prompts are also held out and left out of training", path, len(train) - len(kept))
    return kept
