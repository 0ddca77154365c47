"""Trained weights in files: safetensors of bounded size, as float32, float16 or int8 with a scale a row."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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

MAX_FILE_BYTES = 15 << 20

_SCALE = "::scale"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file of weights."""

    name: str
    """Within the checkpoint's folder, which has no folders inside."""
    digest: str


def write_weights(
    folder: Path, stem: str, weights: Mapping[str, Tensor], *, dtype: StoredDtype, max_bytes: int = MAX_FILE_BYTES
) -> tuple[WeightFile, ...]:
    """Write `weights` as `STEM-00001.safetensors`, … of at most `max_bytes` each (a larger tensor gets its own file).

    int8 keeps the largest entry of each row of a matrix as 127 and its scale in float32; vectors stay float16.
    """
    files = []
    for number, group in enumerate(_groups(_packed(weights, dtype), max_bytes), start=1):
        data = save(group)
        file = WeightFile(f"{stem}-{number:05d}.safetensors", digest_bytes(data))
        (folder / file.name).write_bytes(data)
        files.append(file)
    return tuple(files)


def _packed(weights: Mapping[str, Tensor], dtype: StoredDtype) -> Iterator[dict[str, Tensor]]:
    """What is stored of each weight; a matrix and its scales stay in one file."""
    for name, weight in sorted(weights.items()):
        given = weight.detach().to("cpu", torch.float32).contiguous()
        if dtype == "int8" and given.ndim == 2:
            scale = given.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127.0
            yield {name: (given / scale[:, None]).round().to(torch.int8), name + _SCALE: scale}
        else:
            yield {name: given.to(torch.float32 if dtype == "float32" else torch.float16)}


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
    """All weights of the files, float32. Raises ConfigError for a file that is no safetensors."""
    stored: dict[str, Tensor] = {}
    for path in paths:
        try:
            stored |= load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} is no safetensors file ({error}); get the checkpoint again") from error
    return {
        name: tensor.float() * stored[name + _SCALE][:, None] if name + _SCALE in stored else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith(_SCALE)
    }


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
