"""The command line. Our errors are one line and exit code 2, or 3 where the budget is spent."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from omniopd.errors import ConfigError, OmniError, RunError
from omniopd.tables import (
    gain,
    print_audit,
    print_cache,
    print_decay,
    print_fidelity,
    print_probe,
    print_prompts,
    print_selftest,
    print_summary,
    share,
)
from omniopd.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _arguments(argv)
    _quiet_libraries()
    try:
        arguments.command(arguments)
        return 0
    except OmniError as error:
        if not (_is_beside() if error.said is None else error.said):
            print(f"omniopd: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if not _is_beside():
            print("omniopd: interrupted; what was done is kept, continue with --resume", file=sys.stderr)
        return 130


def _is_beside() -> bool:
    """Whether another process of the run on this machine says what all of them would say."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


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
    probing = command("probe", _probe, "Ask the live teacher what it really does; a few cents, said beforehand.")
    probing.add_argument("--fidelity", action="store_true", help="compare the rungs of the continuation ladder too")
    probing.add_argument(
        "--decay",
        type=_counts,
        default=[],
        metavar="N,N,...",
        help="how often the teacher's end of an answer is right after so many tokens of the student's: 0,50,100,200,300",
    )
    probing.add_argument("--yes", action="store_true", help="do not ask before paid calls")
    probing.add_argument("--json", action="store_true", help="print the record as JSON")
    testing = command(
        "selftest", _selftest, "Check the arithmetic of a run on its own student and teacher; trains nothing."
    )
    testing.add_argument("--yes", action="store_true", help="do not ask before paid calls")
    cache = command("cache", _cache, "Look into an answer store, thin it out, or write it out.", config=False)
    cache.add_argument("action", choices=["stats", "prune", "export"])
    cache.add_argument("store", type=Path, help="the store's file, or a run's folder")
    cache.add_argument("--teacher", help="prune: only this teacher's draws (its fingerprint, see stats)")
    cache.add_argument("--older-than", type=float, metavar="DAYS", help="prune: only draws older than this")
    cache.add_argument("--rejected", action="store_true", help="prune: only replies that a rule rejected")
    cache.add_argument("--dry-run", action="store_true", help="prune: only count")
    cache.add_argument("--what", choices=["draws", "calls"], default="draws", help="export: answers, or the ledger")
    cache.add_argument("--out", type=Path, help="export: the JSON Lines file to write (default: print)")
    report = command("report", _report, "Write a run's report as one HTML file.", config=False)
    report.add_argument("run", type=Path, help="the run's folder")
    controls = command("controls", _controls, "Run the placebos: shuffled, constant, teacher-is-the-student.")
    controls.add_argument("--seeds", type=int, default=1, help="runs of each (default 1)")
    comparing = command("compare", _compare, "Run several methods under several seeds, and compare what they come to.")
    comparing.add_argument(
        "--methods",
        required=True,
        help="a YAML file of methods, or names and blocks: opd,'{name: fire}'; the first is the baseline",
    )
    comparing.add_argument("--seeds", type=int, default=3, help="runs of each, from the config's seed on (default 3)")
    comparing.add_argument(
        "--controls",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="shuffled and length-matched runs too (default)",
    )
    comparing.add_argument("--workers", type=int, default=1, help="runs side by side (default 1)")
    methods = command("methods", _methods, "Show the methods and their parts, or one of them.", config=False)
    methods.add_argument("name", nargs="?", help="a method or a part")
    serve = command("serve", _serve, "Serve a model folder as a text-only teacher (OpenAI chat shape).", config=False)
    serve.add_argument("model", help="model folder or hub id")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free port")
    serve.add_argument("--name", help="the model name that it answers to")
    return parser


def _counts(text: str) -> list[int]:
    """Numbers of tokens, ascending."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"'{text}' are no numbers of tokens; write them as 0,50,100")
    return sorted({int(part) for part in text.split(",")})


def _quiet_libraries() -> None:
    """Progress bars and notes of libraries would cut through ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.ERROR if _is_beside() else logging.WARNING, format="%(name)s: %(message)s")


# Commands import what they need: `omniopd --help` should not wait for torch.


def _train(arguments: argparse.Namespace) -> None:
    from omniopd.config import load_config
    from omniopd.plan import describe
    from omniopd.progress import Progress
    from omniopd.report import write_report
    from omniopd.run import Run, distill
    from students.ranks import Ranks

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        table = Table("", "plan", show_header=False)
        for row in describe(Run(config)):
            table.add_row(*row)
        Console().print(table)
        return
    ranks = Ranks(config.train.rank_timeout_s)
    summary = distill(config, resume=arguments.resume, progress=Progress(), ranks=ranks)
    if ranks.main:
        print_summary(summary)
        print(f"report: {write_report(config.output)}")
        print(f"student: {config.output / 'student'}")


def _eval(arguments: argparse.Namespace) -> None:
    from omniopd.config import load_config
    from omniopd.measuring import measure_student, measure_teacher
    from omniopd.progress import Progress
    from omniopd.run import Run

    overrides = [*arguments.overrides, *([f"student.path={arguments.model}"] if arguments.model else [])]
    run = Run(load_config(arguments.config, overrides), Progress())
    result = asyncio.run(measure_teacher(run)) if arguments.teacher else measure_student(run, "")
    low, high = result.ci95
    print(f"accuracy {result.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}, n={result.n})")


def _verify(arguments: argparse.Namespace) -> None:
    from omniopd.config import load_config
    from omniopd.measuring import verify_answer
    from omniopd.run import Run

    run = Run(load_config(arguments.config, arguments.overrides))
    record = asyncio.run(verify_answer(run, arguments.prompt, arguments.answer))
    if arguments.json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        print_audit(record)


def _probe(arguments: argparse.Namespace) -> None:
    from omniopd.config import load_config
    from omniopd.probing import probe_run
    from omniopd.progress import Progress
    from omniopd.run import Run

    run = Run(load_config(arguments.config, arguments.overrides), Progress())
    agree = _tell if arguments.yes else _agree
    found = asyncio.run(probe_run(run, fidelity=arguments.fidelity, decay=arguments.decay, agree=agree))
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2))
        return
    print_probe(found.record)
    print_prompts(found.prompts)
    if found.fidelity:
        print_fidelity(found.fidelity)
    if found.decay:
        print_decay(found.decay)
    for sentence in found.disproved:
        print(f"omniopd train would refuse: {sentence}")


def _selftest(arguments: argparse.Namespace) -> None:
    from omniopd.config import load_config
    from omniopd.progress import Progress
    from omniopd.selftest import selftest

    config = load_config(arguments.config, arguments.overrides)
    results = asyncio.run(selftest(config, Progress(), _tell if arguments.yes else _agree))
    print_selftest(results)
    if failed := [result for result in results if result.verdict == "failed"]:
        first = failed[0]
        raise RunError(f"selftest: {len(failed)} of {len(results)} checks failed; {first.name}: {first.found}")


def _tell(cost: str) -> bool:
    """Say what is to be spent."""
    print(cost, file=sys.stderr, flush=True)
    return True


def _agree(cost: str) -> bool:
    """Say what is to be spent, and ask.

    Raises:
        ConfigError: there is nobody to ask.
    """
    _tell(cost)
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on; add --yes to agree to that")
    print("go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _cache(arguments: argparse.Namespace) -> None:
    import time

    from omniopd.store import Store

    path = arguments.store / "answers.sqlite" if arguments.store.is_dir() else arguments.store
    store = Store(path, create=False)
    try:
        if arguments.action == "stats":
            print_cache(str(path), path.stat().st_size, store.stats())
        elif arguments.action == "prune":
            before = None if arguments.older_than is None else time.time() - arguments.older_than * 86_400
            if arguments.teacher is None and before is None and not arguments.rejected:
                raise ConfigError("cache prune: name what to delete: --teacher, --older-than or --rejected")
            gone = store.prune(
                teacher=arguments.teacher, before=before, rejected=arguments.rejected, dry_run=arguments.dry_run
            )
            print(
                f"{gone:,} draws {'would be ' if arguments.dry_run else ''}deleted; what they cost stays on the books"
            )
        else:
            rows = store.draws() if arguments.what == "draws" else store.calls()
            _write_lines(rows, arguments.out)
    finally:
        store.close()


def _write_lines(rows: Iterable[Mapping[str, Any]], out: Path | None) -> None:
    try:
        with out.open("w", encoding="utf-8") if out else nullcontext(sys.stdout) as target:
            target.writelines(json.dumps(row) + "\n" for row in rows)  # ASCII: any text, on any terminal
            target.flush()
    except BrokenPipeError:  # the reader has gone, as `head` does; the interpreter must not write to it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise RunError(f"--out: {out}: {error.strerror or error}") from None


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
            row["control"], str(row["seed"]), share(row["before"]), share(row["after"]), gain(row["difference"])
        )
    Console().print(table)


def _compare(arguments: argparse.Namespace) -> None:
    from omniopd.compare import compare
    from omniopd.compare.table import print_comparison
    from omniopd.progress import Progress

    found = compare(
        arguments.config,
        arguments.overrides,
        arguments.methods,
        seeds=arguments.seeds,
        controls=arguments.controls,
        workers=arguments.workers,
        progress=Progress(),
    )
    print_comparison(found)
    print(f"page: {Path(found['output']) / 'compare.html'}")


def _methods(arguments: argparse.Namespace) -> None:
    from omniopd.catalogue import entries, entry
    from omniopd.catalogue.tables import print_entry, print_methods

    if arguments.name is None:
        print_methods(entries("method"), entries("part"))
        return
    one = entry(arguments.name)
    print_entry(one, [entry(part["name"], "part") for part in one.parts])


def _serve(arguments: argparse.Namespace) -> None:
    from teachers.serve import serve

    serve(arguments.model, host=arguments.host, port=arguments.port, name=arguments.name)


def command_line() -> None:
    """The entry point of the installed command."""
    sys.exit(main())


if __name__ == "__main__":
    command_line()
