from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from refrag_core.errors import ConfigError
from refrag_core.training.example_stream import ExampleStream, PreparedStep
from refrag_core.training.loop import Trainer
from refrag_core.training.micro_batches import plan_step
from refrag_core.training.processes import Processes
from tests.refrag_core.training.conftest import settings

TASKS = [
    {"kind": "reconstruct", "batch_rows": 3},
    {"kind": "next-paragraph", "batch_rows": 2, "distillation": 0.5, "expansion_fractions": [0.0, 0.25, 0.5]},
]


class SecondOfTwo(Processes):
    def own(self, items: Sequence[Any]) -> Sequence[Any]:
        return items[1::2]


@pytest.fixture
def trainer(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> Trainer:
    return Trainer(settings(data, models, tmp_path, tasks=TASKS, micro_batches=4, alike=2))


def stream(trainer: Trainer, processes: Processes) -> ExampleStream:
    return ExampleStream(trainer.config, trainer.windows, None, processes, torch.device("cpu"))


def same(one: PreparedStep, other: PreparedStep) -> bool:
    pairs = zip(one.examples, other.examples, strict=True)
    return one.next_position == other.next_position and all(
        all(torch.equal(a, b) for a, b in zip((*x.own, *x.full), (*y.own, *y.full), strict=True)) for x, y in pairs
    )


def test_a_step_is_the_same_ahead_of_time_or_not(trainer: Trainer) -> None:
    running, position, steps = stream(trainer, Processes()), 0, []
    for number in range(4):
        steps.append(running.take(step=number, position=position, elapsed=0.0))
        position = steps[-1].next_position
    for number, first in ((3, steps[2].next_position), (1, steps[0].next_position)):
        assert same(stream(trainer, Processes()).take(step=number, position=first, elapsed=0.0), steps[number])
        assert same(running.take(step=number, position=first, elapsed=0.0), steps[number])


def test_a_process_makes_its_own_share(trainer: Trainer) -> None:
    whole = stream(trainer, Processes()).take(step=0, position=0, elapsed=0.0)
    share = stream(trainer, SecondOfTwo()).take(step=0, position=0, elapsed=0.0)
    assert same(share, PreparedStep(whole.examples[1::2], whole.next_position))


def test_neighbours_are_alike(trainer: Trainer) -> None:
    seen = set()
    for step in range(20):
        planned = plan_step(trainer.config, position=0, step=step, progress=0.0)
        kinds = [(one.task.kind, one.chunk_size, one.expansion_fraction) for one in planned]
        assert kinds[0] == kinds[1]
        assert kinds[2] == kinds[3]
        seen.add(kinds[0] == kinds[2])
    assert seen == {True, False}


def test_micro_batches_are_a_multiple_of_alike(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="multiple of alike, 3"):
        settings(data, models, tmp_path, micro_batches=4, alike=3)
