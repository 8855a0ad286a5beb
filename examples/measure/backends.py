"""The same run with six teachers: the quickstart, of which only the `teacher:` block changes.

    python examples/measure/backends.py [--steps 30] [--seed 0] [--only NAME ...] [--probe]

All six serve the same weights, those of the demo teacher, through servers that this project did not write (vLLM, LiteLLM,
llama.cpp; `make contract` installs them), through its own demo server, and in process. Each is probed first. Finished runs
are kept in runs/backends, so the command can be stopped and called again. The rows go to docs/results/backends.json, the
probes' records to docs/results/probes/ (`--probe` makes only these), and both tables are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUNS, DOCS = ROOT / "runs" / "backends", ROOT / "docs" / "results"
DEMO = "examples/demo/teacher"
sys.path.insert(0, str(ROOT / "tests" / "contract"))

Teacher = dict[str, Any]
MARKS = {"confirmed": "yes", "refuted": "no", "unknown": "?"}
# What every block says: the demo teacher goes on from a prefix, and none of these servers has a discount to keep warm.
COMMON: Teacher = {"continuation": "prefill", "warm_cache": False, "price": {"prompt": 0.15, "completion": 0.60}}


@contextmanager
def demo() -> Iterator[Teacher]:
    """The quickstart's own server."""
    from teachers.local import local_server

    with local_server(ROOT / DEMO) as url:
        yield {"type": "openai", "base_url": url, "model": "teacher", "api_key_env": None}


@contextmanager
def transformers() -> Iterator[Teacher]:
    """The weights in this process."""
    yield {"type": "transformers", "path": DEMO, "continuation": "raw"}


@contextmanager
def vllm_chat() -> Iterator[Teacher]:
    """vLLM's OpenAI-shaped chat route."""
    import servers

    with servers.vllm() as url:
        yield {"type": "vllm", "base_url": f"{url}/v1", "model": "demo", "tokenizer": DEMO}


@contextmanager
def vllm_messages() -> Iterator[Teacher]:
    """vLLM's Anthropic-shaped Messages route."""
    import servers

    with servers.vllm() as url:
        yield {"type": "anthropic", "base_url": f"{url}/v1", "model": "demo", "api_key_env": None}


@contextmanager
def litellm_gemini() -> Iterator[Teacher]:
    """LiteLLM's Gemini-shaped route, in front of vLLM."""
    import servers

    with servers.vllm() as vllm, servers.litellm(vllm) as url:
        os.environ["LITELLM_KEY"] = servers.LITELLM_KEY
        yield {"type": "gemini", "base_url": f"{url}/v1beta", "model": "demo", "api_key_env": "LITELLM_KEY"}


@contextmanager
def llamacpp() -> Iterator[Teacher]:
    """llama.cpp's own server, with the prompt rendered here."""
    import servers

    with servers.llamacpp() as url:
        yield {"type": "llamacpp", "base_url": f"{url}/v1", "model": "demo", "continuation": "raw", "tokenizer": DEMO}


@contextmanager
def liar() -> Iterator[Teacher]:
    """A server that takes `logprobs` and `prompt_logprobs`, and ignores them."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "end_to_end")]
    from honest import Honest
    from scripted import ScriptedTeacher

    from omniopd.chat import ChatTemplate

    server = ScriptedTeacher()
    chat = ChatTemplate.load(DEMO, "tokenizer")
    server.answer = Honest("logprobs_ignored", "scores_ignored", chat=chat)
    yield {"type": "vllm", "base_url": server.url, "model": "honest", "tokenizer": DEMO}


BACKENDS: dict[str, Callable[[], Any]] = {
    "demo server": demo,
    "transformers, in process": transformers,
    "vLLM, OpenAI chat": vllm_chat,
    "vLLM, Anthropic Messages": vllm_messages,
    "LiteLLM, Gemini": litellm_gemini,
    "llama.cpp": llamacpp,
}
PROBED = {**BACKENDS, "lying endpoint": liar}


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="back ends whose name contains one of these")
    parser.add_argument("--probe", action="store_true", help="probe again, train nothing")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    for name, serve in (PROBED if arguments.probe else BACKENDS).items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        output = RUNS / f"{slug(name)}-{arguments.steps}-{arguments.seed}"
        if arguments.probe or not finished(output):
            with serve() as block:
                run({**COMMON, **block}, output, arguments.steps, arguments.seed, record_of(name), arguments.probe)
    rows = [row for name in BACKENDS for row in runs_of(name)]
    (DOCS / "backends.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table(rows), probes(), sep="\n\n")


def run(teacher: Teacher, output: Path, steps: int, seed: int, record: Path, only_probe: bool) -> None:
    """Probe a teacher, then train with it."""
    if only_probe:
        output = Path(tempfile.mkdtemp()) / "run"
    overrides = [f"teacher={json.dumps(teacher)}", f"train.steps={steps}", f"seed={seed}", f"output={output}"]
    overrides += ["eval.teacher=false", "eval.every=0", "train.save_every=1000"]
    probed = command("probe", overrides, "--yes", "--json")
    found = json.loads(probed.stdout[probed.stdout.index("{") :])
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if only_probe:
        return
    command("train", overrides, *(["--resume"] if (output / "config.yaml").exists() else []))


def command(name: str, overrides: list[str], *flags: str) -> subprocess.CompletedProcess[str]:
    """One omniopd command over the quickstart's config."""
    line = [sys.executable, "-m", "omniopd.cli", name, "examples/quickstart.yaml", *overrides, *flags]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    return done


def finished(output: Path) -> bool:
    """Whether a folder holds a run that came to its end."""
    path = output / "summary.json"
    return path.exists() and json.loads(path.read_text())["status"] == "finished"


def runs_of(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a back end's finished runs."""
    for output in sorted(RUNS.glob(f"{slug(name)}-*")):
        if finished(output):
            summary = json.loads((output / "summary.json").read_text())
            manifest = json.loads((output / "manifest.json").read_text())
            asked = summary["teacher"]
            yield {
                "teacher": name,
                "steps": summary["steps"],
                "seed": summary["seed"],
                "rung": (manifest["teacher_probe"] or {}).get("rung"),
                "before": summary["eval"]["before"]["accuracy"],
                "after": summary["eval"]["after"],
                "gain": summary["eval"]["difference"],
                "calls": asked["calls"],
                "prompt_tokens": asked["prompt_tokens"],
                "completion_tokens": asked["completion_tokens"],
                "rejects": sum(summary["rejects"].values()),
                "seconds_per_step": summary["wall_seconds"] / summary["steps"],
            }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| teacher | steps | seed | after (%) | gain in points (95 %) | calls | tokens in | out | rejected | s a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gain = row["gain"]
        points = f"{100 * gain['mean']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})"
        lines.append(
            f"| {row['teacher']} | {row['steps']} | {row['seed']} | {100 * row['after']['accuracy']:.1f} | {points} | "
            f"{row['calls']:,} | {row['prompt_tokens']:,} | {row['completion_tokens']:,} | {row['rejects']:,} | "
            f"{row['seconds_per_step']:.1f} |"
        )
    return "\n".join(lines)


def probes() -> str:
    """Markdown: what each probe found, a column for each teacher."""
    records = {name: json.loads(record_of(name).read_text()) for name in PROBED if record_of(name).exists()}
    names = dict.fromkeys(found["name"] for record in records.values() for found in record["findings"])
    lines = [f"| asked | {' | '.join(records)} |", "|---" * (len(records) + 1) + "|"]
    for asked in names:
        said = [next((f for f in record["findings"] if f["name"] == asked), None) for record in records.values()]
        marks = ["" if found is None else MARKS[found["verdict"]] for found in said]
        lines.append(f"| {asked} | {' | '.join(marks)} |")
    return "\n".join(lines)


def record_of(name: str) -> Path:
    """Where the record of a teacher's probe is kept."""
    return DOCS / "probes" / f"{slug(name)}.json"


def slug(name: str) -> str:
    """A name as a file's."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())


if __name__ == "__main__":
    main()
