"""Runs every method under every seed, with controls, and writes down what it came to after each run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from omniopd.compare.page import write_page
from omniopd.compare.results import comparison
from omniopd.compare.runs import read, run
from omniopd.compare.variants import (
    Variant,
    config_of,
    extends,
    folder_of,
    length_matched,
    read_variants,
    shuffled,
)
from omniopd.config import RunConfig, load_config
from omniopd.errors import ConfigError
from omniopd.progress import Progress
from omniopd.unloaded import misfit

SHORTER = (
    0.9  # a method that writes or learns less than this share of the baseline's tokens gets a control of its length
)


def compare(
    source: Path | Mapping[str, Any],
    overrides: Sequence[str],
    methods: str,
    *,
    seeds: int = 3,
    controls: bool = True,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare methods on one config. `compare.json` and `compare.html` in its output folder are rewritten after each run.

    Runs that are finished are kept, those that were begun are gone on with; a method that does not fit is a row with its
    reason. All have the prompts, their order, the initial weights and the seeds of the student's draws in common, since
    those come from the run's seed alone.

    Args:
        methods: see `variants.read_variants`; the first is what the others are measured against.

    Raises:
        ConfigError: the config or the methods are wrong, or the first of them does not fit.
    """
    base = load_config(source, overrides)
    if seeds < 1 or workers < 1:
        raise ConfigError("compare: --seeds and --workers are 1 or more")
    name = str(source) if isinstance(source, Path) else "config"
    referee = Referee(base, read_variants(methods), seeds, progress or Progress(enabled=False), name)
    return referee.compare(controls, workers)


class Referee:
    """The comparison under way: its variants, and a row for each run."""

    def __init__(
        self, base: RunConfig, methods: Sequence[Variant], seeds: int, progress: Progress, name: str = "config"
    ) -> None:
        self.base, self.methods, self.progress, self.name = base, list(methods), progress, name
        self.seeds = range(base.seed, base.seed + seeds)
        self.controls: list[Variant] = []
        self.refused: dict[str, str] = {}
        self.rows: dict[str, dict[int, dict[str, Any]]] = {}
        self._writing = Lock()

    def compare(self, controls: bool, workers: int) -> dict[str, Any]:
        """All runs, the first seed's first, so that an early stop leaves a whole table; returns what `compare.json` holds.

        Raises:
            ConfigError: the first method does not fit.
        """
        self._check()
        pool = ThreadPoolExecutor(workers)
        try:
            for seed in self.seeds:
                list(pool.map(partial(self._run, seed), self._fitting()))
                if controls and seed == self.seeds[0]:
                    self.controls = self._controls()
                list(pool.map(partial(self._run, seed), self.controls))
        finally:
            pool.shutdown(cancel_futures=True)  # after Ctrl-C, which the runs have heard too, nothing new begins
        return self._write(pairwise=True)

    def _check(self) -> None:
        """Find those that do not fit, before anything is spent."""
        for variant in self.methods:
            try:
                reason = misfit(config_of(self.base, variant, self.base.seed, self.base.output))
            except ConfigError as error:
                reason = str(error)
            if reason:
                self.refused[variant.label] = reason
                self.progress.say(f"{variant.label}: refused: {reason}")
        first = self.methods[0].label
        if first in self.refused:
            raise ConfigError(f"--methods: {first}, against which the others are measured: {self.refused[first]}")

    def _fitting(self) -> list[Variant]:
        return [one for one in self.methods if one.label not in self.refused]

    def config(self, variant: Variant, seed: int) -> RunConfig:
        """The config of one run, with the folder that is its own."""
        config = config_of(self.base, variant, seed, self.base.output)
        return config_of(self.base, variant, seed, self.base.output / folder_of(variant, config) / f"seed-{seed}")

    def _run(self, seed: int, variant: Variant) -> None:
        """One run; what goes wrong with it is its row's."""
        try:
            config = self.config(variant, seed)
            reason = run(config)
            row = {"folder": str(config.output), **read(config)}
            row |= {"reason": reason} if row["status"] != "finished" else {}
        except ConfigError as error:  # of a control: the method itself has been looked at
            row = {"status": "refused", "reason": str(error), "course": [], "correct": {}}
        with self._writing:
            self.rows.setdefault(variant.label, {})[seed] = row
            self.progress.say(f"{variant.label}, seed {seed}: {row['status']}{_dash(row.get('reason'))}")
            self._write()

    # ------------------------------------------------------------------ controls

    def _controls(self) -> list[Variant]:
        """The control runs of the methods, as the first seed's runs ask for them; the same for all seeds."""
        first = self.seeds[0]
        finished = [one for one in self._fitting() if self.rows[one.label][first]["status"] == "finished"]
        found = [control for one in finished for control in (self._shuffled(one), self._length(one))]
        return [one for one in found if one is not None]

    def _shuffled(self, variant: Variant) -> Variant | None:
        return shuffled(variant, self.config(variant, self.seeds[0]))

    def _length(self, variant: Variant) -> Variant | None:
        """Plain distillation cut to the method's length, where that is clearly shorter."""
        baseline, seed = self.methods[0], self.seeds[0]
        config, base = self.config(variant, seed), self.config(baseline, seed)
        if variant is baseline or not extends(config, base):
            return None
        own, plain = (_lengths(self.rows[one.label][seed]) for one in (variant, baseline))
        if not own or not plain or all(a >= SHORTER * b for a, b in zip(own, plain, strict=True)):
            return None
        return length_matched(variant, baseline, own[1], config, base)

    def _write(self, *, pairwise: bool = False) -> dict[str, Any]:
        """Both files, from all rows so far."""
        variants = [
            one for method in self.methods for one in [method, *(c for c in self.controls if c.of == method.label)]
        ]
        found = comparison(variants, self.rows, self.refused, self.base, self.seeds, self.name, pairwise=pairwise)
        self.base.output.mkdir(parents=True, exist_ok=True)
        path = self.base.output / "compare.json"
        draft = path.with_suffix(".json.tmp")
        draft.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)
        write_page(found, self.base.output / "compare.html")
        return found


def _dash(reason: str | None) -> str:
    return f" - {reason}" if reason else ""


def _lengths(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Tokens that a rollout has, and those of it that are learned, in the mean; None of a run that is not finished."""
    if row["status"] != "finished" or not row["rollouts"] or not row["totals"]["trained_tokens"]:
        return None
    return row["totals"]["student_tokens"] / row["rollouts"], row["totals"]["trained_tokens"] / row["rollouts"]
