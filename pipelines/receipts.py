"""Receipts: what a stage did to one shard, kept so that an interrupted build goes on where it was."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from refrag_core.digests import canonical_json
from refrag_core.storage import WORK, FileRecord, Store

_FOLDER = f"{WORK}/receipts"


@dataclass(frozen=True, slots=True)
class Rejected:
    """A document that a stage could not process; the rest of its shard is not affected."""

    document_id: str
    source_digest: str
    """SHA-256, hexadecimal."""
    source: str
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one stage made of one shard."""

    stage: str
    key: str
    """Digest of the stage's fingerprint and its input; names the output."""
    shard: str
    files: Mapping[str, FileRecord]
    """Published tables by table name; empty when `rejected` documents must leave the shard first."""
    rows: Mapping[str, int]
    seconds: float
    rejected: tuple[Rejected, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the stage has to say: first and last document id, truncated passages."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Of `seconds`, what went where (see refrag_core.parts)."""
    reused: bool = False
    """True when the output was there already."""


def _name(stage: str, key: str) -> str:
    return f"{_FOLDER}/{stage}-{key}.json"


def write_receipt(store: Store, receipt: Receipt) -> None:
    """Keep the receipt; a repeated stage writes the same one again."""
    store.replace(_name(receipt.stage, receipt.key), canonical_json(asdict(receipt)))


def forget_receipt(store: Store, stage: str, key: str) -> None:
    """Remove a receipt that nobody will ask for again; those of other work stay."""
    store.remove(_name(stage, key))


def find_receipt(store: Store, stage: str, key: str) -> Receipt | None:
    """The receipt of an earlier run if all that it lists is still there in full size."""
    try:
        receipt = _decode(json.loads(store.read(_name(stage, key))))
    except FileNotFoundError:
        return None
    if any(store.size(record.name) != record.bytes for record in receipt.files.values()):
        return None
    store.expect(receipt.files.values())
    return replace(receipt, reused=True)


def _decode(body: dict[str, Any]) -> Receipt:
    files = {table: FileRecord(**record) for table, record in body.pop("files").items()}
    rejected = tuple(Rejected(**entry) for entry in body.pop("rejected"))
    return Receipt(**body, files=files, rejected=rejected)
