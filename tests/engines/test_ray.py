"""The Ray engine gives what the local one gives, on real nodes; its errors are refrag's own."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from refrag.pipelines import preflight
from refrag.pipelines.build import build_index
from refrag.pipelines.engines import ray as ray_engine
from refrag.pipelines.engines.dispatch import Limits
from refrag.pipelines.engines.node_checks import Needs
from refrag.pipelines.engines.ray import RayEngine, RayOptions, _on_device, connect
from refrag.pipelines.preflight import Machine
from refrag.pipelines.stages import EmbedStage, Stages, TokenizeStage
from refrag_core.errors import ClusterError, ConfigError, StageError
from refrag_core.manifest import read_manifest
from refrag_core.models import fingerprint_tokenizer
from refrag_core.storage import FolderStore
from tests import command_line
from tests.engines.odd_work import fail_oddly, hang_once, node_of
from tests.faults.kill_builds import problems_of
from tests.pipelines.test_local_engine import die_once, fail_at_two, one_and_its_pid, slower_first
from tests.ray_cluster import RayCluster
from tests.sabotage import Sabotage, Sabotaged, faulty
from tests.small_index import SmallIndex, documents
from tests.tiny_models import decoder_folder


@pytest.fixture(scope="session")
def engine(cluster: RayCluster) -> Iterator[RayEngine]:
    """One connection for all tests: a build's actors end, its connection need not."""
    with RayEngine(RayOptions(address=cluster.address, device_workers=(1, 2), shard_timeout=120.0)) as running:
        yield running


@pytest.fixture
def own_index(tmp_path: Path, own_cache: Path) -> SmallIndex:
    return SmallIndex(tmp_path, documents(200, sentences=6), shard_bytes=12_000)


class Noted:
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, step: str, total: int | None, unit: str) -> None: ...

    def advance(self, amount: int) -> None: ...

    def finish(self) -> None: ...

    def note(self, message: str) -> None:
        self.notes.append(message)


def test_results_come_in_the_order_of_the_items_from_both_nodes(engine: RayEngine) -> None:
    made = list(engine.map(slower_first, range(12)))
    assert [square for square, _ in made] == [item * item for item in range(12)]
    assert os.getpid() not in {pid for _, pid in made}
    assert len(set(engine.map(node_of, range(8)))) == 2


def test_it_looks_ahead_but_never_far(engine: RayEngine) -> None:
    pulled = consumed = furthest = 0

    def items() -> Iterator[int]:
        nonlocal pulled, furthest
        for item in range(100):
            pulled += 1
            furthest = max(furthest, pulled - consumed)
            yield item

    for _ in engine.map(one_and_its_pid, items()):
        consumed += 1
    assert (pulled, consumed) == (100, 100)
    assert furthest <= 16 * 4 + 8


def test_the_work_of_a_killed_worker_is_run_again(engine: RayEngine, tmp_path: Path) -> None:
    assert list(engine.map(partial(die_once, tmp_path), range(12))) == list(range(12))
    assert {path.name for path in tmp_path.glob("[37]-*")} >= {"3-0", "3-1", "7-0", "7-1"}


def test_errors_of_refrag_arrive_as_themselves_and_others_as_one_line(engine: RayEngine) -> None:
    with pytest.raises(StageError) as raised:
        list(engine.map(fail_at_two, range(50)))
    assert str(raised.value) == "shard 2 cannot be read, expected it to be: look at it"
    message = (
        r"^fail oddly 1 failed 3 times \(LookupError: nobody knows \(odd_work.py:\d+\)\), expected it to finish: look "
        r"at the workers' logs, and run the command again; what is finished is kept$"
    )
    with pytest.raises(StageError, match=message):
        list(engine.map(fail_oddly, range(4)))


def test_an_index_is_that_of_the_local_engine_byte_for_byte(
    engine: RayEngine, own_index: SmallIndex, tmp_path: Path
) -> None:
    """Through a sabotaged stage: an encode actor is killed at work, and every shard is run twice at once."""
    calm = own_index.build(workers=1)
    expected = read_manifest(FolderStore(own_index.path))
    own_index.path.rename(tmp_path / "calm")
    change = faulty(Sabotage(str(tmp_path / "struck"), "device", "kill"))
    report = build_index(own_index.options, Sabotaged(engine, change, copies=2))
    assert (report.content_id, report.build_id) == (calm.content_id, calm.build_id)
    assert read_manifest(FolderStore(own_index.path)).files == expected.files
    assert list(problems_of(own_index.path)) == []
    assert (tmp_path / "struck" / "struck-0").exists()


def test_a_worker_that_hangs_is_ended_and_its_work_run_again(
    engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Noted()
    # Not an engine of its own: the workers of the session's may hold all CPUs.
    monkeypatch.setattr(engine._dispatcher, "_limits", Limits(timeout=4.0))
    monkeypatch.setattr(engine._metrics, "_progress", progress)
    assert list(engine.map(partial(hang_once, tmp_path), range(4))) == [0, 1, 2, 3]
    (note,) = progress.notes
    assert re.fullmatch(r"hang once 2 is run again: timed out \(after 4 s on \S+/[0-9a-f]{8}\)", note)


# --- what is refused --------------------------------------------------------------------------------


def test_no_room_is_an_error_before_anything_starts(engine: RayEngine) -> None:
    with pytest.raises(
        ClusterError, match=r"^the cluster has 2 nodes with 4 CPUs and 0 GPUs in all .*9 device workers"
    ):
        RayEngine(RayOptions(device_workers=(9, 9))).__enter__()


def test_a_node_that_lacks_something_is_an_error_before_anything_starts(
    engine: RayEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = Needs(modules=("no_such_module",), readable=("/no/such/corpus",))
    monkeypatch.setattr(RayEngine, "_needs", lambda self: needs)
    message = (
        r"^2 of 2 nodes are not ready: .* lacks the packages no_such_module, has no /no/such/corpus; .*nothing was"
    )
    with pytest.raises(ClusterError, match=message):
        RayEngine().__enter__()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (RayOptions(device="cuda:1"), "--device is 'cuda:1'; expected auto, cpu or cuda with --engine ray"),
        (RayOptions(workers=0), "--workers is 0, expected at least 1 with --engine ray"),
        (RayOptions(gpus_per_worker=1.5), "--gpus-per-worker is 1.5; expected a fraction up to 1, or a whole number"),
        (RayOptions(device="cuda", gpus_per_worker=0), "--gpus-per-worker is 0 and --device is cuda; expected them to"),
        (RayOptions(device="cpu", gpus_per_worker=0.5), "--gpus-per-worker is 0.5 and --device is cpu; expected them"),
    ],
)
def test_settings_that_no_cluster_can_serve(options: RayOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RayEngine(options)


def test_another_cluster_than_the_one_of_this_process(engine: RayEngine) -> None:
    with pytest.raises(
        ConfigError, match=r"^this process is connected to the Ray cluster at \S+, 10.0.0.1:6379 was asked"
    ):
        RayEngine(RayOptions(address="10.0.0.1:6379")).__enter__()


def test_a_worker_runs_a_stage_on_its_own_device() -> None:
    stage = EmbedStage("retriever", "f" * 64, "cpu")
    assert _on_device(stage, "cuda").device == "cuda"
    assert _on_device(stage, "cuda").fingerprint == stage.fingerprint


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from refrag import cli
sys.argv = ["refrag", *sys.argv[1:]]
cli.main()
"""


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path) -> None:
    run = [sys.executable, "-c", WITHOUT_RAY, "index", "build", str(tmp_path), "--engine", "ray"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --engine ray needs the packages of an extra: pip install 'refrag[ray]'\n"


@pytest.mark.parametrize("text", ["", "0", "2:1", "a:b", "1:", ":2"])
def test_a_range_that_is_none(tmp_path: Path, text: str) -> None:
    done = command_line.call("index", "build", tmp_path, "--engine", "ray", "--device-workers", text)
    assert done.code == 2
    assert done.err.endswith(f"--device-workers is {text!r}; expected MIN:MAX with 1 ≤ MIN ≤ MAX, or one number\n")


def test_what_is_said_of_a_cluster_is_not_ignored_on_one_machine(tmp_path: Path) -> None:
    done = command_line.call("index", "build", tmp_path, "--ray-address", "auto", "--wait-for-nodes", 60)
    assert done.code == 2
    assert done.err == (
        "error: --ray-address, --wait-for-nodes was given with --engine local; expected it with --engine ray\n"
    )


def test_an_address_where_nothing_listens() -> None:
    with pytest.raises(
        ClusterError, match=r"^no Ray cluster at 127.0.0.1:1 \(\[Errno 111\] Connection refused\), expected"
    ):
        connect(RayOptions(address="127.0.0.1:1"))


def test_other_machines_are_looked_at_before_the_first_shard(
    cluster: RayCluster, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_folder(tmp_path / "decoder")
    stages = Stages(TokenizeStage(str(decoder), fingerprint_tokenizer(decoder), 256), ())
    monkeypatch.setattr(ray_engine, "_this_host", lambda: "a machine of no cluster")
    compared: list[tuple[Machine, ...]] = []

    def with_other_code(needs: Needs, driver: Machine, workers: list[Machine]) -> None:
        compared.append((driver, *workers))
        preflight.check_workers(needs, driver, workers)
        preflight.check_workers(needs, replace(driver, source="0" * 64), workers)

    monkeypatch.setattr(ray_engine, "check_workers", with_other_code)
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
