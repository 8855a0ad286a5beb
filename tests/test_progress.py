"""What is shown where the output is no terminal, and where it is one."""

from __future__ import annotations

import io

from rich.console import Console

from omniopd.progress import Progress


def shown(*, terminal: bool, brief: bool = False, enabled: bool = True) -> str:
    out = io.StringIO()
    progress = Progress(enabled=enabled, console=Console(file=out, force_terminal=terminal, width=160))
    with progress.task("distilling", total=3, brief=brief) as bar:
        for step in range(3):
            bar.advance(f"loss {step}")
    progress.say("done [not markup]")
    return out.getvalue()


def test_plain_output_gets_the_first_and_the_last_line() -> None:
    lines = shown(terminal=False).splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["distilling 1/3", "distilling 3/3"]
    assert "ETA" in lines[0]
    assert "loss 2" in lines[1]
    assert lines[2] == "done [not markup]"


def test_brief_work_makes_no_lines() -> None:
    assert shown(terminal=False, brief=True).splitlines() == ["done [not markup]"]


def test_a_terminal_gets_a_bar_with_an_eta() -> None:
    out = shown(terminal=True)
    assert "distilling" in out
    assert "ETA" in out
    assert "3/3" in out


def test_disabled_shows_nothing() -> None:
    assert shown(terminal=False, enabled=False) == ""
