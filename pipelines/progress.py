"""What a build tells while it runs; the command line decides how that looks."""

from typing import Protocol


class Progress(Protocol):
    """Receives the steps of a long job."""

    def start(self, step: str, total: int | None, unit: str) -> None:
        """A step begins; `total` units are expected, None when that is not known yet."""

    def advance(self, amount: int) -> None:
        """So many more units of the step are done."""

    def finish(self) -> None:
        """The step is over."""

    def note(self, message: str) -> None:
        """A line for the log."""


class Silent:
    """Tells nothing."""

    def start(self, step: str, total: int | None, unit: str) -> None:
        """Ignore a step's start."""

    def advance(self, amount: int) -> None:
        """Ignore progress."""

    def finish(self) -> None:
        """Ignore a step's end."""

    def note(self, message: str) -> None:
        """Ignore a log line."""
