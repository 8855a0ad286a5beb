"""A run's folder: its config and manifest, logs that a resumed run can continue, checkpoints, and the summary."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import yaml

from omniopd.config import RunConfig, dump_config
from omniopd.errors import BudgetSpent, RunError
from omniopd.types import Usage
from students.checkpoint import Stateful, checkpoints, load_checkpoint, save_checkpoint
from students.policy import Policy
from students.ranks import Ranks
from students.trainer import Trainer

P = ParamSpec("P")

_PACKAGES = (
    "omniopd",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "tokenizers",
    "httpx",
    "math-verify",
    "rapidfuzz",
)


_COUNTERS = ("drops", "rejects", "lag")  # of a record

# A run may be made longer and dearer; which teacher and judge it has, `check_teacher` decides by fingerprint.
_MAY_CHANGE = ("train.steps", "train.rank_timeout_s", "budget_usd", "prices", "teacher.", "judge.")


@dataclass
class Record:
    """How far a run is and what it has counted; it travels in the checkpoint."""

    step: int = 0
    wall_seconds: float = 0.0
    usage: Usage = field(default_factory=Usage)
    coverage_sum: float = 0.0
    drops: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    teachers: dict[str, dict[str, int]] = field(default_factory=dict)  # counts of each, where there are several
    lag: Counter[str] = field(default_factory=Counter)  # rollouts by the updates since they were written
    wait_seconds: float = 0.0  # for the teacher's evidence, with nothing else to do
    begun: list[dict[str, Any]] = field(default_factory=list)  # steps that are written but not learned, in order
    before: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None

    def add(self, row: Mapping[str, Any], usage: Usage, seconds: float) -> None:
        """Count one step's row."""
        self.step = row["step"]
        self.usage = self.usage + usage
        self.wall_seconds += seconds
        self.coverage_sum += row["coverage"]
        self.drops.update(row["drops"])
        self.rejects.update(row["rejects"])
        self.lag.update(row["lag"])
        self.wait_seconds += row["seconds_wait"]
        for name, counts in row.get("teachers", {}).items():
            self.teachers[name] = dict(Counter(self.teachers.get(name, {})) + Counter(counts))

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "usage": asdict(self.usage), **{name: dict(getattr(self, name)) for name in _COUNTERS}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        counters = {name: Counter(data[name]) for name in _COUNTERS}
        return cls(**{**data, "usage": Usage(**data["usage"]), **counters})


def _by_main(work: Callable[Concatenate[RunFolder, P], None]) -> Callable[Concatenate[RunFolder, P], None]:
    """A method that only the main process does. Where it fails, the others hear of it when they next wait for it."""

    @wraps(work)
    def method(self: RunFolder, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.ranks.main:
            work(self, *args, **kwargs)

    return method


class RunFolder:
    """The files of one run, for every process of it; only the main one writes them.

    Raises:
        RunError: the folder holds another run, or can't be written.
    """

    def __init__(self, config: RunConfig, ranks: Ranks | None = None, *, resume: bool) -> None:
        self.path = config.output
        self.config = config
        self.ranks = ranks or Ranks()
        self._resume = resume
        self.run_id: str = self.ranks.from_main(self._look)  # the run's name in the ledger

    def _look(self) -> str:
        """See that the folder is free or this run's; the run's name."""
        existing, manifest = self.path / "config.yaml", self.path / "manifest.json"
        with self.writing():
            if existing.exists():
                self._check_same(existing.read_text(encoding="utf-8"))
            began = json.loads(manifest.read_text(encoding="utf-8")) if self._resume and manifest.exists() else {}
        return str(began.get("run_id") or secrets.token_hex(8))

    @_by_main
    def begin(self) -> None:
        """Make the folder this run's. What goes wrong before leaves none behind that would ask for --resume."""
        with self.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self._write("config.yaml", dump_config(self.config))
            if not self._resume:
                for log in ("metrics.jsonl", "audits.jsonl", "summary.json"):
                    (self.path / log).unlink(missing_ok=True)

    def _check_same(self, old: str) -> None:
        if not self._resume:
            raise RunError(
                f"output: {self.path} holds a run already; use --resume to continue it, or another output folder"
            )
        before, now = _leaves(yaml.safe_load(old)), _leaves(self.config.model_dump(mode="json"))
        for name in [*now, *before]:
            if before.get(name) != now.get(name) and not name.startswith(_MAY_CHANGE):
                raise RunError(
                    f"output: {self.path} holds another run: there {name} is {before.get(name)}, not {now.get(name)}; "
                    "set it back, or use another output folder"
                )

    # ------------------------------------------------------------------ writing

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns a failed write into one line that says what to do."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"output: {error.filename or self.path}: {error.strerror or error}; mend that, then continue with --resume"
            ) from None

    def log(self, row: Mapping[str, Any]) -> None:
        self._append("metrics.jsonl", [row])

    def log_audits(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._append("audits.jsonl", rows)

    @_by_main
    def _append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        with self.writing(), (self.path / name).open("a", encoding="utf-8") as log:
            log.writelines(json.dumps(_finite(row), ensure_ascii=False) + "\n" for row in rows)

    def write_manifest(self, fingerprint: str, policy: Policy, probe: Mapping[str, Any] | None = None) -> None:
        """What made this run: versions, machine kind, the teacher's fingerprint, what the student's model can do."""
        versions: dict[str, str | None] = {}
        for package in _PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = None
        manifest = {
            "run_id": self.run_id,
            "versions": {"python": platform.python_version(), **versions},
            "machine": {"system": platform.system(), "processor": platform.machine()},
            "teacher_fingerprint": fingerprint,
            "teacher_probe": probe,
            "student": {
                "path": policy.settings.path,
                "parameters": policy.parameters,
                "trained_parameters": sum(p.numel() for p in policy.model.parameters() if p.requires_grad),
                "tree_packing": policy.packs_trees,
                "sliced_head": policy.splits_head,
                "rollouts": policy.settings.rollouts.type,
                "entropy": "exact, fp32, full vocabulary, by the policy's own forward pass",
            },
        }
        self._write_json("manifest.json", manifest)

    @_by_main
    def check_teacher(self, fingerprint: str) -> None:
        """Refuse to go on with another teacher than the run began with (trap S7)."""
        path = self.path / "manifest.json"
        if path.exists():
            began_with = json.loads(path.read_text(encoding="utf-8"))["teacher_fingerprint"]
            if began_with != fingerprint:
                raise RunError(
                    f"teacher: the run began with {began_with}, this is {fingerprint}; use the teacher it began with"
                )

    @_by_main
    def check_budget(self) -> None:
        """Refuse to go on with no more money than what has stopped the run: another order of calls might find a cheaper
        one that still fits."""
        path, budget = self.path / "summary.json", self.config.budget_usd
        stopped = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if stopped.get("status") == "out of budget" and budget is not None:
            teacher = stopped["teacher"]
            if budget <= teacher["budget_usd"]:
                raise BudgetSpent(
                    f"budget_usd: the run has spent {teacher['spent_usd']:.4f} of {teacher['budget_usd']:g} dollars and "
                    f"stopped there, and budget_usd is {budget:g}; raise it, then continue with --resume"
                )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        self._write_json("summary.json", summary)

    @_by_main
    def _write_json(self, name: str, data: Mapping[str, Any]) -> None:
        with self.writing():
            self._write(name, json.dumps(_finite(data), indent=2, ensure_ascii=False) + "\n")

    def _write(self, name: str, text: str) -> None:
        """A whole file or none: a process may be killed while it writes."""
        partial = self.path / f".{name}"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)

    # ------------------------------------------------------------------ checkpoints

    def checkpoint(self, record: Record, policy: Policy, trainer: Trainer, method: Stateful) -> None:
        with self.writing():
            folder, keep = self.path / "checkpoints", self.config.train.keep_checkpoints
            save_checkpoint(folder, record.step, policy, trainer, method, record.to_json(), keep)

    def restore(self, policy: Policy, trainer: Trainer, method: Stateful) -> Record:
        """Weights, optimizer, the method's state and the record of the last checkpoint, and logs cut back to it; a fresh
        record if there is none."""
        saved = self.ranks.from_main(lambda: checkpoints(self.path / "checkpoints"))
        record = Record.from_json(load_checkpoint(saved[-1], policy, trainer, method)) if saved else Record()
        self._cut_logs(record.step if saved else -1)
        return record

    @_by_main
    def _cut_logs(self, step: int) -> None:
        with self.writing():
            for name in ("metrics.jsonl", "audits.jsonl"):
                self._cut_back(self.path / name, step)

    @staticmethod
    def _cut_back(log: Path, step: int) -> None:
        if not log.exists():
            return
        kept = []
        for line in log.read_text(encoding="utf-8").split("\n"):  # other line ends are text
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # a line that a crash left half-written
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        log.write_text("".join(kept), encoding="utf-8")


def _leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """The values of a config by dotted name."""
    if not isinstance(tree, Mapping):
        return {name: tree}
    return {
        dotted: leaf
        for key, value in tree.items()
        for dotted, leaf in _leaves(value, f"{name}.{key}".strip(".")).items()
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN: what was not measured is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
