"""The Beam engine gives what the local one gives, on three runners, and its errors are refrag's own."""

import logging
import os
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import apache_beam
import pytest
import torch
from apache_beam.testing.util import assert_that

from refrag.pipelines.build import BuildReport, build_index
from refrag.pipelines.components import resolve_models
from refrag.pipelines.engines import beam
from refrag.pipelines.engines.beam import BeamEngine, BuildIndex, FailedShard
from refrag.pipelines.engines.exchange import Exchange
from refrag.pipelines.plan import ShardSpec, cut_shards
from refrag.pipelines.receipts import Receipt
from refrag.pipelines.scan import merge_runs, scan_corpus
from refrag.pipelines.stages import ShardResult, Stages
from refrag_core.errors import ConfigError, ObjectStoreError, StageError
from refrag_core.manifest import read_manifest
from refrag_core.storage import EXCHANGE, FolderStore, Store
from refrag_core.work_folder import WorkFolder
from tests import command_line
from tests.faults.kill_builds import build_arguments, ids_of, problems_of
from tests.small_index import SmallIndex, documents, write_jsonl

DIRECT = ("--runner=DirectRunner",)
PORTABLE = ("--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK")
RUNNERS = {"direct": DIRECT, "portable": PORTABLE}
"""Those that start no process; what they cannot show is shown once with processes, since these take seconds."""

DOCUMENTS = documents(200, sentences=6)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallIndex]:
    """A corpus with the index that the local engine makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        index = SmallIndex(tmp_path_factory.mktemp("local"), DOCUMENTS, shard_bytes=8000)
        index.build()
        yield index


def build(index: SmallIndex, output: Path, flags: tuple[str, ...], **changes: Any) -> tuple[BuildReport, BeamEngine]:
    with BeamEngine(flags, exchange=output) as engine:
        return build_index(replace(index.options, output=output, **changes), engine), engine


def digests(path: Path) -> dict[str, str]:
    """Every file that the newest generation names."""
    return {name: record.digest for name, record in read_manifest(FolderStore(path)).files.items()}


# --- the same index ---------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_index_is_the_local_engines_byte_for_byte(local: SmallIndex, tmp_path: Path, runner: str) -> None:
    report, engine = build(local, tmp_path / "index", RUNNERS[runner])
    assert ids_of(tmp_path / "index") == ids_of(local.path)
    assert digests(tmp_path / "index") == digests(local.path)
    assert list(problems_of(tmp_path / "index")) == []
    wanted = {"documents": report.indexed, "passages": report.passages, "chunks": report.chunks}
    assert {name: engine.counters[name] for name in wanted} == wanted
    assert engine.counters["shards"] > 5


def test_worker_processes_on_the_command_line(local: SmallIndex, tmp_path: Path) -> None:
    """The same ids, and on the terminal the progress alone: none of what Beam and its workers have to say."""
    write_jsonl(tmp_path / "corpus" / "records.jsonl", DOCUMENTS)
    index = tmp_path / "index"
    done = command_line.run(*build_arguments(tmp_path, index, shard_bytes=8000), "--engine", "beam")
    assert done.code == 0, done.err
    assert ids_of(index) == ids_of(local.path)
    assert digests(index) == digests(local.path)
    assert list(problems_of(index)) == []
    allowed = ("scan", "plan", "encode", "index")
    assert [line for line in done.err.splitlines() if not line.startswith(allowed)] == []


def test_an_update_goes_on_from_the_local_engines_generation(local: SmallIndex, tmp_path: Path) -> None:
    changed = [*DOCUMENTS[:150], {"id": "new", "text": "A document that comes later."}]
    fresh = SmallIndex(tmp_path / "fresh", changed, shard_bytes=8000)
    shutil.copytree(local.path, tmp_path / "index")
    report, _ = build(fresh, tmp_path / "index", DIRECT, delete_missing=True)
    assert (report.new, report.deleted, report.version) == (1, 50, 2)
    assert report.content_id == fresh.build().content_id


@pytest.mark.parametrize("told", [1, 2])
def test_every_bundle_twice_changes_nothing(
    local: SmallIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: int
) -> None:
    """The driver hears of each item from its first execution, which does the work, or from its second, which finds all
    done."""
    deliveries = Deliveries(told, monkeypatch)
    report, engine = build(local, tmp_path / "index", (*DIRECT, "--direct_runner_bundle_repeat=1"))
    assert set(deliveries.counts.values()) == {2}
    assert ids_of(tmp_path / "index") == ids_of(local.path)
    assert digests(tmp_path / "index") == digests(local.path)
    assert engine.counters["shards"] == len(read_manifest(FolderStore(local.path)).shards)
    assert engine.counters["reused"] == 3 * engine.counters["shards"]
    assert report.encoded_chunks == (report.chunks if told == 1 else 0)


class Deliveries:
    """Has the driver take each result when it has been delivered `told` times, and no later delivery come before."""

    def __init__(self, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        self._told = told
        self._taken: set[str] = set()
        self._changed = threading.Condition()
        self._put, self._present, self._take = Exchange.put, Exchange.present, Exchange.take
        monkeypatch.setattr(Exchange, "put", lambda exchange, key, data: self.put(exchange, key, data))
        monkeypatch.setattr(Exchange, "present", lambda exchange: self.present(exchange))
        monkeypatch.setattr(Exchange, "take", lambda exchange, key: self.take(exchange, key))

    def put(self, exchange: Exchange, key: str, data: bytes) -> None:
        """Deliver; what comes too late for the driver waits until that has what it is to take."""
        name = exchange._name(key)
        with self._changed:
            assert self._changed.wait_for(lambda: self.counts[name] < self._told or name in self._taken, 60)
        self._put(exchange, key, data)
        self.counts[name] += 1

    def present(self, exchange: Exchange) -> list[str]:
        """Items that were delivered so many times."""
        return [key for key in self._present(exchange) if self.counts[exchange._name(key)] >= self._told]

    def take(self, exchange: Exchange, key: str) -> bytes:
        """Read, and let later deliveries come."""
        data = self._take(exchange, key)
        with self._changed:
            self._taken.add(exchange._name(key))
            self._changed.notify_all()
        return data


def test_results_come_back_through_a_bucket(local: SmallIndex, bucket: str) -> None:
    with BeamEngine(PORTABLE, exchange=f"{bucket}/index") as engine:
        report = build_index(replace(local.options, output=f"{bucket}/index"), engine)
    assert report.content_id == ids_of(local.path)[0]


# --- map --------------------------------------------------------------------------------------------


def squared(item: int) -> int:
    return item * item


def later_first(item: int) -> tuple[int, int]:
    time.sleep(0.02 * (item % 3 == 0))
    return item * item, os.getpid()


def fail_at_two(item: int) -> int:
    if item == 2:
        raise StageError("shard 2 cannot be read, expected it to be: look at it")
    return item


def crash_at_two(item: int) -> int:
    if item == 2:
        raise ZeroDivisionError("division by zero")
    return item


def unsendable(item: int) -> object:
    return {item}


def lose_connections(folder: Path, item: int) -> int:
    """Fails twice on each item before it works."""
    tries = len(list(folder.glob(f"{item}-*")))
    (folder / f"{item}-{tries}").touch()
    if tries < 2:
        raise (ConnectionResetError if item % 2 else ObjectStoreError)("the connection was reset")
    return item


def never_connect(item: int) -> int:
    raise ObjectStoreError("s3://bucket cannot be reached, expected it to be: look at the network")


@pytest.mark.parametrize("runner", RUNNERS)
def test_results_come_in_the_order_of_the_items(runner: str) -> None:
    with BeamEngine(RUNNERS[runner]) as engine:
        assert list(engine.map(squared, iter(range(30)))) == [item * item for item in range(30)]
        assert list(engine.map(squared, [])) == []
        assert list(engine.map(later_first, [3])) == [(9, os.getpid())]  # not worth a pipeline
        assert not engine.spans_machines


@pytest.mark.slow
def test_worker_processes_share_the_items() -> None:
    with BeamEngine(workers=2) as engine:
        made = list(engine.map(later_first, range(12)))
    assert [square for square, _ in made] == [item * item for item in range(12)]
    assert len({pid for _, pid in made} - {os.getpid()}) == 2


def test_many_items_go_into_several_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam, "_ITEMS_A_PIPELINE", 7)
    pulled = 0

    def items() -> Iterator[int]:
        nonlocal pulled
        for item in range(1, 21):
            pulled = item
            yield item

    with BeamEngine() as engine:
        results = engine.map(squared, items())
        assert next(results) == 1
        assert pulled == 7  # a corpus of a million shards must not become one pipeline
        assert list(results) == [item * item for item in range(2, 21)]


def size_of(item: bytes) -> int:
    return len(item)


def test_large_items_go_into_several_pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's description may have no more than so many bytes."""
    monkeypatch.setattr(beam, "_BYTES_A_PIPELINE", 3000)
    sizes: list[int] = []
    original = beam._map_pipeline

    def noted(function: Any, pipeline: Any, exchange: Any, items: dict[str, bytes]) -> None:
        sizes.append(len(items))
        original(function, pipeline, exchange, items)

    monkeypatch.setattr(beam, "_map_pipeline", noted)
    with BeamEngine() as engine:
        assert list(engine.map(size_of, [bytes(1200)] * 6)) == [1200] * 6
    assert sizes == [3, 3]


@pytest.mark.parametrize("runner", RUNNERS)
def test_an_error_of_refrag_arrives_as_itself(runner: str) -> None:
    with BeamEngine(RUNNERS[runner]) as engine, pytest.raises(StageError) as raised:
        list(engine.map(fail_at_two, range(4)))
    assert str(raised.value) == "shard 2 cannot be read, expected it to be: look at it"


@pytest.mark.parametrize("function", [crash_at_two, unsendable])
def test_what_no_worker_should_do_is_one_message(function: Any) -> None:
    with BeamEngine() as engine, pytest.raises(StageError, match=r"a worker (failed with ZeroDivisionError|made a)"):
        list(engine.map(function, range(4)))


def test_an_item_alone_fails_as_it_would_among_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(beam, "_PAUSE_SECONDS", 0.0)
    with BeamEngine() as engine:
        with pytest.raises(StageError, match="a worker failed with ZeroDivisionError: division by zero"):
            list(engine.map(crash_at_two, [2]))
        with pytest.raises(StageError, match=r"^shard 2 cannot be read, expected it to be"):
            list(engine.map(fail_at_two, [2]))
        assert list(engine.map(partial(lose_connections, tmp_path), [1])) == [1]


def talkative(item: int) -> int:
    os.write(1, b"a worker's library says something\n")
    return item


def test_stdout_is_for_the_result_alone(capfd: pytest.CaptureFixture[str]) -> None:
    with BeamEngine(workers=1) as engine:
        assert list(engine.map(talkative, range(2))) == [0, 1]
    assert capfd.readouterr().out == ""


def test_lost_connections_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam, "_PAUSE_SECONDS", 0.0)
    with BeamEngine() as engine:
        assert list(engine.map(partial(lose_connections, tmp_path), range(4))) == list(range(4))
        assert engine.counters["retries"] == 8
        with pytest.raises(ObjectStoreError, match=r"^s3://bucket cannot be reached, expected"):
            list(engine.map(never_connect, range(2)))


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before, hook = list(logging.getLogger().handlers), threading.excepthook
    with BeamEngine(exchange=tmp_path / "index") as engine:
        assert list(engine.map(squared, range(3))) == [0, 1, 4]
        with pytest.raises(StageError):
            list(engine.map(fail_at_two, range(4)))
        next(engine.map(squared, range(100)))  # a consumer that stops early
    assert list((tmp_path / "index" / EXCHANGE).iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    assert (list(logging.getLogger().handlers), threading.excepthook) == (before, hook)


# --- the transform ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FailingTokenize:
    """A tokenize stage that fails on one shard."""

    stage: Any
    shard: str

    def __call__(self, store: Store, spec: ShardSpec) -> Receipt:
        if spec.name == self.shard:
            raise StageError("this shard cannot be tokenized")
        receipt: Receipt = self.stage(store, spec)
        return receipt


@dataclass(frozen=True, slots=True)
class MissingModel:
    """A device stage whose model is not there."""

    table: str = "embeddings"
    fingerprint: str = "none"

    def load(self) -> Any:
        raise StageError("the model is not on this worker, expected it in /models: mount it there")

    def __call__(self, store: Store, shard: Any) -> Receipt:
        raise AssertionError("no shard gets here")


@pytest.fixture
def work(tmp_path: Path, own_cache: Path) -> tuple[Store, Stages, list[ShardSpec]]:
    """A store, its stages, and the specs of a small corpus: what a pipeline of one's own starts from."""
    index = SmallIndex(tmp_path, documents(30, sentences=3))
    store = FolderStore(index.path)
    models = resolve_models(store, index.options.models)
    folder = WorkFolder(str(tmp_path / "work"))
    scan = scan_corpus(index.options.corpus, folder.below("scan"), chunk_sizes=(16,), default_chunk_size=16)
    specs = list(cut_shards(merge_runs(scan.runs, work=folder.below("merging")), folder.below("plan"), 500))
    assert len(specs) > 3
    return store, models.stages(score=False), specs


def test_the_transform_in_a_pipeline_of_ones_own(work: tuple[Store, Stages, list[ShardSpec]]) -> None:
    """A shard that comes twice gives the same result, one that fails is a dead letter, and no other suffers."""
    store, stages, specs = work
    failing = replace(stages, tokenize=FailingTokenize(stages.tokenize, specs[1].name))  # type: ignore[arg-type]

    def check_results(results: list[ShardResult]) -> None:
        good = [specs[0], specs[0], *specs[2:]]
        assert sorted(result.spec.name for result in results) == sorted(spec.name for spec in good)
        assert all(result.shard is not None and "vectors" in result.shard.tables for result in results)
        by_name = {result.spec.name: result.shard for result in results}
        assert all(result.shard == by_name[result.spec.name] for result in results)

    def check_failed(failed: list[FailedShard]) -> None:
        assert [letter.spec for letter in failed] == [specs[1]]
        assert str(failed[0].failure.error) == "this shard cannot be tokenized"

    with apache_beam.Pipeline(runner="FnApiRunner") as pipeline:
        built = pipeline | apache_beam.Create([specs[0], *specs]) | BuildIndex(store, failing)
        assert_that(built.results, check_results, label="results")
        assert_that(built.failed, check_failed, label="failed")


def test_a_model_that_does_not_load_is_told_for_each_shard(work: tuple[Store, Stages, list[ShardSpec]]) -> None:
    store, stages, specs = work
    with BeamEngine() as engine, pytest.raises(StageError, match=r"^the model is not on this worker, expected it"):
        list(engine.run(store, Stages(stages.tokenize, (MissingModel(),)), specs))


def test_a_cancelled_transform_leaves_the_rest_out(work: tuple[Store, Stages, list[ShardSpec]]) -> None:
    store, stages, specs = work
    with apache_beam.Pipeline(runner="FnApiRunner") as pipeline:
        built = pipeline | apache_beam.Create(specs) | BuildIndex(store, stages, cancelled=lambda: True)
        assert_that(built.results, lambda results: _is_empty(results), label="results")
        assert_that(built.failed, lambda failed: _is_empty(failed), label="failed")
    assert not (Path(store.location) / "shards").exists()


def _is_empty(found: list[Any]) -> None:
    assert found == []


def test_large_shards_go_first(work: tuple[Store, Stages, list[ShardSpec]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The direct runner deals the shards out in turn: the order is what evens its workers out."""
    store, stages, specs = work
    dealt: list[ShardSpec] = []
    original = beam._build_pipeline

    def noted(store: Store, stages: Stages, pipeline: Any, exchange: Any, items: dict[str, ShardSpec]) -> None:
        dealt.extend(items.values())
        original(store, stages, pipeline, exchange, items)

    monkeypatch.setattr(beam, "_build_pipeline", noted)
    with BeamEngine() as engine:
        made = list(engine.run(store, stages, reversed(specs)))
    assert {result.spec.name for result in made} == {spec.name for spec in specs}
    assert [spec.num_bytes for spec in dealt] == sorted((spec.num_bytes for spec in specs), reverse=True)


# --- options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "workers", "message"),
    [
        (("--direct_num_wrkers=2",), None, "Beam's direct runner has no option --direct_num_wrkers; expected one of"),
        (("--direct_num_workers=two",), None, "invalid int value: 'two'; expected PipelineOptions of Beam"),
        (("--runner=NoSuchRunner",), None, r"Beam has no runner NoSuchRunner here \(.*\); expected one that is"),
        (("--direct_num_workers=2",), 4, "--workers 4 was given with Beam's own --direct_num_workers=2; expected one"),
        (("--direct_running_mode=multi_processing",), 0, "--workers 0 was given with Beam's own --direct_running_mode"),
        (PORTABLE, 2, "--workers counts processes of Beam's direct runner, and PortableRunner was asked for; expected"),
    ],
)
def test_options_that_are_wrong(flags: tuple[str, ...], workers: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BeamEngine(flags, workers=workers)


def test_a_runner_elsewhere_has_to_know_where_results_come_back() -> None:
    flags = ("--runner=PortableRunner", "--job_endpoint=localhost:1")
    with BeamEngine(flags) as engine, pytest.raises(ConfigError, match=r"expected the index's location: BeamEngine\("):
        list(engine.map(squared, range(2)))
    assert engine.spans_machines


def test_a_runner_that_breaks_is_one_message(tmp_path: Path) -> None:
    flags = ("--runner=PortableRunner", "--job_endpoint=localhost:1", "--job_server_timeout=1")
    with (
        BeamEngine(flags, exchange=tmp_path) as engine,
        pytest.raises(
            StageError, match=r"the pipeline on PortableRunner ended without the results of 2 items"
        ) as raised,
    ):
        list(engine.map(squared, range(2)))
    logs = Path(str(raised.value).rpartition("Beam's logs are in ")[2])
    assert (logs / "pipeline.log").exists()
    shutil.rmtree(logs)


def test_beam_options_need_the_beam_engine(tmp_path: Path) -> None:
    done = command_line.call("index", "build", tmp_path, "--beam-option=--runner=DirectRunner")
    assert done.code == 2
    assert "--beam-option was given with --engine local; expected --engine beam" in done.err


@pytest.mark.parametrize("command", ["compact", "repair"])
def test_every_command_with_the_engine_takes_its_options(command: str, tmp_path: Path) -> None:
    done = command_line.call("index", command, tmp_path, "--engine", "beam", "--beam-option=--direct_num_wrkers=2")
    assert done.code == 2
    assert "Beam's direct runner has no option --direct_num_wrkers" in done.err


def test_a_device_that_is_not_there_is_refused(local: SmallIndex, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, which nothing could refuse")
    checkpoint, retriever = str(local.models / "checkpoint"), str(local.models / "encoder")
    models = ("--checkpoint", checkpoint, "--retriever", retriever)
    place = (local.corpus, "-o", tmp_path / "index", "--engine", "beam", "--device", "cuda")
    done = command_line.call("index", "build", *place, *models)
    assert (done.code, done.out) == (2, "")
    assert "device is 'cuda', and PyTorch finds no CUDA device; expected cpu or auto on this machine" in done.err
    assert not (tmp_path / "index").exists()


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "refrag.pipelines.engines.beam")
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    done = command_line.call("index", "build", tmp_path, "-o", tmp_path / "index", "--engine", "beam")
    assert done.code == 2
    error = command_line.without_traceback(done)
    assert error == "error: the Beam engine needs the packages of an extra: pip install 'refrag[beam]'"
