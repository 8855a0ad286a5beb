"""Students on disk, one of each kind, built once: see `tiny.py`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

# Tests that are started in the background of a shell would ignore Ctrl-C, which some of them are about.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # tiny models lose far more by waiting for a second thread than they gain


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a tiny student's folder; the same request gives the same folder."""
    made: dict[str, Path] = {}

    def make(tokenizer: str = "byte_level", kind: str = "llama", **settings: object) -> Path:
        name = f"{tokenizer}-{kind}-{sorted(settings.items())}"
        if name not in made:
            made[name] = tiny.saved(
                tmp_path_factory.mktemp("student"),
                getattr(tiny, tokenizer)(),
                kind,
                **settings,  # type: ignore[arg-type]
            )
        return made[name]

    return make


@pytest.fixture(scope="session")
def llama_folder(tiny_folder: Callable[..., Path]) -> Path:
    """Llama with a byte-level tokenizer and a head of its own."""
    return tiny_folder()


@pytest.fixture(scope="session")
def tied_folder(tiny_folder: Callable[..., Path]) -> Path:
    """Llama whose head is its embedding."""
    return tiny_folder(tie_word_embeddings=True)


@pytest.fixture(scope="session")
def qwen_folder(tiny_folder: Callable[..., Path]) -> Path:
    """Qwen3 with a SentencePiece-like tokenizer."""
    return tiny_folder("pieces", "qwen3")
