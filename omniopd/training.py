"""All steps of a run, one after another or overlapping: the loop, its logs and checkpoints, and how it ends."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omniopd.errors import BudgetSpent, RunError
from omniopd.fitting import check_teacher
from omniopd.folder import Record, RunFolder
from omniopd.ledger import Ledger
from omniopd.measuring import ask_teacher, marked, measure_student
from omniopd.opening import open_teacher
from omniopd.pipeline import Begun, Kept, dropped
from omniopd.summary import figures, flat, headline, summary
from omniopd.types import Teacher
from omniopd.watch import Watch, unheard
from students.checkpoint import save_student

if TYPE_CHECKING:
    from omniopd.run import Run


class Training:
    """A run from its first step, or its last checkpoint, to its end."""

    def __init__(self, parts: Run, resume: bool) -> None:
        """`parts` is what the run is put together from, and its step."""
        self.parts, self.config, self.resume = parts, parts.config, resume
        self.folder = RunFolder(self.config, parts.ranks, resume=resume)
        self.record = Record()
        self.begun: deque[Begun] = deque()  # steps that are written and asked about, but not learned yet
        self._states: Sequence[Mapping[str, Any]] = ()  # of the steps that were begun when the checkpoint was written

    async def run(self) -> dict[str, Any]:
        """See `Run.train`."""
        parts, folder = self.parts, self.folder
        parts.progress.say(f"signal: {parts.signal}")
        for caution in parts.cautions():
            parts.progress.say(f"caution: {caution}")
        async with open_teacher(parts, folder.run_id) as (teacher, ledger):
            if self.resume:
                folder.check_teacher(teacher.fingerprint)
                folder.check_budget()
            await check_teacher(parts, teacher)
            folder.begin()
            self.record = record = folder.restore(parts.policy, parts.trainer, self)
            steps = zip(record.begun, self._states, strict=False)
            parts.kept = {one["step"]: Kept(one["rollouts"], state) for one, state in steps}
            await parts.lane.run(parts.push)
            folder.write_manifest(teacher.fingerprint, parts.policy, getattr(teacher, "probe", None))
            if record.before is None and parts.heldout:
                record.before = (await parts.lane.run(measure_student, parts, "before")).to_json(samples=20)
                folder.log({"step": 0, "eval": figures(record.before)})
            if record.step == 0:
                self._checkpoint(record)
            status = "failed"
            try:
                await self._loop(teacher, ledger)
                after = await parts.lane.run(measure_student, parts, "after") if parts.heldout else None
                if self.config.eval.teacher and parts.heldout and record.teacher is None:
                    taught, usage = await ask_teacher(parts, teacher)
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
                        self._stop(ledger, status)
            with folder.writing():
                save_student(folder.path / "student", parts.policy, parts.ranks)
            parts.trainer.end()
            finished = summary(self.config, record, ledger, status, parts.policy.parameters, parts.signal, after)
            folder.write_summary(finished)
            return finished

    async def _loop(self, teacher: Teacher, ledger: Ledger) -> None:
        parts, folder, record, config = self.parts, self.folder, self.record, self.config.train
        watch = Watch(config.max_silent_steps, parts.method.min_coverage, folder.path)
        accuracy = record.before["accuracy"] if record.before else None
        parts.trainer.accelerator.init_trackers("omniopd")
        with parts.progress.task("distilling", total=config.steps, done=record.step) as bar:
            began = time.monotonic()
            while record.step < config.steps:
                while len(self.begun) <= config.max_lag and record.step + len(self.begun) < config.steps:
                    self.begun.append(await parts.begin(record.step + len(self.begun) + 1, teacher))
                row, audits, usage = await parts.finish(self.begun[0])
                self.begun.popleft()
                record.add(row, usage, time.monotonic() - began)
                try:  # the step is done: whatever comes now, it is logged
                    ledger.hear(await parts.lane.run(parts.ranks.all, ledger.booked))
                    if self._measures_at(record.step):
                        problems = self.config.eval.every_problems
                        found = await parts.lane.run(measure_student, parts, "on the way", problems)
                        row["eval"] = figures(found.to_json())
                        accuracy = row["eval"]["accuracy"]
                finally:
                    folder.log(row)
                began = time.monotonic()
                parts.trainer.accelerator.log(flat(row), step=record.step)
                folder.log_audits(marked(parts, audit) for audit in audits[: config.keep_audits])
                bar.advance(headline(row, record, ledger, accuracy))
                if record.step % config.save_every == 0 or record.step == config.steps:
                    await parts.lane.run(self._save)
                if record.step == min(5, config.steps):
                    for name in unheard(getattr(self.config.teacher, "teachers", ()), record):
                        parts.progress.say(
                            f"caution: teacher '{name}' has spoken about no token in {record.step} steps"
                        )
                watch.check(row, record)

    def _save(self) -> None:
        """A checkpoint: weights, record, and the steps that are begun, since later weights would write them otherwise."""
        together = self.parts.ranks.all([begun.to_json() for begun in self.begun])
        self.record.begun = []
        for begun, *parts in zip(self.begun, *together, strict=True):
            written = {row: kept for part in parts for row, kept in part.items()}
            self.record.begun.append({"step": begun.step, "rollouts": [written[row] for row in sorted(written)]})
        self._checkpoint(self.record)

    def _checkpoint(self, record: Record) -> None:
        self.folder.checkpoint(record, self.parts.policy, self.parts.trainer, self)

    def state_dict(self) -> dict[str, Any]:
        """The method's state, and those that the begun steps began with."""
        return {"now": self.parts.method.state_dict(), "begun": [begun.state for begun in self.begun]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.parts.method.load_state_dict(state["now"])
        self._states = state["begun"]

    def _measures_at(self, step: int) -> bool:
        every = self.config.eval.every
        return bool(every and self.parts.heldout) and step % every == 0 and step < self.config.train.steps

    def _stop(self, ledger: Ledger, status: str) -> None:
        """Keep what there is, if the weights are those after the last whole step; otherwise the last checkpoint counts."""
        parts, record = self.parts, self.record
        try:
            if parts.trainer.whole and parts.trainer.updates == record.step:
                if parts.ranks.count == 1:
                    self._save()
                elif not parts.ranks.sharded and self.config.train.max_lag == 0:  # what one process has is all
                    self._checkpoint(replace(record, begun=[]))
            said = summary(self.config, record, ledger, status, parts.policy.parameters, parts.signal)
            self.folder.write_summary(said)
        except RunError:
            parts.progress.say("the last checkpoint could not be written; an earlier one is kept")
