"""A run: the one place where student, teacher, task and method are put together, and the whole training step."""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from omniopd.choosing import settle
from omniopd.composition import compose, keeps_initial
from omniopd.config import RunConfig
from omniopd.fitting import check_method, check_processes
from omniopd.method import Method
from omniopd.pipeline import Arrivals, Begun, Clock, Kept, Lane, dropped, rollout_of
from omniopd.progress import Progress
from omniopd.registry import SAMPLERS, TASKS
from omniopd.sampling import Blend, named_seed
from omniopd.summary import step_row, used
from omniopd.threads import one_thread
from omniopd.training import Training
from omniopd.types import Evidence, Prompt, Queries, Rollout, Teacher, Usage, Writing
from students.policy import Policy
from students.ranks import Ranks
from students.rollouts import Ended, Sampler
from students.trainer import Trainer
from students.view import StudentView


class Step(NamedTuple):
    """What came of a step: its row for the log, its audits, and what the teacher used."""

    row: dict[str, Any]
    audits: list[dict[str, Any]]
    usage: Usage


class Run:
    """Everything that a run needs, made from its config.

    Raises:
        OmniError: something that the config names can't be had or doesn't fit; nothing was spent.
    """

    def __init__(self, config: RunConfig, progress: Progress | None = None, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks(config.train.rank_timeout_s)
        check_processes(config, self.ranks)
        config, self.why = settle(config)
        self.config = config
        self.progress = progress if progress and self.ranks.main else Progress(enabled=False)
        self.task = TASKS.build(config.task)
        self.heldout: Sequence[Prompt] = self.task.heldout[: config.eval.problems]
        self.prompt_of = {prompt.id: prompt for prompt in self.task.train}
        for prompt in [*self.task.train, *(self.heldout if config.eval.teacher else [])]:
            if (route := getattr(config.teacher, "route", None)) is not None:  # of several teachers
                route(prompt)
        torch.manual_seed(config.seed)  # LoRA's initial weights
        with one_thread(self.ranks.device.type == "cpu"):  # the main thread needs no helpers: it computes nothing later
            anchored = config.method.anchor.beta > 0 or keeps_initial(config.method)
            self.policy = Policy(config.student, anchored=anchored)
        self.method: Method = compose(
            config.method, self.policy, config.seed, self.task.check, config.train.rollouts_per_prompt
        )
        self.trainer = Trainer(
            self.policy, config.train, self.method.objective, config.train.track, config.output, self.ranks
        )
        self.sampler: Sampler = SAMPLERS.build(config.student.rollouts, self.policy, config.seed)
        self.sampler.entropies, self.sampler.candidates = self.method.reads_entropy, self.method.candidates
        self.sampler.ranks = self.ranks
        check_method(config, self.method, self.sampler, self.ranks, self.task.train)
        self.lane = Lane(self.ranks.device.type, self.ranks.enter_thread)
        self.kept: dict[int, Kept] = {}  # steps that were begun before a resumption
        self.origin = time.monotonic()
        self._shuffled: tuple[int, Sequence[int]] = (-1, ())
        for prompt in [*self.task.train, *self.heldout]:
            self.policy.prompt_ids(prompt)  # one that does not fit is found now, not after an hour

    @property
    def signal(self) -> str:
        """What of the teacher the student learns from, and why that where the config left it open."""
        return f"{self.method.describe()}{f' ({self.why})' if self.why else ''}"

    def cautions(self) -> list[str]:
        """What is allowed but known to end badly, a sentence each."""
        return [*self.method.cautions(), *self.policy.cautions()]

    # ------------------------------------------------------------------ one step

    async def step(self, step: int, teacher: Teacher) -> Step:
        """Write, ask, read, learn."""
        return await self.finish(await self.begin(step, teacher))

    async def begin(self, step: int, teacher: Teacher) -> Begun:
        """The first half: this process's share of the step's rollouts, each asked about as soon as it ends.

        A step that was begun before a resumption begins with the method's state of then.
        """
        now = self.method.state_dict()
        if self.config.train.max_lag or step in self.kept:  # else it is still the state when the step is learned
            now = copy.deepcopy(now)
        if step not in self.kept:
            return await self._begin(step, teacher, now)
        self.method.load_state_dict(self.kept[step].state)
        try:
            return await self._begin(step, teacher, self.kept[step].state)
        finally:
            self.method.load_state_dict(now)

    async def _begin(self, step: int, teacher: Teacher, state: Mapping[str, Any]) -> Begun:
        clock, arrivals = Clock(self.origin), Arrivals()
        prompts, written = dict(self.ranks.mine(self.prompts(step))), dict[int, Rollout]()
        before = await self._before(teacher, prompts, step)
        writings = self.method.writings(prompts, before, step)
        blend = Blend.of(teacher, self.method.budget(step), self.policy.end_id)
        asked = asyncio.create_task(self._ask(teacher, arrivals, clock, before, written, step))

        def ended(row: int, rollout: Rollout) -> None:
            written[row] = rollout
            arrivals.put(self.method.ask(rollout, row, step))

        try:
            with clock.stage("rollout"):
                await self.lane.run(self._write, prompts, step, ended, writings, blend)
        except BaseException:
            await dropped([asked])
            raise
        arrivals.put(None)
        rollouts = [written[row] for row in prompts]
        return Begun(step, tuple(prompts), rollouts, asked, clock, self.sampler.gap, state)

    async def finish(self, begun: Begun) -> Step:
        """The second half: wait for what the teacher says, and learn from it."""
        with begun.clock.stage("wait"):
            evidence = await begun.asked
        return await self.lane.run(self._learn, begun, evidence)

    def _learn(self, begun: Begun, evidence: Sequence[Evidence]) -> Step:
        """Read what the teacher says of the rollouts of all processes, and make one update."""
        step, clock = begun.step, begun.clock
        with clock.stage("update"):
            measured = self._measured(dict(zip(begun.rows, begun.rollouts, strict=True)), evidence)
            rollouts, evidence = self._together(measured, evidence)
            signal = self.method.read(rollouts, evidence, step)
            lag = Counter(self.trainer.updates - rollout.version for rollout in rollouts)
            torch.manual_seed(named_seed(self.config.seed, "update", step))  # dropout, for models that have any
            metrics = self.trainer.update(rollouts, signal)
            metrics |= self.method.after(rollouts, signal, step, self.trainer)
            self.push()
        gap = begun.gap.to_json() if begun.gap else {}
        row = step_row(step, rollouts, evidence, signal, metrics, lag) | gap | clock.to_json()
        return Step(row, [{"step": step, **audit} for audit in signal.audits], used(evidence))

    def prompts(self, step: int) -> list[Prompt]:
        """The prompts of step 1, 2, ...: a fresh shuffle of the data per epoch, the same for every method under one seed."""
        train, size = self.task.train, self.config.train.prompts_per_step
        places = (divmod(position, len(train)) for position in range((step - 1) * size, step * size))
        chosen = [train[self._order(epoch)[place]] for epoch, place in places]
        return [prompt for prompt in chosen for _ in range(self.config.train.rollouts_per_prompt)]

    def _order(self, epoch: int) -> Sequence[int]:
        """The order of the data in an epoch; the last one asked for is kept."""
        if self._shuffled[0] != epoch:
            order = list(range(len(self.task.train)))
            random.Random(named_seed(self.config.seed, "order", epoch)).shuffle(order)
            self._shuffled = epoch, order
        return self._shuffled[1]

    def _write(
        self,
        prompts: Mapping[int, Prompt],
        step: int,
        ended: Ended,
        writings: Mapping[int, Writing],
        blend: Blend | None,
    ) -> None:
        """A rollout for each row; of no tokens where the method learns from the teacher's answers alone."""
        if step in self.kept:
            for row, prompt in prompts.items():
                ended(row, rollout_of(self.kept[step].rollouts[row], prompt, self.policy))
        elif self.method.on_policy:
            with self.trainer.unsharded():
                self.sampler.fill(prompts, step, ended, writings, blend)
        else:
            for row, rollout in zip(prompts, self.sampler.unwritten(list(prompts.values())), strict=True):
                ended(row, rollout)

    def push(self) -> None:
        """The sampler writes with the present weights from now on."""
        with self.trainer.unsharded():
            self.sampler.push(self.trainer.updates)

    async def _before(self, teacher: Teacher, prompts: Mapping[int, Prompt], step: int) -> list[Evidence]:
        """What the method wants of the teacher before the student writes."""
        queries = self.method.before(prompts, step)
        return await self.gather(teacher, queries, "asking the teacher first") if queries else []

    async def _ask(
        self,
        teacher: Teacher,
        arrivals: Arrivals,
        clock: Clock,
        before: Sequence[Evidence],
        written: Mapping[int, Rollout],
        step: int,
    ) -> list[Evidence]:
        """The teacher's evidence: asked for as each rollout ends, or for all at once where the teacher wants that; then round
        after round, if the method asks again."""
        queries: Queries = arrivals
        if not teacher.streams:
            queries = sorted([query async for batch in arrivals for query in batch], key=lambda query: query.row)
        await arrivals.first()
        with clock.stage("evidence"):
            evidence = [*before, *await self.gather(teacher, queries, "asking the teacher")]
            while more := self.method.again(written, evidence, step):
                evidence += await self.gather(teacher, more, "asking again")
        return evidence

    async def gather(self, teacher: Teacher, queries: Queries, title: str) -> list[Evidence]:
        """The teacher's evidence, with a bar of its own while it is waited for."""
        with self.progress.task(title, total=0, brief=True) as bar:  # grows as they come
            return await teacher.gather(queries, bar.reach)

    def _measured(self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence]) -> dict[int, Rollout]:
        """This process's rollouts with what the method measures of them."""
        if not self.method.measures:
            return dict(rollouts)
        with self.trainer.unsharded():
            facts = self.method.measure(rollouts, evidence, StudentView(self.policy, rollouts.values()))
        measured = {row: {name: tuple(numbers) for name, numbers in own.items()} for row, own in facts.items()}
        return {row: replace(one, facts={**one.facts, **measured.get(row, {})}) for row, one in rollouts.items()}

    def _together(
        self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence]
    ) -> tuple[list[Rollout], list[Evidence]]:
        """The rollouts and the evidence of all processes, so that whatever a method counts is counted over the whole step."""
        written: dict[int, Rollout] = {}
        found: list[Evidence] = []
        for rollouts_there, evidence_there in self.ranks.all((rollouts, evidence)):
            written |= rollouts_there
            found += evidence_there
        return [written[row] for row in sorted(written)], sorted(found, key=lambda one: one.query.row)

    # ------------------------------------------------------------------ all steps

    def train(self, *, resume: bool = False) -> dict[str, Any]:
        """Train to the end, from the last checkpoint if resuming; returns the summary that is also on disk.

        Raises:
            OmniError: the run had to stop; what it had is in its last checkpoint.
        """
        try:
            return asyncio.run(self._train(resume))
        finally:
            self.lane.close()
            self.sampler.close()

    async def _train(self, resume: bool) -> dict[str, Any]:
        return await Training(self, resume).run()


def distill(
    config: RunConfig, *, resume: bool = False, progress: Progress | None = None, ranks: Ranks | None = None
) -> dict[str, Any]:
    """Distil a student as the config says; returns the run's summary, in each of its processes.

    Raises:
        OmniError: see the message; it names the field or file and the mend.
    """
    ranks = ranks or Ranks(config.train.rank_timeout_s)
    with ranks.alike():
        return Run(config, progress, ranks).train(resume=resume)
