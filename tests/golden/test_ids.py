"""Ids must never change by accident: each is made here a second time, from the words of schemas/BUNDLE.md alone."""

import hashlib
import json
import struct

import numpy as np

from refrag_core.chunking import content_digest, passage_id
from refrag_core.corpus.document import Document, source_digest
from refrag_core.digests import canonical_json
from refrag_core.manifest import Component, Components, Parameters, content_id


def prefixed(part: bytes) -> bytes:
    return struct.pack("<Q", len(part)) + part


def plain_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_canonical_json() -> None:
    assert canonical_json({"b": [1, None, True], "a": "é"}) == '{"a":"é","b":[1,null,true]}'.encode()


def test_source_digest() -> None:
    document = Document("doc", "Some text.", {"year": 1999}, "a.jsonl")
    expected = hashlib.sha256(plain_json({"text": "Some text.", "metadata": {"year": 1999}})).digest()
    assert source_digest(document) == expected


def test_passage_id() -> None:
    parts = [b"doc", "Zürich.".encode(), struct.pack("<Q", 1)]
    expected = hashlib.blake2b(b"".join(prefixed(part) for part in parts), digest_size=16).digest()
    assert passage_id("doc", "Zürich.", 1) == expected
    assert passage_id("doc", "Zürich.", 1).hex() == "2e90ad1cfda300fa2d3645e1c7b895ec"


def test_content_digest() -> None:
    ids = np.array([5, 70000, 3], np.int32)
    expected = hashlib.sha256(
        prefixed(b"doc")
        + prefixed(plain_json({"year": 1999}))
        + struct.pack("<Q", 16)
        + prefixed(b"p" * 16)
        + struct.pack("<QQ", 0, 9)
        + prefixed(struct.pack("<3i", 5, 70000, 3))
    ).digest()
    found = content_digest(document_id="doc", metadata={"year": 1999}, chunk_size=16, passages=[(b"p" * 16, 0, 9, ids)])
    assert found == expected


def test_content_id() -> None:
    components = Components(Component("t", "1"), Component("e", "2"), Component("r", "3"), None)
    parameters = Parameters(256, 16, None, 384, "float16", 384)
    header = {
        "format_version": 1,
        "components": {"tokenizer": "1", "encoder": "2", "retriever": "3", "scorer": None},
        "parameters": {
            "max_passage_tokens": 256, "chunk_size": 16, "chunk_size_field": None,
            "embedding_dim": 384, "embedding_dtype": "float16", "vector_dim": 384,
        },
    }  # fmt: skip
    documents = [("a", b"1" * 32), ("é", b"2" * 32)]
    body = b"".join(prefixed(name.encode()) + digest for name, digest in documents)
    expected = hashlib.sha256(plain_json(header) + body).hexdigest()
    assert content_id(documents, components, parameters) == expected
    assert (
        content_id(documents, components, parameters)
        == "dcd4a50539380dfd8f5216f8840308762de8d524a2e74ba132e6c6180e57c05a"
    )
