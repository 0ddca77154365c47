import hashlib

import pytest

from refrag.schemas import arrow
from refrag_core.corpus.document import (
    Document,
    Reject,
    RejectReason,
    position_of,
    reject_row,
    scan_order,
    source_digest,
)


def test_the_source_digest_is_of_text_and_metadata_alone() -> None:
    expected = hashlib.sha256('{"metadata":{"a":1,"é":null},"text":"x"}'.encode()).digest()
    assert source_digest(Document("one", "x", {"é": None, "a": 1}, "s")) == expected
    assert source_digest(Document("two", "x", {"a": 1, "é": None}, "t")) == expected


def test_two_reasons_filter_and_all_others_quarantine() -> None:
    filtered = [reason for reason in RejectReason if reason.disposition == "filtered"]
    assert filtered == [RejectReason.EMPTY, RejectReason.DUPLICATE]
    assert {reason.disposition for reason in RejectReason} == {"filtered", "quarantined"}


def test_a_reject_keeps_what_utf8_can_hold_and_64_kib() -> None:
    reject = Reject(
        reason=RejectReason.INVALID_UTF8,
        detail="half \ud800 " + "x" * 1000,
        source="name\udcff.txt",
        position=3,
        raw=b"r" * 70_000,
    )
    row = reject_row(reject)
    assert list(row) == arrow.QUARANTINE.names
    assert row["detail"] == "half \\ud800 " + "x" * 493
    assert row["source"] == "name\\udcff.txt"
    assert row["raw"] == b"r" * 65_536
    assert row["disposition"] == "quarantined"


@pytest.mark.parametrize(("file", "position"), [(0, 0), (1, 0), (0, (1 << 40) - 1), ((1 << 23) - 1, 7)])
def test_order_is_by_file_then_position(file: int, position: int) -> None:
    order = scan_order(file, position)
    assert order < 1 << 63
    assert position_of(order) == position
    assert scan_order(file + 1, 0) > order
