"""Measures accuracy: asks for an answer to each prompt, checks it, and says how sure the result is.

The runner knows no models. Whoever calls it provides `generate`: prompts in, (text, finished) out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evals.intervals import Difference, bootstrap_interval, paired_difference
from evals.task import Task
from omniopd.errors import DataError, RunError
from omniopd.types import Prompt

Generate = Callable[[Sequence[Prompt]], list[tuple[str, bool]]]
Progress = Callable[[int, int], None]  # prompts done, prompts in all


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer and the verdict on it. `finished` is False where the token limit cut the text."""

    id: str
    question: str
    reference: str | None
    text: str
    correct: bool
    finished: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy on n prompts, with its 95 % interval.

    `ids` and `correct` are in the order of the prompts. `mean_length` counts characters, since models with different
    tokenizers are compared. `finished` is the share of texts that ended by themselves; a text that was cut is checked
    as it is.
    """

    accuracy: float
    ci95: tuple[float, float]
    n: int
    ids: tuple[str, ...]
    correct: tuple[bool, ...]
    mean_length: float
    finished: float
    samples: tuple[Sample, ...]

    def to_json(self, samples: int | None = None) -> dict[str, Any]:
        """Plain JSON data, with the first `samples` samples (all if None)."""
        kept = self.samples[:samples]
        return {
            "accuracy": self.accuracy,
            "ci95": list(self.ci95),
            "n": self.n,
            "ids": list(self.ids),
            "correct": list(self.correct),
            "mean_length": self.mean_length,
            "finished": self.finished,
            "samples": [asdict(sample) for sample in kept],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_json`, as far as samples were kept.

        Raises:
            DataError: a field is missing, unknown or of the wrong type.
        """
        try:
            fields = dict(data)
            samples = tuple(Sample(**sample) for sample in fields.pop("samples"))
            low, high = fields.pop("ci95")
            ids, correct = tuple(fields.pop("ids")), tuple(fields.pop("correct"))
            return cls(ci95=(low, high), ids=ids, correct=correct, samples=samples, **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"evaluation: not what `to_json` writes ({error}); measure again") from error


def evaluate(
    task: Task,
    prompts: Sequence[Prompt],
    generate: Generate,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer the prompts in batches and check each answer. `seed` is that of the bootstrap, not of `generate`.

    Raises:
        DataError: there are no prompts.
        ConfigError: the task can't check answers; found out before anything is generated.
        RunError: `generate` returned another number of answers than it was given prompts.
    """
    if not prompts:
        raise DataError("evaluation: no held-out prompts; set the task's heldout_size (or heldout_path)")
    for prompt in prompts:
        if prompt.reference is None:  # a task that can't do without says so now, not after an hour of generation
            task.check(prompt, "")
    samples: list[Sample] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        answers = generate(batch)
        if len(answers) != len(batch):
            raise RunError(f"evaluation: {len(answers)} answers to {len(batch)} prompts; mend the generator")
        samples += [_judge(task, prompt, *answer) for prompt, answer in zip(batch, answers, strict=True)]
        if progress is not None:
            progress(len(samples), len(prompts))
    return _summarize(samples, seed)


def compare(before: Evaluation, after: Evaluation, seed: int = 0) -> Difference:
    """The paired difference of two evaluations of the same prompts, in whatever order each was measured.

    Raises:
        DataError: the evaluations are of different prompts.
    """
    later = dict(zip(after.ids, after.correct, strict=True))
    if set(before.ids) != set(later) or before.n != after.n:
        raise DataError(
            f"comparison: the evaluations share {len(set(before.ids) & set(later))} prompts of {before.n} before and "
            f"{after.n} after; measure both on the same held-out prompts"
        )
    return paired_difference(before.correct, [later[id_] for id_ in before.ids], seed)


def _judge(task: Task, prompt: Prompt, text: str, finished: bool) -> Sample:
    question = prompt.messages[-1].content
    return Sample(prompt.id, question, prompt.reference, text, bool(task.check(prompt, text)), bool(finished))


def _summarize(samples: Sequence[Sample], seed: int) -> Evaluation:
    n = len(samples)
    correct = tuple(sample.correct for sample in samples)
    return Evaluation(
        accuracy=sum(correct) / n,
        ci95=bootstrap_interval(correct, seed),
        n=n,
        ids=tuple(sample.id for sample in samples),
        correct=correct,
        mean_length=sum(len(sample.text) for sample in samples) / n,
        finished=sum(sample.finished for sample in samples) / n,
        samples=tuple(samples),
    )
