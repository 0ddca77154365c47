import gzip
import json
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refrag.pipelines import scan as scan_module
from refrag.pipelines.scan import (
    ScanReceipt,
    ScanResult,
    merge_runs,
    resolve_duplicates,
    scan_corpus,
    scan_unit,
)
from refrag.schemas import arrow
from refrag_core import work_folder
from refrag_core.corpus import sources
from refrag_core.corpus.document import Reject
from refrag_core.corpus.readers import read_documents, read_raw
from refrag_core.corpus.sources import CorpusOptions, ScanUnit, scan_units
from refrag_core.errors import CorpusChangedError, CorpusError
from refrag_core.work_folder import WorkFolder

SIZES = (8, 16, 32)


def write_lines(path: Path, *records: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusOptions:
    """Eleven records: 7 to index, an empty and a malformed one, a duplicate and a duplicate id."""
    root = tmp_path / "corpus"
    write_lines(root / "a.jsonl", {"id": "é", "text": "one"}, b"bad", {"id": "b", "text": "two", "weight": 0.9})
    write_lines(root / "b.jsonl.gz", {"id": "z", "text": "three"}, {"id": "b", "text": "other two"})
    pq.write_table(pa.table({"id": [10, 9], "text": ["ten", "nine"]}), root / "c.parquet")
    (root / "d").mkdir()
    (root / "d/e.txt").write_text("five")
    (root / "d/empty.md").write_text("\n")
    (root / "d/f.txt").write_text("six")
    (root / "d/g.png").touch()
    write_lines(root / "e.ndjson", {"id": "z", "text": "three"})
    return CorpusOptions((str(root),), chunk_size_field="weight")


def run(options: CorpusOptions, work: Path, **more: Any) -> ScanResult:
    return scan_corpus(options, WorkFolder(str(work)), chunk_sizes=SIZES, default_chunk_size=16, **more)


def rows_of(result: ScanResult, work: Path, **more: Any) -> list[dict[str, Any]]:
    return [dict(row) for row in merge_runs(result.runs, work=WorkFolder(str(work)), **more)]


def unique(result: ScanResult, work: Path) -> tuple[list[dict[str, Any]], list[Reject]]:
    rejects: list[Reject] = []
    rows = [
        dict(row) for row in resolve_duplicates(merge_runs(result.runs, work=WorkFolder(str(work))), rejects.append)
    ]
    return rows, rejects


def test_every_record_is_a_row_or_a_reject(corpus: CorpusOptions, tmp_path: Path) -> None:
    result = run(corpus, tmp_path / "work")
    rows, duplicates = unique(result, tmp_path / "work")
    assert [row["document_id"] for row in rows] == ["10", "9", "b", "d/e.txt", "d/f.txt", "z", "é"]
    assert result.reasons == {"empty": 1, "malformed_json": 1}
    assert [(r.reason, r.document_id, Path(r.source).name, r.position) for r in duplicates] == [
        ("duplicate_id", "b", "b.jsonl.gz", 1),
        ("duplicate", "z", "e.ndjson", 0),
    ]
    assert result.documents_in == len(rows) + len(duplicates) + 2 == 11
    assert result.ignored == {".png": 1}
    assert result.text_bytes == sum(
        len(t) for t in ("one", "two", "three", "other two", "ten", "nine", "five", "six", "three")
    )


def test_documents_are_read_again_from_their_rows(corpus: CorpusOptions, tmp_path: Path) -> None:
    rows, _ = unique(run(corpus, tmp_path / "work"), tmp_path / "work")
    documents = list(read_documents(rows))
    assert [d.text for d in documents] == ["ten", "nine", "two", "five", "six", "three", "one"]
    assert [d.document_id for d in documents] == [row["document_id"] for row in rows]
    assert documents[2].metadata == {"weight": 0.9}


def test_the_chunk_size_follows_the_field(corpus: CorpusOptions, tmp_path: Path) -> None:
    rows, _ = unique(run(corpus, tmp_path / "work"), tmp_path / "work")
    assert {row["document_id"]: row["chunk_size"] for row in rows if row["chunk_size"] != 16} == {"b": 8}


def test_what_cannot_be_sought_is_spooled(corpus: CorpusOptions, tmp_path: Path) -> None:
    rows, _ = unique(run(corpus, tmp_path / "work"), tmp_path / "work")
    formats = {row["document_id"]: row["format"].split()[0] for row in rows}
    assert formats == {
        "10": "spool",
        "9": "spool",
        "b": "jsonl",
        "d/e.txt": "txt",
        "d/f.txt": "txt",
        "z": "spool",
        "é": "jsonl",
    }
    spooled = next(row for row in rows if row["document_id"] == "z")
    assert os.path.isabs(spooled["path"])
    assert json.loads(read_raw(spooled)) == {
        "document_id": "z",
        "text": "three",
        "metadata": {},
        "source": spooled["source"],
    }


def test_rejects_are_kept_with_their_bytes(corpus: CorpusOptions, tmp_path: Path) -> None:
    result = run(corpus, tmp_path / "work")
    kept = pa.concat_tables([pq.read_table(path) for path in result.rejects])
    assert kept.schema.equals(arrow.QUARANTINE)
    assert {(row["reason"], row["raw"], row["disposition"]) for row in kept.to_pylist()} == {
        ("malformed_json", b"bad", "quarantined"),
        ("empty", b"\n", "filtered"),
    }
    _, duplicates = unique(result, tmp_path / "work")
    assert json.loads(duplicates[0].raw)["text"] == "other two"
    assert duplicates[0].detail.startswith("another document of this id is in ")
    assert duplicates[1].raw == b""


def test_how_units_are_cut_changes_nothing(
    corpus: CorpusOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(corpus, tmp_path / "one")
    expected = [{k: v for k, v in row.items() if k != "path"} for row in rows_of(one, tmp_path)]
    monkeypatch.setattr(sources, "UNIT_BYTES", 1)
    monkeypatch.setattr(sources, "RANGE_BYTES", 20)
    many = run(corpus, tmp_path / "many")
    got = [{k: v for k, v in row.items() if k != "path"} for row in rows_of(many, tmp_path)]
    assert len(many.runs) > len(one.runs) == 1
    for row in (*expected, *got):
        if row["format"] == "spool":  # places in a spool are the unit's own
            row["offset"] = row["length"] = 0
    assert got == expected
    assert (many.documents_in, many.reasons) == (one.documents_in, one.reasons)


def test_units_run_in_any_order_on_any_engine(
    corpus: CorpusOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 1)

    def backwards(function: Callable[[ScanUnit], ScanReceipt], units: Iterable[ScanUnit]) -> Iterator[ScanReceipt]:
        packed = [pickle.dumps((function, unit)) for unit in units]
        for call, unit in map(pickle.loads, reversed(packed)):
            yield call(unit)

    seen: list[ScanReceipt] = []
    forwards = run(corpus, tmp_path / "work", on_unit=seen.append)
    reversed_ = run(corpus, tmp_path / "work", map_units=backwards)
    assert rows_of(forwards, tmp_path) == rows_of(reversed_, tmp_path)
    assert sum(receipt.documents_in for receipt in seen) == 11


def test_scanning_again_gives_the_same_files_and_nothing_else(corpus: CorpusOptions, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = run(corpus, work)
    files = {path.name: path.read_bytes() for path in work.iterdir()}
    assert run(corpus, work) == first
    assert {path.name: path.read_bytes() for path in work.iterdir()} == files
    assert sorted(Path(name).suffix for name in files if name != ".reachable") == [".parquet", ".parquet", ".spool"]


def test_a_unit_with_many_rows_gets_several_sorted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "RUN_ROWS", 7)
    write_lines(tmp_path / "c/a.jsonl.gz", *({"id": n * 37 % 100, "text": f"text {n}"} for n in range(100)))
    options = CorpusOptions((str(tmp_path / "c"),))
    result = run(options, tmp_path / "work")
    assert len(result.runs) == 15
    for written in result.runs:
        ids = pq.read_table(written.location).column("document_id").to_pylist()
        assert ids == sorted(ids)
    rows = rows_of(result, tmp_path / "work")
    assert [row["document_id"] for row in rows] == sorted(str(n) for n in range(100))
    assert [d.document_id for d in read_documents(rows)] == [row["document_id"] for row in rows]


@pytest.mark.parametrize("fan_in", [2, 3, 64])
def test_more_runs_than_fan_in_are_merged_in_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fan_in: int
) -> None:
    monkeypatch.setattr(scan_module, "RUN_ROWS", 3)
    monkeypatch.setattr(scan_module, "_MERGED_ROWS", 2)
    write_lines(tmp_path / "c/a.jsonl", *({"id": f"é{n % 20}", "text": f"text {n}"} for n in range(60)))
    result = run(CorpusOptions((str(tmp_path / "c"),)), tmp_path / "work")
    assert len(result.runs) == 20
    before = sorted((tmp_path / "work").iterdir())
    rows = rows_of(result, tmp_path / "work", fan_in=fan_in)
    keys = [(row["document_id"].encode(), row["order"]) for row in rows]
    assert keys == sorted(keys)
    assert len(set(keys)) == 60
    assert sorted((tmp_path / "work").iterdir()) == before


def test_the_first_in_scan_order_wins_whatever_its_bytes() -> None:
    def row(order: int, digest: bytes) -> dict[str, Any]:
        return {"document_id": "a", "source_digest": digest * 32, "order": order, "source": "s"}

    rejects: list[Reject] = []
    rows = [row(3, b"x"), row(5, b"y"), row(9, b"x")]
    (first,) = resolve_duplicates(rows, rejects.append, read=lambda _: b"raw")
    assert first["order"] == 3
    assert [(r.reason, r.position, r.raw) for r in rejects] == [("duplicate_id", 5, b"raw"), ("duplicate", 9, b"")]
    assert list(resolve_duplicates([], rejects.append)) == []


def test_the_bytes_kept_of_duplicates_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "DUPLICATE_RAW_BYTES", 5)
    rows = [{"document_id": "a", "source_digest": bytes([n]), "order": n, "source": "s"} for n in range(5)]
    rejects: list[Reject] = []
    assert len(list(resolve_duplicates(rows, rejects.append, read=lambda _: b"raw"))) == 1
    assert [r.raw for r in rejects] == [b"raw", b"raw", b"", b""]


def test_a_kill_leaves_only_temporary_files(
    corpus: CorpusOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unit,) = scan_units(corpus)

    def fail(_: Path) -> str:
        raise KeyboardInterrupt

    work = WorkFolder(str(tmp_path / "work"))
    work.make()
    monkeypatch.setattr(work_folder, "digest_file", fail)
    with pytest.raises(KeyboardInterrupt):
        scan_unit(unit, corpus, work=work, chunk_sizes=SIZES, default_chunk_size=16)
    assert [path for path in (tmp_path / "work").iterdir() if not path.name.startswith(".")] == []


def test_a_damaged_spool_is_noticed(corpus: CorpusOptions, tmp_path: Path) -> None:
    rows, _ = unique(run(corpus, tmp_path / "work"), tmp_path / "work")
    row = next(row for row in rows if row["format"] == "spool")
    data = bytearray(Path(row["path"]).read_bytes())
    data[row["offset"] : row["offset"] + 4] = b"\0\0\0\0"
    Path(row["path"]).write_bytes(data)
    with pytest.raises(CorpusChangedError):
        list(read_documents([row]))


def test_a_corpus_of_rejects_alone_has_no_rows(tmp_path: Path) -> None:
    write_lines(tmp_path / "c/a.jsonl", b"bad", b"worse")
    result = run(CorpusOptions((str(tmp_path / "c"),)), tmp_path / "work")
    assert (result.runs, result.documents_in, result.reasons) == ((), 2, {"malformed_json": 2})
    assert list(merge_runs(result.runs, work=WorkFolder(str(tmp_path / "work")))) == []


def test_a_missing_corpus_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="is not there"):
        run(CorpusOptions((str(tmp_path / "gone"),)), tmp_path / "work")
