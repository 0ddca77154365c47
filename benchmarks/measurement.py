"""What every benchmark shares: the machine in words, progress on stderr, and the result as one JSON object."""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refrag_core.errors import RefragError


def say(message: str) -> None:
    """One line of progress on stderr, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


def cpu_model() -> str:
    """The CPU's name as the kernel tells it, or the architecture where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment() -> dict[str, Any]:
    """Date, processor, versions, threads and load: what a figure cannot be compared without."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": load(),
    }


def load() -> float:
    """Runnable processes over the last minute, this one included."""
    return round(os.getloadavg()[0], 2)


def quantiles(seconds: Sequence[float], *, unit: float) -> dict[str, float]:
    """Median, 99th percentile and extremes of `seconds`, divided by `unit` (1e-3 for milliseconds)."""
    import numpy as np

    values = np.asarray(seconds) / unit
    named = {
        "p50": np.quantile(values, 0.5),
        "p99": np.quantile(values, 0.99),
        "min": values.min(),
        "max": values.max(),
    }
    return {name: round(float(value), 3) for name, value in named.items()}


def add_output(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has."""
    parser.add_argument("--output", type=Path, help="write the JSON result to this file as well")


def exit_code_of(make: Callable[[], None], output: Path) -> int:
    """0 and the name of what was made on stdout, or 2 and on stderr what was wrong."""
    try:
        make()
    except RefragError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(output)
    return 0


def finish(name: str, arguments: Mapping[str, Any], results: Mapping[str, Any], output: Path | None) -> None:
    """Print `{benchmark, environment, arguments, …results}` on stdout, and write it to `output`."""
    report = {"benchmark": name, "environment": environment(), "arguments": dict(arguments), **results}
    text = json.dumps(report, indent=2, ensure_ascii=False)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
