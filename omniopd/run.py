"""A run: the one place where student, teacher, task and method are put together, and the whole training step."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from evals.runner import Evaluation, evaluate
from omniopd.choosing import against_scores, settle
from omniopd.composition import compose, keeps_initial
from omniopd.config import RunConfig
from omniopd.errors import BudgetSpent, ConfigError, RunError
from omniopd.folder import Record, RunFolder
from omniopd.ledger import Ledger, read_prices
from omniopd.method import Method
from omniopd.pipeline import Arrivals, Begun, Clock, Lane, dropped, rollout_of
from omniopd.progress import Progress
from omniopd.prompt_check import check_prompts
from omniopd.registry import SAMPLERS, TASKS, TEACHERS
from omniopd.sampling import Blend, named_seed
from omniopd.store import Store
from omniopd.summary import figures, flat, headline, step_row, summary, used
from omniopd.threads import one_thread
from omniopd.types import AnswerQuery, Answers, Evidence, Message, Prompt, Queries, Rollout, Teacher, Usage, Writing
from omniopd.watch import Watch, unheard
from students.checkpoint import save_student
from students.policy import Policy
from students.ranks import Ranks
from students.rollouts import Ended, Sampler
from students.trainer import Trainer
from students.view import StudentView
from teachers.findings import refuse_disproved
from teachers.pace import shared_out


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
        _check_processes(config, self.ranks)
        config, self.why = settle(config)
        self.config = config
        self.progress = progress if progress and self.ranks.main else Progress(enabled=False)
        self.task = TASKS.build(config.task)
        self.heldout: Sequence[Prompt] = self.task.heldout[: config.eval.problems]
        self._prompt_of = {prompt.id: prompt for prompt in self.task.train}
        for prompt in [*self.task.train, *(self.heldout if config.eval.teacher else [])]:
            if (route := getattr(config.teacher, "route", None)) is not None:  # of several teachers
                route(prompt)
        torch.manual_seed(config.seed)  # LoRA's initial weights
        with one_thread(self.ranks.device.type == "cpu"):  # the main thread needs no helpers: it computes nothing later
            anchored = config.method.anchor.beta > 0 or keeps_initial(config.method)
            self.policy = Policy(config.student, anchored=anchored)
        self.method: Method = compose(config.method, self.policy, config.seed, self.task.check)
        self.trainer = Trainer(
            self.policy, config.train, self.method.objective, config.train.track, config.output, self.ranks
        )
        self.sampler: Sampler = SAMPLERS.build(config.student.rollouts, self.policy, config.seed)
        self.sampler.entropies, self.sampler.candidates = self.method.reads_entropy, self.method.candidates
        self.sampler.ranks = self.ranks
        _check_method(config, self.method, self.sampler, self.ranks)
        self.lane = Lane(self.ranks.device.type, self.ranks.enter_thread)
        self.begun: deque[Begun] = deque()  # steps that are written and asked about, but not learned yet
        self.kept: dict[int, Sequence[Mapping[str, Any]]] = {}  # rollouts of steps that were begun before a resumption
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
        """The first half: this process's share of the step's rollouts, each asked about as soon as it ends."""
        clock, arrivals = Clock(self.origin), Arrivals()
        prompts, written = dict(self.ranks.mine(self.prompts(step))), dict[int, Rollout]()
        before = await self._before(teacher, prompts, step)
        writings = self.method.writings(prompts, before, step)
        blend = Blend.of(teacher, self.method.budget(step))
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
        return Begun(step, tuple(prompts), rollouts, asked, clock, self.sampler.gap)

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
            self._push()
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
                ended(row, rollout_of(self.kept[step][row], prompt, self.policy))
        elif self.method.on_policy:
            with self.trainer.unsharded():
                self.sampler.fill(prompts, step, ended, writings, blend)
        else:
            for row, rollout in zip(prompts, self.sampler.unwritten(list(prompts.values())), strict=True):
                ended(row, rollout)

    def _push(self) -> None:
        """The sampler writes with the present weights from now on."""
        with self.trainer.unsharded():
            self.sampler.push(self.trainer.updates)

    async def _before(self, teacher: Teacher, prompts: Mapping[int, Prompt], step: int) -> list[Evidence]:
        """What the method wants of the teacher before the student writes."""
        queries = self.method.before(prompts, step)
        return await self._gather(teacher, queries, "asking the teacher first") if queries else []

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
            evidence = [*before, *await self._gather(teacher, queries, "asking the teacher")]
            while more := self.method.again(written, evidence, step):
                evidence += await self._gather(teacher, more, "asking again")
        return evidence

    def _measured(self, rollouts: Mapping[int, Rollout], evidence: Sequence[Evidence]) -> dict[int, Rollout]:
        """This process's rollouts with what the method measures of them."""
        with self.trainer.unsharded():
            facts = self.method.measure(rollouts, evidence, StudentView(self.policy))
        measured = {row: {name: tuple(numbers) for name, numbers in own.items()} for row, own in facts.items()}
        return {row: replace(one, facts=measured[row]) if row in measured else one for row, one in rollouts.items()}

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
        self.progress.say(f"signal: {self.signal}")
        for caution in self.cautions():
            self.progress.say(f"caution: {caution}")
        folder = RunFolder(self.config, self.ranks, resume=resume)
        async with open_teacher(self, folder.run_id) as (teacher, ledger):
            if resume:
                folder.check_teacher(teacher.fingerprint)
                folder.check_budget()
            await self.check_teacher(teacher)
            folder.begin()
            record = folder.restore(self.policy, self.trainer, self.method)
            self.kept = {one["step"]: one["rollouts"] for one in record.begun}
            await self.lane.run(self._push)
            folder.write_manifest(teacher.fingerprint, self.policy, getattr(teacher, "probe", None))
            if record.before is None and self.heldout:
                record.before = (await self.lane.run(self.evaluate, "before")).to_json(samples=20)
                folder.log({"step": 0, "eval": figures(record.before)})
            if record.step == 0:
                folder.checkpoint(record, self.policy, self.trainer, self.method)
            status = "failed"
            try:
                await self._loop(folder, record, teacher, ledger)
                after = await self.lane.run(self.evaluate, "after") if self.heldout else None
                if self.config.eval.teacher and self.heldout and record.teacher is None:
                    taught, usage = await self.ask_teacher(teacher)
                    record.teacher, record.usage = taught.to_json(samples=20), record.usage + usage
                status = "finished"
            except (KeyboardInterrupt, asyncio.CancelledError):
                status = "interrupted"
                raise
            except BudgetSpent:
                status = "out of budget"
                raise
            finally:
                try:
                    await dropped([begun.asked for begun in self.begun])  # answers under way still reach the store
                finally:
                    if status != "finished":
                        self._stop(folder, record, ledger, status)
            with folder.writing():
                save_student(folder.path / "student", self.policy, self.ranks)
            self.trainer.end()
            finished = summary(self.config, record, ledger, status, self.policy.parameters, self.signal, after)
            folder.write_summary(finished)
            return finished

    async def _loop(self, folder: RunFolder, record: Record, teacher: Teacher, ledger: Ledger) -> None:
        config = self.config.train
        watch = Watch(config.max_silent_steps, self.method.min_coverage, folder.path)
        accuracy = record.before["accuracy"] if record.before else None
        self.trainer.accelerator.init_trackers("omniopd")
        with self.progress.task("distilling", total=config.steps, done=record.step) as bar:
            began = time.monotonic()
            while record.step < config.steps:
                while len(self.begun) <= config.max_lag and record.step + len(self.begun) < config.steps:
                    self.begun.append(await self.begin(record.step + len(self.begun) + 1, teacher))
                row, audits, usage = await self.finish(self.begun[0])
                self.begun.popleft()
                record.add(row, usage, time.monotonic() - began)
                try:  # the step is done: whatever comes now, it is logged
                    ledger.hear(await self.lane.run(self.ranks.all, ledger.booked))
                    if self._measures_at(record.step):
                        found = await self.lane.run(self.evaluate, "on the way", self.config.eval.every_problems)
                        row["eval"] = figures(found.to_json())
                        accuracy = row["eval"]["accuracy"]
                finally:
                    folder.log(row)
                began = time.monotonic()
                self.trainer.accelerator.log(flat(row), step=record.step)
                folder.log_audits(self._marked(audit) for audit in audits[: config.keep_audits])
                bar.advance(headline(row, record, ledger, accuracy))
                if record.step % config.save_every == 0 or record.step == config.steps:
                    await self.lane.run(self._save, folder, record)
                if record.step == min(5, config.steps):
                    for name in unheard(getattr(self.config.teacher, "teachers", ()), record):
                        self.progress.say(f"caution: teacher '{name}' has spoken about no token in {record.step} steps")
                watch.check(row, record)

    def _save(self, folder: RunFolder, record: Record) -> None:
        """A checkpoint: weights, record, and the steps that are begun, since later weights would write them otherwise."""
        together = self.ranks.all([begun.to_json() for begun in self.begun])
        record.begun = []
        for begun, *parts in zip(self.begun, *together, strict=True):
            written = {row: kept for part in parts for row, kept in part.items()}
            record.begun.append({"step": begun.step, "rollouts": [written[row] for row in sorted(written)]})
        folder.checkpoint(record, self.policy, self.trainer, self.method)

    def _measures_at(self, step: int) -> bool:
        every = self.config.eval.every
        return bool(every and self.heldout) and step % every == 0 and step < self.config.train.steps

    def _stop(self, folder: RunFolder, record: Record, ledger: Ledger, status: str) -> None:
        """Keep what there is, if the weights are those after the last whole step; otherwise the last checkpoint counts."""
        try:
            if self.trainer.whole and self.trainer.updates == record.step:
                if self.ranks.count == 1:
                    self._save(folder, record)
                elif not self.ranks.sharded and self.config.train.max_lag == 0:  # what one process has is all
                    folder.checkpoint(replace(record, begun=[]), self.policy, self.trainer, self.method)
            folder.write_summary(summary(self.config, record, ledger, status, self.policy.parameters, self.signal))
        except RunError:
            self.progress.say("the last checkpoint could not be written; an earlier one is kept")

    def check_needs(self, teacher: Teacher) -> None:
        """Refuse a teacher that can't give what the method needs."""
        if lacking := self.method.lacking(teacher.capabilities):
            raise ConfigError(
                f"method: needs {' and '.join(lacking)}, which this teacher does not offer; choose another teacher or method"
            )

    async def check_teacher(self, teacher: Teacher) -> None:
        """Refuse what a probe has disproved, and prompts that student and teacher see differently (trap R3)."""
        for config, part in getattr(teacher, "parts", {"": (self.config.teacher, teacher)}).values():
            probe = getattr(part, "probe", None)
            refuse_disproved(config, probe)
            if self.method.needs & {"score", "topk"} and (found := against_scores(probe)):
                raise ConfigError(
                    f"method: reads log-probs of given text; the probe found otherwise ({found}); leave the method to "
                    "signal: auto, or probe again if the server has changed"
                )
            allowed = getattr(config, "allow_prompt_difference", False)
            if noted := await check_prompts(self.policy, part, self.task.train, allowed):
                self.progress.say(f"caution: {noted}")

    # ------------------------------------------------------------------ measuring

    def evaluate(self, title: str, problems: int | None = None) -> Evaluation:
        """The student's greedy accuracy on the held-out problems."""
        prompts = self.heldout[:problems]

        def generate(batch: Sequence[Prompt]) -> list[tuple[str, bool]]:
            mine = self.ranks.mine(batch)
            rollouts = self.sampler.greedy([prompt for _, prompt in mine])
            said = {row: (r.text, r.finish == "stop") for (row, _), r in zip(mine, rollouts, strict=True)}
            answers = {row: answer for part in self.ranks.all(said) for row, answer in part.items()}
            return [answers[row] for row in range(len(batch))]

        with self.progress.task(f"accuracy {title}", total=len(prompts), brief=True) as bar, self.trainer.unsharded():
            return evaluate(
                self.task,
                prompts,
                generate,
                batch_size=64 * self.ranks.count,
                seed=self.config.seed,
                progress=lambda done, _: bar.advance(by=done - bar.done),
            )

    async def ask_teacher(self, teacher: Teacher) -> tuple[Evaluation, Usage]:
        """The teacher's own accuracy on the same problems, an answer each, and what those answers cost."""
        limit, seed = self.config.eval.teacher_tokens, self.config.seed
        queries = [
            AnswerQuery(prompt, row, 1, limit, named_seed(seed, "teacher answers", row) % 2**31)
            for row, prompt in enumerate(self.heldout)
        ]
        mine = [query for _, query in self.ranks.mine(queries)]
        found = await self._gather(teacher, mine, "the teacher's accuracy")
        evidence = [one for part in await self.lane.run(self.ranks.all, found) for one in part]
        texts = {e.query.prompt.id: e.replies[0] if e.replies else None for e in evidence if isinstance(e, Answers)}

        def generate(batch: Sequence[Prompt]) -> list[tuple[str, bool]]:
            replies = [texts[prompt.id] for prompt in batch]
            return [(reply.text, reply.finish == "stop") if reply else ("", False) for reply in replies]

        return evaluate(self.task, self.heldout, generate, seed=seed), used(evidence)

    async def _gather(self, teacher: Teacher, queries: Queries, title: str) -> list[Evidence]:
        """The teacher's evidence, with a bar of its own while it is waited for."""
        with self.progress.task(title, total=0, brief=True) as bar:  # grows as they come
            return await teacher.gather(queries, bar.reach)

    def _marked(self, audit: Mapping[str, Any]) -> dict[str, Any]:
        """A record of the report with the task's verdict on the rollout."""
        prompt = self._prompt_of[audit["prompt_id"]]
        return {**audit, "correct": self.task.check(prompt, audit["text"]) if prompt.reference is not None else None}


def _check_method(config: RunConfig, method: Method, sampler: Sampler, ranks: Ranks) -> None:
    """Refuse what the run can't give a method, the teacher apart: see `Run.check_needs`."""
    name = config.method.name
    if "group" in method.needs and config.train.rollouts_per_prompt < 2:
        raise ConfigError(
            f"train.rollouts_per_prompt: the method '{name}' compares rollouts of one prompt; set 2 or more"
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


def _check_processes(config: RunConfig, ranks: Ranks) -> None:
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


@asynccontextmanager
async def open_teacher(run: Run, run_id: str = "") -> AsyncIterator[tuple[Teacher, Ledger]]:
    """The config's teacher with its store and ledger, closed at the end; refused if it can't give what the method needs."""
    config = run.config
    prices = read_prices(config.prices) if config.prices else None
    path = config.store_path
    if run.ranks.node:  # SQLite's log does not work across machines
        path = path.with_stem(f"{path.stem}-node{run.ranks.node}")
    path.parent.mkdir(parents=True, exist_ok=True)
    store = Store(path)
    ledger = Ledger(store, run_id, prices=prices, budget_usd=config.budget_usd)
    ledger.share(dict(run.ranks.all((run.ranks.node, ledger.before))), run.ranks.count)
    try:
        with one_thread(run.ranks.device.type == "cpu"):  # as of the student
            teacher: Teacher = TEACHERS.build(shared_out(config.teacher, run.ranks.count), store, ledger)
        try:
            run.check_needs(teacher)
            yield teacher, ledger
        finally:
            await teacher.close()
    finally:
        store.close()


async def measure_teacher(run: Run) -> Evaluation:
    """The teacher's accuracy on the run's held-out problems; its answers are kept in the run's store."""
    async with open_teacher(run) as (teacher, _):
        return (await run.ask_teacher(teacher))[0]


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
