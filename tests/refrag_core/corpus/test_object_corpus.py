"""Corpora on a real S3 server: listed, cut and read as folders are."""

import gzip
import io
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from refrag_core.corpus import filesystem, sources
from refrag_core.corpus.document import Reject, ScannedDocument
from refrag_core.corpus.filesystem import open_binary
from refrag_core.corpus.readers import read_unit
from refrag_core.corpus.sources import CorpusOptions, list_files, scan_units
from refrag_core.errors import CorpusError, ObjectStoreError
from refrag_core.object_store import RemoteObjects
from tests.object_server import Fault, FaultyServer
from tests.small_index import SmallIndex, documents

RECORDS = [{"id": f"r{n:03}", "text": f"Record number {n} of the harbour."} for n in range(300)]


def _parquet() -> bytes:
    stream = io.BytesIO()
    rows = [{"id": f"p{n}", "text": f"Row {n} of the table."} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), stream, row_group_size=10)
    return stream.getvalue()


FILES = {
    "corpus/a.txt": b"A plain text.",
    "corpus/deep/er/b.md": b"# A heading\n\nA paragraph.",
    "corpus/deep/c #1 50%.txt": b"A name with marks.",
    "corpus/deep/d.txt.gz": gzip.compress(b"A compressed text.", mtime=0),
    "corpus/e.jsonl": b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS),
    "corpus/f.jsonl.zst": zstandard.compress(b'{"id": "z1", "text": "Zstandard holds this."}\n'),
    "corpus/g.parquet": _parquet(),
    "corpus/h.bin": b"unknown",
    "corpus/.hidden/i.txt": b"not to be read",
    "other/j.txt": b"elsewhere",
}


@pytest.fixture
def corpus(bucket: str) -> str:
    """URI of a bucket with FILES."""
    objects = RemoteObjects(bucket)
    for name, data in FILES.items():
        objects.put(name, data)
    return bucket


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The same files on the disk."""
    for name, data in FILES.items():
        (tmp_path / "local" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / name).write_bytes(data)
    return tmp_path / "local"


def read(root: str) -> tuple[list[tuple[str, str, bytes]], Counter[str]]:
    """Id, text and digest of every document, and the suffixes that were left out."""
    options, ignored = CorpusOptions((root,)), Counter[str]()
    found = []
    for unit in scan_units(options, ignored=ignored):
        for record in read_unit(unit, options):
            assert isinstance(record, ScannedDocument), record
            found.append((record.document.document_id, record.document.text, record.source_digest))
    return found, ignored


@pytest.mark.parametrize(
    "root", ["corpus", "corpus/", "corpus/**", "corpus/*/*.txt*", "corpus/g.parquet", "", "*/j.txt"]
)
def test_it_reads_as_a_folder_does(corpus: str, folder: Path, root: str) -> None:
    there, here = read(f"{corpus}/{root}".rstrip("/") if not root else f"{corpus}/{root}"), read(f"{folder}/{root}")
    assert there == here
    assert len(there[0]) > 0


def test_byte_ranges_and_row_groups(corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(f"{corpus}/corpus")
    monkeypatch.setattr(sources, "RANGE_BYTES", 700)
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    monkeypatch.setattr(filesystem, "BUFFER_BYTES", 512)
    assert len(list(scan_units(CorpusOptions((f"{corpus}/corpus",))))) > 20
    assert read(f"{corpus}/corpus") == whole


def test_a_large_file_is_not_held_in_memory(corpus: str, faulty: FaultyServer) -> None:
    with open_binary(f"{corpus}/corpus/e.jsonl") as stream:
        stream.seek(-20, io.SEEK_END)
        assert stream.read() == FILES["corpus/e.jsonl"][-20:]
        assert stream.seek(3) == stream.tell() == 3
        assert stream.read(5) == FILES["corpus/e.jsonl"][3:8]


def test_what_is_not_there(corpus: str) -> None:
    with pytest.raises(CorpusError, match=r"s3://.*/nothing is not there"):
        list(list_files(CorpusOptions((f"{corpus}/nothing",))))
    with pytest.raises(FileNotFoundError):
        open_binary(f"{corpus}/nothing.txt")
    with pytest.raises(ObjectStoreError, match="its bucket does not exist"):
        list(list_files(CorpusOptions(("s3://no-such-bucket/corpus",))))


def test_a_file_that_goes_while_it_is_scanned_is_quarantined(corpus: str) -> None:
    options = CorpusOptions((f"{corpus}/other",))
    units = list(scan_units(options))
    RemoteObjects(corpus).delete("other/j.txt")
    (record,) = [record for unit in units for record in read_unit(unit, options)]
    assert isinstance(record, Reject)
    assert record.source == "j.txt"


def test_errors_and_cut_answers_change_nothing(corpus: str, faulty: FaultyServer) -> None:
    faulty.faults = [
        Fault("error", "GET", "list-type", times=2),
        Fault("cut", "GET", "corpus/e.jsonl"),
        Fault("error", "HEAD", "a.txt"),
        Fault("error", "GET", "g.parquet", times=2),
        Fault("slow", "GET", "corpus/a.txt", seconds=0.2),
    ]
    found, _ = read(f"{corpus}/corpus")
    assert [fault.times for fault in faulty.faults] == [0] * len(faulty.faults)
    assert len(found) == 300 + 40 + 1 + 4


def test_from_bucket_to_bucket(corpus: str, tmp_path: Path) -> None:
    """The index may lie below its corpus, and is never part of it."""
    lines = [json.dumps(record) for record in documents(8)]
    RemoteObjects(corpus).put("docs/records.jsonl", "\n".join(lines).encode())
    small = SmallIndex(tmp_path, documents(8), output=f"{corpus}/docs/index")
    local = small.build(output=tmp_path / "index")
    options = CorpusOptions((f"{corpus}/docs",), excluded_folder=f"{corpus}/docs/index")
    first, second = small.build(corpus=options), small.build(corpus=options)
    assert first.content_id == local.content_id
    assert (second.documents_in, second.committed, second.ignored) == (8, False, {})
