"""What `refrag index plan` promises against what the build then does."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from refrag.pipelines import estimate
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.estimate import PlanReport, estimate_build
from refrag_core.manifest import read_manifest
from refrag_core.storage import FolderStore
from tests.small_index import SmallIndex, documents

BAD: list[Any] = ["{broken", {"id": "no-text"}, {"id": "empty", "text": " "}, documents(1)[0]]


def plan(small: SmallIndex, **changes: Any) -> PlanReport:
    with LocalEngine(0) as engine:
        return estimate_build(replace(small.options, **changes), engine)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallIndex]:
    """A homogeneous corpus with a sample of about a quarter of it: counts have to be scaled up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(estimate, "SAMPLE_BYTES", 16 << 10)
        yield SmallIndex(tmp_path_factory.mktemp("plan"), [*documents(150), *BAD], score=True)


@pytest.fixture(scope="module")
def first(small: SmallIndex) -> tuple[PlanReport, Any]:
    """Plan and build of the empty index."""
    planned = plan(small)
    assert not small.path.exists()
    return planned, small.build()


def test_counts_of_documents_are_exact(first: tuple[PlanReport, Any]) -> None:
    planned, built = first
    assert planned.documents_in == built.documents_in == 154
    assert (planned.new, planned.changed, planned.unchanged) == (150, 0, 0)
    assert (built.new, built.changed, built.unchanged) == (150, 0, 0)
    assert (planned.deleted, planned.missing) == (built.deleted, built.missing) == (0, 0)
    assert asdict(planned)["rejected"] == built.reasons  # as `--json` prints it
    assert sum(planned.rejected.values()) == 4
    assert planned.differences == ()


def test_shards_and_text_are_exact(small: SmallIndex, first: tuple[PlanReport, Any]) -> None:
    assert first[0].shards == len(read_manifest(FolderStore(small.path), 1).shards) > 10
    assert first[0].text_bytes == sum(len(record["text"].encode()) for record in documents(150))


def test_what_is_scaled_up_is_within_a_fifth(small: SmallIndex, first: tuple[PlanReport, Any]) -> None:
    planned, built = first
    assert 10 < planned.sample_documents < 75
    assert planned.tokens == pytest.approx(built.tokens, rel=0.2)
    assert planned.passages == pytest.approx(built.passages, rel=0.2)
    assert planned.chunks == pytest.approx(built.chunks, rel=0.2)


def test_every_stage_of_the_build_has_an_estimate(first: tuple[PlanReport, Any]) -> None:
    planned = first[0]
    stages = {"tokenize", "embeddings", "vectors", "scores"}
    assert set(planned.seconds) == stages | {"scan", "plan", "load", "index"}
    assert all(planned.seconds[stage] > 0 for stage in stages)
    alone = sum(seconds for step, seconds in planned.seconds.items() if step != "tokenize")
    assert alone - 0.05 < planned.total_seconds <= alone + planned.seconds["tokenize"] + 0.05
    assert planned.device == "cpu"


def test_an_update_is_planned_and_written_nowhere(small: SmallIndex, first: tuple[PlanReport, Any]) -> None:
    edited = documents(150)[10:]
    edited[0] = edited[0] | {"text": "An edited text."}
    small.write([*edited, {"id": "new-1", "text": "A new text."}, {"id": "new-2", "text": "Another new text."}])
    before = {path: path.stat().st_mtime_ns for path in small.path.rglob("*")}
    kept, gone = plan(small), plan(small, delete_missing=True)
    assert {path: path.stat().st_mtime_ns for path in small.path.rglob("*")} == before
    assert (kept.new, kept.changed, kept.unchanged, kept.missing, kept.deleted) == (2, 1, 139, 10, 0)
    assert (gone.missing, gone.deleted) == (0, 10)
    assert kept.rejected == {}
    built = small.build(delete_missing=True)
    assert (built.new, built.changed, built.unchanged, built.deleted) == (2, 1, 139, 10)
    # All of so little is in the sample: nothing is left to scale.
    assert gone.sample_documents == 3
    assert gone.chunks == built.encoded_chunks
    nothing = plan(small)
    assert (nothing.new, nothing.shards, nothing.tokens) == (0, 0, 0)
    assert set(nothing.seconds) == {"scan", "plan"}


def sample_of(seconds: float, text_bytes: int) -> estimate._Sample:
    return estimate._Sample(1, 1, text_bytes, 1, 1, 1, 1, {"tokenize": seconds})


def test_a_shard_costs_something_by_itself() -> None:
    """Half a second a shard and a second for 100 bytes: short corpora are not overestimated by the fixed part."""
    small, large = sample_of(0.75, 25), sample_of(1.5, 100)
    assert estimate._extrapolated("tokenize", small, large, 10, 10_000) == pytest.approx(10 * 0.5 + 100)
    assert estimate._extrapolated("tokenize", small, large, 1, 100) == 1.5
    assert estimate._extrapolated("tokenize", sample_of(2.0, 25), large, 3, 10_000) == pytest.approx(77.25)  # noise


def test_a_plan_says_what_would_need_a_rebuild(small: SmallIndex, first: tuple[PlanReport, Any]) -> None:
    planned = plan(small, models=small.with_models(max_passage_tokens=32).models)
    assert planned.differences == ("max_passage_tokens 64, now 32",)
    assert planned.unchanged == 0
    assert planned.new == planned.documents_in - sum(planned.rejected.values())


def test_nothing_is_left_in_the_temporary_folder(
    small: SmallIndex, first: tuple[PlanReport, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plan(small)
    assert list(tmp_path.iterdir()) == []
