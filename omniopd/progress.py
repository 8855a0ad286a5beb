"""Progress on a terminal: bars with an ETA; plain lines now and then where the output is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


class Bar:
    """One bar. `advance` moves it by a step and shows the newest figures beside it."""

    def __init__(self, progress: Progress, title: str, total: int, done: int, brief: bool) -> None:
        self.progress, self.title, self.total, self.done, self.brief = progress, title, total, done, brief
        self.started, self.first = time.monotonic(), done
        self.spoken = self.started if brief else 0.0

    def advance(self, note: str = "", by: int = 1) -> None:
        self.done += by
        self.progress.show(self, note)

    def reach(self, done: int, total: int) -> None:
        """Move it to where the work now stands, of which more may have come."""
        self.done, self.total = done, total
        self.progress.show(self, "")


class Progress:
    """Shows bars on `console`; a disabled one shows nothing."""

    QUIET_SECONDS = 15.0  # between two lines where there is no terminal

    def __init__(self, *, enabled: bool = True, console: Console | None = None) -> None:
        self.enabled = enabled
        self.console = console or Console(stderr=True)
        self._rich: RichProgress | None = None
        self._ids: dict[Bar, int] = {}

    @contextmanager
    def task(self, title: str, total: int, done: int = 0, *, brief: bool = False) -> Iterator[Bar]:
        """A bar for one stretch of work, gone when it ends. Bars may nest. A brief one makes no lines unless it drags on."""
        bar = Bar(self, title, total, done, brief)
        outermost = False
        if self.enabled and self.console.is_terminal:
            if self._rich is None:
                outermost = True
                self._rich = RichProgress(
                    TextColumn("{task.description:<22}"),
                    BarColumn(bar_width=28),
                    MofNCompleteColumn(),
                    TimeElapsedColumn(),
                    TextColumn("ETA"),
                    TimeRemainingColumn(elapsed_when_finished=False),
                    TextColumn("{task.fields[note]}"),
                    console=self.console,
                )
                self._rich.start()
            self._ids[bar] = self._rich.add_task(title, total=total, completed=done, note="")
        try:
            yield bar
        finally:
            if self._rich is not None and bar in self._ids:
                if outermost:
                    self._rich.stop()
                    self._rich = None
                else:
                    self._rich.remove_task(self._ids[bar])  # type: ignore[arg-type]
                del self._ids[bar]

    def show(self, bar: Bar, note: str) -> None:
        if self._rich is not None and bar in self._ids:
            self._rich.update(self._ids[bar], completed=bar.done, total=bar.total, note=note)  # type: ignore[arg-type]
        elif self.enabled:
            self._line(bar, note)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.enabled:
            (self._rich.console if self._rich else self.console).print(
                text, highlight=False, markup=False, soft_wrap=True
            )

    def _line(self, bar: Bar, note: str) -> None:
        now = time.monotonic()
        if now - bar.spoken < self.QUIET_SECONDS and (bar.brief or bar.done < bar.total):
            return
        bar.spoken = now
        pace = (now - bar.started) / max(1, bar.done - bar.first)
        left = int(pace * (bar.total - bar.done))
        self.say(f"{bar.title} {bar.done}/{bar.total}, ETA {left // 60}:{left % 60:02d}  {note}")
