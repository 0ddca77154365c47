"""`refrag` as its users run it: in a process of its own, or in this one where start-up time would count."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from refrag import cli
from refrag_core.storage import WORK

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The result on stdout: nothing but one JSON value."""
        return json.loads(self.out)


def call(*arguments: object) -> Finished:
    """Run `refrag` in this process; anything but a clean exit is raised, as the traceback that a user would see."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv = ["refrag", *map(str, arguments)]
    try:
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
                code: Any = 0
            except SystemExit as end:
                code = end.code or 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Finished(int(code), out.getvalue(), err.getvalue())


def command(*arguments: object) -> list[str]:
    """The command line of `refrag` in a process of its own."""
    return [sys.executable, "-m", "refrag.cli", *map(str, arguments)]


def start(*arguments: object, **options: Any) -> "subprocess.Popen[str]":
    """Start `refrag` at the head of a process group of its own, so that a signal can reach all of it."""
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def finish(process: "subprocess.Popen[str]", timeout: float = 240) -> Finished:
    """Wait for a started command."""
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        kill_group(process)
        raise
    return Finished(process.returncode, out, err)


def run(*arguments: object, **options: Any) -> Finished:
    """Run `refrag` in a process of its own."""
    return finish(start(*arguments, **options))


def kill_group(process: "subprocess.Popen[str]") -> None:
    """SIGKILL a command and its workers, as a machine that dies would, and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]", timeout: float = 240) -> None:
    """Poll until `condition` holds; AssertionError with the log when the process ends or time is up before."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            kill_group(process)
            raise AssertionError(f"it never came about; the command's exit code is {process.returncode}")
        time.sleep(0.01)


def num_receipts(index: Path) -> int:
    """Stages done on single shards by the build in progress."""
    folder = index / WORK / "receipts"
    return sum(1 for path in folder.iterdir() if path.suffix == ".json") if folder.is_dir() else 0


def without_traceback(finished: Finished) -> str:
    """The one line of a failed command's error, checked to be all that there is."""
    assert finished.out == ""
    assert "Traceback" not in finished.err
    errors = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, finished.err
    assert finished.err.splitlines()[-1] == errors[0]
    return errors[0]
