"""Trained weights in files: safetensors of bounded size, as float32, float16 or int8 with a scale a row, and bits.

The form is specified in schemas/CHECKPOINT.md.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from refrag_core.digests import digest_bytes, digest_file
from refrag_core.errors import ConfigError, FingerprintMismatchError, ModelNotFoundError

StoredDtype = Literal["float32", "float16", "int8"]
FloatDtype = Literal["float32", "float16"]

MAX_FILE_BYTES = 15 << 20

_SCALE = "::scale"
_CODE_LIMIT = 127
_FLOATS = (torch.float32, torch.float16)
_BITS = ".signs"
"""Ends the names of matrices of bits, uint8 (`refrag_core.adapter.SignMatrix`), which have no other form."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of weights."""

    name: str
    """Within the checkpoint's folder, which has no folders inside."""
    digest: str


def write_weights(
    folder: Path,
    stem: str,
    weights: Mapping[str, Tensor],
    *,
    dtype: StoredDtype,
    exact: Container[str] = (),
    max_bytes: int = MAX_FILE_BYTES,
) -> tuple[WeightFile, ...]:
    """Write `weights` as `STEM-00001.safetensors`, … of at most `max_bytes` each (a larger tensor gets its own file).

    int8 keeps the largest entry of each row of a matrix as 127 and its scale in float32, so that an entry comes back
    within 1/254 of its row's largest; vectors, and matrices named in `exact`, stay float16.

    Raises ConfigError for weights that are not finite in the form asked for.
    """
    files = []
    for number, group in enumerate(_groups(_packed(weights, dtype, exact), max_bytes), start=1):
        data = save(group)
        file = WeightFile(f"{stem}-{number:05d}.safetensors", digest_bytes(data))
        (folder / file.name).write_bytes(data)
        files.append(file)
    return tuple(files)


def _packed(weights: Mapping[str, Tensor], dtype: StoredDtype, exact: Container[str]) -> Iterator[dict[str, Tensor]]:
    """What is stored of each weight; a matrix and its scales stay in one file."""
    for name, weight in sorted(weights.items()):
        if name.endswith(_BITS):
            yield {name: weight.detach().to("cpu", torch.uint8).contiguous()}
            continue
        given = weight.detach().to("cpu", torch.float32).contiguous()
        if dtype == "int8" and given.ndim == 2 and name not in exact:
            codes, scale = quantise_rows(given)
            made = {name: codes, name + _SCALE: scale}
        else:
            made = {name: given.to(torch.float32 if dtype == "float32" else torch.float16)}
        if not all(tensor.isfinite().all() for tensor in made.values()):
            raise ConfigError(
                f"weight {name!r} is not finite as {dtype}; expected finite numbers: store it as float32, or train it "
                f"again"
            )
        yield made


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[n, m]` and scales float32 `[n]` of a float32 `[n, m]`; entry ≈ code · scale.

    A scale is its row's largest absolute entry / 127, a code the nearest integer; a row of zeros has scale 0.
    """
    scale = matrix.abs().amax(dim=1) / _CODE_LIMIT
    divisor = torch.where(scale > 0, scale, 1.0)
    return (matrix / divisor[:, None]).round().clamp(-_CODE_LIMIT, _CODE_LIMIT).to(torch.int8), scale


def _groups(items: Iterable[dict[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    group: dict[str, Tensor] = {}
    size = 0
    for item in items:
        more = sum(tensor.nbytes for tensor in item.values())
        if group and size + more > max_bytes:
            yield group
            group, size = {}, 0
        group |= item
        size += more
    if group:
        yield group


def read_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """All weights of the files, float32; int8 codes are multiplied by their scales, bits stay uint8.

    Raises ConfigError for a file that is no safetensors, and for tensors that are no stored weights.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} is no safetensors file ({error}); get the checkpoint again") from error
        found |= _multiplied_out(stored, path)
    return found


def _multiplied_out(stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name, tensor in stored.items():
        problem = _problem_of_scale(name, stored) if name.endswith(_SCALE) else _problem_of_weight(name, stored)
        if problem:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{path} holds {name!r} of {kind} {list(tensor.shape)} {problem}; expected float32, float16, or int8 "
                f"with a float32 scale a row (signs: uint8): get the checkpoint again"
            )
    scales = {name: stored.get(name + _SCALE) for name in stored if not name.endswith(_SCALE)}
    return {name: _numbers(stored[name], scale) for name, scale in scales.items()}


def _numbers(tensor: Tensor, scale: Tensor | None) -> Tensor:
    if tensor.dtype == torch.uint8:
        return tensor
    return tensor.float() if scale is None else tensor.float() * scale[:, None]


def _problem_of_weight(name: str, stored: Mapping[str, Tensor]) -> str:
    """What is wrong with a weight or its codes beside the other tensors of its file; "" for nothing."""
    tensor = stored[name]
    if name.endswith(_BITS):
        return "" if tensor.dtype == torch.uint8 else "for bits"
    if tensor.dtype != torch.int8:
        return "" if tensor.dtype in _FLOATS else "entries"
    if name + _SCALE not in stored:
        return "without scales"
    return "" if tensor.numel() == 0 or int(tensor.min()) >= -_CODE_LIMIT else f"with codes below -{_CODE_LIMIT}"


def _problem_of_scale(name: str, stored: Mapping[str, Tensor]) -> str:
    scale, codes = stored[name], stored.get(name.removesuffix(_SCALE))
    if codes is None or codes.dtype != torch.int8:
        return "without codes"
    if scale.dtype != torch.float32 or codes.ndim != 2 or scale.shape != codes.shape[:1]:
        return f"beside codes {list(codes.shape)}"
    return "" if bool((scale.isfinite() & (scale >= 0)).all()) else "of which some are negative or not finite"


def verified_paths(folder: Path, files: Sequence[WeightFile]) -> list[Path]:
    """Where the files are. Raises ModelNotFoundError for a missing and FingerprintMismatchError for an altered one."""
    paths = [folder / file.name for file in files]
    for path, file in zip(paths, files, strict=True):
        if not path.is_file():
            raise ModelNotFoundError(f"the checkpoint lacks {path}; expected it beside its config: get it complete")
        found = digest_file(path)
        if found != file.digest:
            raise FingerprintMismatchError(
                f"{path} has digest {found[:12]} and the checkpoint's config says {file.digest[:12]}; expected the "
                f"same file: get the checkpoint again"
            )
    return paths
