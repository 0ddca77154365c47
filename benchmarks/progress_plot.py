"""What training runs, one after the other, made of held-out losses, as PNG, from their evaluation.json files.

    python -m benchmarks.progress_plot SECONDS:EVALUATION.json [SECONDS:EVALUATION.json …] --output progress.png

SECONDS are those of one GPU, of all runs up to the evaluation. All evaluations are over as many windows of the same
documents; losses are in nats a token, expanded chunks are drawn at random. One panel a chunk size.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refrag_core.errors import MissingExtraError, RefragError, UsageError

STYLES = {
    "no context": ("black", "--"),
    "p = 0": ("#d62728", "-"),
    "p = 0.1": ("#ff7f0e", "-"),
    "p = 0.25": ("#2ca02c", "-"),
    "last tokens, as many positions as p = 0": ("#777777", "--"),
    "full context": ("black", ":"),
}

Point = tuple[float, float]
"""(GPU seconds, nats a token)."""


def read_points(arguments: Sequence[str]) -> dict[int, dict[str, list[Point]]]:
    """Curves by chunk size and name.

    Raises UsageError for what is no SECONDS:FILE of an evaluation, and for evaluations that cannot be compared.
    """
    found: dict[int, dict[str, list[Point]]] = {}
    read = {}
    for argument in arguments:
        seconds, _, path = argument.partition(":")
        try:
            held_out = json.loads(Path(path).read_text(encoding="utf-8"))["held_out"]
            read[argument] = (held_out["windows"], held_out["base"]["full"])
            rows = {int(key[11:]): row for key, row in held_out.items() if key.startswith("chunk_size_")}
            for size, row in rows.items():
                for name, loss in _losses(held_out, row).items():
                    found.setdefault(size, {}).setdefault(name, []).append((float(seconds), loss))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{argument!r} is no SECONDS:FILE of a training run's evaluation.json with held-out documents "
                f"({error!r}); expected such as 860:runs/whole/evaluation.json"
            ) from error
    odd = [argument for argument in arguments if read[argument] != read[arguments[0]]]
    if odd:
        raise UsageError(
            f"{odd[0]} was evaluated on other windows than {arguments[0]}, and losses on them cannot be compared; "
            f"expected as many windows of the same documents"
        )
    return {size: found[size] for size in sorted(found)}


def _losses(held_out: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, float]:
    compressed = {f"p = {p}": by_policy["random"] for p, by_policy in row["refrag"].items()}
    last = {"last tokens, as many positions as p = 0": row["last"]["0"]["loss"]}
    return {"no context": held_out["none"], **compressed, **last, "full context": held_out["full"]}


def draw(curves: Mapping[int, Mapping[str, Sequence[Point]]], output: Path) -> None:
    """Write the figure. Raises MissingExtraError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("the figure needs matplotlib: pip install 'refrag[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.progress_plot", description=__doc__.splitlines()[0])
    parser.add_argument("evaluations", nargs="+", metavar="SECONDS:FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    given = parser.parse_args(arguments)
    try:
        draw(read_points(given.evaluations), given.output)
    except RefragError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
