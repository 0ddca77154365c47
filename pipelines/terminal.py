"""Progress on standard error: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_EVERY_SECONDS = 10.0


def stderr_console() -> Console:
    """The console of the log; honours NO_COLOR and plain pipes."""
    return Console(file=sys.stderr, highlight=False)


class BarProgress:
    """Bars, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._task: TaskID | None = None

    def start(self, step: str, total: int | None, unit: str) -> None:
        """Show a new bar."""
        self._bars = Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TextColumn(f"{unit} {{task.fields[rate]}}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bars.start()
        self._task = self._bars.add_task(step, total=total, rate="")

    def advance(self, amount: int) -> None:
        """Move the bar."""
        if self._bars is None or self._task is None:
            return
        self._bars.advance(self._task, amount)
        task = self._bars.tasks[0]
        self._bars.update(self._task, rate=f"{task.completed / max(task.elapsed or 0.0, 1e-9):,.0f}/s")

    def finish(self) -> None:
        """Leave the finished bar standing."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def note(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message)


class LineProgress:
    """A line at the start and end of each step and every ten seconds between, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def start(self, step: str, total: int | None, unit: str) -> None:
        """Begin a step."""
        self._step, self._total, self._unit = step, total, unit
        self._done = 0
        self._started = self._last = time.monotonic()
        self._print(f"{step}: {'' if total is None else f'{total:,} {unit} to do'}".rstrip(": "))

    def advance(self, amount: int) -> None:
        """Count, and print when the last line is old."""
        self._done += amount
        now = time.monotonic()
        if now - self._last >= _LINE_EVERY_SECONDS:
            self._last = now
            self._print(self._state(now))

    def _state(self, now: float) -> str:
        rate = self._done / max(now - self._started, 1e-9)
        of = "" if self._total is None else f" of {self._total:,}"
        left = f", {(self._total - self._done) / rate:,.0f} s left" if self._total and rate else ""
        return f"{self._step}: {self._done:,}{of} {self._unit}, {rate:,.1f}/s{left}"

    def finish(self) -> None:
        """Say what the step took."""
        seconds = time.monotonic() - self._started
        count = f" {self._done:,} {self._unit}" if self._done else ""
        self._print(
            f"{self._step}: done,{count} in {seconds:,.1f} s".replace(",  in", " in").replace("done, in", "done in")
        )

    def note(self, message: str) -> None:
        """Print a line."""
        self._print(message)

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)


def progress_for(console: Console) -> BarProgress | LineProgress:
    """Bars on a terminal, lines elsewhere."""
    return BarProgress(console) if console.is_terminal else LineProgress(console)
