"""A step's stages on a GPU against the floors of its memory and its matrices, and against TRL's trainer on the same weights.

    python examples/bench/gpu.py [--json NEW] [--compare OLD]      # a student like Qwen3-0.6B, a teacher like Qwen3-1.7B
    python examples/bench/gpu.py --shape tiny --device cpu         # seconds, on anything

Weights are random, in the shapes of `costs.py`; the tokenizer is the demo student's, and ids that it lacks are ordinary ids.
No id ends a response, so that every row has `--new-tokens` on both sides. Both learn the dense reverse KL to the teacher
without an anchor, in micro-batches of at most as many tokens. Stages are timed one after the other, the device waited for
after each; for their floors see `floors.py`. A side's first step is warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from compare import add_options, described, finish
from costs import QWEN3_06B, QWEN3_17B, Transformer
from floors import Stopwatch, floors, rates
from gpu_trl import REST, Stages, train
from measuring import Setting, machine
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from omniopd.config import RunConfig, load_config
from omniopd.opening import open_teacher
from omniopd.run import Run

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "examples" / "demo" / "student"
SHAPES = {
    "qwen3": (QWEN3_06B, QWEN3_17B),
    "tiny": (
        Transformer("tiny student", 2, 64, 4, 2, 128, 1024, tied=True, head_dim=16),
        Transformer("tiny teacher", 2, 96, 4, 2, 192, 1024, tied=True, head_dim=24),
    ),
}
WIDTH = {"float32": 4, "bfloat16": 2}


def save_model(shape: Transformer, folder: Path, setting: Setting) -> Path:
    """A model of random weights with the demo student's tokenizer, as any model folder."""
    config = Qwen3Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    torch.manual_seed(setting.seed)
    with torch.device(setting.device):
        model = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, setting.dtype))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def config_of(paths: Sequence[Path], options: argparse.Namespace, output: Path) -> RunConfig:
    """Our side as any other run."""
    student, teacher = map(str, paths)
    return load_config(
        {
            "student": {"path": student, "dtype": options.dtype, "max_new_tokens": options.new_tokens},
            "teacher": {"type": "transformers", "path": teacher, "device": options.device},
            "task": {"type": "arithmetic"},
            "method": {"name": "opd", "form": "dense", "anchor": {"beta": 0, "allow_none": True}},
            "train": {"prompts_per_step": options.prompts},
            "eval": {"problems": 0},
            "output": str(output),
        }
    )


def ours(run: Run, steps: int, device: str) -> Stages:
    """Seconds of our stages by step."""
    run.policy.end_ids = frozenset()
    watch = Stopwatch(device)

    async def train_all() -> None:
        async with open_teacher(run) as (teacher, _):
            for step in range(1, steps + 1):
                with watch.stage("rollout"):
                    rollouts = run.sampler.sample(run.prompts(step), step)
                with watch.stage("evidence"):
                    evidence = await teacher.gather(run.method.audit(rollouts, step))
                with watch.stage("update"):
                    run.trainer.update(rollouts, run.method.read(rollouts, evidence, step))
                    run.sampler.push(run.trainer.updates)

    asyncio.run(train_all())
    return watch.seconds


def micro_batches(rows: int, longest: int, tokens: int) -> int:
    """The smallest divisor of the rows into parts of at most so many tokens; a row each where none does."""
    fits = (parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts * longest <= tokens)
    return next(fits, rows)


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Both sides, as written to the JSON."""
    setting = Setting(device=options.device, dtype=options.dtype)
    shapes, steps = SHAPES[options.shape], options.steps + 1
    rate = rates(setting)
    with TemporaryDirectory() as name:
        paths = [save_model(shape, Path(name) / str(place), setting) for place, shape in enumerate(shapes)]
        run = Run(config_of(paths, options, Path(name) / "run"))
        prompts = [prompt for step in range(1, steps + 1) for prompt in run.prompts(step)]
        lengths = [len(run.policy.prompt_ids(prompt)) for prompt in prompts]
        chats = [[asdict(message) for message in prompt.messages] for prompt in prompts]
        longest = max(lengths) + options.new_tokens
        batches = micro_batches(options.prompts, longest, run.config.student.micro_batch_tokens)
        _peak(options.device)
        sides = {"omniopd": ours(run, steps, options.device)}
        peaks = {"omniopd": _peak(options.device)}
        del run
        _peak(options.device)
        sides["TRL"] = train(paths, chats, steps, batches, options)
        peaks["TRL"] = _peak(options.device)
    least = floors(shapes, options.prompts, statistics.fmean(lengths), options.new_tokens, WIDTH[options.dtype], rate)
    tokens = options.prompts * options.new_tokens
    return {
        "machine": machine(setting),
        "dtype": options.dtype,
        "shapes": [shape.name for shape in shapes],
        "prompts": options.prompts,
        "prompt_tokens": statistics.fmean(lengths),
        "new_tokens": options.new_tokens,
        "steps": options.steps,
        "rates": rate,
        "sides": {side: {"peak_bytes": peaks[side], "stages": summary(sides[side], least, tokens)} for side in sides},
    }


def summary(stages: Stages, least: Mapping[str, float], tokens: int) -> dict[str, dict[str, Any]]:
    """Each stage's median over the steps after the first, and its share that the floor is; `tokens` of responses a step."""
    whole = dict(stages)
    if REST not in whole:
        whole[REST] = [sum(parts) for parts in zip(stages["evidence"], stages["update"], strict=True)]
    whole["step"] = [sum(parts) for parts in zip(whole["rollout"], whole[REST], strict=True)]
    least = {**least, REST: least["evidence"] + least["update"], "step": sum(least.values())}
    found = {}
    for name, seconds in whole.items():
        median = statistics.median(seconds[1:])
        found[name] = {
            "seconds": median,
            "tokens_per_second": tokens / median,
            "floor_seconds": least[name],
            "floor_share": least[name] / median,
            "seconds_all": seconds,
        }
    return found


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a row for each stage of each side."""
    rate = found["rates"]
    lines = [
        f"{described(found['machine'])}; {found['dtype']}; {' learns from '.join(found['shapes'])}, random weights; "
        f"{found['prompts']} prompts of {found['prompt_tokens']:.0f} tokens, {found['new_tokens']} new tokens each; median "
        f"of {found['steps']} steps. A copy moves {rate['bytes_per_second'] / 1e9:,.0f} GB/s, a matrix product does "
        f"{rate['flops_per_second'] / 1e12:,.1f} TFLOP/s.",
        "",
        "| | seconds | response tokens / s | floor, seconds | floor / seconds |",
        "|---|---|---|---|---|",
    ]
    for side, each in found["sides"].items():
        for name, stage in each["stages"].items():
            lines.append(
                f"| {side}, {name} | {stage['seconds']:.3g} | {stage['tokens_per_second']:,.0f} | "
                f"{stage['floor_seconds']:.3g} | {stage['floor_share']:.2f} |"
            )
    peaks = {side: each["peak_bytes"] for side, each in found["sides"].items() if each["peak_bytes"]}
    told = [f"peak memory of {side}: {peak / 1e9:.1f} GB" for side, peak in peaks.items()]
    return "\n".join([*lines, *(["", "; ".join(told)] if told else []), ""])


def figures(found: Mapping[str, Any]) -> dict[str, float]:
    """For `--compare`."""
    under = f"{found['shapes'][0]}, {found['dtype']}, {found['prompts']} x {found['new_tokens']}"
    return {
        f"{under}: {side}, {name}, tokens/s": stage["tokens_per_second"]
        for side, each in found["sides"].items()
        for name, stage in each["stages"].items()
    }


def _peak(device: str) -> int | None:
    """Most bytes of the device since the last call; None off CUDA. What nobody holds any more is given back."""
    gc.collect()
    if device != "cuda":
        return None
    most = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


def main() -> None:
    """Measure, print, and write the JSON if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="qwen3")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=WIDTH, default="bfloat16")
    parser.add_argument("--prompts", type=int, default=64, help="prompts a step")
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5, help="steps of each side after one of warm-up")
    add_options(parser)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # where there is a GPU as well
    finish(bench(options), options, table, figures)


if __name__ == "__main__":
    main()
