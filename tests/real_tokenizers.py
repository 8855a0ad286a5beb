"""Real tokenizers of the three kinds whose tokens can be laid over bytes; a test skips where their files are not at hand."""

from __future__ import annotations

import base64
import json
import os
from functools import cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("OMNIOPD_SHARED", ROOT.parent / "shared"))


@cache
def smollm2() -> PreTrainedTokenizerBase:
    """SmolLM2: byte-level BPE, 49,152 entries."""
    file = SHARED / "tokenizers" / "smollm2" / "tokenizer.json"
    if not file.is_file():
        pytest.skip("needs SmolLM2's tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=str(file))


@cache
def mistral() -> PreTrainedTokenizerBase:
    """Mistral 7B v0.3: SentencePiece with byte fallback and a space before every text, 32,768 entries.

    The library's own reader of such files wants protobuf; its `LlamaTokenizer` is what it would make of them.
    """
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(_mistral_data() / "mistral_instruct_tokenizer_240323.model.v3")
    )
    pieces = [model.id_to_piece(id) for id in range(len(model))]
    controls = [piece for id, piece in enumerate(pieces) if model.is_control(id)]
    vocab = {piece: id for id, piece in enumerate(pieces)}
    merges = generate_merges(vocab, None, skip_tokens=controls)
    return LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, extra_special_tokens=controls)


@cache
def tekken() -> PreTrainedTokenizerBase:
    """Mistral's Tekken: tiktoken-style ranks of bytes, 130,072 of them; here its control tokens stand behind them."""
    state = json.loads((_mistral_data() / "tekken_240911.json").read_text(encoding="utf-8"))
    size = state["config"]["default_vocab_size"] - state["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in state["vocab"][:size]}

    class Ranks(TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    controls = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    tokenizer = Ranks("", state["config"]["pattern"], extra_special_tokens=controls).converted()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def demo(model: str) -> PreTrainedTokenizerBase:
    """Of the demo's `student` (byte-level) or `teacher` (SentencePiece-style without the space before a text)."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(ROOT / "examples" / "demo" / model)
    return tokenizer


def _mistral_data() -> Path:
    package = pytest.importorskip("mistral_common", exc_type=ImportError)
    return Path(package.__file__).parent / "data"
