"""Storage forms of chunk embeddings: whole numbers of bytes a row, and what a reader gets back.

    float32   4·d bytes a row, exact
    float16   2·d bytes a row, what an index holds by default
    int8      d + 4 bytes a row: codes in [-127, 127] and one float32 scale, the row's largest entry / 127

Notation: n rows (chunks), d = d_enc. A row is stored by itself: its bytes depend on nothing but its own values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from refrag_core.errors import ConfigError

EmbeddingDtype = Literal["float32", "float16", "int8"]
EMBEDDING_DTYPES: tuple[EmbeddingDtype, ...] = get_args(EmbeddingDtype)

INDEX_DTYPES: tuple[EmbeddingDtype, ...] = ("float16", "int8")
"""The forms that an index may hold its chunk embeddings in."""

Rows = npt.NDArray[np.floating]

LARGEST_CODE = 127
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Rows as int8 codes: entry j of row i is `codes[i, j] · scales[i]`."""

    codes: npt.NDArray[np.int8]
    """`[n, d]`."""
    scales: npt.NDArray[np.float32]
    """`[n]`, 0 for a row of zeros."""

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: "slice | npt.NDArray[np.integer]") -> "Int8Rows":
        return Int8Rows(self.codes[rows], self.scales[rows])


StoredRows = Rows | Int8Rows
"""Chunk embeddings as a reader gets them, `[n, d]`: an array of floats, or codes with their scales."""


def quantise_rows(rows: Rows) -> Int8Rows:
    """The nearest codes (ties to even) of `rows` float `[n, d]`.

    An entry comes back within half a scale, 1/254 of its row's largest. Raises ConfigError for NaN and infinities,
    which no scale holds.
    """
    values = rows.astype(np.float32)
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).any(axis=1).sum())
        raise ConfigError(f"{bad} of {len(values)} rows have entries that are no finite numbers; expected none")
    scales = np.abs(values).max(axis=1, initial=0.0) / np.float32(LARGEST_CODE)
    # A scale that underflows float32 would divide by zero; such a row is zeros to every reader.
    safe = np.where(scales > 0, scales, np.float32(1.0))
    codes = np.rint(values / safe[:, None]).clip(-LARGEST_CODE, LARGEST_CODE).astype(np.int8)
    return Int8Rows(np.where(scales[:, None] > 0, codes, np.int8(0)), scales.astype(np.float32))


def dequantise_rows(stored: Int8Rows) -> npt.NDArray[np.float32]:
    """Float32 `[n, d]`."""
    rows: npt.NDArray[np.float32] = stored.codes.astype(np.float32) * stored.scales[:, None]
    return rows


def store_rows(rows: Rows, dtype: EmbeddingDtype) -> StoredRows:
    """`rows` float `[n, d]` in the form `dtype`. Raises ConfigError for int8 of what is not finite."""
    if dtype == "int8":
        return quantise_rows(rows)
    return rows.astype(np.float16 if dtype == "float16" else np.float32, copy=False)


def read_rows(stored: StoredRows) -> Rows:
    """The rows as floats `[n, d]`: codes are multiplied out to float32, floats stay as they are."""
    return dequantise_rows(stored) if isinstance(stored, Int8Rows) else stored


def concatenate_rows(parts: Sequence[StoredRows]) -> StoredRows:
    """All rows of `parts` (at least one), in order; codes stay codes unless they meet floats."""
    codes = [part for part in parts if isinstance(part, Int8Rows)]
    if codes and len(codes) == len(parts):
        return Int8Rows(np.concatenate([c.codes for c in codes]), np.concatenate([c.scales for c in codes]))
    joined: Rows = np.concatenate([read_rows(part) for part in parts] if codes else parts)  # type: ignore[arg-type]
    return joined


def bytes_per_row(dtype: EmbeddingDtype, dim: int) -> int:
    """Bytes of one row of `dim` entries, its scale included."""
    return {"float32": 4 * dim, "float16": 2 * dim, "int8": dim + _SCALE_BYTES}[dtype]


def stored_and_read(rows: Rows, dtype: EmbeddingDtype) -> Rows:
    """What comes back of `rows` float `[…, d]` after they were stored as `dtype`, float32 except for float16."""
    return read_rows(store_rows(rows.reshape(-1, rows.shape[-1]), dtype)).reshape(rows.shape)
