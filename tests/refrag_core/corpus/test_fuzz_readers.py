"""No bytes make a reader fail, and no bad record costs a good one."""

import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from refrag_core.corpus.document import Reject, ScannedDocument, reject_row
from refrag_core.corpus.readers import read_documents, read_unit
from refrag_core.corpus.sources import CorpusOptions, scan_units

SUFFIXES = ["txt", "md", "html", "jsonl", "parquet", "txt.gz", "txt.zst", "html.gz", "jsonl.gz", "jsonl.zst"]

# Nearly valid input reaches further than random bytes.
FRAGMENTS = st.sampled_from(
    [
        b'{"id":',
        b'"text":',
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b"\\ud800",
        b"\n",
        b"\r",
        b"\xef\xbb\xbf",
        b"\xff",
        b"NaN",
        b"1e999",
        b"null",
        b"<p>",
        b"</p>",
        b"<pre>",
        b"<script>",
        b"<!--",
        b"&#",
        b"<![CDATA[",
        b"\0",
        b"a ",
        b"\x1f\x8b\x08",
        b"\x28\xb5\x2f\xfd",
        b"PAR1",
        b"<meta charset=utf-7>",
        b"+AAA-",
    ]
)
BYTES = st.one_of(st.binary(max_size=300), st.lists(FRAGMENTS, max_size=40).map(b"".join))


def scan(name: str, data: bytes, **options: object) -> list[ScannedDocument | Reject]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(data)
        corpus = CorpusOptions((folder,), **options)  # type: ignore[arg-type]
        records = [record for unit in scan_units(corpus) for record in read_unit(unit, corpus)]
        check(records)
        return records


def check(records: list[ScannedDocument | Reject]) -> None:
    """Rejects can be written down, documents read again, and orders are unique."""
    rejects = [reject_row(r) for r in records if isinstance(r, Reject)]
    found = [r for r in records if isinstance(r, ScannedDocument)]
    json.dumps([{k: v for k, v in row.items() if not isinstance(v, bytes)} for row in rejects]).encode()
    for row in rejects:
        for value in row.values():
            if isinstance(value, str):
                value.encode("utf-8")
    assert len({r.order for r in found}) == len(found)
    rows = [row for record in found if (row := located(record))]
    assert list(read_documents(rows)) == [r.document for r in found if r.location]


def located(record: ScannedDocument) -> dict[str, object]:
    if record.location is None:
        return {}
    return {
        "document_id": record.document.document_id,
        "source_digest": record.source_digest,
        "source": record.document.source,
        "num_bytes": len(record.document.text),
        "path": record.location.path,
        "format": record.location.format,
        "offset": record.location.offset,
        "length": record.location.length,
    }


def packed(name: str, data: bytes) -> bytes:
    if name.endswith(".gz"):
        return gzip.compress(data)
    return zstandard.compress(data) if name.endswith(".zst") else data


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(data=BYTES)
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_read_or_rejected(suffix: str, data: bytes) -> None:
    scan(f"a.{suffix}", data)


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix.endswith(("gz", "zst"))])
@given(data=BYTES)
@settings(max_examples=40, deadline=None)
def test_any_compressed_bytes_are_read_or_rejected(suffix: str, data: bytes) -> None:
    scan(f"a.{suffix}", packed(suffix, data))


GARBAGE = BYTES.map(lambda data: data.replace(b"\n", b""))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
@given(garbage=st.lists(GARBAGE, min_size=1, max_size=12), limit=st.integers(min_value=60, max_value=400))
@settings(max_examples=60, deadline=None)
def test_every_good_record_comes_out_between_garbage(suffix: str, garbage: list[bytes], limit: int) -> None:
    good = [{"id": f"good-{n}", "text": f"text é {n}"} for n in range(len(garbage) + 1)]
    lines = [json.dumps(good[0]).encode()]
    for bad, record in zip(garbage, good[1:], strict=True):
        lines += [bad, json.dumps(record).encode()]
    records = scan(f"a.{suffix}", packed(suffix, b"\n".join(lines)), max_line_bytes=limit)
    texts = {r.document.document_id: r.document.text for r in records if isinstance(r, ScannedDocument)}
    assert {record["id"]: record["text"] for record in good}.items() <= texts.items()
    lines_in = sum(bool(line.removeprefix(b"\xef\xbb\xbf").strip()) for line in lines)
    assert len(records) == lines_in


@given(where=st.integers(min_value=0), value=st.integers(min_value=0, max_value=255), cut=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_damaged_gzip_file_gives_what_precedes_the_damage(where: int, value: int, cut: bool) -> None:
    lines = [json.dumps({"id": str(n), "text": f"text {n * 7919}"}).encode() for n in range(60)]
    members = [gzip.compress(line + b"\n") for line in lines]
    starts = [sum(map(len, members[:n])) for n in range(len(members) + 1)]
    data = bytearray(b"".join(members))
    where %= len(data)
    data = data[:where] if cut else data
    if not cut:
        data[where] = value
    whole = sum(start <= where for start in starts[1:])
    found = [r.document.document_id for r in scan("a.jsonl.gz", bytes(data)) if isinstance(r, ScannedDocument)]
    assert found[:whole] == [str(n) for n in range(whole)]


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    columns = {"id": [str(n) for n in range(40)], "text": [f"text {n}" for n in range(40)], "x": [0.5] * 40}
    pq.write_table(pa.table(columns), sink, row_group_size=10)
    return sink.getvalue()


PARQUET = parquet_bytes()


@given(
    changes=st.lists(
        st.tuples(st.integers(min_value=0, max_value=len(PARQUET) - 1), st.integers(min_value=0, max_value=255)),
        max_size=6,
    ),
    length=st.one_of(st.just(len(PARQUET)), st.integers(min_value=0, max_value=len(PARQUET))),
)
@settings(max_examples=150, deadline=None)
def test_damaged_parquet_is_read_or_rejected(changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(PARQUET)
    for where, value in changes:
        data[where] = value
    records = scan("a.parquet", bytes(data[:length]))
    if bytes(data[:length]) == PARQUET:
        assert len(records) == 40
        assert not [r for r in records if isinstance(r, Reject)]
    else:
        assert records
