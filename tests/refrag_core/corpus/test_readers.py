import errno
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from refrag_core.corpus import lines, parquet_rows, readers, sources
from refrag_core.corpus.compression import DamagedFileError, decompress
from refrag_core.corpus.document import Document, Reject, RejectReason, ScannedDocument, source_digest
from refrag_core.corpus.lines import split_lines
from refrag_core.corpus.readers import read_document, read_documents, read_raw, read_unit
from refrag_core.corpus.sources import CorpusOptions, scan_units
from refrag_core.errors import CorpusChangedError


def scan(path: Path, **options: Any) -> list[ScannedDocument | Reject]:
    corpus = CorpusOptions((str(path),), **options)
    return [record for unit in scan_units(corpus) for record in read_unit(unit, corpus)]


def documents(path: Path, **options: Any) -> list[Document]:
    records = scan(path, **options)
    assert not [record for record in records if isinstance(record, Reject)]
    return [record.document for record in records if isinstance(record, ScannedDocument)]


def reasons(path: Path, **options: Any) -> list[str]:
    """The reason of each reject, `ok` for each document."""
    return [r.reason.value if isinstance(r, Reject) else "ok" for r in scan(path, **options)]


def jsonl(path: Path, *records: Any) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in records))
    return path


def one_reject(path: Path, **options: Any) -> Reject:
    (record,) = scan(path, **options)
    assert isinstance(record, Reject)
    return record


def row_of(record: ScannedDocument | Reject) -> dict[str, Any]:
    assert isinstance(record, ScannedDocument)
    assert record.location is not None
    return {
        "document_id": record.document.document_id,
        "source_digest": record.source_digest,
        "source": record.document.source,
        "num_bytes": len(record.document.text.encode()),
        "path": record.location.path,
        "format": record.location.format,
        "offset": record.location.offset,
        "length": record.location.length,
    }


# --- files that are one document --------------------------------------------------------------------


def test_a_text_file_is_a_document_named_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (document,) = documents(tmp_path)
    assert document == Document("a/b.txt", "one\ntwo\nthree\n", {}, "a/b.txt")


def test_markdown_stays_as_it_is_and_html_gives_its_title(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# *Title*\n")
    (tmp_path / "b.html").write_text("<title>T</title><p>text</p>")
    markdown, page = documents(tmp_path)
    assert markdown.text == "# *Title*\n"
    assert (page.text, page.metadata) == ("text", {"title": "T"})


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_compressed_files_read_as_their_contents(tmp_path: Path, suffix: str, pack: Any) -> None:
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"text\r\n"))
    (record,) = scan(tmp_path)
    assert isinstance(record, ScannedDocument)
    assert (record.document.document_id, record.document.text) == (f"a.txt{suffix}", "text\n")
    assert read_document(row_of(record)) == record.document


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b" \n\t\xc2\xa0", "empty"),
        ("a.html", b"<script>x</script>", "empty"),
        ("a.txt", b"good \xff bad", "invalid_utf8"),
        ("a.html", b"good \xff bad", "invalid_utf8"),
        ("a.txt", b"x" * 101, "document_too_large"),
        ("a.txt.gz", gzip.compress(b"x" * 101, mtime=0), "document_too_large"),
        ("a.txt.gz", b"not gzip", "unreadable_file"),
        ("a.txt.gz", gzip.compress(b"x" * 50, mtime=0)[:-3], "unreadable_file"),
        ("a.txt.zst", zstandard.compress(b"x" * 50)[:-3], "unreadable_file"),
        ("a.html", b"<p>" * 3 + b"<div>" * 50_000, "unreadable_file"),
    ],
)
def test_a_file_that_cannot_be_a_document_is_one_reject(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    limit = 1 << 20 if name == "a.html" else 100
    reject = one_reject(tmp_path, max_document_bytes=limit)
    assert (reject.reason, reject.document_id, reject.position) == (reason, name, 0)


def test_a_file_that_is_gone_or_has_no_utf8_name_is_one_reject(tmp_path: Path) -> None:
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone")
    Path(str(tmp_path) + "/name\udcff.txt").write_text("x")
    gone, unnamed = scan(tmp_path)
    assert isinstance(gone, Reject)
    assert (gone.reason, gone.detail) == ("unreadable_file", "No such file or directory")
    assert isinstance(unnamed, Reject)
    assert (unnamed.reason, unnamed.document_id) == ("invalid_utf8", None)
    assert unnamed.source.endswith("name\\udcff.txt")


def test_an_error_that_may_pass_is_raised_for_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")

    def fail(_: str) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(readers, "open_binary", fail)
    with pytest.raises(OSError, match="Input/output error"):
        scan(tmp_path)


# --- lines ------------------------------------------------------------------------------------------


def test_records_keep_id_text_and_scalar_metadata(tmp_path: Path) -> None:
    record = {"id": 7, "text": "t", "n": 1, "f": 0.5, "s": "x", "b": True, "none": None, "list": [1], "o": {"a": 1}}
    (document,) = documents(jsonl(tmp_path / "a.jsonl", record))
    assert document == Document("7", "t", {"n": 1, "f": 0.5, "s": "x", "b": True}, "a.jsonl")


def test_fields_can_be_chosen(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"key": "k", "body": "t", "x": 1, "y": 2, "tags": ["a", {"b": 1}]})
    (document,) = documents(path, id_field="key", text_field="body", metadata_fields=("x", "tags", "missing"))
    assert document == Document("k", "t", {"x": 1, "tags": ["a", {"b": 1}]}, "a.jsonl")


def test_without_an_id_field_the_id_is_the_contents_digest(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"id": 1, "text": "t"})
    (record,) = scan(path, id_field="")
    assert isinstance(record, ScannedDocument)
    assert record.document.document_id == source_digest(Document("", "t", {"id": 1}, "")).hex()
    assert read_document(row_of(record)) == record.document


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "a", "text": "t"}', "ok"),
        (b'{"id": 12, "text": "t"}', "ok"),
        (b'{"id": 1.5, "text": "t"}', "ok"),
        (b'{"id": "a", "text": "t", "text": "u"}', "ok"),
        (b'\xef\xbb\xbf{"id": "a", "text": "t"}', "ok"),
        (b'{"id": "a", "text": "t", "x": [NaN]}', "malformed_json"),
        (b'{"id": "a", "text": "t", "x": Infinity}', "malformed_json"),
        (b'{"id": "a", "text": "t", "x": 1e999}', "ok"),
        (b'{"id": 1e999, "text": "t"}', "wrong_type"),
        (b'{"id": true, "text": "t"}', "wrong_type"),
        (b'{"id": null, "text": "t"}', "wrong_type"),
        (b'{"id": {}, "text": "t"}', "wrong_type"),
        (b'{"id": [1], "text": "t"}', "wrong_type"),
        (b'{"id": "' + b"i" * 5000 + b'", "text": "t"}', "wrong_type"),
        (b'{"id": "", "text": "t"}', "missing_field"),
        (b'{"text": "t"}', "missing_field"),
        (b'{"id": "a"}', "missing_field"),
        (b'{"id": "a", "text": 3}', "wrong_type"),
        (b'{"id": "a", "text": null}', "wrong_type"),
        (b'{"id": "a", "text": ["t"]}', "wrong_type"),
        (b'{"id": "a", "text": ""}', "empty"),
        (b'{"id": "a", "text": " \\n\\u3000"}', "empty"),
        (b'{"id": "a", "text": "\\ud800"}', "invalid_text"),
        (b'{"id": "\\udfff", "text": "t"}', "invalid_text"),
        (b'{"id": "a", "text": "t", "\\ud800": 1}', "invalid_text"),
        (b'{"id": "a", "text": "t", "x": "\\ud800"}', "invalid_text"),
        (b'{"id": "a", "text": "\xff"}', "invalid_utf8"),
        (b'{"id": "a", "text": "t"', "malformed_json"),
        (b'{"id": "a", "text": "t"} x', "malformed_json"),
        (b"garbage", "malformed_json"),
        (b"[1, 2]", "wrong_type"),
        (b'"text"', "wrong_type"),
        (b"null", "wrong_type"),
        (b'{"id": "a", "text": "t", "x": ' + b"1" * 5000 + b"}", "malformed_json"),
        (b'{"id": "a", "text": "t", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "malformed_json"),
        (b"[" * 100_000, "malformed_json"),
        (b'{"a":' * 100_000, "malformed_json"),
        (b'{"id": "a", "text": "' + b"[{" * 1000 + b'"}', "ok"),
        (b'{"id": "a", "text": "\\"' + b"[{" * 1000 + b'"}', "ok"),
        (b'{"id": "a", "text": "t", "x": ' + b"[" * 199 + b"]" * 199 + b"}", "ok"),
        (b'{"id": "a", "text": "t", "x": ' + b"[" * 200 + b"]" * 200 + b"}", "malformed_json"),
        (b'"' + b'\\"' * 100_000 + b"[" * 300, "malformed_json"),
    ],
)
def test_a_line_is_a_document_or_has_a_reason_and_its_neighbours_are_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    good = [{"id": f"good {n}", "text": "t"} for n in (1, 2)]
    assert reasons(jsonl(tmp_path / "a.jsonl", good[0], line, good[1])) == ["ok", reason, "ok"]
    assert reasons(jsonl(tmp_path / "a.jsonl", line, *good)) == [reason, "ok", "ok"]


def test_a_reject_says_where_what_and_whose(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"id": "a", "text": "t"}, {"id": "b", "text": 3})
    reject = scan(path)[1]
    assert reject == Reject(
        reason=RejectReason.WRONG_TYPE,
        detail="'text' is a int, expected a string",
        source="a.jsonl",
        position=25,
        raw=b'{"id": "b", "text": 3}',
        document_id="b",
    )


def test_blank_lines_are_no_records_and_the_last_needs_no_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n \r\n{"id": 1, "text": "a"}\r\n\n{"id": 2, "text": "b"}')
    assert [document.document_id for document in documents(path)] == ["1", "2"]


def test_an_over_long_line_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "read_blocks", lambda stream: iter(lambda: stream.read(7), b""))
    good = {"id": "a", "text": "t"}
    path = jsonl(tmp_path / "a.jsonl", good, b"x" * 101, good | {"text": "u" * 75}, b"y" * 100)
    assert reasons(path, max_line_bytes=100) == ["ok", "line_too_long", "ok", "malformed_json"]


def test_an_over_long_text_is_too_large(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"id": "a", "text": "é" * 50}, {"id": "b", "text": "é" * 51})
    assert reasons(path, max_document_bytes=100) == ["ok", "document_too_large"]


def test_lines_hold_no_more_than_the_limit() -> None:
    fed = []

    def blocks() -> Iterator[bytes]:
        for _ in range(100):
            fed.append(1)
            yield b"x" * 100_000

    (line,) = split_lines(blocks(), offset=0, max_bytes=1000)
    assert (line.length, len(line.data), len(fed)) == (10_000_000, 65_536, 100)


def test_an_over_long_lines_held_bytes_stay_bounded() -> None:
    held = lines._Held(1000)
    for _ in range(50):
        held.add(b"x" * 100_000)
        assert sum(map(len, held._parts)) <= 65_536


@pytest.mark.parametrize("cut", range(1, 40))
def test_byte_ranges_give_each_record_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    records = [{"id": n, "text": "é" * n} for n in range(1, 6)]
    path = jsonl(tmp_path / "a.jsonl", *records)
    whole = scan(path)
    monkeypatch.setattr(sources, "RANGE_BYTES", cut)
    assert scan(path) == whole
    assert len(whole) == 5


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compressed_records_are_numbered_by_line_and_have_no_location(tmp_path: Path, compression: str) -> None:
    data = b'{"id": "a", "text": "t"}\n\nbad\n{"id": "b", "text": "t"}\n'
    suffix, pack = (".gz", gzip.compress) if compression == "gzip" else (".zst", zstandard.compress)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(data))
    first, bad, second = scan(tmp_path)
    assert isinstance(first, ScannedDocument)
    assert isinstance(second, ScannedDocument)
    assert isinstance(bad, Reject)
    assert (first.order, bad.position, second.order) == (0, 2, 3)
    assert first.location is None


# --- importance -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [("0", 0.0), ("0.4", 0.4), ("1", 1.0), ("null", None), ("1.1", "x"), ("-0.1", "x"), ('"0.5"', "x"), ("true", "x")],
)
def test_importance_is_a_number_in_0_to_1(tmp_path: Path, value: str, expected: float | str | None) -> None:
    line = f'{{"id": "a", "text": "t", "weight": {value}}}'.encode()
    (record,) = scan(jsonl(tmp_path / "a.jsonl", line), chunk_size_field="weight")
    if expected == "x":
        assert isinstance(record, Reject)
        assert (record.reason, record.document_id) == ("wrong_type", "a")
    else:
        assert isinstance(record, ScannedDocument)
        assert record.importance == expected


def test_a_missing_importance_in_a_table_may_be_nan(tmp_path: Path) -> None:
    columns = {"id": ["a", "b"], "text": ["t", "u"], "weight": [0.25, float("nan")]}
    records = scan(parquet(tmp_path / "a.parquet", columns), chunk_size_field="weight")
    assert [r.importance for r in records if isinstance(r, ScannedDocument)] == [0.25, None]


# --- compression ------------------------------------------------------------------------------------


def incompressible(count: int) -> bytes:
    return b"".join(
        json.dumps({"id": n, "text": zlib.crc32(bytes([n % 256])).to_bytes(4, "big").hex() * 3}).encode() + b"\n"
        for n in range(count)
    )


def all_before_damage(packed: bytes) -> tuple[bytes, str]:
    got = b""
    try:
        for block in decompress(iter([packed]), "gzip"):
            got += block
    except DamagedFileError as damage:
        return got, damage.detail
    pytest.fail("the damage was not noticed")


def test_everything_before_a_truncation_survives(tmp_path: Path) -> None:
    data = incompressible(2000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(data, mtime=0)[:-1000])
    *good, last = scan(path)
    assert isinstance(last, Reject)
    assert (last.reason, last.position) == ("unreadable_file", len(good))
    assert last.detail == "the rest of it cannot be read: the compressed stream ends early"
    assert last.raw == data.split(b"\n")[len(good)][: len(last.raw)]
    assert [r.document.document_id for r in good if isinstance(r, ScannedDocument)] == [
        str(n) for n in range(len(good))
    ]
    assert len(good) > 1500


def test_everything_before_a_damaged_byte_survives() -> None:
    first, second = incompressible(300), incompressible(500)
    packed = gzip.compress(first, mtime=0) + gzip.compress(second, mtime=0)
    damaged = (
        packed[: len(gzip.compress(first, mtime=0))] + b"\0\0garbage" + packed[len(gzip.compress(first, mtime=0)) :]
    )
    got, detail = all_before_damage(damaged)
    assert got == first
    assert detail.startswith("not valid gzip")


def test_a_wrong_checksum_is_found_after_all_its_data() -> None:
    packed = bytearray(gzip.compress(incompressible(50), mtime=0))
    packed[-6] ^= 1
    got, detail = all_before_damage(bytes(packed))
    assert got == incompressible(50)
    assert "incorrect data check" in detail


def test_members_and_frames_follow_one_another_and_padding_is_allowed() -> None:
    zipped = gzip.compress(b"one ", mtime=0) + gzip.compress(b"two", mtime=0) + bytes(600)
    assert b"".join(decompress(iter([zipped]), "gzip")) == b"one two"
    frames = zstandard.compress(b"one ") + zstandard.compress(b"two")
    assert b"".join(decompress(iter([frames[:9], frames[9:]]), "zstd")) == b"one two"


def test_a_file_of_zeros_is_damaged_not_empty() -> None:
    for compression in ("gzip", "zstd"):
        with pytest.raises(DamagedFileError):
            list(decompress(iter([bytes(1000)]), compression))


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_bomb_is_given_out_in_bounded_steps(compression: str) -> None:
    size = 128 << 20
    if compression == "gzip":
        packer = zlib.compressobj(9, wbits=31)
        packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    else:
        packer = zstandard.ZstdCompressor().compressobj()
        packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    sizes = [len(block) for block in decompress(iter([packed]), compression)]
    assert sum(sizes) == size
    assert max(sizes) <= 32 << 20


# --- Parquet ----------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_cells_become_json_values(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        {
            "id": pa.array([1], pa.int64()),
            "text": ["t"],
            "nan": [float("nan")],
            "inf": [float("-inf")],
            "half": pa.array([0.5], pa.float16()),
            "decimal": [Decimal("1.50")],
            "date": [date(2024, 2, 29)],
            "nanos": pa.array([1], pa.timestamp("ns")),
            "zoned": pa.array([datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)], pa.timestamp("us", "Europe/Paris")),
            "far": pa.array([1 << 62], pa.timestamp("us")),
            "time": [time(1, 2, 3)],
            "span": pa.array([timedelta(seconds=2)], pa.duration("ms")),
            "bytes": [b"caf\xc3\xa9"],
            "blob": [b"\xff\x00"],
            "word": pa.array(["x"]).dictionary_encode(),
            "none": pa.array([None], pa.string()),
            "list": [[1]],
        },
    )
    (document,) = documents(path)
    assert document.document_id == "1"
    assert document.metadata == {
        "inf": "-Infinity",
        "half": 0.5,
        "decimal": "1.50",
        "date": "2024-02-29",
        "nanos": "1970-01-01T00:00:00.000000001",
        "zoned": "2024-01-02T03:04:05.000000Z",
        "far": "<value out of range: 4611686018427387904>",
        "time": "01:02:03.000000",
        "span": 2000,
        "bytes": "café",
        "blob": "ff00",
        "word": "x",
    }


def test_nested_metadata_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    columns = {"id": ["a"], "text": ["t"], "tags": [["x", None]], "o": [{"d": date(2024, 1, 1), "n": float("nan")}]}
    (document,) = documents(parquet(tmp_path / "a.parquet", columns), metadata_fields=("tags", "o"))
    assert document.metadata == {"tags": ["x", None], "o": {"d": "2024-01-01", "n": None}}


def test_jsonl_and_parquet_of_the_same_records_give_the_same_documents(tmp_path: Path) -> None:
    records = [{"id": 1, "text": "t", "a": None, "b": 0.5}, {"id": 2, "text": "u", "a": "x", "b": 2.0}]
    lines = documents(jsonl(tmp_path / "a.jsonl", *records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet")
    rows = documents(tmp_path / "b.parquet")
    assert [replace(d, source="") for d in lines] == [replace(d, source="") for d in rows]


def test_bad_rows_are_rejected_one_by_one(tmp_path: Path) -> None:
    bad_text = pa.Array.from_buffers(
        pa.string(), 5, [None, pa.py_buffer(bytes.fromhex("0000000001000000020000000300000003000000" "04000000")),
                         pa.py_buffer(b"a\xffbc")]
    )  # fmt: skip
    path = parquet(tmp_path / "a.parquet", {"id": ["a", "b", None, "d", ""], "text": bad_text})
    records = scan(path)
    assert [r.reason.value if isinstance(r, Reject) else "ok" for r in records] == [
        "ok",
        "invalid_utf8",
        "wrong_type",
        "empty",
        "missing_field",
    ]
    bad = records[1]
    assert isinstance(bad, Reject)
    assert (bad.document_id, bad.position) == ("b", 1)


def test_binary_text_is_read_as_utf8_or_rejected(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"id": [b"a", b"b"], "text": [b"caf\xc3\xa9", b"\xff"]})
    first, second = scan(path)
    assert isinstance(first, ScannedDocument)
    assert first.document.text == "café"
    assert isinstance(second, Reject)
    assert (second.reason, second.document_id) == ("invalid_utf8", "b")


def test_a_missing_column_rejects_every_row(tmp_path: Path) -> None:
    assert reasons(parquet(tmp_path / "a.parquet", {"id": [1, 2]})) == ["missing_field"] * 2
    assert reasons(parquet(tmp_path / "a.parquet", {"nothing": [[1], [2]]})) == ["missing_field"] * 2


def test_batches_are_as_small_as_the_rows_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = parquet(tmp_path / "a.parquet", {"id": list(range(100)), "text": [f"text {n}" * 100 for n in range(100)]})
    monkeypatch.setattr(parquet_rows, "_BATCH_BYTES", 2000)
    seen = []
    original = parquet_rows._plain_rows
    monkeypatch.setattr(parquet_rows, "_plain_rows", lambda batch: seen.append(batch.num_rows) or original(batch))
    assert len(documents(path)) == 100
    assert max(seen) <= 3


def test_row_groups_after_a_damaged_one_survive(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        {"id": [str(n) for n in range(30)], "text": [f"text {n}" for n in range(30)]},
        row_group_size=10,
        compression="zstd",
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    records = scan(path)
    assert [r.document.document_id for r in records if isinstance(r, ScannedDocument)] == [
        str(n) for n in (*range(10), *range(20, 30))
    ]
    (reject,) = [r for r in records if isinstance(r, Reject)]
    assert (reject.reason, reject.position) == ("unreadable_file", 10)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1", b"not parquet" * 100])
def test_what_is_not_parquet_is_one_reject(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(data)
    assert one_reject(tmp_path).reason == RejectReason.UNREADABLE_FILE


# --- again ------------------------------------------------------------------------------------------


def test_documents_are_read_back_in_the_order_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "a.jsonl", *({"id": n, "text": f"text {n}", "m": n} for n in range(20)))
    jsonl(tmp_path / "c.jsonl", {"id": "c", "text": "last", "m": {"nested": 1}})
    (tmp_path / "b.html").write_text("<title>T</title><p>page</p>")
    (tmp_path / "d.md").write_text("mark\r\ndown")
    records = [r for r in scan(tmp_path, metadata_fields=("m",)) if isinstance(r, ScannedDocument)]
    mixed = [records[n] for n in (3, 20, 22, 0, 21, 19, 3)]
    opened = []
    original = readers.open_binary
    monkeypatch.setattr(readers, "open_binary", lambda path: opened.append(path) or original(path))
    assert list(read_documents([row_of(r) for r in mixed])) == [r.document for r in mixed]
    assert len(opened) == 4
    monkeypatch.setattr(readers, "WINDOW_BYTES", 1)
    assert list(read_documents([row_of(r) for r in mixed])) == [r.document for r in mixed]
    assert list(read_documents([])) == []


@pytest.mark.parametrize("change", [b'{"id": "a", "text": "u"}\n', b'{"id": "b", "text": "t"}\n', b"bad", b""])
def test_a_line_that_changed_since_the_scan_is_an_error(tmp_path: Path, change: bytes) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"id": "a", "text": "t"})
    (record,) = scan(path)
    path.write_bytes(change)
    with pytest.raises(CorpusChangedError):
        read_document(row_of(record))


def test_a_file_that_changed_or_is_gone_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    (record,) = scan(path)
    path.write_text("after")
    advice = "Leave the corpus alone during a build and run the build again."
    with pytest.raises(CorpusChangedError) as caught:
        read_document(row_of(record))
    assert str(caught.value) == (
        f"document 'a.txt' of {path} has changed since the scan, expected it to stay as the scan found it. {advice}"
    )
    path.unlink()
    with pytest.raises(CorpusChangedError, match=re.escape("can no longer be opened")):
        read_document(row_of(record))


def test_an_unrelated_edit_behind_a_record_does_not_matter(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"id": "a", "text": "t"})
    (record,) = scan(path)
    with path.open("ab") as stream:
        stream.write(b"appended")
    assert read_document(row_of(record)).text == "t"


def test_raw_bytes_of_a_record(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"id": "a", "text": "t"}, {"id": "b", "text": "u" * 70_000})
    first, second = map(row_of, scan(path))
    assert read_raw(first) == b'{"id": "a", "text": "t"}'
    assert len(read_raw(second)) == 65_536
