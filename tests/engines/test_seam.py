"""What engines carry, whatever the engine: everything pickles, results come back through messages, and all of it is
small and free of documents' text and of what the driver has open or in its caches.
"""

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from refrag.pipelines import build, indexing, scan
from refrag.pipelines.build import BuildReport, build_index
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.engines.messages import decode, encode
from refrag.pipelines.id_ranges import make_plan
from refrag.pipelines.plan import ShardSpec
from refrag.pipelines.stages import ShardResult, Stages
from refrag_core.errors import RefragError
from refrag_core.storage import Store, open_store
from tests.small_index import SmallIndex, documents

MARK = "Quetzalcoatlus"
"""A word of every document."""


class Carried(LocalEngine):
    """Carries work as Ray and Beam do, by pickle, and results as Beam does, by messages."""

    def __init__(self) -> None:
        super().__init__(0)
        self.sent: list[bytes] = []
        self.messages: list[bytes] = []
        self.mapped: dict[str, int] = {}

    def _carried(self, work: Any) -> Any:
        self.sent.append(pickle.dumps(work))
        return pickle.loads(self.sent[-1])  # noqa: S301

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        name = getattr(function, "func", function).__name__
        self.mapped.setdefault(name, 0)
        for item in items:
            self.mapped[name] += 1
            there, work = self._carried((function, item))
            yield decode(encode(there(work)))

    def run(self, store: Store, stages: Stages, specs: Iterable[ShardSpec]) -> Iterator[ShardResult]:
        for spec in specs:
            there = self._carried((store, stages, spec))
            (result,) = LocalEngine(0).run(there[0], there[1], [there[2]])
            self.messages.append(encode(result))
            yield decode(self.messages[-1])


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ranges, runs and segments of few documents."""
    monkeypatch.setattr(scan, "MARK_ROWS", 4)
    monkeypatch.setattr(scan, "RUN_ROWS", 16)
    monkeypatch.setattr(build, "make_plan", partial(make_plan, range_rows=16))
    monkeypatch.setattr(indexing, "SEGMENT_ROWS", 60)


def records(count: int) -> list[dict[str, Any]]:
    return [record | {"text": f"{MARK} {record['text']}"} for record in documents(count)]


def built(small: SmallIndex, engine: LocalEngine) -> BuildReport:
    return build_index(replace(small.options, delete_missing=True, dedup_passages=True), engine)


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_all_that_a_build_sends_and_gets(
    tmp_path: Path, small_parts: None, where: str, request: pytest.FixtureRequest
) -> None:
    output = tmp_path / "index" if where == "folder" else f"{request.getfixturevalue('bucket')}/index"
    small, calm, engine = SmallIndex(tmp_path, records(60)), SmallIndex(tmp_path / "calm", records(60)), Carried()
    small.options = replace(small.options, output=output)
    assert built(small, engine).content_id == built(calm, LocalEngine(0)).content_id
    for index in (small, calm):  # an update: tombstones, hidden duplicates and a parent travel, too
        index.write([*records(60)[4:], {"id": "twin", "text": records(60)[9]["text"]}])
    assert built(small, engine).content_id == built(calm, LocalEngine(0)).content_id
    several = ("scan_unit", "plan_range", "cut_stretch", "_sample_part", "_segment", "_exact_hits", "_hits")
    assert [name for name in several if engine.mapped[name] == 0] == []
    assert min(engine.mapped[name] for name in ("plan_range", "_segment", "_exact_hits")) > 2
    assert [message for message in (*engine.sent, *engine.messages) if MARK.encode() in message] == []
    # The gate's 200 queries, float32, are the largest thing that travels.
    assert max(map(len, engine.sent)) < 200 * 4 * 32 + 20_000
    assert max(map(len, engine.messages)) < 10_000


def test_a_store_travels_without_what_the_driver_knows_of_its_files(bucket: str, tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(20), output=f"{bucket}/index")
    store = open_store(f"{bucket}/index")
    before = len(pickle.dumps(store))
    small.build()
    store.fetch(store.files())
    store.expect([store.record(name) for name in store.files()])
    assert len(pickle.dumps(store)) == before


@pytest.mark.parametrize("kind", RefragError.__subclasses__())
def test_errors_arrive_as_themselves(kind: type[RefragError]) -> None:
    there = pickle.loads(pickle.dumps(kind("found, expected, do")))  # noqa: S301
    assert (type(there), str(there)) == (kind, "found, expected, do")
