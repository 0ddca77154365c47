"""The micro-batches of a run, made in a thread ahead of the step that needs them."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refrag_core.training.batches import TrainingBatch
from refrag_core.training.config import TrainingConfig
from refrag_core.training.instruct_data import InstructionSet
from refrag_core.training.micro_batches import Example, MicroBatch, make_example, plan_step
from refrag_core.training.processes import Processes
from refrag_core.training.schedule import progress_of
from refrag_core.training.token_shards import Windows


@dataclass(frozen=True, slots=True)
class PreparedExample:
    """A micro-batch with its tensors, on the CPU and, where there is a GPU, in memory that it reads by itself."""

    example: Example
    own: tuple[Tensor, ...]
    """`TrainingBatch.arrays`."""
    full: tuple[Tensor, ...]
    """Those of the full context, empty without one."""


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """This process's share of a step."""

    examples: list[PreparedExample]
    next_position: int
    """Number of the first window that the step after it reads."""


class ExampleStream:
    """Steps in their order, from any first one; the one after it is made meanwhile.

    Args:
        device: that the tensors are for.
    """

    def __init__(
        self,
        config: TrainingConfig,
        windows: Windows,
        instructions: InstructionSet | None,
        processes: Processes,
        device: torch.device,
    ) -> None:
        self._config = config
        self._windows = windows
        self._instructions = instructions
        self._processes = processes
        self._pinned = device.type == "cuda"
        current = torch.cuda.current_device() if self._pinned else 0
        start = (lambda: torch.cuda.set_device(current)) if self._pinned else None
        self._thread = ThreadPoolExecutor(1, "examples", initializer=start)
        self._ahead: tuple[tuple[int, int], Future[PreparedStep]] | None = None

    def take(self, *, step: int, position: int, elapsed: float) -> PreparedStep:
        """The share of a step that starts at this window.

        Args:
            elapsed: seconds of training, which the shares of tasks follow where the config limits seconds.
        """
        if self._ahead is None or self._ahead[0] != (step, position):
            self._begin(step, position, elapsed)
        assert self._ahead is not None
        made = self._ahead[1].result()
        self._begin(step + 1, made.next_position, elapsed)
        return made

    def _begin(self, step: int, position: int, elapsed: float) -> None:
        progress = progress_of(step, self._config.steps, elapsed, self._config.seconds)
        planned = plan_step(self._config, position=position, step=step, progress=progress)
        following = planned[-1].position + planned[-1].task.batch_rows
        own = self._processes.own(planned)
        self._ahead = ((step, position), self._thread.submit(self._prepare, own, following, progress))

    def _prepare(self, planned: Sequence[MicroBatch], following: int, progress: float) -> PreparedStep:
        examples = [
            make_example(self._config, self._windows, micro_batch, progress=progress, instructions=self._instructions)
            for micro_batch in planned
        ]
        return PreparedStep([prepared(example, pinned=self._pinned) for example in examples], following)


def prepared(example: Example, *, pinned: bool) -> PreparedExample:
    """Its tensors, in pinned memory if wanted."""
    full = () if example.full is None else _tensors(example.full, pinned)
    return PreparedExample(example, _tensors(example.batch, pinned), full)


def _tensors(batch: TrainingBatch, pinned: bool) -> tuple[Tensor, ...]:
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in batch.arrays)
    return tuple(tensor.pin_memory() if pinned else tensor for tensor in tensors)
