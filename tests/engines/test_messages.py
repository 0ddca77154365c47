"""What comes back from workers as JSON: equal to what was sent, and nothing but values and refrag's own dataclasses."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refrag.pipelines.engines.messages import Failure, decode, encode, failure_of
from refrag.pipelines.plan import ShardSpec
from refrag.pipelines.receipts import Receipt, Rejected
from refrag.pipelines.stages import ShardResult
from refrag_core.corpus.document import RejectReason
from refrag_core.errors import CorpusChangedError, RefragError, StageError
from refrag_core.manifest import Segment, Shard
from refrag_core.storage import FileRecord

SPEC = ShardSpec("a" * 32, "/shared/list.parquet", 16, 3, 1000)
RECEIPT = Receipt(
    stage="tokenize",
    key="k" * 32,
    shard="s" * 32,
    files={"passages": FileRecord("shards/s/passages.parquet", 10, "d" * 64)},
    rows={"documents": 3, "passages": 5},
    seconds=0.125,
    rejected=(Rejected("a", "00", "file.jsonl", RejectReason.TOKENIZE_FAILED, "ValueError: no"),),
    facts={"first_document": "ä", "chunk_size": 16},
)
SHARD = Shard(
    name="s" * 32,
    chunk_size=16,
    first_document="a",
    last_document="z",
    tables={"passages": "shards/s/passages.parquet"},
    documents=3,
    passages=5,
    chunks=9,
    tokens=100,
)

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(values)
def test_values_come_back_equal_and_of_their_types(value: Any) -> None:
    assert repr(decode(encode(value))) == repr(value)


@pytest.mark.parametrize(
    "value",
    [
        ShardResult(SPEC, (RECEIPT,), SHARD),
        ShardResult(SPEC, (), None),
        (Segment("segments/x.faiss", ["a", "b"], 7), FileRecord("segments/x.faiss", 10, "d" * 64)),
        Path("/a/b"),
        Failure("StageError", "no", trace="…"),
    ],
)
def test_what_engines_carry_comes_back(value: Any) -> None:
    assert decode(encode(value)) == value


@pytest.mark.parametrize("dtype", ["<f4", "<i8", "?", "<f2"])
def test_arrays_come_back_equal_and_writable(dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(dtype)
    back = decode(encode({"hits": (array, array[:0])}))["hits"]
    for made, sent in zip(back, (array, array[:0]), strict=True):
        assert (made.dtype, made.shape) == (sent.dtype, sent.shape)
        np.testing.assert_array_equal(made, sent)
    back[0][0, 0] = 1


@pytest.mark.parametrize("value", [np.array([object()]), {1, 2}, object(), [st], os.stat_result(range(10)).__class__])
def test_nothing_else_is_sent(value: Any) -> None:
    with pytest.raises(StageError, match="engines carry specs and receipts; write"):
        encode(value)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("subprocess", "Popen"),
        ("refrag_core.storage", "FolderStore"),
        ("refrag_core.storage", "shutil"),
        ("refrag_core.storage", "NoSuchClass"),
        ("refrag_evil", "FileRecord"),
        ("hypothesis", "given"),
    ],
)
def test_a_message_makes_no_foreign_object(module: str, name: str) -> None:
    forged = json.dumps({"class": [module, name], "fields": {}}).encode()
    with pytest.raises(StageError, match="expected a dataclass of refrag"):
        decode(forged)


def raised(error: BaseException) -> Failure:
    try:
        raise error
    except BaseException as caught:
        return decode(encode(failure_of(caught)))


def test_errors_of_refrag_arrive_as_themselves() -> None:
    error = raised(CorpusChangedError("found, expected, do")).error
    assert type(error) is CorpusChangedError
    assert str(error) == "found, expected, do"
    assert "test_messages.py" in error.__notes__[0]


def test_errors_of_the_system_arrive_as_themselves() -> None:
    error = raised(FileNotFoundError(errno.ENOENT, "No such file or directory", "/a")).error
    assert type(error) is FileNotFoundError
    assert str(error) == "[Errno 2] No such file or directory: '/a'"
    full = raised(OSError(errno.ENOSPC, "No space left on device")).error
    assert str(full) == "[Errno 28] No space left on device"


@pytest.mark.parametrize("error", [ValueError("bad row"), OSError("no number"), KeyboardInterrupt()])
def test_any_other_error_is_one_message(error: BaseException) -> None:
    arrived = raised(error).error
    assert isinstance(arrived, RefragError)
    assert str(arrived).startswith(f"a worker failed with {type(error).__name__}: {error}; expected")
