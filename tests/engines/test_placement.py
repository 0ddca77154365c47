"""What fits on a cluster, and what is said when it does not."""

import re
from dataclasses import replace

import pytest

from refrag.pipelines.engines.placement import Layout, Node, Wanted, bundles, lay_out
from refrag_core.errors import ClusterError


def nodes(*sizes: tuple[float, float]) -> list[Node]:
    return [Node(f"id{at}", f"host{at}", cpus, gpus) for at, (cpus, gpus) in enumerate(sizes)]


def sizes(layout: Layout) -> tuple[int, int, int, int, int]:
    return (
        layout.workers,
        layout.tokenizers,
        layout.min_device_workers,
        layout.max_device_workers,
        layout.last_device_workers,
    )


@pytest.mark.parametrize(
    ("cluster", "wanted", "expected"),
    [
        (nodes((2, 0)), Wanted(), (2, 1, 1, 1, 2)),
        (nodes((1, 0), (1, 0)), Wanted(), (2, 1, 1, 1, 2)),
        (nodes((16, 0)), Wanted(), (16, 2, 1, 14, 16)),
        (nodes((16, 0)), Wanted(workers=4), (4, 4, 1, 12, 16)),
        (nodes((4, 0)), Wanted(workers=9), (4, 3, 1, 1, 4)),
        (nodes((8, 0)), Wanted(device_workers=(2, 3)), (8, 1, 2, 3, 3)),
        (nodes((8, 2), (8, 2)), Wanted(), (16, 16, 1, 4, 4)),
        (nodes((8, 2)), Wanted(gpus_per_worker=0.5), (8, 8, 1, 4, 4)),
        (nodes((8, 2)), Wanted(gpus_per_worker=0.6), (8, 8, 1, 2, 2)),
        (nodes((8, 3), (8, 3)), Wanted(gpus_per_worker=2, device_workers=(2, 9)), (16, 16, 2, 2, 2)),
        (nodes((8, 2)), Wanted(device="cpu"), (8, 1, 1, 7, 8)),
        (nodes((8, 2)), Wanted(gpus_per_worker=0), (8, 1, 1, 7, 8)),
    ],
)
def test_pools_fill_the_cluster_and_never_more(
    cluster: list[Node], wanted: Wanted, expected: tuple[int, int, int, int, int]
) -> None:
    layout = lay_out(cluster, wanted)
    assert sizes(layout) == expected
    if not layout.device_gpus:
        assert layout.tokenizers + layout.max_device_workers <= sum(node.cpus for node in cluster)


def test_one_cpu_is_shared_in_halves() -> None:
    layout = lay_out(nodes((1, 0)), Wanted())
    assert (layout.worker_cpus, layout.device_cpus, layout.tokenizers, layout.max_device_workers) == (0.5, 0.5, 1, 1)


def test_a_worker_with_a_gpu_needs_no_cpu_of_its_node() -> None:
    """Workers for CPU stages may have taken every CPU beside the GPU."""
    layout = lay_out(nodes((4, 1)), Wanted())
    assert (layout.device_cpus, layout.device_gpus, layout.tokenizers) == (0.0, 1.0, 4)


@pytest.mark.parametrize(
    ("cluster", "wanted", "message"),
    [
        (
            nodes((2, 0), (2, 0)),
            Wanted(device_workers=(4, 4)),
            "the cluster has 2 nodes with 4 CPUs and 0 GPUs in all (host0: 2 CPUs, 0 GPUs, host1: 2 CPUs, 0 GPUs); "
            "expected room for 4 device workers and one worker for the CPU stages, a CPU each: pass --device-workers "
            "3, or add nodes (with --wait-for-nodes SECONDS where an autoscaler brings them)",
        ),
        (
            nodes((2, 0)),
            Wanted(device="cuda"),
            "the cluster has 1 nodes with 2 CPUs and 0 GPUs in all (host0: 2 CPUs, 0 GPUs); expected GPUs for device "
            "workers with 1 each: pass --device cpu, or add nodes with GPUs (with --wait-for-nodes SECONDS where an "
            "autoscaler brings them)",
        ),
        (
            nodes((2, 1), (2, 1)),
            Wanted(gpus_per_worker=2),
            "the cluster has 2 nodes with 4 CPUs and 2 GPUs in all (host0: 2 CPUs, 1 GPUs, host1: 2 CPUs, 1 GPUs); "
            "expected room for 1 device workers with 2 GPUs each, and a CPU for the other stages: change "
            "--device-workers or --gpus-per-worker, pass --device cpu, or add nodes (with --wait-for-nodes SECONDS "
            "where an autoscaler brings them)",
        ),
        (nodes(), Wanted(), "the cluster has 0 nodes with 0 CPUs and 0 GPUs in all (none); expected room for 1"),
    ],
)
def test_what_has_no_room_is_refused(cluster: list[Node], wanted: Wanted, message: str) -> None:
    with pytest.raises(ClusterError, match=re.escape(message)):
        lay_out(cluster, wanted)


def test_an_autoscaler_is_asked_for_as_much_as_may_be_used() -> None:
    wanted = Wanted(workers=2, device_workers=(1, 3), gpus_per_worker=0.5)
    assert bundles(wanted, None) == [{"CPU": 1.0}] * 2 + [{"GPU": 0.5}] * 3
    assert bundles(replace(wanted, device="cpu"), None) == [{"CPU": 1.0}] * 5
    assert bundles(Wanted(), lay_out(nodes((2, 1)), Wanted())) == [{"CPU": 1.0}, {"GPU": 1.0}]
