"""Trained weights in files: safetensors, as float32, float16, int8 with a scale a row or int5 with one each 32 entries,
and bits.

Storing weights that were read gives the bytes that they were read from, in int8 and int5 as well.

The form is specified in schemas/CHECKPOINT.md.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import pad

from refrag_core.digests import digest_bytes, digest_file
from refrag_core.errors import ConfigError, FingerprintMismatchError, ModelNotFoundError

StoredDtype = Literal["float32", "float16", "int8", "int5"]

MAX_FILE_BYTES = 15 << 20

_SCALE = "::scale"
_CODE_LIMIT = 127

_RUN = 32
_RUN_LIMIT = 15
_SHRINK = (0.99, 0.98, 0.97, 0.96, 0.95, 0.94, 0.93, 0.92)
"""Scales that are tried beside largest / 15, as parts of it: they clip the largest and are finer for the others. With
32 entries that much less hardly ever pays: clipping then costs more than all the others can gain."""
_LEAST_HALF = 2.0**-24
_NO_CODE = 31
_SHIFTS = 5 * torch.arange(8)

_FLOATS = (torch.float32, torch.float16)
_CODES = {"int8": torch.int8, "int5": torch.uint8}
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
    within 1/254 of its row's largest; int5 has codes up to 15 and a float16 scale each 32 entries of a row. Vectors,
    and matrices named in `exact`, then stay float16.

    Raises ConfigError for weights that are not finite in the form asked for.
    """
    files = []
    for number, group in enumerate(_groups(_packed(weights, dtype, exact), max_bytes), start=1):
        data = save(group)
        file = WeightFile(f"{stem}-{number:05d}.safetensors", digest_bytes(data))
        (folder / file.name).write_bytes(data)
        files.append(file)
    return tuple(files)


def weights_file(weights: Mapping[str, Tensor], dtype: StoredDtype) -> bytes:
    """One file with all `weights`. Raises ConfigError like `write_weights`."""
    stored: dict[str, Tensor] = {}
    for made in _packed(weights, dtype, ()):
        stored |= made
    return cast(bytes, save(stored))


def _packed(weights: Mapping[str, Tensor], dtype: StoredDtype, exact: Container[str]) -> Iterator[dict[str, Tensor]]:
    """What is stored of each weight; a matrix and its scales stay in one file."""
    for name, weight in sorted(weights.items()):
        if name.endswith(_BITS):
            yield {name: _bits(name, weight)}
            continue
        given = weight.detach().to("cpu", torch.float32).contiguous()
        form = "float16" if name in exact and dtype in _CODES else _form_for(given, dtype)
        if form == "int8":
            codes, scale = quantise_rows(given)
            made = {name: codes, name + _SCALE: scale}
        elif form == "int5":
            codes, scale = quantise_runs(given)
            made = {name: pack_codes(codes), name + _SCALE: scale}
        else:
            made = {name: given.to(getattr(torch, form))}
        if not all(tensor.isfinite().all() for tensor in made.values()):
            raise ConfigError(
                f"weight {name!r} is not finite as {dtype}; expected finite numbers: store it as float32, or train it "
                f"again"
            )
        yield made


def _bits(name: str, weight: Tensor) -> Tensor:
    if weight.dtype != torch.uint8:
        raise ConfigError(f"weight {name!r} is {weight.dtype}; expected bits as uint8 under a name in {_BITS}")
    return weight.detach().cpu().contiguous()


def _form_for(weight: Tensor, dtype: StoredDtype) -> StoredDtype:
    """Only matrices have codes."""
    return dtype if dtype not in _CODES or (weight.ndim == 2 and weight.numel()) else "float16"


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[n, m]` and scales float32 `[n]` of a float32 `[n, m]`; entry ≈ code · scale.

    A scale is its row's largest absolute entry / 127, a code the nearest integer; a row of zeros has scale 0. What the
    codes and scales multiply to has the very same ones: for each float32 x, 127 · (x / 127) / 127 is x / 127 again when
    each step is rounded, unless that is below float32's normal numbers.
    """
    scale = matrix.abs().amax(dim=1) / _CODE_LIMIT
    divisor = torch.where(scale > 0, scale, 1.0)
    return (matrix / divisor[:, None]).round().clamp(-_CODE_LIMIT, _CODE_LIMIT).to(torch.int8), scale


def quantise_runs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[n, m]` in [-15, 15] and scales float16 `[n, ⌈m / 32⌉]` of a float32 `[n, m]`, m > 0.

    Entry j of a row ≈ code · its row's scale j // 32. Of nine scales the one of the least squared error is taken, the
    largest of equals; a run whose codes are all 0 has scale 0. What the codes and scales multiply to has the very same
    ones: each scale is rounded down, so that the largest code is 15 unless the scale is the least that float16 has.
    """
    rows, columns = matrix.shape
    runs = pad(matrix, (0, -columns % _RUN)).view(rows, -1, _RUN)
    largest = runs.abs().amax(dim=2, keepdim=True) / _RUN_LIMIT
    scale = _half_below(largest)
    error = _run_error(runs, scale)
    for part in _SHRINK:
        other = _half_below(largest * part)
        other_error = _run_error(runs, other)
        better = other_error < error
        scale, error = torch.where(better, other, scale), torch.where(better, other_error, error)
    codes = _run_codes(runs, scale)
    empty = (codes == 0).all(dim=2, keepdim=True) & scale.isfinite()
    return codes.to(torch.int8).view(rows, -1)[:, :columns], torch.where(empty, 0, scale).squeeze(2)


def _half_below(values: Tensor) -> Tensor:
    """The float16 next to float32 `values` ≥ 0 that is not larger, but at least the least one above 0."""
    half = values.half()
    above = half.isfinite() & (half.float() > values)
    return (half.view(torch.int16) - above.to(torch.int16)).view(torch.float16).clamp(min=_LEAST_HALF)


def _run_codes(runs: Tensor, scale: Tensor) -> Tensor:
    return (runs / scale.float()).round().clamp(-_RUN_LIMIT, _RUN_LIMIT)


def _run_error(runs: Tensor, scale: Tensor) -> Tensor:
    return (_run_codes(runs, scale) * scale.float() - runs).square().sum(dim=2, keepdim=True)


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 `[5 · ⌈n·m / 8⌉]` of codes int8 `[n, m]` in [-15, 15].

    Row after row, eight codes + 15 are a number of 40 bits, the first in the lowest five, and its bytes the lowest
    first. What is left of the last number is filled with 31, which is no code.
    """
    flat = codes.flatten().to(torch.int64) + _RUN_LIMIT
    eights = pad(flat, (0, -len(flat) % 8), value=_NO_CODE).view(-1, 8)
    return (eights << _SHIFTS).sum(dim=1).view(torch.uint8).view(-1, 8)[:, :5].flatten()


def unpack_codes(packed: Tensor) -> Tensor:
    """int8 `[8 · k / 5]` in [-15, 16] of uint8 `[k]`, in `pack_codes`' order; 16 is no code."""
    numbers = pad(packed.view(-1, 5), (0, 3)).view(torch.int64)
    return ((numbers >> _SHIFTS) & _NO_CODE).flatten().to(torch.int8) - _RUN_LIMIT


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


def read_weights(paths: Sequence[Path], dtype: StoredDtype | None = None) -> dict[str, Tensor]:
    """All weights of the files, float32; codes are multiplied by their scales, bits stay uint8.

    Raises ConfigError for a file that is no safetensors, for tensors that are no stored weights, and where `dtype` is
    given for weights that `weights_file` would not have stored so.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            stored = load_file(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} is no safetensors file ({error}); get the checkpoint again") from error
        weights = _multiplied_out(stored, path)
        if dtype is not None:
            _check_forms(weights, stored, dtype, path)
        found |= weights
    return found


def _check_forms(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor], dtype: StoredDtype, path: Path) -> None:
    for name, form in stored_forms(stored).items():
        expected = _form_for(weights[name], dtype)
        if form != expected:
            raise ConfigError(
                f"{path} holds {name!r} as {form}; expected {expected}, for the checkpoint's config says {dtype}: get "
                f"the checkpoint again"
            )


def stored_forms(stored: Mapping[str, Tensor]) -> dict[str, str]:
    """The form of each weight among a file's tensors: a StoredDtype, or the type of what is none."""
    forms = {codes: form for form, codes in _CODES.items()}
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in stored.items()}
    return {
        name: forms.get(tensor.dtype, kinds[name]) if name + _SCALE in stored else kinds[name]
        for name, tensor in stored.items()
        if not name.endswith(_SCALE)
    }


def _multiplied_out(stored: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    for name, tensor in sorted(stored.items()):  # a weight before its scales
        problem = _problem_of_scale(name, stored) if name.endswith(_SCALE) else _problem_of_weight(name, stored)
        if problem:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(
                f"{path} holds {name!r} of {kind} {list(tensor.shape)} {problem}; expected float32, float16, int8 with "
                f"a float32 scale a row, or int5 with a float16 scale each {_RUN} entries (signs: uint8): get the "
                f"checkpoint again"
            )
    scales = {name: stored.get(name + _SCALE) for name in stored if not name.endswith(_SCALE)}
    return {name: _weight(stored[name], scale) for name, scale in scales.items()}


def _weight(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """float32 of a stored tensor, or of codes and their scales; bits as they are."""
    if scale is None:
        return tensor if tensor.dtype == torch.uint8 else tensor.float()
    if tensor.dtype == torch.int8:
        return tensor.float() * scale[:, None]
    rows = len(scale)
    columns = _code_count(tensor) // rows
    return (
        unpack_codes(tensor)[: rows * columns].view(rows, columns)
        * scale.float().repeat_interleave(_RUN, dim=1)[:, :columns]
    )


def _problem_of_weight(name: str, stored: Mapping[str, Tensor]) -> str:
    """What is wrong with a weight or its codes beside the other tensors of its file; "" for nothing."""
    tensor = stored[name]
    if name.endswith(_BITS):
        return "" if tensor.dtype == torch.uint8 and name + _SCALE not in stored else "for bits"
    if tensor.dtype not in _CODES.values():
        return _problem_of_floats(tensor)
    if name + _SCALE not in stored:
        return "without scales"
    if tensor.dtype == torch.uint8:
        return _problem_of_packed(tensor)
    return "" if tensor.numel() == 0 or int(tensor.min()) >= -_CODE_LIMIT else f"with codes below -{_CODE_LIMIT}"


def _problem_of_floats(tensor: Tensor) -> str:
    if tensor.dtype not in _FLOATS:
        return "entries"
    return "" if bool(tensor.isfinite().all()) else "of which some are not finite"


def _problem_of_packed(packed: Tensor) -> str:
    if packed.ndim != 1 or packed.numel() == 0 or packed.numel() % 5:
        return "that are no fives of bytes"
    codes, count = unpack_codes(packed), _code_count(packed)
    within = len(codes) - count == 8 or bool((codes[:count] > _RUN_LIMIT).any())
    return f"with codes of {_NO_CODE} before the end" if within else ""


def _code_count(packed: Tensor) -> int:
    """How many codes there are, when only the last of all eights may hold less than eight."""
    return 8 * (len(packed) // 5) - int((unpack_codes(packed[-5:]) > _RUN_LIMIT).sum())


def _problem_of_scale(name: str, stored: Mapping[str, Tensor]) -> str:
    scale, codes = stored[name], stored.get(name.removesuffix(_SCALE))
    if codes is None or codes.dtype not in _CODES.values():
        return "without codes"
    if not (_fits_rows(scale, codes) if codes.dtype == torch.int8 else _fits_runs(scale, codes)):
        return f"beside codes {list(codes.shape)}"
    return "" if bool((scale.isfinite() & (scale >= 0)).all()) else "of which some are negative or not finite"


def _fits_rows(scale: Tensor, codes: Tensor) -> bool:
    return scale.dtype == torch.float32 and codes.ndim == 2 and scale.shape == codes.shape[:1]


def _fits_runs(scale: Tensor, packed: Tensor) -> bool:
    """Whether there are whole rows of so many runs in packed codes without a problem of their own."""
    if scale.dtype != torch.float16 or scale.ndim != 2 or scale.numel() == 0:
        return False
    columns, rest = divmod(_code_count(packed), len(scale))
    return rest == 0 and -(-columns // _RUN) == scale.shape[1]


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
