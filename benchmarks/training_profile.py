"""Where a training step's time goes: `python -m benchmarks.training_profile CONFIG [--set KEY=VALUE …] --output FILE`.

Each task of the config is trained by itself for some steps, until every shape is compiled and captured; then whole
steps are timed, and the parts of a step one by one with the device waited for in between. On CUDA a trace of a
few steps adds the kernels that took longest, and the share of the time in which the device had none to run.
Nothing is saved but under a temporary folder.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measurement import add_output, finish, say
from refrag_core.training.config import TaskConfig, TrainingConfig, load_config
from refrag_core.training.loop import Trainer
from refrag_core.training.throughput import Meter

TRACED_STEPS = 3
TOP_KERNELS = 15


def wait(device: torch.device) -> None:
    """Until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PartTimes:
    """Seconds of the parts of a step, each from a device at rest to a device at rest."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, list[float]] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose seconds are kept under `name`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            wait(self._device)
            started = time.perf_counter()
            made = call(*arguments, **options)
            wait(self._device)
            self.seconds.setdefault(name, []).append(time.perf_counter() - started)
            return made

        return timed

    def milliseconds(self, steps: int) -> dict[str, float]:
        """A step's mean of every part."""
        return {name: round(1000 * sum(values) / steps, 3) for name, values in self.seconds.items()}


def step_seconds(trainer: Trainer, steps: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds of whole steps, each waited for, and the meter's report of all of them."""
    meter, seconds = Meter(), []
    wait(trainer.device)
    for _ in range(steps):
        started = time.perf_counter()
        trainer._train_step(meter)
        wait(trainer.device)
        seconds.append(time.perf_counter() - started)
    return seconds, meter.report(trainer.config.peak_tflops, trainer.processes)


def part_milliseconds(trainer: Trainer, steps: int) -> dict[str, float]:
    """Milliseconds a step of gradients, their sum over processes, clipping and update."""
    times = PartTimes(trainer.device)
    places: list[tuple[Any, str, str]] = [
        (trainer, "backward", "forward_backward"),
        (trainer.processes, "sum", "sum_over_processes"),
        (trainer.gradients, "clip", "clip"),
        (trainer.optimizer, "step", "update"),
    ]
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, part in places:
        setattr(owner, name, times.timed(part, getattr(owner, name)))
    try:
        step_seconds(trainer, steps)
    finally:
        for (owner, name, _), call in zip(places, before, strict=True):
            setattr(owner, name, call)
    return times.milliseconds(steps)


def kernels(trainer: Trainer) -> dict[str, Any]:
    """Milliseconds a step of the longest kernels, and the share of the time in which the device ran none."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        step_seconds(trainer, TRACED_STEPS)
        elapsed = time.perf_counter() - started
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in found) / 1e6
    return {
        "idle_share": round(1.0 - busy / elapsed, 3),
        "top_ms_a_step": {
            event.key[:120]: round(event.self_device_time_total / 1000 / TRACED_STEPS, 3)
            for event in found[:TOP_KERNELS]
        },
    }


def profile_task(config: TrainingConfig, task: TaskConfig, folder: Path, *, warm_up: int, steps: int) -> dict[str, Any]:
    """One task by itself."""
    alone = replace(task, weight=1.0, final_weight=None)
    instructions = config.instructions if task.kind == "instruct" else None
    own = replace(config, tasks=(alone,), output=str(folder / task.kind), instructions=instructions, seconds=None)
    trainer = Trainer(own)
    warming, _ = step_seconds(trainer, warm_up)
    seconds, report = step_seconds(trainer, steps)
    result = {
        "batch_rows": task.batch_rows,
        "warm_up_seconds": round(sum(warming), 1),
        "step_ms": round(1000 * statistics.median(seconds), 2),
        "positions_a_second": round(report["decoder_positions_per_s"]),
        "mfu": float(f"{report['mfu']:.3g}"),
        "parts_ms": part_milliseconds(trainer, steps),
    }
    return result | ({"kernels": kernels(trainer)} if trainer.device.type == "cuda" else {})


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_profile", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--warm-up", type=int, default=40, help="steps in which shapes are met first")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    add_output(parser)
    given = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    config = load_config(given.config, given.set)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for task in config.tasks:
            say(f"{task.kind}: {given.warm_up} steps to warm up, then {given.steps}")
            results[task.kind] = profile_task(config, task, Path(folder), warm_up=given.warm_up, steps=given.steps)
    finish("training_profile", {"config": given.config.name, "set": given.set}, {"tasks": results}, given.output)


if __name__ == "__main__":
    main()
