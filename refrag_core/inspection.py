"""What an index holds, for a person or a script."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from refrag_core.digests import JSON
from refrag_core.errors import UsageError
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.manifest import bytes_by_kind, list_versions
from refrag_core.models import load_tokenizer, resolve_model
from refrag_core.storage import IndexLocation
from refrag_core.tables import iterate_rows


def inspect_index(location: IndexLocation, version: int | None = None) -> dict[str, dict[str, Any]]:
    """Counts, sizes, models and settings of one generation."""
    reader = IndexReader(location, version)
    manifest = reader.manifest
    sizes = bytes_by_kind(manifest)
    models = {role: value for role, value in asdict(manifest.components).items() if value is not None}
    return {
        "index": {
            "version": manifest.version,
            "versions": list_versions(reader.store)[-1],
            "content_id": manifest.content_id,
            "build_id": manifest.build_id,
            "trained": manifest.checkpoint.trained,
            "tables": "parquet" if manifest.lance is None else "parquet, lance",
        },
        "counts": {
            **asdict(manifest.counts),
            "shards": len(manifest.shards),
            "segments": len(manifest.segments),
            "tombstoned_passages": manifest.tombstones.passages if manifest.tombstones else 0,
            "hidden_duplicates": manifest.duplicates.passages if manifest.duplicates else 0,
        },
        "quarantine": dict(manifest.quarantine.counts),
        "models": {role: f"{value['reference']} {value['fingerprint'][:16]}" for role, value in models.items()},
        "parameters": asdict(manifest.parameters),
        "vector_index": asdict(manifest.vector_index),
        "bytes": {**sizes, "total": sum(sizes.values())},
    }


def inspect_quarantine(location: IndexLocation, version: int | None = None) -> list[dict[str, JSON]]:
    """Records that are not in the index, with their reasons; raw bytes as far as they are text."""
    reader = IndexReader(location, version)
    name = reader.manifest.quarantine.file
    if name is None:
        return []
    rows = iterate_rows(reader.store.path(name))
    return [
        {**row, "source_digest": _hex(row["source_digest"]), "raw": row["raw"].decode("utf-8", "replace")}
        for row in rows
    ]


def _hex(value: bytes | None) -> str | None:
    return None if value is None else value.hex()


def inspect_passage(location: IndexLocation, wanted: str, version: int | None = None) -> dict[str, Any]:
    """One passage with its chunks; `wanted` is a passage id or `DOCUMENT#ORDINAL`.

    Raises UsageError when the index has no such passage.
    """
    reader = IndexReader(location, version)
    ref = next(_find(reader, wanted), None)
    if ref is None:
        raise UsageError(
            f"no passage {wanted!r} in {location}: expected a passage id (32 hexadecimal characters, as `refrag index "
            "search --json` prints it) or DOCUMENT#ORDINAL, like 'guide.txt#0'"
        )
    shown, fetched = reader.describe(ref), reader.fetch([ref])[0]
    decoder = reader.included("decoder")
    tokenizer = load_tokenizer(decoder or resolve_model(reader.manifest.components.tokenizer.reference))
    chunks = []
    for ordinal in range(shown.num_chunks):
        ids = fetched.tokens[ordinal * fetched.chunk_size : (ordinal + 1) * fetched.chunk_size].tolist()
        chunks.append(
            {
                "ordinal": ordinal,
                "num_tokens": len(ids),
                "tokens": ids,
                "text": tokenizer.decode(ids, skip_special_tokens=False),
                "nll": None if fetched.scores is None else float(fetched.scores[ordinal]),
            }
        )
    return {**asdict(shown), "chunk_size": fetched.chunk_size, "chunks": chunks}


def _find(reader: IndexReader, wanted: str) -> Iterator[PassageRef]:
    document_id, _, ordinal = wanted.rpartition("#")
    for number, shard in enumerate(reader.manifest.shards):
        by_document = (
            bool(document_id) and shard.first_document.encode() <= document_id.encode() <= shard.last_document.encode()
        )
        if document_id and not by_document:
            continue
        rows = iterate_rows(reader.store.path(shard.tables["passages"]), ["passage_id", "document_id", "ordinal"])
        live = reader.live_rows(number)
        for at, row in enumerate(rows):
            named = row["document_id"] == document_id and str(row["ordinal"]) == ordinal
            if live[at] and (named or row["passage_id"].hex() == wanted):
                yield PassageRef(number, at)
