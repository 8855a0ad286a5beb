"""One side of steps.py in a process of its own: TRL's trainer or ours, which trains in turns with the other.

    python examples/bench/sides.py NAME FOLDER      # started by steps.py; it says what it is to do on stdin

Lines on stdin are numbers of steps; after each block of them a line of JSON on stdout tells what it took, and the student's
weights are saved beside it. What is timed is a whole step of the trainer's own loop, from the end of the last step to the end
of this one, waiting for a turn left out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Plan:
    """What both sides are given."""

    student: str
    teacher: str
    brief: str
    prompts: int
    tokens: int
    steps: int
    rate: float
    threads: int
    seed: int

    def write(self, folder: Path) -> None:
        """Keep it for the sides."""
        (folder / "plan.json").write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """What `write` kept."""
        return cls(**json.loads((folder / "plan.json").read_text(encoding="utf-8")))


class Turns:
    """Times the steps of this side, and waits for the next turn after each block of them."""

    def __init__(self, out: TextIO, save: Callable[[Path], None], folder: Path, imports: float) -> None:
        self.out, self.save, self.folder, self.imports = out, save, folder, imports
        self.blocks = 0
        self.left = 0
        self.block: dict[str, Any] = {}

    def begin(self) -> None:
        """Wait for the first turn; where there is no further one, the process ends."""
        steps = sys.stdin.readline().strip()
        if not steps or int(steps) == 0:
            os._exit(0)
        self.left = int(steps)
        self.block = {"seconds": [], "cpu_seconds": [], "rollout_seconds": [], "tokens": [], "losses": []}
        self._mark = (time.perf_counter(), time.process_time())

    def step(self, rollout_seconds: float, tokens: int, loss: float) -> None:
        """A step has ended."""
        wall, cpu = time.perf_counter(), time.process_time()
        found = (wall - self._mark[0], cpu - self._mark[1], rollout_seconds, tokens, loss)
        for values, value in zip(self.block.values(), found, strict=True):
            values.append(value)
        self.left -= 1
        if self.left:
            self._mark = (time.perf_counter(), time.process_time())
            return
        peak = resident("VmHWM")  # before the weights are saved
        self.blocks += 1
        weights = self.folder / f"{self.blocks}"
        self.save(weights)
        told = {"peak_bytes": peak, "imports_bytes": self.imports, "weights": str(weights), "block": self.block}
        print(json.dumps(told), file=self.out, flush=True)
        self.begin()


def resident(name: str) -> float:
    """Bytes of memory of this process: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def config(plan: Plan, folder: Path) -> dict[str, Any]:
    """Our run: nothing is measured on the way, and a checkpoint written only at the start."""
    return {
        "student": {"path": plan.student, "max_new_tokens": plan.tokens},
        "teacher": {"type": "transformers", "path": plan.teacher},
        "task": {
            "type": "jsonl",
            "path": str(folder / "train.jsonl"),
            "heldout_path": str(folder / "heldout.jsonl"),
            "system": plan.brief,
        },
        "method": {"name": "opd", "form": "dense"},
        "train": {
            "steps": plan.steps,
            "prompts_per_step": plan.prompts,
            "learning_rate": plan.rate,
            "save_every": plan.steps,
        },
        "eval": {"problems": 0},
        "output": str(folder / "run"),
        "seed": plan.seed,
    }


def omniopd(plan: Plan, folder: Path, out: TextIO) -> None:
    """Our whole loop, the files of the run included."""
    from omniopd.config import load_config
    from omniopd.progress import Bar, Progress
    from omniopd.run import Run

    imports = resident("VmRSS")

    class Stops(Progress):
        """Takes turns where a bar would move."""

        @contextmanager
        def task(self, title: str, total: int, done: int = 0, *, brief: bool = False) -> Iterator[Bar]:
            with super().task(title, total, done, brief=brief) as bar:
                if title == "distilling":
                    turns.begin()
                yield bar

        def show(self, bar: Bar, note: str) -> None:
            if bar.title == "distilling":
                lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
                row = json.loads(lines[-1])
                tokens = round(row["mean_length"] * plan.prompts)
                turns.step(row["seconds_rollout"], tokens, row["loss"])

    run = Run(load_config(config(plan, folder)), Stops(enabled=False))
    turns = Turns(out, run.policy.model.save_pretrained, folder / "omniopd", imports)
    run.train()


def trl(plan: Plan, folder: Path, out: TextIO, micro_batches: int = 1) -> None:
    """TRL's trainer with its own loop, completions and loss; nothing is logged, measured or saved on the way."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    imports = resident("VmRSS")

    class Watched(DistillationTrainer):  # type: ignore[misc]
        """Notes the time of its rollouts, and the length of its completions."""

        spent, tokens, loss = 0.0, 0, 0.0

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            ids = super()._generate_single_turn(*args, **kwargs)
            self.spent, self.tokens, self.loss = time.perf_counter() - began, sum(map(len, ids)), 0.0
            return ids

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.loss += float(loss.detach())
            return loss

    class Stops(TrainerCallback):  # type: ignore[misc]
        """Takes turns at the end of a step."""

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.step(trainer.spent, trainer.tokens, trainer.loss)

    def model(path: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype="float32", attn_implementation="sdpa")

    rows = [json.loads(line) for line in (folder / "order.jsonl").read_text(encoding="utf-8").splitlines()]
    system = {"role": "system", "content": plan.brief}
    chats = [{"prompt": [system, {"role": "user", "content": row["prompt"]}]} for row in rows]
    student = model(plan.student)
    trainer = Watched(
        model=student,
        teacher_model=model(plan.teacher),
        train_dataset=Dataset.from_list(chats),
        processing_class=AutoTokenizer.from_pretrained(plan.student, padding_side="left"),
        callbacks=[Stops()],
        args=DistillationConfig(
            output_dir=str(folder / "trl-out"),
            beta=1.0,
            temperature=1.0,
            top_p=1.0,
            max_completion_length=plan.tokens,
            per_device_train_batch_size=plan.prompts // micro_batches,
            gradient_accumulation_steps=micro_batches,
            max_steps=plan.steps,
            shuffle_dataset=False,
            learning_rate=plan.rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            adam_beta1=0.9,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_num_workers=0,
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=plan.seed,
        ),
    )
    turns = Turns(out, student.save_pretrained, folder / f"trl-{micro_batches}", imports)
    trainer.train()


SIDES = {"omniopd": omniopd, "TRL": trl, "TRL, 4 micro-batches": partial(trl, micro_batches=4)}


def main() -> None:
    """Train on demand; whatever a library prints goes to stderr."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    plan = Plan.read(folder)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(plan.threads)
    SIDES[name](plan, folder, out)


if __name__ == "__main__":
    main()
