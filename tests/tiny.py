"""Tiny random models and real tokenizers of several families, small enough that a test can build its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from omniopd.types import Message, Prompt, Rollout
from omniopd.verification.text import char_ends
from students.policy import Policy, StudentSettings
from students.samplers.transformers import TransformersRollouts, TransformersSampler

CORPUS = [
    "The answer is 12 + 7 = 19, so Tom has 19 apples.\nThe train leaves at noon and covers sixty miles every hour.",
    "First, we add the two numbers. Then we divide by three.\n\n    return x  # done\n",
    "naïve café, 東京は大きい, 😀👍🏽 emoji, the end of the whole answer",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PIECE_TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
LETTERS = "abcdef"


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2 and most models since; the pad token has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return _fast(tokenizer, TEMPLATE, eos_token="<|end|>", pad_token="<|pad|>", additional_special_tokens=special[2:])


@cache
def pieces(dummy_space: bool = False) -> PreTrainedTokenizerFast:
    """SentencePiece-style BPE: metaspace, byte fallback; `dummy_space` puts a space before the text, as in Llama 2."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    marks = [normalizers.Prepend("▁")] * dummy_space + [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    strip = [decoders.Strip(" ", 1, 0)] * dummy_space
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(
        vocab_size=180,
        special_tokens=special,
        initial_alphabet=["▁", *(chr(code) for code in range(33, 127))],
        limit_alphabet=96,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    state = json.loads(tokenizer.to_str())
    vocab = state["model"]["vocab"]
    for byte in range(256):  # ordinary vocabulary: as special tokens they would be left out when decoding
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    return _fast(
        Tokenizer.from_str(json.dumps(state)),
        PIECE_TEMPLATE,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        additional_special_tokens=special[3:],
    )


@cache
def letters() -> PreTrainedTokenizerFast:
    """A letter per token and one end token, so that every id sequence and its text are the same thing."""
    tokenizer = Tokenizer(models.BPE({"<end>": 0, **{letter: i + 1 for i, letter in enumerate(LETTERS)}}, []))
    tokenizer.decoder = decoders.Fuse()
    return _fast(
        tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}", eos_token="<end>", pad_token="<end>"
    )


def _fast(tokenizer: Tokenizer, template: str, **special: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False, **special
    )


def model(tokenizer: PreTrainedTokenizerBase, kind: str = "llama", seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of that architecture, peaked enough that mistakes of one position show."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.35,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **settings})).eval()


def saved(
    folder: Path, tokenizer: PreTrainedTokenizerBase, kind: str = "llama", seed: int = 0, **settings: Any
) -> Path:
    """Such a model with its tokenizer as a Hugging Face folder."""
    model(tokenizer, kind, seed, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def policy(folder: Path, **settings: Any) -> Policy:
    return Policy(StudentSettings(path=str(folder), **{"max_new_tokens": 16, **settings}))


def sampler(student: Policy, seed: int = 0) -> TransformersSampler:
    """The embedded sampler of a policy."""
    return TransformersSampler(TransformersRollouts(), student, seed)


def prompt(text: str = "What is 12 + 7?", name: str = "p") -> Prompt:
    return Prompt(name, (Message("user", text),))


def rollout(student: Policy, ids: Sequence[int], asked: Prompt | None = None, finish: str = "length") -> Rollout:
    """A rollout of given ids with the student's own log-probs and entropies, by one dense forward pass."""
    asked = asked or prompt()
    prompt_ids = student.prompt_ids(asked)
    logp, entropy = dense(student.model, prompt_ids, ids)
    text = student.decode(list(ids))
    ends = tuple(char_ends(list(ids), student.decode))
    return Rollout(asked, prompt_ids, tuple(ids), tuple(logp.tolist()), tuple(entropy.tolist()), ends, text, finish)  # type: ignore[arg-type]


@torch.no_grad()
def dense(model: Any, prompt_ids: Sequence[int], ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and entropy of each of `ids` after `prompt_ids`: the slow reference, one row, no cache, no padding."""
    whole = torch.tensor([[*prompt_ids, *ids]])
    logp = model(input_ids=whole).logits[0].float().log_softmax(-1)
    producing = logp[len(prompt_ids) - 1 : len(prompt_ids) - 1 + len(ids)]
    entropy = -(producing.exp() * producing).sum(-1)
    return producing.gather(1, torch.tensor(ids, dtype=torch.long)[:, None])[:, 0], entropy
