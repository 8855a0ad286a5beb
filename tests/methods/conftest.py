"""The pair that most tests of methods ask for. What changes weights makes a student of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from students.policy import Policy


@pytest.fixture(scope="module")
def student(llama_folder: Path) -> Policy:
    return tiny.policy(llama_folder)


@pytest.fixture(scope="module")
def teacher(tiny_folder: Callable[..., Path]) -> Policy:
    """Of the same tokenizer, other weights."""
    return tiny.policy(tiny_folder(seed=1))
