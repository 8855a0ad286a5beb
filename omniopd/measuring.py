"""What a run measures beside its steps: accuracy, the student's and the teacher's, and what is said of one given answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evals.runner import Evaluation, evaluate
from omniopd.errors import ConfigError
from omniopd.opening import open_teacher
from omniopd.sampling import named_seed
from omniopd.summary import used
from omniopd.types import AnswerQuery, Answers, Message, Prompt, Teacher, Usage

if TYPE_CHECKING:
    from omniopd.run import Run


def measure_student(run: Run, title: str, problems: int | None = None) -> Evaluation:
    """The student's greedy accuracy on the run's held-out problems, or so many of them."""
    prompts = run.heldout[:problems]

    def generate(batch: Sequence[Prompt]) -> list[tuple[str, bool]]:
        mine = run.ranks.mine(batch)
        rollouts = run.sampler.greedy([prompt for _, prompt in mine])
        said = {row: (r.text, r.finish == "stop") for (row, _), r in zip(mine, rollouts, strict=True)}
        answers = {row: answer for part in run.ranks.all(said) for row, answer in part.items()}
        return [answers[row] for row in range(len(batch))]

    with run.progress.task(f"accuracy {title}", total=len(prompts), brief=True) as bar, run.trainer.unsharded():
        return evaluate(
            run.task,
            prompts,
            generate,
            batch_size=64 * run.ranks.count,
            seed=run.config.seed,
            progress=lambda done, _: bar.advance(by=done - bar.done),
        )


async def ask_teacher(run: Run, teacher: Teacher) -> tuple[Evaluation, Usage]:
    """The teacher's own accuracy on the same problems, an answer each, and what those answers cost."""
    limit, seed = run.config.eval.teacher_tokens, run.config.seed
    queries = [
        AnswerQuery(prompt, row, 1, limit, named_seed(seed, "teacher answers", row) % 2**31)
        for row, prompt in enumerate(run.heldout)
    ]
    mine = [query for _, query in run.ranks.mine(queries)]
    found = await run.gather(teacher, mine, "the teacher's accuracy")
    evidence = [one for part in await run.lane.run(run.ranks.all, found) for one in part]
    texts = {e.query.prompt.id: e.replies[0] if e.replies else None for e in evidence if isinstance(e, Answers)}

    def generate(batch: Sequence[Prompt]) -> list[tuple[str, bool]]:
        replies = [texts[prompt.id] for prompt in batch]
        return [(reply.text, reply.finish == "stop") if reply else ("", False) for reply in replies]

    return evaluate(run.task, run.heldout, generate, seed=seed), used(evidence)


async def measure_teacher(run: Run) -> Evaluation:
    """The teacher's accuracy on the run's held-out problems; its answers are kept in the run's store."""
    async with open_teacher(run) as (teacher, _):
        return (await ask_teacher(run, teacher))[0]


async def verify_answer(run: Run, question: str, answer: str) -> dict[str, Any]:
    """Audit one given answer; returns its record: chunks, continuations, scores and values."""
    prompt = Prompt("verify", (Message("user", question),))
    rollouts = [run.sampler.given(prompt, answer)]
    async with open_teacher(run) as (teacher, _):
        evidence = await teacher.gather(run.method.audit(rollouts, 0))
    audits = run.method.read(rollouts, evidence, 0).audits
    if not audits:
        raise ConfigError(f"method: '{run.config.method.name}' audits no answers; choose omniopd")
    return dict(audits[0])


def marked(run: Run, audit: Mapping[str, Any]) -> dict[str, Any]:
    """A record of the report with the task's verdict on the rollout."""
    prompt = run.prompt_of[audit["prompt_id"]]
    right = run.task.check(prompt, audit["text"]) if prompt.reference is not None else None
    return {**audit, "correct": right}
