"""TRL's DistillationTrainer on the weights and prompts that gpu.py gives it: its own loop, completions and loss."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from floors import Stopwatch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

REST = "evidence + update"  # one computation on TRL's side
Stages = dict[str, list[float]]


def train(paths: Sequence[Path], chats: Sequence[Any], steps: int, batches: int, options: argparse.Namespace) -> Stages:
    """Seconds by step of TRL's rollouts, and of the rest of its steps."""
    watch = Stopwatch(options.device)
    whole: list[float] = []

    class Watched(DistillationTrainer):
        """Times its rollouts."""

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            with watch.stage("rollout"):
                return super()._generate_single_turn(*args, **kwargs)

    class Marks(TrainerCallback):
        """Times whole steps."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.wait()
            whole.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.wait()
            whole[-1] += time.perf_counter()

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=options.dtype, attn_implementation="sdpa") for path in paths
    )
    with TemporaryDirectory() as folder:
        Watched(
            model=student,
            teacher_model=teacher,
            train_dataset=Dataset.from_list([{"prompt": chat} for chat in chats]),
            processing_class=AutoTokenizer.from_pretrained(paths[0], padding_side="left"),
            callbacks=[Marks()],
            args=DistillationConfig(
                output_dir=folder,
                beta=1.0,
                temperature=1.0,
                top_p=1.0,
                max_completion_length=options.new_tokens,
                generation_kwargs={"min_new_tokens": options.new_tokens},
                per_device_train_batch_size=options.prompts // batches,
                gradient_accumulation_steps=batches,
                max_steps=steps,
                shuffle_dataset=False,
                learning_rate=1e-5,
                lr_scheduler_type="constant",
                bf16=False,  # the weights are of the type themselves, as ours
                gradient_checkpointing=False,
                use_cpu=options.device == "cpu",
                dataloader_pin_memory=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        ).train()
    written = watch.seconds["rollout"]
    return {"rollout": written, REST: [all_of_it - part for all_of_it, part in zip(whole, written, strict=True)]}
