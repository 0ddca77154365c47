"""Workers on clusters of odd shapes: a GPU each, or hardly a CPU. CPUs and GPUs are those of Ray's books alone."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine_overhead import SleepingTokenize, specs
from refrag.pipelines.engines.ray import RayEngine, RayOptions
from refrag.pipelines.receipts import Receipt
from refrag.pipelines.stages import Stages, TokenizedShard
from refrag_core.storage import FileRecord, FolderStore, Store
from tests.ray_cluster import RayCluster, ray_cluster


@dataclass(frozen=True, slots=True)
class TellingStage:
    """A device stage whose receipt says where it ran."""

    device: str = "cpu"
    table: str = "embeddings"
    fingerprint: str = "telling"

    def __call__(self, store: Store, shard: TokenizedShard) -> Receipt:
        time.sleep(0.3)
        facts = {"device": self.device, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES", ""), "pid": os.getpid()}
        files = {self.table: FileRecord(f"shards/{shard.name}", 0, "")}
        return Receipt(self.table, shard.name, shard.name, files, {self.table: 1}, 0.3, facts=facts)


@pytest.fixture(scope="module")
def gpu_cluster() -> Iterator[RayCluster]:
    with ray_cluster(2) as running:
        running.add_node(2, num_gpus=2)
        yield running


def where(cluster: RayCluster, root: Path, **options: Any) -> list[dict[str, Any]]:
    stages: Any = Stages(SleepingTokenize(0.0), (TellingStage(),))  # type: ignore[arg-type]
    with RayEngine(RayOptions(address=cluster.address, **options)) as engine:
        results = list(engine.run(FolderStore(root), stages, specs(24)))
    return [dict(result.receipts[1].facts) for result in results]


@pytest.mark.slow
def test_each_worker_has_a_gpu_of_its_own(gpu_cluster: RayCluster, tmp_path: Path) -> None:
    found = where(gpu_cluster, tmp_path, device_workers=(2, 2))
    assert {entry["device"] for entry in found} == {"cuda"}
    assert {entry["gpu"] for entry in found} == {"0", "1"}
    assert len({(entry["gpu"], entry["pid"]) for entry in found}) == 2


@pytest.mark.slow
def test_two_workers_share_each_gpu(gpu_cluster: RayCluster, tmp_path: Path) -> None:
    found = where(gpu_cluster, tmp_path, device_workers=(4, 4), gpus_per_worker=0.5)
    pairs = {(entry["gpu"], entry["pid"]) for entry in found}
    assert {gpu: sum(gpu == other for other, _ in pairs) for gpu in ("0", "1")} == {"0": 2, "1": 2}


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [(1,), (1, 1), (1, 1, 1)])
def test_nodes_of_one_cpu_do_not_hang(cpus: tuple[int, ...], tmp_path: Path) -> None:
    with ray_cluster(*cpus) as cluster:
        found = where(cluster, tmp_path)
    assert len(found) == 24


@pytest.mark.slow
def test_on_a_cpu_no_gpu_is_taken(gpu_cluster: RayCluster, tmp_path: Path) -> None:
    found = where(gpu_cluster, tmp_path, device="cpu")
    assert {(entry["device"], entry["gpu"]) for entry in found} == {("cpu", "")}
