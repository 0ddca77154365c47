"""Training runs as the command line starts them: a stage's config, checked to be one, then the run and its result.

Stages are trained one after another, each from the checkpoint before it: reconstruct, next-paragraph, policy,
instruct. A config is of every stage whose own task is among its tasks (with a weight), so that one run may mix several;
that of a policy has no tasks and is of that stage alone.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from refrag_core.errors import ConfigError
from refrag_core.training.config import TaskConfig, TrainingConfig, parse_config, read_settings
from refrag_core.training.policy_config import PolicyTrainingConfig, parse_policy_config
from refrag_core.training.run_log import METRICS_FILE, read_metrics
from refrag_core.training.run_state import EVALUATION_FILE

Stage = Literal["reconstruct", "next-paragraph", "policy", "instruct"]
AnyConfig = TrainingConfig | PolicyTrainingConfig

_POSITION = ("step", "progress", "epoch", "seconds", "learning_rate", "learning_rate_factor")
_SHIPPED = Path(__file__).parent / "configs"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What a run came to."""

    run: str
    """Its folder."""
    finished: bool
    """False when its time was up before: the same command resumes it."""
    step: int
    progress: float
    """From 0 to 1."""
    seconds: float
    """Training time, resumed parts counted together."""
    checkpoint: str | None
    """Folder of the trained checkpoint, None before the end."""
    metrics: dict[str, Any]
    """The last logged ones."""
    evaluation: dict[str, Any]
    """By split, and of whole matrices held_out_uncut; empty before the end."""


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.toml"))}


def shipped_config(name: str) -> Path:
    """The config of that name that comes with the package. Raises ConfigError."""
    shipped = shipped_configs()
    if name not in shipped:
        raise ConfigError(
            f"no training config {name!r}; expected a TOML file, or one of those that come with refrag "
            f"({', '.join(shipped)}): `refrag train config NAME` prints one to start from"
        )
    return shipped[name]


def config_title(path: Path) -> str:
    """The first sentence of the comment that a shipped config begins with."""
    comment = " ".join(line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines())
    return comment.partition(". ")[0]


def find_config(reference: str) -> Path:
    """The TOML file that `reference` means: a path, else the name of a shipped config. Raises ConfigError."""
    path = Path(reference)
    return path if path.is_file() else shipped_config(reference)


def load_stage(stage: Stage, reference: str, overrides: Sequence[str] = (), output: Path | None = None) -> AnyConfig:
    """The config of a stage, with `overrides` (`key=value`) and, where given, another output folder.

    Raises ConfigError for what is unreadable, unknown, ill-typed or out of range, and for a config of other stages.
    """
    path = find_config(reference)
    values = read_settings(path, overrides)
    if output is not None:
        values["output"] = str(output)
    if stage == "policy":
        return _policy_config(path, values)
    if "tasks" not in values and (odd := _policy_only(values)):
        raise ConfigError(
            f"{path} is a policy's training config (it has {odd[0]} and no [[tasks]]); expected one with a {stage} "
            f"task: run `refrag train policy {reference}`"
        )
    config = parse_config(values)
    kinds = sorted({task.kind for task in config.tasks if task.weight_at(0.0) or task.weight_at(1.0)})
    if stage not in kinds:
        raise ConfigError(
            f"{path} has the tasks {', '.join(kinds)}; expected {stage} among them: run another `refrag train` "
            f"command, or add [[tasks]] with kind = {stage!r}"
        )
    return config


def _policy_config(path: Path, values: dict[str, Any]) -> PolicyTrainingConfig:
    if "tasks" in values:
        raise ConfigError(
            f"{path} has [[tasks]], and a policy's training has none; expected a config such as `refrag train config "
            f"policy` prints: run another `refrag train` command for this one"
        )
    return parse_policy_config(values)


def _policy_only(values: dict[str, Any]) -> list[str]:
    """Settings that a policy's training has and the others' has not."""
    others = {field.name for kind in (TrainingConfig, TaskConfig) for field in fields(kind)}
    return [field.name for field in fields(PolicyTrainingConfig) if field.name in values and field.name not in others]


def run_stage(config: AnyConfig) -> RunResult | None:
    """Train, or resume; None in all processes of a run of several but the first. Errors as of the trainers."""
    with _fast_matrix_products():
        if isinstance(config, PolicyTrainingConfig):
            from refrag_core.training.policy_loop import PolicyTrainer

            policy = PolicyTrainer(config)
            return _result(policy, policy.run())
        from refrag_core.training.loop import Trainer

        trainer = Trainer(config)
        finished = trainer.run()
        return _result(trainer, finished) if trainer.processes.is_first else None


@contextmanager
def _fast_matrix_products() -> Iterator[None]:
    """TF32 on a GPU that has it, for what is not bf16 anyway."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _result(trainer: Any, finished: bool) -> RunResult:
    folder: Path = trainer.folder
    evaluation = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8")) if finished else {}
    return RunResult(
        run=str(folder),
        finished=finished,
        step=trainer.step,
        progress=trainer.progress,
        seconds=round(trainer.elapsed, 3),
        checkpoint=str(folder / "checkpoint") if finished else None,
        metrics=trainer.last_report or _last_metrics(folder),
        evaluation=evaluation,
    )


def _last_metrics(folder: Path) -> dict[str, Any]:
    """What was logged last, for a run that had nothing left to do."""
    logged = [line for line in read_metrics(folder / METRICS_FILE) if "held_out" not in line]
    return {key: value for key, value in logged[-1].items() if key not in _POSITION} if logged else {}


def result_rows(result: RunResult) -> list[tuple[str, object]]:
    """A result as names and values, for people."""
    state = "finished" if result.finished else f"stopped at {result.progress:.0%}; run again to resume"
    rows: list[tuple[str, object]] = [
        ("run", f"{result.run}, {state}"),
        ("steps", result.step),
        ("seconds", f"{result.seconds:,.1f}"),
    ]
    losses = result.metrics.get("losses", result.metrics)
    rows += [(name, f"{value:.4f}") for name, value in losses.items()]
    for split, found in result.evaluation.items():
        rows += _evaluation_rows(split, found)
    return rows + ([("checkpoint", result.checkpoint)] if result.checkpoint else [])


def _evaluation_rows(split: str, found: dict[str, Any]) -> Iterator[tuple[str, object]]:
    if "skipped" in found:
        yield split, f"not evaluated: {found['skipped']}"
    for layout in ("next_paragraph", "shuffled"):
        for key, row in found.get(layout, {}).items():
            gain = row["gains"]["over_last"]
            yield f"{split} {layout} k={key[11:]}", f"gains {gain['nats']:+.4f} nats a token over the last chunks"
    for key, row in found.items():
        if not key.startswith("chunk_size_"):
            continue
        if "gap_closed" in row:
            gaps = ", ".join(f"{by['random']:.3f} at p={p}" for p, by in row["gap_closed"].items())
            yield f"{split} k={key[11:]}", f"gap closed {gaps}"
        else:
            chosen = f"{row['learned']:.3f} of {found['questions']}, by chance {row['random']:.3f}"
            yield f"{split} k={key[11:]}", f"answers among the chosen chunks {chosen}"
