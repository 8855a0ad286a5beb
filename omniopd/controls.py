"""Placebo runs: would the student have gained without what the teacher says? (trap L19)

- `shuffle`: the teacher's verdicts are dealt out to other chunks;
- `constant`: every audited token gets the same value;
- `self`: the teacher is the student itself, frozen.

If one of them keeps most of the gain, the teacher is not what is learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omniopd.choosing import settle
from omniopd.config import RunConfig, load_config
from omniopd.errors import ConfigError
from omniopd.progress import Progress
from omniopd.run import distill
from teachers.local import local_server

CONTROLS = ("real", "shuffle", "constant", "self")


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
        ConfigError: the method has no placebos.
    """
    base, _ = settle(load(source, overrides))
    if not hasattr(base.method, "placebo"):
        raise ConfigError(f"method: '{base.method.name}' has no placebo runs; omniopd has")
    rows = []
    for seed in range(base.seed, base.seed + seeds):
        for control in CONTROLS:
            output = base.output / f"{control}-{seed}"
            own = [*overrides, f"seed={seed}", f"output={output}", "eval.teacher=false"]
            if control in ("shuffle", "constant"):
                own.append(f"method.placebo={control}")
            summary = _finished(output)
            if summary is None and control == "self":
                with local_server(base.student.path) as url:
                    own += [f"teacher={json.dumps(_self_teacher(url))}"]
                    summary = distill(load(source, own), resume=output.exists(), progress=progress)
            elif summary is None:
                summary = distill(load(source, own), resume=output.exists(), progress=progress)
            rows.append({"control": control, "seed": seed, **summary["eval"]})
    (base.output / "controls.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def _finished(output: Path) -> dict[str, Any] | None:
    path = output / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return summary if summary.get("status") == "finished" else None


def _self_teacher(url: str) -> dict[str, Any]:
    return {"type": "openai", "base_url": url, "model": "student", "api_key_env": None, "continuation": "prefill"}
