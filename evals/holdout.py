"""Keeping prompts that measure apart from prompts that train, by what they ask and not by where they stand."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence

from omniopd.errors import DataError
from omniopd.types import Message, Prompt


def digest(messages: Sequence[Message]) -> str:
    """The identity of a prompt: SHA-256 of its turns. System messages are instructions, not part of the question."""
    turns = [[message.role, message.content] for message in messages if message.role != "system"]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def hold_out(prompts: Sequence[Prompt], size: int, where: str) -> tuple[list[Prompt], list[Prompt]]:
    """Split into (train, held out), both in the given order; `where` names the data in an error.

    The prompts with the smallest digests are held out, so that the choice does not depend on the order of the rows.
    Equal prompts stay together, so there may be a few more than `size`.

    Raises:
        DataError: nothing is left to train on.
    """
    keys = [digest(prompt.messages) for prompt in prompts]
    groups = Counter(keys)
    chosen: set[str] = set()
    count = 0
    for key in sorted(groups):
        if count >= size:
            break
        chosen.add(key)
        count += groups[key]
    train = [prompt for prompt, key in zip(prompts, keys, strict=True) if key not in chosen]
    if not train:
        raise DataError(f"{where}: holding out {size} of {len(prompts)} rows leaves none to train on; hold out fewer")
    return train, [prompt for prompt, key in zip(prompts, keys, strict=True) if key in chosen]


def without(train: Sequence[Prompt], heldout: Sequence[Prompt]) -> list[Prompt]:
    """The training prompts that are not also held out."""
    held = {digest(prompt.messages) for prompt in heldout}
    return [prompt for prompt in train if digest(prompt.messages) not in held]
