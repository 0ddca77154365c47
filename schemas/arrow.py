"""Arrow schemas of the tables in an index: the one place where column names and types are written down.

A shard is one row group a file and rows follow (document_id, passage ordinal, chunk ordinal). Widths that
depend on the models are fixed-size binary, little-endian, so that a reader can map them in place:
`tokens` int32 `[chunk_size]`, `embedding` float16 or int8 `[d_enc]`, `vector` float16 `[d_ret]`.
"""

import pyarrow as pa

DIGEST = pa.binary(32)
PASSAGE_ID = pa.binary(16)


def _required(name: str, kind: pa.DataType, **metadata: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata=metadata or None)


DOCUMENTS = pa.schema(
    [
        _required("document_id", pa.string()),
        _required("source_digest", DIGEST),
        _required("content_digest", DIGEST),
        _required("source", pa.string(), note="file, relative to the corpus"),
        _required("chunk_size", pa.int16()),
        _required("num_passages", pa.int32()),
        _required("num_chunks", pa.int32()),
        _required("num_tokens", pa.int64()),
        _required("metadata", pa.string(), encoding="canonical JSON object"),
    ]
)

PASSAGES = pa.schema(
    [
        _required("passage_id", PASSAGE_ID),
        _required("document_id", pa.string()),
        _required("ordinal", pa.int32()),
        _required("char_start", pa.int64()),
        _required("char_end", pa.int64()),
        _required("num_tokens", pa.int32()),
        _required("first_chunk", pa.int64()),
        _required("num_chunks", pa.int32()),
        _required("text", pa.string()),
        _required("metadata", pa.string(), encoding="canonical JSON object"),
    ]
)

QUARANTINE = pa.schema(
    [
        pa.field("document_id", pa.string()),
        _required("reason", pa.string()),
        _required("detail", pa.string()),
        _required("disposition", pa.string(), values="quarantined or filtered"),
        _required("source", pa.string()),
        _required(
            "position",
            pa.int64(),
            unit="byte offset of the line in a plain .jsonl, record number from 0 in other containers, 0 for a file",
        ),
        pa.field("source_digest", DIGEST),
        _required("raw", pa.binary(), note="the record's bytes, cut at 64 KiB"),
    ]
)

SCAN_RUN = pa.schema(
    [
        _required("document_id", pa.string()),
        _required("source_digest", DIGEST),
        _required("chunk_size", pa.int16()),
        _required("num_bytes", pa.int64(), unit="UTF-8 bytes of the text"),
        _required("order", pa.int64(), unit="position of the record in the scan of the whole corpus"),
        _required("source", pa.string()),
        _required("path", pa.string()),
        _required("format", pa.string()),
        _required("offset", pa.int64()),
        _required("length", pa.int64()),
    ]
)

TOMBSTONES = pa.schema(
    [
        _required("shard", pa.string()),
        _required("document", pa.int32(), note="row in the shard's documents"),
        _required("first_passage", pa.int32(), note="row in the shard's passages"),
        _required("num_passages", pa.int32()),
    ]
)

DUPLICATES = pa.schema(
    [
        _required("shard", pa.string()),
        _required("passage", pa.int32(), note="row in the shard's passages"),
        _required("first_shard", pa.string(), note="of the passage that it equals"),
        _required("first_passage", pa.int32()),
    ]
)

SCORES = pa.schema([_required("nll", pa.float32(), unit="nats a token")])

_WHERE = (_required("shard", pa.string()), _required("row", pa.int32(), note="row in the shard's Parquet table"))


def chunks(chunk_size: int) -> pa.Schema:
    """Schema of a shard's chunks; `tokens` holds `chunk_size` int32, zero after `num_tokens` of them."""
    return pa.schema(
        [
            _required("passage", pa.int32(), note="row of the passage in this shard"),
            _required("ordinal", pa.int32()),
            _required("num_tokens", pa.int16()),
            _required("tokens", pa.binary(4 * chunk_size), dtype="int32", dim=str(chunk_size)),
        ]
    )


def embeddings(dim: int, dtype: str = "float16") -> pa.Schema:
    """Schema of a shard's chunk embeddings, row for row with its chunks; int8 codes have their scales beside them."""
    if dtype == "int8":
        codes = _required("embedding", pa.binary(dim), dtype="int8", dim=str(dim))
        return pa.schema([codes, _required("scale", pa.float32(), note="entry = code × scale")])
    return pa.schema([_required("embedding", pa.binary(2 * dim), dtype="float16", dim=str(dim))])


def lance_documents() -> pa.Schema:
    """Schema of the LanceDB table `documents`."""
    return pa.schema([*_WHERE, *DOCUMENTS])


def lance_passages(vector_dim: int) -> pa.Schema:
    """Schema of the LanceDB table `passages`: its passage embeddings are a column of it."""
    return pa.schema([*_WHERE, *PASSAGES, _required("vector", pa.list_(pa.float16(), vector_dim))])


def lance_chunks(dim: int, dtype: str = "float16", *, scored: bool = False) -> pa.Schema:
    """Schema of the LanceDB table `chunks`: embeddings and scores are columns of it, `tokens` has no zeros behind."""
    wide = [_required("tokens", pa.list_(pa.int32()))]
    if dtype == "int8":
        wide += [_required("embedding", pa.list_(pa.int8(), dim)), _required("scale", pa.float32())]
    else:
        wide.append(_required("embedding", pa.list_(pa.float16(), dim)))
    plain = [field for field in chunks(1) if field.name != "tokens"]
    return pa.schema([*_WHERE, *plain, *wide, *(SCORES if scored else ())])


def vectors(dim: int) -> pa.Schema:
    """Schema of a shard's passage embeddings, row for row with its passages; unit length."""
    return pa.schema([_required("vector", pa.binary(2 * dim), dtype="float16", dim=str(dim))])
