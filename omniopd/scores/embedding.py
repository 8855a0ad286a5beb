"""Cosine similarity of sentence embeddings: the score that forgives another wording."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from pydantic import Field

from omniopd.errors import ConfigError
from omniopd.registry import SCORES
from omniopd.settings import Settings
from omniopd.types import Chunk, Reply


@SCORES.register("embedding")
class Embedding:
    """`phi = max(0, cos(e(a), e(b)))` with a sentence-transformers model e; both empty 1, exactly one empty 0. [ours]

    Embeddings hardly see a changed number or a negation: read the fixed set in its test before trusting it on
    mathematics. Needs `pip install omniopd[embed]`.
    """

    class Config(Settings):
        """Which embedding model to load, once per process."""

        name: Literal["embedding"] = "embedding"
        model: str = Field(
            default="sentence-transformers/all-MiniLM-L6-v2", description="folder or Hugging Face id of the model"
        )

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, pairs: Sequence[tuple[Chunk, Reply]]) -> list[float]:
        """One clipped cosine per pair. Each distinct text is embedded once.

        Raises:
            ConfigError: sentence-transformers is not installed, or the model can't be loaded.
        """
        texts = sorted({text for chunk, reply in pairs for text in (chunk.text, reply.text) if text})
        vectors = dict(zip(texts, _embed(self.config.model, texts), strict=True)) if texts else {}
        return [_similarity(vectors.get(chunk.text), vectors.get(reply.text)) for chunk, reply in pairs]


def _similarity(a: Any, b: Any) -> float:
    """Clipped dot product of two unit vectors; None stands for an empty text."""
    if a is None or b is None:
        return float(a is b)
    return min(1.0, max(0.0, float(a @ b)))


def _embed(model: str, texts: list[str]) -> Any:
    """Unit vectors, [texts, width]."""
    return _load(model).encode(texts, normalize_embeddings=True, show_progress_bar=False)


@lru_cache(maxsize=2)
def _load(model: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError("score.name: 'embedding' needs sentence-transformers; pip install omniopd[embed]") from error
    try:
        return SentenceTransformer(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"score.model: '{model}' can't be loaded ({error}); give a folder or a sentence-transformers id"
        ) from error
