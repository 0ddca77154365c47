"""Devices: where a model runs when nobody says, and how chunk embeddings get there."""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from refrag_core.embedding_storage import Int8Rows, StoredRows
from refrag_core.errors import ConfigError
from refrag_core.parts import part

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

_TURN = threading.Lock()


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_device(device: str) -> str:
    """`auto` is the first CUDA device where there is one, else the CPU; any other name stands.

    Raises ConfigError for a name that PyTorch does not know and for a CUDA device that is not there.
    """
    if device == "cpu":
        return device
    import torch

    found = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if found else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:NUMBER") from error
    if kind == "cuda" and not found:
        raise ConfigError(
            f"device is {device!r}, and PyTorch finds no CUDA device; expected cpu or auto on this machine"
        )
    return device


@contextlib.contextmanager
def device_turn(device: "torch.device") -> Iterator[None]:
    """The GPU to oneself among the threads that encode, embed and score; nothing to wait for on a CPU.

    Two at a time would not be faster, take twice the device's memory, and one could disturb what the other captures.
    """
    if not _has_turns(device):
        yield
        return
    with part("wait"):
        _TURN.acquire()
    try:
        yield
    finally:
        _TURN.release()


def _has_turns(device: "torch.device") -> bool:
    return device.type == "cuda"


def upload(values: "npt.NDArray[Any]", device: "torch.device | str") -> "torch.Tensor":
    """The array on `device`: the shape, and the PyTorch dtype of that name, of an array of any shape and number type.

    To CUDA it travels from pinned memory, and nobody waits until it is there; on a CPU a contiguous array's own memory
    is used. Raises TypeError for a dtype that PyTorch does not have.
    """
    import numpy as np
    import torch

    tensor, there = torch.from_numpy(np.ascontiguousarray(values)), torch.device(device)
    return tensor.pin_memory().to(there, non_blocking=True) if there.type == "cuda" else tensor.to(there)


def upload_rows(rows: StoredRows, device: "torch.device | str") -> "torch.Tensor":
    """Chunk embeddings `[n, d_enc]` on `device`; codes travel as they are and become float32 there."""
    if not isinstance(rows, Int8Rows):
        return upload(rows, device)
    return upload(rows.codes, device).float() * upload(rows.scales, device)[:, None]
