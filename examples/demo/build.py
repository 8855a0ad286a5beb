"""Build the demo models from a seed: `python examples/demo/build.py [student|teacher|...]` (some minutes each on two cores).

The **student** is a small Llama with a byte-level BPE tokenizer that answers tersely and is right about half of the
time: its training is stopped early. The **teacher** is a Qwen3 with a SentencePiece-style BPE tokenizer (metaspace,
byte fallback). Left alone it answers in a wordy manner four times out of five, but it can go on in either style. Told
by a system message to be brief it always answers tersely: that is the demo's "teacher that writes in the student's
style". The two differ in architecture, tokenizer family, chat template and manner, as a closed teacher would.

The **sibling** is the teacher's recipe with the student's tokenizer and chat template: a teacher of the same tokenizer
family, to compare what crossing tokenizers costs. The **cousin** is the recipe with a tokenizer that, unlike the
student's, writes a number as one token where it can: there the two texts are cut differently at nearly every word.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from evals.tasks.arithmetic import Problem, problems

HERE = Path(__file__).parent
SEED = 20260531
BRIEF = "Answer in equations only."  # the system message that makes the teacher terse
WORDY_SHARE = 0.8


@dataclass(frozen=True)
class Recipe:
    """How one demo model is made: optimizer steps, batch size, peak learning rate and whether it decays."""

    name: str
    steps: int
    decay: bool
    batch: int = 48
    learning_rate: float = 3e-3


STUDENT = Recipe("student", steps=1000, decay=False)
TEACHER = Recipe("teacher", steps=3000, decay=True)
SIBLING = Recipe("sibling", steps=3000, decay=True)
COUSIN = Recipe("cousin", steps=3000, decay=True)
BRIEFER = Recipe(
    "cousin, briefer", steps=1500, decay=True, learning_rate=1.5e-3
)  # numbers as tokens are harder to learn

_STUDENT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEACHER_TEMPLATE = (
    "<s>{% for m in messages %}{% if m['role'] == 'system' %}[SYS]{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def corpus(count: int = 4000) -> Iterator[str]:
    """Text that the tokenizers are trained on."""
    for problem in islice(problems("train", SEED), count):
        yield from (problem.question, problem.terse, problem.wordy)


def student_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=special[2:],
        chat_template=_STUDENT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def teacher_tokenizer(*, single_digits: bool = True, vocab_size: int = 640) -> PreTrainedTokenizerFast:
    """SentencePiece-style BPE: spaces are written as a metaspace, unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=single_digits)]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", "[SYS]", "[INST]", "[/INST]"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer = _with_ordinary_bytes(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        additional_special_tokens=special[3:],
        chat_template=_TEACHER_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _with_ordinary_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Byte pieces are ordinary vocabulary: as special tokens, which training makes them, decoding would drop them."""
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(parts))


def student_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def teacher_model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=144,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=36,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def student_messages(problem: Problem, rng: random.Random) -> tuple[list[dict[str, str]], str]:
    return [{"role": "user", "content": problem.question}], problem.terse


def teacher_messages(
    problem: Problem, rng: random.Random, brief_share: float = 0.2
) -> tuple[list[dict[str, str]], str]:
    user = {"role": "user", "content": problem.question}
    if rng.random() < brief_share:
        return [{"role": "system", "content": BRIEF}, user], problem.terse
    return [user], problem.wordy if rng.random() < WORDY_SHARE else problem.terse


def batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, messages
) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Endless batches of (prompt ids, answer ids), rows of similar length together to waste little on padding."""
    rng = random.Random(f"{SEED}/{recipe.name}")
    stream = problems("train", SEED)
    while True:
        pool = []
        for problem in islice(stream, 16 * recipe.batch):
            chat, answer = messages(problem, rng)
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            answer_ids = tokenizer(answer, add_special_tokens=False).input_ids
            pool.append((tokenizer(prompt, add_special_tokens=False).input_ids, [*answer_ids, tokenizer.eos_token_id]))
        pool.sort(key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(pool), recipe.batch))
        rng.shuffle(starts)
        yield from (pool[start : start + recipe.batch] for start in starts)


def rate(step: int, recipe: Recipe, warmup: int = 100) -> float:
    """The learning rate's factor: a linear warm-up, then a cosine down to 2 %, or no decay at all."""
    decay = 0.5 * (1 + math.cos(min(step / recipe.steps, 1.0) * math.pi)) + 0.02 if recipe.decay else 1.0
    return min((step + 1) / warmup, decay)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, messages) -> None:
    """Supervised training on worked answers with AdamW, loss on the answer only."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    model.train()
    started = time.time()
    for step, rows in enumerate(islice(batches(tokenizer, recipe, messages), recipe.steps)):
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        predicts = torch.zeros(len(rows), width, dtype=torch.bool)  # positions whose next token belongs to the answer
        for i, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[i, :end] = torch.tensor(prompt + answer)
            predicts[i, len(prompt) - 1 : end - 1] = True
        hidden = model.model(input_ids=ids).last_hidden_state
        targets = ids.roll(-1, dims=1)[predicts]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[predicts]), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(
                f"{recipe.name} step {step + 1}/{recipe.steps} loss {loss.item():.3f} {time.time() - started:.0f} s",
                flush=True,
            )


def build(name: str, recipe: Recipe | None = None, target: Path | None = None) -> None:
    """Make one model from the seed and write it as safetensors."""
    torch.manual_seed(SEED)
    recipe = recipe or {"student": STUDENT, "teacher": TEACHER, "sibling": SIBLING, "cousin": COUSIN}[name]
    if name == "cousin":
        tokenizer = teacher_tokenizer(single_digits=False, vocab_size=1024)
    else:
        tokenizer = teacher_tokenizer() if name == "teacher" else student_tokenizer()
    model = student_model(tokenizer) if name == "student" else teacher_model(tokenizer)
    messages = student_messages if name == "student" else teacher_messages
    print(f"{name}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, recipe, messages)
    if name == "cousin":
        train(model, tokenizer, BRIEFER, partial(teacher_messages, brief_share=0.7))
    target = target or HERE / name
    model.eval().save_pretrained(target)
    tokenizer.save_pretrained(target)
    print(json.dumps({"model": name, "megabytes": round(sum(f.stat().st_size for f in target.iterdir()) / 1e6, 2)}))


if __name__ == "__main__":
    for which in sys.argv[1:] or ["student", "teacher", "sibling", "cousin"]:
        build(which)
