"""What a run tells while it trains: metrics.jsonl, one line a logged step, and TensorBoard's event files beside it."""

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refrag_core.errors import MissingExtraError

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """The log of one run. Lines are JSON objects with a `step`; nested numbers become one TensorBoard tag each.

    Args:
        folder: of the run.
        tensorboard: whether event files are written; None for where the package is installed.
        active: whether this process logs at all.

    Raises MissingExtraError where event files are asked for and the package is not there.
    """

    def __init__(self, folder: Path, *, tensorboard: bool | None, active: bool = True) -> None:
        self._path = folder / METRICS_FILE
        self._active = active
        installed = importlib.util.find_spec("tensorboard") is not None
        if tensorboard and not installed:
            raise MissingExtraError("tensorboard = true needs the package tensorboard: pip install 'refrag[train]'")
        self._with_events = installed if tensorboard is None else tensorboard
        self._writer: Any = None

    def begin(self, step: int) -> None:
        """Open the log behind `step`; what a killed run logged after it is dropped, since it will come again."""
        if not self._active:
            return
        kept = [line for line in read_metrics(self._path) if line["step"] <= step]
        if self._path.exists():
            temporary = self._path.with_name(f"{METRICS_FILE}.{os.getpid()}.part")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self._path)
        if self._with_events:
            from torch.utils.tensorboard import SummaryWriter

            again = any(self._path.parent.glob("events.out.tfevents.*"))
            self._writer = SummaryWriter(str(self._path.parent), purge_step=step + 1 if again else None)

    def write(self, line: Mapping[str, Any]) -> None:
        """Add one line."""
        if not self._active:
            return
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._writer is not None:
            for tag, value in scalars(line):
                self._writer.add_scalar(tag, value, line["step"])
            self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl, without one that a kill cut off; none where there is no file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            found.append(value)
    return found


def scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """All numbers in nested tables, by their path: `losses/reconstruct/k8`; the step itself is none of them."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and prefix + key != "step":
            yield prefix + key, float(value)
