"""Tables and texts of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from omniopd.store import StoreStats

if TYPE_CHECKING:  # its module imports torch, which tables can do without
    from omniopd.prompt_check import Compared

_MARKS = {"confirmed": "[green]yes[/green]", "refuted": "[red]no[/red]", "unknown": "[yellow]?[/yellow]"}


def share(figures: dict[str, Any]) -> str:
    """An accuracy with its interval."""
    low, high = figures["ci95"]
    return f"{figures['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def gain(difference: dict[str, float]) -> str:
    """A paired difference in points, with its interval."""
    return f"{difference['mean'] * 100:+.1f} ({difference['low'] * 100:+.1f} to {difference['high'] * 100:+.1f})"


def print_summary(summary: dict[str, Any]) -> None:
    """What a finished run learned, asked and paid."""
    measured, teacher = summary["eval"], summary["teacher"]
    table = Table("", "accuracy (95 % interval)", "n", title="held-out problems")
    for name in ("before", "after", "teacher"):
        if measured.get(name):
            label = f"student {name}" if name != "teacher" else "teacher"
            table.add_row(label, share(measured[name]), str(measured[name]["n"]))
    if "difference" in measured:
        table.add_row("gain, in points", gain(measured["difference"]), "")
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
        f"${teacher['spent_usd']:.4f}",
        f"{summary['signal']['coverage']:.0%}",
    )
    console.print(asked)
    console.print(f"signal: {summary['signal']['read']}", highlight=False)
    if teacher.get("each"):
        console.print(_each(teacher["each"]))
    holes = {
        **summary["drops"],
        **{f"{reason} (replies or tokens)": count for reason, count in summary["rejects"].items()},
    }
    if holes:
        console.print("holes: " + ", ".join(f"{reason} {count}" for reason, count in sorted(holes.items())))


def print_audit(record: dict[str, Any]) -> None:
    """One audited answer, chunk by chunk."""
    console = Console()
    for chunk in record["chunks"]:
        before = escape(record["text"][: chunk["char_start"]][-60:])
        console.print(f"\n[dim]...{before}[/dim][bold]{escape(chunk['text'])}[/bold]")
        if chunk["dropped"]:
            console.print(f"  dropped: {chunk['dropped']} {chunk['rejected']}")
            continue
        if not chunk["replies"]:
            _print_scored(console, chunk)
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


def _print_scored(console: Console, chunk: Mapping[str, Any]) -> None:
    """A response that the teacher scored as it stands: the value of each token, - where there is none."""
    if chunk["score"] is not None:
        console.print(f"  the teacher's log-prob less the student's: {chunk['score']:+.3f} nats per token in the mean")
    if not chunk["values"]:
        console.print("  the target is a distribution at each token, so tokens have no values of their own")
    for token, value in zip(chunk["tokens"], chunk["values"], strict=False):
        console.print(f"  {'-' if value is None else f'{value:+.3f}':>8}  {escape(repr(token))}", highlight=False)
    if chunk["rejected"]:
        console.print(f"  without a value: {chunk['rejected']}")


def _each(teachers: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("teacher", "queries", "replies", "rejected", "share of tokens", title="each teacher")
    for name, count in teachers.items():
        rejected = sum(number for key, number in count.items() if key.startswith("rejected "))
        table.add_row(name, f"{count['queries']:,}", f"{count['replies']:,}", f"{rejected:,}", f"{count['share']:.0%}")
    return table


def print_probe(record: Mapping[str, Any]) -> None:
    """A probe's findings, the rung that it proves, and what it and its pilot used."""
    table = Table("asked", "does it?", "seen", title=f"probe of {escape(record['fingerprint'])}")
    for finding in record["findings"]:
        table.add_row(finding["name"], _MARKS[finding["verdict"]], escape(finding["found"]))
    console, used = Console(), record["usage"]
    console.print(table)
    proved = any(
        found["name"] == f"continuation.{record['rung']}"
        for found in record["findings"]
        if found["verdict"] == "confirmed"
    )
    console.print(
        f"continuation: {record['rung']}{'' if proved else ' (not proved: many replies may be rejected)'}",
        highlight=False,
    )
    console.print(
        f"asked: {used['calls']} calls, {used['prompt_tokens']:,} tokens in, {used['completion_tokens']:,} out, "
        f"${used['cost_usd']:.4f}",
        highlight=False,
    )
    if pilot := record.get("pilot"):
        console.print(
            f"pilot: {pilot['queries']} queries of the first step, {pilot['calls']} calls, {pilot['prompt_tokens']:,} tokens "
            f"in, {pilot['completion_tokens']:,} out; the run finds their answers in its store",
            highlight=False,
        )


def print_prompts(compared: Compared | None) -> None:
    """What student and teacher are shown of the same messages."""
    console = Console()
    if compared is None:
        console.print("prompt check: this teacher does not tell what its model is shown", highlight=False)
        return
    table = Table("", "student", "teacher", title="the same messages, as each model is shown them")
    for row in compared.rows:
        table.add_row(*map(escape, row))
    console.print(table)
    for said in compared.differences:
        console.print(f"[red]difference:[/red] {escape(said)}", highlight=False)
    if not compared.differences:
        console.print("no difference but markup", highlight=False)


def print_fidelity(rows: Sequence[Any]) -> None:
    """How near each rung comes to the best one."""
    table = Table("rung", "similarity", "rejected", "replies", "why", title=f"fidelity to {rows[0].rung}")
    for row in rows:
        alike = "-" if row.similarity is None else f"{row.similarity:.3f}"
        why = ", ".join(f"{reason} {count}" for reason, count in sorted(row.reasons.items()))
        table.add_row(row.rung, alike, f"{row.rejected:.1%}", str(row.replies), why or "-")
    Console().print(table)


def print_decay(rows: Sequence[Any]) -> None:
    """How often the teacher ends rightly what the student began."""
    table = Table(
        "after", "right", "teacher ended", "student ended", "no verdict", title="decay by the student's tokens"
    )
    for row in rows:
        right = "-" if row.accuracy is None else f"{row.accuracy:.1%}"
        table.add_row(str(row.tokens), right, str(row.continued), str(row.whole), str(row.unknown))
    Console().print(table)


def print_selftest(results: Sequence[Any]) -> None:
    """What each check of a self-test came to."""
    colours = {"passed": "green", "failed": "red", "skipped": "yellow"}
    table = Table("check", "", "found", title="self-test")
    for result in results:
        table.add_row(result.name, f"[{colours[result.verdict]}]{result.verdict}[/]", escape(result.found))
    Console().print(table)


def print_cache(path: str, size: int, stats: StoreStats) -> None:
    """What a store holds."""
    table = Table("", "", title=f"{escape(path)}, {size / 1e6:.1f} MB", show_header=False)
    table.add_row("answers", f"{stats.answers:,}")
    for reason, count in sorted(stats.rejected.items()):
        table.add_row(f"rejected: {reason}", f"{count:,}")
    for reason, count in sorted(stats.holes.items()):
        table.add_row(f"no answer: {reason}", f"{count:,}")
    table.add_row("calls booked", f"{stats.calls:,}, ${stats.cost_usd:.4f}")
    for teacher, count in stats.by_teacher.items():
        table.add_row(f"of {escape(teacher or 'teachers of an older format')}", f"{count:,} draws")
    Console().print(table)
