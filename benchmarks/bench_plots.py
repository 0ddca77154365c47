"""The plots of `refrag bench`: PNG files through matplotlib, which the extra `train` or `dev` brings.

    python -m benchmarks.bench_plots benchmarks/results/ttft-*-h200.json --output benchmarks/results/ttft-h200.png

draws the rows of several `refrag bench ttft` reports of one machine, one for a range of contexts each, as one figure.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refrag_core.errors import UsageError


def _pyplot() -> Any:
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    return pyplot


def plot_ttft(report: Mapping[str, Any], path: Path) -> None:
    """Time to the first token and speed-up over context, one line a chunk size and fraction."""
    pyplot = _pyplot()
    figure, (times, speedups) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    lines: dict[tuple[int, float], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        lines.setdefault((row["chunk_size"], row["expansion_fraction"]), []).append(row)
    for (chunk_size, fraction), rows in lines.items():
        context, label = [row["context"] for row in rows], f"k={chunk_size}, p={fraction:g}"
        times.plot(context, [row["ttft_ms"] for row in rows], marker="o", label=label)
        if all(row["speedup"] for row in rows):
            speedups.plot(context, [row["speedup"] for row in rows], marker="o", label=label)
    for name, label in (("full_ttft_ms", "full context, eager"), ("full_best_ttft_ms", "full context, captured")):
        full = sorted({row["context"]: row[name] for row in report["rows"] if row.get(name)}.items())
        if full:
            times.plot(*zip(*full, strict=True), linestyle="--", marker="s", label=label)
    for axes, label in ((times, "time to the first token, ms"), (speedups, "× over the eager full context")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(_title(report))
    _save(pyplot, figure, path)


def plot_rates(report: Mapping[str, Any], path: Path, *, name: str, label: str) -> None:
    """One bar a row: its `name` under its `body`, chunk size and baseline."""
    pyplot = _pyplot()
    rows = [row for row in report["rows"] if row.get(name)]
    figure, axes = pyplot.subplots(figsize=(9, 0.4 * len(rows) + 1.5))
    names = [
        " ".join(str(row[key]) for key in ("body", "chunk_size", "baseline", "stage") if row.get(key)) for row in rows
    ]
    axes.barh(range(len(rows)), [row[name] for row in rows])
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.invert_yaxis()
    axes.set_title(_title(report), fontsize=9)
    _save(pyplot, figure, path)


def _title(report: Mapping[str, Any]) -> str:
    found = report["environment"]
    return f"{found.get('decoder', '')} {found.get('gpu') or found['cpu']}, {found['date']}".strip()


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def merged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One report with the rows of all, by context. Raises UsageError for reports of several decoders or devices."""
    machines = {tuple(report["environment"].get(key) for key in ("decoder", "gpu", "cpu")) for report in reports}
    if len(machines) != 1:
        raise UsageError(f"the reports are of {len(machines)} decoders or machines; expected one for a figure")
    rows = sorted((row for report in reports for row in report["rows"]), key=lambda row: row["context"])
    return {"environment": reports[0]["environment"], "rows": rows}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_plots", description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    plot_ttft(merged([json.loads(path.read_text(encoding="utf-8")) for path in given.reports]), given.output)


if __name__ == "__main__":
    main()
