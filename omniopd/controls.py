"""Placebo runs: would the student have gained without what the teacher says? (trap L19)

- `shuffle`: the teacher's verdicts are dealt out to other chunks;
- `constant`: every audited token gets the same value;
- `self`: the teacher is the student itself, frozen.

If one of them keeps most of the gain, the teacher is not what is learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omniopd.choosing import settle
from omniopd.config import RunConfig, load_config
from omniopd.errors import ConfigError
from omniopd.progress import Progress
from omniopd.run import distill
from omniopd.unloaded import misfit
from teachers.local import local_server

CONTROLS = ("real", "shuffle", "constant", "self")
NOWHERE = "http://127.0.0.1:9/v1"  # of the student that is not served yet


def run_controls(
    source: Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    seeds: int = 1,
    progress: Progress | None = None,
    load: Callable[[Path | Mapping[str, Any], Sequence[str]], RunConfig] = load_config,
) -> list[dict[str, Any]]:
    """Run the config and its placebos, each into a folder of its own under the config's output; finished ones are kept.

    Returns:
        A row per run: control, seed, accuracy before and after, difference.

    Raises:
        ConfigError: the method has no placebos, or one of them would be refused; nothing was spent.
    """
    base, _ = settle(load(source, overrides))
    if not hasattr(base.method, "placebo"):
        raise ConfigError(f"method: '{base.method.name}' has no placebo runs; omniopd has")
    runs = [(control, seed) for seed in range(base.seed, base.seed + seeds) for control in CONTROLS]

    def config(control: str, seed: int, student: str = NOWHERE) -> RunConfig:
        return load(source, [*overrides, *_changes(base, control, seed, student)])

    for control in CONTROLS:
        if reason := misfit(config(control, base.seed)):
            where = " (its teacher, the student, is served as text)" if control == "self" else ""
            raise ConfigError(f"controls: the run '{control}'{where} would be refused: {reason}")
    rows = []
    for control, seed in runs:
        output = _output(base, control, seed)
        summary = _finished(output)
        if summary is None:
            with local_server(base.student.path) if control == "self" else nullcontext(NOWHERE) as url:
                summary = distill(config(control, seed, url), resume=output.exists(), progress=progress)
        rows.append({"control": control, "seed": seed, **summary["eval"]})
    (base.output / "controls.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def _output(base: RunConfig, control: str, seed: int) -> Path:
    return base.output / f"{control}-{seed}"


def _changes(base: RunConfig, control: str, seed: int, student: str) -> list[str]:
    """What a run changes of the config; `student` is where the student itself is served."""
    changes = [f"seed={seed}", f"output={_output(base, control, seed)}", "eval.teacher=false"]
    if control in ("shuffle", "constant"):
        changes.append(f"method.placebo={control}")
    if control == "self":
        changes.append(f"teacher={json.dumps(_self_teacher(student))}")
    return changes


def _finished(output: Path) -> dict[str, Any] | None:
    path = output / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return summary if summary.get("status") == "finished" else None


def _self_teacher(url: str) -> dict[str, Any]:
    return {"type": "openai", "base_url": url, "model": "student", "api_key_env": None, "continuation": "prefill"}
