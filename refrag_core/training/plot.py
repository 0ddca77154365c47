"""The log of a training run as one figure: losses, held-out results, learning rate, speed; of either kind of run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_core.errors import ConfigError, MissingExtraError
from refrag_core.training.run_log import METRICS_FILE, read_metrics
from refrag_core.training.run_state import EVALUATION_FILE

_POLICY_LOSSES = ("warm_start_loss", "policy_loss")
_POLICY_PANELS = (("reward", "reward_std"), ("entropy", "divergence"), ("clip_fraction", "advantage_std"))

Points = list[tuple[int, float]]
"""(step, value)."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves that share an axis."""

    title: str
    curves: Mapping[str, Points]


def panels(lines: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """What is drawn of a run's log; a panel that the log has nothing for is left out."""
    logged = [line for line in lines if "held_out" not in line]
    held_out = [line for line in lines if "held_out" in line]
    made = [
        *_task_panels(logged, "losses", "loss, nats a token"),
        *_task_panels(logged, "divergences", "divergence from the teacher, nats a token"),
        Panel("loss of the policy", _columns(logged, _fields(_POLICY_LOSSES))),
        *(Panel(", ".join(names).replace("_", " "), _columns(logged, _fields(names))) for names in _POLICY_PANELS),
        Panel("held out: gap closed, random expansion", _columns(held_out, _gaps)),
        Panel("held out: nats gained by the policy", _columns(held_out, _gains)),
        Panel("learning rate", _columns(logged, _fields(("learning_rate", "learning_rate_factor")))),
        Panel("decoder positions a second", _columns(logged, _fields(("decoder_positions_per_s",)))),
    ]
    return [panel for panel in made if panel.curves]


def _columns(lines: Sequence[Mapping[str, Any]], values: Any) -> dict[str, Points]:
    found: dict[str, Points] = {}
    for line in lines:
        for name, value in values(line):
            found.setdefault(name, []).append((line["step"], value))
    return {name: found[name] for name in sorted(found)}


def _task_panels(lines: Sequence[Mapping[str, Any]], key: str, title: str) -> Iterator[Panel]:
    """One for each task, whose curves are its chunk sizes and expansion fractions: all in one would be unreadable."""
    curves = _columns(lines, lambda line: line.get(key, {}).items())
    for task in dict.fromkeys(name.partition("/")[0] for name in curves):
        own = {name: points for name, points in curves.items() if name.partition("/")[0] == task}
        yield Panel(f"{task}: {title}", {name.partition("/")[2] or task: points for name, points in own.items()})


def _fields(names: Sequence[str]) -> Any:
    return lambda line: ((name, line[name]) for name in names if name in line)


def _gaps(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, row in line["held_out"].items():
        if key.startswith("chunk_size_"):
            yield from ((f"k={key[11:]}, p={p}", by["random"]) for p, by in row["gap_closed"].items())


def _gains(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for layout in ("next_paragraph", "shuffled"):
        for key, row in line["held_out"].get(layout, {}).items():
            for name, gain in row["gains"].items():
                yield f"{layout.replace('_', ' ')}, k={key[11:]}, {name.replace('_', ' ')}", gain["nats"]


def plot_run(run: Path, output: Path) -> list[Panel]:
    """Draw the log of the run in folder `run` into the image `output`, whose suffix says its format.

    Returns what was drawn. Raises ConfigError when there is no log, and MissingExtraError without matplotlib.
    """
    logged = read_metrics(run / METRICS_FILE)
    drawn = panels([*logged, *_last_evaluation(run, logged)])
    if not drawn:
        raise ConfigError(
            f"{run} has no {METRICS_FILE} with logged steps; expected the folder of a training run that took "
            f"steps: give the config's `output`"
        )
    _draw(drawn, run.name, output)
    return drawn


def _last_evaluation(run: Path, logged: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The evaluation at the run's end, which is a file of its own, as the log's last line."""
    path = run / EVALUATION_FILE
    found = json.loads(path.read_text(encoding="utf-8")).get("held_out", {}) if path.is_file() else {}
    if logged and found and "skipped" not in found:
        yield {"step": logged[-1]["step"], "held_out": found}


def _draw(drawn: Sequence[Panel], title: str, output: Path) -> None:
    pyplot = pyplot_for(output)
    rows = (len(drawn) + 1) // 2
    figure, axes = pyplot.subplots(rows, 2, figsize=(13, 4 * rows), squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, drawn, strict=False):
        _draw_panel(axis, panel)
    for axis in axes.flat[len(drawn) :]:
        axis.set_axis_off()
    figure.suptitle(title)
    save_figure(pyplot, figure, output, dpi=120)


def pyplot_for(output: Path) -> Any:
    """matplotlib.pyplot, to draw into an image file without a display.

    Raises MissingExtraError without matplotlib, and ConfigError for an output whose suffix is no image's.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtraError("the figure needs matplotlib: pip install 'refrag[train]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = sorted(pyplot.figure().canvas.get_supported_filetypes())
    pyplot.close()
    if output.suffix[1:].lower() not in known:
        raise ConfigError(f"{output} has suffix {output.suffix!r}; expected an image's: {', '.join(known)}")
    return pyplot


def save_figure(pyplot: Any, figure: Any, output: Path, *, dpi: int) -> None:
    """Write a finished figure, in a folder that may be new, and drop it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=dpi)
    pyplot.close(figure)


def _draw_panel(axis: Any, panel: Panel) -> None:
    for name, points in panel.curves.items():
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, label=name, linewidth=1.0, marker="." if len(points) < 20 else None)
    axis.set_title(panel.title, fontsize="medium")
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
