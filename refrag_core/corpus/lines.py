"""Lines of a byte stream, without ever holding one that is too long."""

from collections.abc import Iterator
from dataclasses import dataclass

from refrag_core.corpus.compression import DamagedFileError
from refrag_core.corpus.document import RAW_BYTES


@dataclass(frozen=True, slots=True)
class Line:
    """One line without its newline.

    Args:
        offset: bytes from the start of the stream.
        number: from 0, counted from where reading began.
        data: its bytes; only the first 64 KiB of a line longer than the limit.
        length: bytes that the line has.
    """

    offset: int
    number: int
    data: bytes
    length: int


class _Held:
    """The pieces of a line that is still growing, of which an over-long one keeps its head only."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self.length = 0

    def add(self, part: bytes) -> None:
        self.length += len(part)
        self._parts.append(part)
        if self.length > self._max_bytes:
            self._parts = [b"".join(self._parts)[:RAW_BYTES]]

    def take(self) -> tuple[bytes, int]:
        taken = b"".join(self._parts), self.length
        self._parts, self.length = [], 0
        return taken


def split_lines(blocks: Iterator[bytes], *, offset: int, max_bytes: int) -> Iterator[Line]:
    """Lines of the joined `blocks`, whose first byte is at `offset` of the file.

    Holds one block and one line of at most `max_bytes` plus a block. Raises DamagedFileError as `blocks` does,
    with the number of the line that could not be read to its end and what there is of it.
    """
    held, number = _Held(max_bytes), 0
    try:
        for block in blocks:
            *ends, rest = block.split(b"\n")
            for end in ends:
                held.add(end)
                data, length = held.take()
                yield Line(offset, number, data, length)
                offset, number = offset + length + 1, number + 1
            held.add(rest)
    except DamagedFileError as damage:
        raise DamagedFileError(damage.detail, number, held.take()[0]) from damage
    if held.length:
        yield Line(offset, number, *held.take())
