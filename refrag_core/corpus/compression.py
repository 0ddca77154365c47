"""Decompression in bounded memory that gives all that precedes the damage of a damaged file."""

import zlib
from collections.abc import Iterator

import zstandard

# Smaller steps bound both what one call can blow up to and what is lost before the damage: deflate expands at
# most 1032 times, a zstd block of 4 bytes to 128 KiB.
_GZIP_STEP_BYTES = 16 << 10
_ZSTD_STEP_BYTES = 1 << 10

_GZIP_WINDOW = 31  # zlib's code for a gzip header and trailer, checksum verified

_TRUNCATED = "the compressed stream ends early"


class DamagedFileError(Exception):
    """The rest of a file cannot be read. Never leaves the corpus package: readers turn it into a `Reject`.

    Args:
        detail: what is wrong.
        position: record number from which on nothing could be read, where it is known.
        raw: the bytes of the record that the damage cut off.
    """

    def __init__(self, detail: str, position: int = 0, raw: bytes = b"") -> None:
        super().__init__(detail, position, raw)
        self.detail = detail
        self.position = position
        self.raw = raw


def decompress(blocks: Iterator[bytes], compression: str | None) -> Iterator[bytes]:
    """The plain bytes of `blocks`. Raises DamagedFileError after all that could be read was given."""
    if compression == "gzip":
        return _gunzip(blocks)
    return _unzstd(blocks) if compression == "zstd" else blocks


def _steps(blocks: Iterator[bytes], size: int) -> Iterator[bytes]:
    for block in blocks:
        for start in range(0, len(block), size):
            yield block[start : start + size]


def _gunzip(blocks: Iterator[bytes]) -> Iterator[bytes]:
    member, ended, fresh = zlib.decompressobj(_GZIP_WINDOW), 0, True
    for step in _steps(blocks, _GZIP_STEP_BYTES):
        data = step
        while data and not (fresh and ended and not data.strip(b"\0")):  # zeros may pad the last member
            before = member.copy()
            try:
                plain = member.decompress(data)
            except zlib.error as error:
                yield _salvage(before, data)
                raise DamagedFileError(f"not valid gzip: {error}") from None
            yield plain
            fresh, data = member.eof, member.unused_data
            if fresh:
                member, ended = zlib.decompressobj(_GZIP_WINDOW), ended + 1
    if not fresh:
        raise DamagedFileError(_TRUNCATED)


def _salvage(member: "zlib._Decompress", data: bytes) -> bytes:
    """All that can be decompressed before the error: byte by byte, as the failing call returns nothing."""
    plain = bytearray()
    try:
        for number in range(len(data)):
            plain += member.decompress(data[number : number + 1])
    except zlib.error:
        pass  # the caller reports the same error
    return bytes(plain)


def _unzstd(blocks: Iterator[bytes]) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    fresh = True
    for step in _steps(blocks, _ZSTD_STEP_BYTES):
        data = step
        while data:
            try:
                plain = frame.decompress(data)
            except (zstandard.ZstdError, MemoryError) as error:
                raise DamagedFileError(f"not valid zstd: {error}") from None
            yield plain
            fresh, data = frame.eof, frame.unused_data
            if fresh:
                frame = decompressor.decompressobj()
    if not fresh:
        raise DamagedFileError(_TRUNCATED)
