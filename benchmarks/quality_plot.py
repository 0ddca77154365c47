"""Quality against compression, as PNG, from the JSON files of `refrag eval perplexity`.

    python -m benchmarks.quality_plot RESULT.json [RESULT.json …] --output quality.png

One panel a text (context, output, plain or shuffled), one line a way to choose the chunks to expand, one marker a
chunk size; beside them the last tokens of the context at equally many decoder positions. The horizontal axis is
context tokens over the decoder positions that they took. Bars are 95% intervals over documents.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measurement import exit_code_of
from refrag_core.errors import UsageError
from refrag_core.training.plot import pyplot_for, save_figure

COLOURS = {
    "last tokens": "#777777",
    "random": "#1f77b4",
    "last": "#9467bd",
    "similarity": "#2ca02c",
    "perplexity": "#ff7f0e",
    "learned": "#d62728",
}
NAMES = {"last": "last chunks"}
MARKERS = {8: "o", 16: "s", 32: "^"}


@dataclass(frozen=True, slots=True)
class Point:
    """One condition of one table."""

    compression: float
    value: float
    interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Curve:
    """One way to choose, at one chunk size, over the expansion fractions."""

    choice: str
    chunk_size: int
    points: tuple[Point, ...]
    """By compression, the smallest first."""


@dataclass(frozen=True, slots=True)
class Panel:
    """All curves over one text."""

    title: str
    none: float
    full: float
    curves: tuple[Curve, ...]


def read_report(path: Path) -> dict[str, Any]:
    """A report of `refrag eval perplexity`. Raises UsageError for another file."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(report, dict)
        _ = report["settings"]["shuffled"], report["corpus"]["source"]
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UsageError(f"{path} is no report of `refrag eval perplexity --save` ({error!r}); make one") from error
    return report


def panels(reports: Sequence[Mapping[str, Any]], *, log_perplexity: bool) -> list[Panel]:
    """What is drawn: gap closed, or log-perplexity itself. Tables over one text share a panel."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        for table in report.get("tables", [report]):
            grouped.setdefault(_title(report, table), []).append(table)
    return [_panel(title, tables, log_perplexity) for title, tables in grouped.items()]


def _title(report: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    corpus, kind = report["corpus"], "shuffled passages" if report["settings"]["shuffled"] else "next tokens"
    name = corpus["split"] or Path(corpus["source"]).stem
    return f"{name}, {kind}, s={table['context_tokens']}, o={table['output_tokens']}"


def _panel(title: str, tables: Sequence[Mapping[str, Any]], log_perplexity: bool) -> Panel:
    curves = [curve for table in tables for curve in _curves(table, log_perplexity)]
    none, full = (tables[0]["none"], tables[0]["full"]) if log_perplexity else (0.0, 1.0)
    return Panel(title, none, full, tuple(curves))


def _curves(table: Mapping[str, Any], log_perplexity: bool) -> list[Curve]:
    size = table["chunk_size"]
    rates = {p: row["effective"] for p, row in table["compression"].items()}
    last = {
        p: Point(rates[p], row["loss"] if log_perplexity else row["gap_closed"], None)
        for p, row in table["last_at_equal_positions"].items()
    }
    choices = next(iter(table["refrag"].values()))
    made = {name: {p: _point(table, p, name, rates[p], log_perplexity) for p in rates} for name in choices}
    return [
        Curve(name, size, tuple(sorted(points.values(), key=lambda point: point.compression)))
        for name, points in {"last tokens": last, **made}.items()
    ]


def _point(table: Mapping[str, Any], p: str, choice: str, rate: float, log_perplexity: bool) -> Point:
    if log_perplexity:
        return Point(rate, table["refrag"][p][choice], None)
    low, high = table["intervals"]["gap_closed"][p][choice]
    return Point(rate, table["gap_closed"][p][choice], (low, high))


def draw(drawn: Sequence[Panel], output: Path, *, log_perplexity: bool) -> None:
    """Write the figure. Raises MissingExtraError without matplotlib, ConfigError for an output that is no image."""
    pyplot = pyplot_for(output)
    figure, axes = pyplot.subplots(
        1, len(drawn), figsize=(6.4 * len(drawn), 4.8), squeeze=False, layout="constrained", sharey=not log_perplexity
    )
    for axis, panel in zip(axes[0], drawn, strict=True):
        _draw_panel(axis, panel)
        axis.set_ylabel("log-perplexity, nats a token" if log_perplexity else "gap closed (0 no, 1 full context)")
    axes[0][-1].legend(fontsize="small")
    save_figure(pyplot, figure, output, dpi=150)


def _draw_panel(axis: Any, panel: Panel) -> None:
    axis.axhline(panel.full, color="black", linewidth=0.8, linestyle=":", label="full context")
    axis.axhline(panel.none, color="black", linewidth=0.8, linestyle="--", label="no context")
    for curve in panel.curves:
        x = [point.compression for point in curve.points]
        y = [point.value for point in curve.points]
        axis.plot(
            x,
            y,
            color=COLOURS.get(curve.choice, "black"),
            marker=MARKERS.get(curve.chunk_size, "D"),
            linestyle="--" if curve.choice == "last tokens" else "-",
            label=f"{NAMES.get(curve.choice, curve.choice)}, k={curve.chunk_size}",
        )
        for point in curve.points:
            if point.interval is not None:
                axis.vlines(point.compression, *point.interval, color=COLOURS.get(curve.choice), linewidth=0.8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.set_xlabel("compression (context tokens a decoder position)")
    axis.set_title(panel.title, fontsize="medium")
    axis.grid(alpha=0.3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_plot", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of `refrag eval perplexity --save`")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    parser.add_argument("--log-perplexity", action="store_true", help="in place of the gap closed")
    given = parser.parse_args(arguments)

    def made() -> None:
        reports = [read_report(path) for path in given.results]
        draw(panels(reports, log_perplexity=given.log_perplexity), given.output, log_perplexity=given.log_perplexity)

    return exit_code_of(made, given.output)


if __name__ == "__main__":
    sys.exit(main())
