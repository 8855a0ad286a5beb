"""The command line: `omniopd train|eval|verify|report|controls|serve`. Our errors are one line and exit code 2."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from omniopd.errors import OmniError
from omniopd.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _arguments(argv)
    _quiet_libraries()
    try:
        arguments.command(arguments)
        return 0
    except OmniError as error:
        print(f"omniopd: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("omniopd: interrupted; what was done is kept, continue with --resume", file=sys.stderr)
        return 130


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed arguments; overrides may stand before, between and after flags, which argparse alone does not allow."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="omniopd", description="Distil language models on-policy from any teacher.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, help_text: str, *, config: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text)
        sub.set_defaults(command=function)
        if config:
            sub.add_argument("config", type=Path, help="the run's YAML file")
            sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings to override, as train.steps=5")
        return sub

    train = command("train", _train, "Distil a student as the config says.")
    train.add_argument("--dry-run", action="store_true", help="print the plan and its price; spend nothing")
    train.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    measure = command("eval", _eval, "Measure accuracy on the config's held-out problems.")
    measure.add_argument("--model", help="another student folder than the config's")
    measure.add_argument("--teacher", action="store_true", help="measure the teacher instead (paid calls)")
    verify = command("verify", _verify, "Audit one given answer: which chunks, which continuations, which scores.")
    verify.add_argument("--prompt", required=True, help="the question")
    verify.add_argument("--answer", required=True, help="the answer to audit, as if the student had written it")
    verify.add_argument("--json", action="store_true", help="print the audit record as JSON")
    report = command("report", _report, "Write a run's report as one HTML file.", config=False)
    report.add_argument("run", type=Path, help="the run's folder")
    controls = command("controls", _controls, "Run the placebos: shuffled, constant, teacher-is-the-student.")
    controls.add_argument("--seeds", type=int, default=1, help="runs of each (default 1)")
    serve = command("serve", _serve, "Serve a model folder as a text-only teacher (OpenAI chat shape).", config=False)
    serve.add_argument("model", help="model folder or hub id")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free port")
    serve.add_argument("--name", help="the model name that it answers to")
    return parser


def _quiet_libraries() -> None:
    """Progress bars and notes of libraries would cut through ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")


# Commands import what they need: `omniopd --help` should not wait for torch.


def _train(arguments: argparse.Namespace) -> None:
    from omniopd.config import load_config
    from omniopd.plan import describe
    from omniopd.progress import Progress
    from omniopd.report import write_report
    from omniopd.run import Run

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        table = Table("", "plan", show_header=False)
        for row in describe(Run(config)):
            table.add_row(*row)
        Console().print(table)
        return
    summary = Run(config, Progress()).train(resume=arguments.resume)
    _print_summary(summary)
    print(f"report: {write_report(config.output)}")
    print(f"student: {config.output / 'student'}")


def _eval(arguments: argparse.Namespace) -> None:
    from omniopd.config import load_config
    from omniopd.progress import Progress
    from omniopd.run import Run, measure_teacher

    overrides = [*arguments.overrides, *([f"student.path={arguments.model}"] if arguments.model else [])]
    run = Run(load_config(arguments.config, overrides), Progress())
    result = asyncio.run(measure_teacher(run)) if arguments.teacher else run.evaluate("")
    low, high = result.ci95
    print(f"accuracy {result.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}, n={result.n})")


def _verify(arguments: argparse.Namespace) -> None:
    from omniopd.config import load_config
    from omniopd.run import Run, verify_answer

    run = Run(load_config(arguments.config, arguments.overrides))
    record = asyncio.run(verify_answer(run, arguments.prompt, arguments.answer))
    if arguments.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        _print_audit(record)


def _report(arguments: argparse.Namespace) -> None:
    from omniopd.report import write_report

    print(write_report(arguments.run))


def _controls(arguments: argparse.Namespace) -> None:
    from omniopd.controls import run_controls
    from omniopd.progress import Progress

    rows = run_controls(arguments.config, arguments.overrides, seeds=arguments.seeds, progress=Progress())
    table = Table("control", "seed", "before", "after", "gain in points (95 %)")
    for row in rows:
        table.add_row(
            row["control"], str(row["seed"]), _share(row["before"]), _share(row["after"]), _gain(row["difference"])
        )
    Console().print(table)


def _serve(arguments: argparse.Namespace) -> None:
    from teachers.serve import serve

    serve(arguments.model, host=arguments.host, port=arguments.port, name=arguments.name)


# ---------------------------------------------------------------------- what is printed


def _share(figures: dict[str, Any]) -> str:
    low, high = figures["ci95"]
    return f"{figures['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def _gain(difference: dict[str, float]) -> str:
    return f"{difference['mean'] * 100:+.1f} ({difference['low'] * 100:+.1f} to {difference['high'] * 100:+.1f})"


def _print_summary(summary: dict[str, Any]) -> None:
    measured, teacher = summary["eval"], summary["teacher"]
    table = Table("", "accuracy (95 % interval)", "n", title="held-out problems")
    for name in ("before", "after", "teacher"):
        if measured.get(name):
            label = f"student {name}" if name != "teacher" else "teacher"
            table.add_row(label, _share(measured[name]), str(measured[name]["n"]))
    if "difference" in measured:
        table.add_row("gain, in points", _gain(measured["difference"]), "")
    console = Console()
    if table.rows:
        console.print(table)
    asked = Table(
        "calls", "from the store", "tokens in", "tokens out", "cost", "coverage", title="asked of the teacher"
    )
    asked.add_row(
        f"{teacher['calls']:,}",
        f"{teacher['cached_calls']:,}",
        f"{teacher['prompt_tokens']:,}",
        f"{teacher['completion_tokens']:,}",
        f"${teacher['cost_usd']:.4f}",
        f"{summary['signal']['coverage']:.0%}",
    )
    console.print(asked)
    holes = {**summary["drops"], **{f"{reason} (replies)": count for reason, count in summary["rejects"].items()}}
    if holes:
        console.print("holes: " + ", ".join(f"{reason} {count}" for reason, count in sorted(holes.items())))


def _print_audit(record: dict[str, Any]) -> None:
    from rich.markup import escape

    console = Console()
    for chunk in record["chunks"]:
        before = escape(record["text"][: chunk["char_start"]][-60:])
        console.print(f"\n[dim]...{before}[/dim][bold]{escape(chunk['text'])}[/bold]")
        if chunk["dropped"]:
            console.print(f"  dropped: {chunk['dropped']} {chunk['rejected']}")
            continue
        score = f"{chunk['score']:.2f}" if chunk["score"] is not None else "-"
        console.print(
            f"  entropy {chunk['entropy']:.2f} nats, score {score} = k {chunk['k']:.2f} of {chunk['n_eff']} replies"
        )
        console.print(f"  value of each token: {chunk['values']}")
        for reply in chunk["replies"]:
            console.print(f"  {reply.get('score', 0):.2f}  {escape(repr(reply['text']))}", highlight=False)
    if not record["chunks"]:
        console.print("no chunk fits this answer; lower method.chunk_tokens")


def command_line() -> None:
    """The entry point of the installed command."""
    sys.exit(main())


if __name__ == "__main__":
    command_line()
