"""A Qwen3 folder as one GGUF file for llama.cpp: `python gguf_of.py FOLDER FILE`, with `gguf` and `safetensors` installed.

Meant for tiny models with a SentencePiece-like BPE tokenizer (metaspace, byte fallback). llama.cpp's `llama` tokenizer
joins whichever neighbours make the piece of the highest score, so a piece's score is minus the rank of its merge.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
from safetensors.numpy import load_file


def write(folder: Path, target: Path) -> None:
    """Convert weights (float32, as they are), vocabulary and chat template."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen3")
    _add_shape(writer, config)
    _add_vocabulary(writer, json.loads((folder / "tokenizer.json").read_text()), config)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, array in load_file(folder / "model.safetensors").items():
        renamed = names.get_name(name, try_suffixes=(".weight",))
        if renamed is None:
            raise SystemExit(f"{name} has no name in GGUF; only Qwen3 models can be converted")
        writer.add_tensor(renamed, array.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    model = tokenizer["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(model["merges"])))}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(ranks.get(piece, len(ranks))) for piece in pieces])
    writer.add_token_types([_kind(piece, special, model["unk_token"]) for piece in pieces])
    writer.add_unk_token_id(model["vocab"][model["unk_token"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)  # the chat template writes it
    writer.add_add_space_prefix(False)


def _kind(piece: str, special: set[str], unknown: str) -> gguf.TokenType:
    if piece == unknown:
        return gguf.TokenType.UNKNOWN
    if piece in special:
        return gguf.TokenType.CONTROL
    if len(piece) == 6 and piece.startswith("<0x"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]))
