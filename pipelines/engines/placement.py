"""Where workers fit: a cluster's CPUs and GPUs against what a build asks for, before anything starts.

Every worker takes whole CPUs, or half ones where the cluster has but one, so that no mix of workers can leave a
remainder on each node that nobody fits into.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from refrag_core.errors import ClusterError

_TOKENIZERS_SHARE = 8
"""On CPUs alone one worker in so many tokenizes: encoding takes many times longer."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster and all that it has, busy or not."""

    id: str
    host: str
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the workers of a build are to be."""

    workers: int | None = None
    """Workers for the CPU stages at most; None takes what there is."""
    device_workers: tuple[int, int] | None = None
    """Workers for the device stages, at least and at most; None is one at least, and what there is at most."""
    gpus_per_worker: float | None = None
    """GPUs of a device worker, a fraction or whole; 0 is the CPU, None one GPU where the cluster has any."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How many workers of each kind fit, and what each takes."""

    worker_cpus: float
    """CPUs of a worker for CPU stages."""
    device_cpus: float
    """CPUs of a device worker: none where it has a GPU, so that any node with a free GPU can take it."""
    device_gpus: float
    workers: int
    """Workers for CPU stages while no device stage runs."""
    tokenizers: int
    """Workers for CPU stages beside the device stages."""
    min_device_workers: int
    max_device_workers: int
    last_device_workers: int
    """Device workers at most once there is nothing left to tokenize."""


def lay_out(nodes: Sequence[Node], wanted: Wanted) -> Layout:
    """Sizes of the pools on these nodes.

    Raises ClusterError when not even the fewest workers have room.
    """
    gpus = _gpus_per_worker(nodes, wanted)
    share = 1.0 if sum(int(node.cpus) for node in nodes) >= 2 else 0.5
    slots = sum(int(node.cpus / share) for node in nodes)
    fewest, most = wanted.device_workers or (1, None)
    if gpus > 0:
        return _on_gpus(nodes, wanted, gpus, share, slots, fewest, most)
    if slots < fewest + 1:
        raise ClusterError(
            f"{describe(nodes)}; expected room for {fewest} device workers and one worker for the CPU stages, a CPU "
            f"each: pass --device-workers {max(1, slots - 1)}, or add nodes{_WAIT}"
        )
    tokenizers = min(wanted.workers or max(1, slots // _TOKENIZERS_SHARE), slots - fewest)
    room = slots if most is None else min(most, slots)
    return Layout(
        worker_cpus=share,
        device_cpus=share,
        device_gpus=0.0,
        workers=min(wanted.workers or slots, slots),
        tokenizers=tokenizers,
        min_device_workers=fewest,
        max_device_workers=min(room, slots - tokenizers),
        last_device_workers=room,
    )


_WAIT = " (with --wait-for-nodes SECONDS where an autoscaler brings them)"


def _gpus_per_worker(nodes: Sequence[Node], wanted: Wanted) -> float:
    found = sum(node.gpus for node in nodes)
    if wanted.device == "cpu":
        return 0.0
    if wanted.device == "auto" and wanted.gpus_per_worker is None:
        return 1.0 if found else 0.0
    gpus = 1.0 if wanted.gpus_per_worker is None else wanted.gpus_per_worker
    if gpus > 0 and not found:
        raise ClusterError(
            f"{describe(nodes)}; expected GPUs for device workers with {gpus:g} each: pass --device cpu, or add nodes "
            f"with GPUs{_WAIT}"
        )
    return gpus


def _on_gpus(
    nodes: Sequence[Node], wanted: Wanted, gpus: float, share: float, slots: int, fewest: int, most: int | None
) -> Layout:
    # A worker with less than one GPU lies on a single one: two of .6 do not fit into 1.2 GPUs of two cards.
    room = sum(int(node.gpus) * int(1 / gpus) if gpus < 1 else int(node.gpus / gpus) for node in nodes)
    if room < fewest or slots < 1:
        raise ClusterError(
            f"{describe(nodes)}; expected room for {fewest} device workers with {gpus:g} GPUs each, and a CPU for the "
            f"other stages: change --device-workers or --gpus-per-worker, pass --device cpu, or add nodes{_WAIT}"
        )
    devices, workers = room if most is None else min(most, room), min(wanted.workers or slots, slots)
    return Layout(
        worker_cpus=share,
        device_cpus=0.0,
        device_gpus=gpus,
        workers=workers,
        tokenizers=workers,
        min_device_workers=fewest,
        max_device_workers=devices,
        last_device_workers=devices,
    )


def bundles(wanted: Wanted, layout: Layout | None) -> list[dict[str, float]]:
    """What an autoscaler is asked to make room for: as many workers as the build may have, else as few as it needs."""
    fewest, most = wanted.device_workers or (1, 1)
    gpus = layout.device_gpus if layout is not None else _asked_gpus(wanted)
    device: dict[str, float] = {"GPU": gpus} if gpus else {"CPU": 1.0}
    return [{"CPU": 1.0}] * (wanted.workers or 1) + [device] * max(fewest, most)


def _asked_gpus(wanted: Wanted) -> float:
    if wanted.device == "cpu":
        return 0.0
    return wanted.gpus_per_worker if wanted.gpus_per_worker is not None else float(wanted.device != "auto")


def describe(nodes: Sequence[Node]) -> str:
    """The cluster in words: its nodes, CPUs and GPUs, and what each node has."""
    shown = ", ".join(f"{node.host}: {node.cpus:g} CPUs, {node.gpus:g} GPUs" for node in nodes[:8])
    rest = f", and {len(nodes) - 8} more" if len(nodes) > 8 else ""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return f"the cluster has {len(nodes)} nodes with {cpus:g} CPUs and {gpus:g} GPUs in all ({shown or 'none'}{rest})"
