"""A small run of the shipped demo student against a scripted teacher."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import ScriptedTeacher

STUDENT = Path(__file__).resolve().parents[2] / "examples" / "demo" / "student"


@pytest.fixture
def teacher() -> Iterator[ScriptedTeacher]:
    server = ScriptedTeacher()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def settings(teacher: ScriptedTeacher, tmp_path: Path) -> dict[str, Any]:
    """A small run against the scripted teacher."""
    return {
        "student": {"path": str(STUDENT), "max_new_tokens": 48},
        "teacher": {
            "type": "openai",
            "base_url": teacher.url,
            "model": "scripted",
            "api_key_env": None,
            "continuation": "prefill",
            "max_attempts": 1,
        },
        "task": {"type": "arithmetic", "train_size": 64, "heldout_size": 16},
        "method": {"name": "omniopd", "chunks": 2, "chunk_tokens": 6, "continuations": 3},
        "train": {"steps": 4, "prompts_per_step": 4, "learning_rate": 1e-4, "save_every": 2},
        "eval": {"problems": 8},
        "output": str(tmp_path / "run"),
    }
