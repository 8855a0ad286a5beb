"""Whether what a run is put together from fits: everything here is refused before anything is spent, with the mend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from omniopd.choosing import against_scores
from omniopd.config import RunConfig
from omniopd.errors import ConfigError
from omniopd.method import Method
from omniopd.prompt_check import check_prompts
from omniopd.types import Prompt, Teacher
from students.ranks import Ranks
from students.rollouts import Sampler
from teachers.findings import refuse_disproved

if TYPE_CHECKING:
    from omniopd.run import Run


def check_processes(config: RunConfig, ranks: Ranks) -> None:
    """Refuse what several processes can't do."""
    if (rows := config.train.prompts_per_step * config.train.rollouts_per_prompt) < ranks.count:
        raise ConfigError(
            f"train.prompts_per_step: {rows} rollouts are less than the {ranks.count} processes; raise it, or "
            "start fewer"
        )
    if ranks.sharded and config.student.lora:
        raise ConfigError(
            "student.lora: adapters are small enough not to be sharded; start without FSDP2, or leave student.lora out"
        )


def check_method(config: RunConfig, method: Method, sampler: Sampler, ranks: Ranks, train: Sequence[Prompt]) -> None:
    """Refuse what the run can't give a method, the teacher apart: see `check_needs`.

    Args:
        train: the prompts that are learned from.
    """
    name = config.method.name
    if "group" in method.needs and config.train.rollouts_per_prompt < 2:
        raise ConfigError(
            f"train.rollouts_per_prompt: the method '{name}' compares rollouts of one prompt; set 2 or more"
        )
    if "verify" in method.needs and all(prompt.reference is None for prompt in train):
        raise ConfigError(
            f"task: the method '{name}' needs to know which answers are right, and none of the prompts has a reference; "
            "choose a task with answers, or another method"
        )
    if "fresh" in method.needs and config.train.max_lag:
        raise ConfigError(
            f"train.max_lag: the method '{name}', as it is set, learns from what the present weights have written; set "
            "train.max_lag=0"
        )
    if unable := sorted(method.writes - sampler.offers):
        raise ConfigError(
            f"student.rollouts: '{config.student.rollouts.type}' can't do what the method '{name}' asks of it "
            f"({', '.join(unable)}); set student.rollouts=transformers"
        )
    if method.candidates and "candidates" not in sampler.offers:
        raise ConfigError(
            f"student.rollouts: '{config.student.rollouts.type}' does not tell the student's likeliest tokens, which the "
            f"method '{name}' reads; set student.rollouts=transformers"
        )
    if method.one_process and ranks.count > 1:
        raise ConfigError(f"method: '{name}' looks at all rollouts of a prompt together; start one process")


def check_needs(method: Method, teacher: Teacher) -> None:
    """Refuse a teacher that can't give what the method needs."""
    if lacking := method.lacking(teacher.capabilities):
        raise ConfigError(
            f"method: needs {' and '.join(lacking)}, which this teacher does not offer; choose another teacher or method"
        )
    if "judge" in method.needs and not getattr(teacher, "judge", teacher).capabilities.answer:
        raise ConfigError("judge: has to answer questions, which this one does not; set judge to a teacher that chats")


async def check_teacher(run: Run, teacher: Teacher) -> None:
    """Refuse what a probe has disproved, and prompts that student and teacher see differently (trap R3)."""
    for config, part in getattr(teacher, "parts", {"": (run.config.teacher, teacher)}).values():
        probe = getattr(part, "probe", None)
        refuse_disproved(config, probe)
        if run.method.needs & {"score", "topk"} and (found := against_scores(probe)):
            raise ConfigError(
                f"method: reads log-probs of given text; the probe found otherwise ({found}); leave the method to "
                "signal: auto, or probe again if the server has changed"
            )
        allowed = getattr(config, "allow_prompt_difference", False)
        if noted := await check_prompts(run.policy, part, run.task.train, allowed):
            run.progress.say(f"caution: {noted}")
