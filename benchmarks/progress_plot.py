"""What training runs, one after the other, made of held-out losses, as PNG, from their evaluation.json files.

    python -m benchmarks.progress_plot SECONDS:EVALUATION.json [SECONDS:EVALUATION.json …] --output progress.png

SECONDS are those of one GPU, of all runs up to the evaluation. All evaluations are over as many windows of the same
documents; losses are in nats a token, expanded chunks are drawn at random. One panel a chunk size.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measurement import exit_code_of
from refrag_core.errors import UsageError
from refrag_core.training.plot import pyplot_for, save_figure

STYLES = {
    "no context": ("black", "--"),
    "p = 0": ("#d62728", "-"),
    "p = 0.1": ("#ff7f0e", "-"),
    "p = 0.25": ("#2ca02c", "-"),
    "last tokens, as many positions as p = 0": ("#777777", "--"),
    "full context": ("black", ":"),
}

_WINDOWS = ("windows", "documents", "context_tokens", "output_tokens")
_ROUNDING = 0.01
"""Nats by which one loss differs between devices and precisions, at the most."""

Point = tuple[float, float]
"""(GPU seconds, nats a token)."""


def read_points(arguments: Sequence[str]) -> dict[int, dict[str, list[Point]]]:
    """Curves by chunk size and name.

    Raises UsageError for what is no SECONDS:FILE of an evaluation, and for evaluations that cannot be compared.
    """
    found: dict[int, dict[str, list[Point]]] = {}
    first: dict[str, Any] | None = None
    for argument in arguments:
        seconds, held_out, losses = _read(argument)
        first = held_out if first is None else first
        _refuse_other_windows(argument, held_out, arguments[0], first)
        for size, named in losses.items():
            curves = found.setdefault(size, {})
            for name, loss in named.items():
                curves.setdefault(name, []).append((seconds, loss))
    return {size: found[size] for size in sorted(found)}


def _read(argument: str) -> tuple[float, dict[str, Any], dict[int, dict[str, float]]]:
    """Seconds, the held-out evaluation, and its losses by chunk size and name."""
    seconds, _, path = argument.partition(":")
    try:
        held_out = json.loads(Path(path).read_text(encoding="utf-8"))["held_out"]
        rows = {int(key[11:]): row for key, row in held_out.items() if key.startswith("chunk_size_")}
        _ = held_out["base"]["full"]
        return float(seconds), held_out, {size: _losses(held_out, row) for size, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{argument!r} is no SECONDS:FILE of a training run's evaluation.json with held-out documents "
            f"({error!r}); expected such as 860:runs/whole/evaluation.json"
        ) from error


def _refuse_other_windows(argument: str, own: Mapping[str, Any], other_argument: str, other: Mapping[str, Any]) -> None:
    """The same windows: as many, as long, and as hard for the decoder before training, rounding left aside."""
    shapes = [tuple(found.get(key) for key in _WINDOWS) for found in (own, other)]
    losses = [found["base"]["full"] for found in (own, other)]
    if shapes[0] != shapes[1] or not math.isclose(*losses, abs_tol=_ROUNDING):
        told = [
            f"{dict(zip(_WINDOWS, shape, strict=True))}, untrained {loss:.3f} nats"
            for shape, loss in zip(shapes, losses, strict=True)
        ]
        raise UsageError(
            f"{argument} was evaluated on {told[0]}, and {other_argument} on {told[1]}; expected the same windows: "
            f"losses on others cannot be compared"
        )


def _losses(held_out: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    compressed = {f"p = {p}": by_policy["random"] for p, by_policy in row["refrag"].items()}
    last = {"last tokens, as many positions as p = 0": row["last"]["0"]["loss"]}
    return {"no context": held_out["none"], **compressed, **last, "full context": held_out["full"]}


def draw(curves: Mapping[int, Mapping[str, Sequence[Point]]], output: Path) -> None:
    """Write the figure. Raises MissingExtraError without matplotlib, ConfigError for an output that is no image."""
    pyplot = pyplot_for(output)
    figure, axes = pyplot.subplots(
        1, len(curves), figsize=(6.4 * len(curves), 4.8), squeeze=False, layout="constrained", sharey=True
    )
    for axis, (size, named) in zip(axes[0], curves.items(), strict=True):
        for name, points in named.items():
            colour, line = STYLES.get(name, ("#1f77b4", "-"))
            axis.plot(*zip(*sorted(points), strict=True), color=colour, linestyle=line, marker=".", label=name)
        axis.set_title(f"k = {size}", fontsize="medium")
        axis.set_xlabel("seconds of training on one GPU")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("held-out documents, nats a token")
    axes[0][-1].legend(fontsize="small")
    save_figure(pyplot, figure, output, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.progress_plot", description=__doc__.splitlines()[0])
    parser.add_argument("evaluations", nargs="+", metavar="SECONDS:FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    given = parser.parse_args(arguments)
    return exit_code_of(lambda: draw(read_points(given.evaluations), given.output), given.output)


if __name__ == "__main__":
    sys.exit(main())
