"""Digests of bytes and of canonical JSON: the only source of names and ids in refrag."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

JSON = str | int | float | bool | None | Sequence["JSON"] | Mapping[str, "JSON"]

_BLOCK_BYTES = 1 << 20


def canonical_json(value: JSON) -> bytes:
    """UTF-8 bytes of `value` with sorted keys and no spaces; equal values give equal bytes.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of `data`, 64 hexadecimal characters."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: JSON) -> str:
    """SHA-256 of the canonical JSON of `value`, 64 hexadecimal characters."""
    return digest_bytes(canonical_json(value))


def digest_stream(stream: BinaryIO) -> str:
    """SHA-256 of what is left in `stream`, read in blocks of 1 MiB."""
    hasher = hashlib.sha256()
    while block := stream.read(_BLOCK_BYTES):
        hasher.update(block)
    return hasher.hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of the file's bytes. Raises OSError when it cannot be read."""
    with path.open("rb") as stream:
        return digest_stream(stream)
