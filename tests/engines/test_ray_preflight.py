"""Other machines of a cluster are compared with the driver's before a shard is sent to them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from refrag.pipelines import preflight
from refrag.pipelines.engines import ray as engine
from refrag.pipelines.engines.ray import RayEngine, RayOptions
from refrag.pipelines.preflight import Machine, Needs
from refrag.pipelines.stages import Stages, TokenizeStage
from refrag_core.errors import ClusterError
from refrag_core.models import fingerprint_tokenizer
from refrag_core.storage import FolderStore
from tests.ray_cluster import RayCluster
from tests.tiny_models import decoder_folder


def test_other_machines_are_looked_at_before_the_first_shard(
    cluster: RayCluster, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_folder(tmp_path / "decoder")
    stages = Stages(TokenizeStage(str(decoder), fingerprint_tokenizer(decoder), 256), ())
    monkeypatch.setattr(engine, "_this_host", lambda: "a machine of no cluster")
    compared: list[tuple[Machine, ...]] = []

    def with_other_code(needs: Needs, driver: Machine, workers: list[Machine]) -> None:
        compared.append((driver, *workers))
        preflight.check_workers(needs, driver, workers)
        preflight.check_workers(needs, replace(driver, source="0" * 64), workers)

    monkeypatch.setattr(engine, "check_workers", with_other_code)
    with RayEngine(RayOptions(address=cluster.address)) as running, pytest.raises(ClusterError) as raised:
        list(running.run(FolderStore(tmp_path), stages, iter([])))
    assert re.match(
        r"2 of 2 workers cannot run this build: refrag's own code is another than the driver's on \S+ \(\w{8}\), \S+ "
        r"\(\w{8}\); expected on each what the driver has\. To mend it: pip install 'refrag\[cpu,ray\]==[\d.]+' there$",
        str(raised.value),
    )
    (machines,) = compared
    assert {machine.models for machine in machines} == {(fingerprint_tokenizer(decoder),)}
    assert len({machine.name for machine in machines}) == 3
