"""One training run on several GPUs: processes that share each step's micro-batches and sum their gradients.

Started by `accelerate launch` or `torchrun`, every process makes the same plan, works through its own part of a
step's micro-batches, and adds its gradients to the others', so that a run computes the same steps on any number
of processes that divides `micro_batches`. Data parallel: every GPU holds the whole model.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refrag_core.errors import ConfigError, MissingExtraError


class Processes:
    """The processes of this run as one of them sees them: here, the only one."""

    rank = 0
    count = 1

    @property
    def device(self) -> torch.device | None:
        """The device of this process, None where the config may choose."""
        return None

    @property
    def is_first(self) -> bool:
        """Whether this one logs, evaluates and saves."""
        return self.rank == 0

    def own(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's share of what all plan."""
        return items[self.rank :: self.count]

    def sum(self, values: Tensor) -> None:
        """Replace `values` by their sum over the processes, in place."""

    def from_first(self, value: float) -> float:
        """The first process's number, in all."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in all."""
        return [value]

    def wait(self) -> None:
        """Go on when all are here."""


class AccelerateProcesses(Processes):
    """Several processes, joined by accelerate."""

    def __init__(self, device_type: str) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        # Small numbers travel between CPUs, where they make nobody wait for a GPU.
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        self._accelerator = Accelerator(cpu=device_type == "cpu", kwargs_handlers=[InitProcessGroupKwargs(backend)])
        self.rank = self._accelerator.process_index
        self.count = self._accelerator.num_processes

    @property
    def device(self) -> torch.device | None:
        """The device of this process."""
        device: torch.device = self._accelerator.device
        return device

    def sum(self, values: Tensor) -> None:
        """Replace `values` by their sum over the processes, in place."""
        torch.distributed.all_reduce(values)

    def from_first(self, value: float) -> float:
        """The first process's number, in all."""
        number = torch.tensor([value], dtype=torch.float64)
        torch.distributed.broadcast(number, src=0)
        return float(number[0])

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in all."""
        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Go on when all are here."""
        self._accelerator.wait_for_everyone()


def join_processes(device: str) -> Processes:
    """The processes that a launcher started, or this one alone.

    Args:
        device: `cpu`, `cuda` or `auto`, as in the config.

    Raises MissingExtraError where a launcher started several and accelerate is not there, and ConfigError for a
    device that names one GPU for all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("training with several processes needs accelerate: pip install 'refrag[train]'")
    if ":" in device:
        raise ConfigError(f"device is {device!r} in a run of several processes; expected cpu, cuda or auto")
    chosen = "cuda" if device in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    return AccelerateProcesses(chosen)
