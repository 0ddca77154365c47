"""`refrag checkpoint pack`: a trained checkpoint in fewer bytes, to be shipped.

Each part has a form of its own. In int8 matrices have one scale a row, in int5 one each 32 entries; vectors stay
float16. What is packed is a checkpoint of its own, with fingerprints of its own: its encoder's embeddings differ.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from refrag_core.adapter import Adapter, LayerUpdate
from refrag_core.checkpoint import CONFIG_FILE, POLICY_FILE, PROJECTION_FILE, AdapterConfig, Checkpoint
from refrag_core.checkpoint_folder import new_checkpoint, trained_folder
from refrag_core.encoder import ENTRYWISE
from refrag_core.errors import ConfigError, ModelNotFoundError, UsageError
from refrag_core.models import SHORT_NAMES, fingerprint_model, resolve_model
from refrag_core.stored_weights import StoredDtype, write_weights
from refrag_core.training.low_rank import closest_factors
from refrag_core.training.run_state import TRAINING_FILE

_ORTHOGONAL = 1e-2
"""Of columns stored in float16."""
_PARTS = ("encoder", "adapter", "projection", "policy")
_PATHS = ("data", "output", "instructions", "held_out_instructions", "checkpoint", "encoder", "decoder", "retriever")
"""Settings of a training config that may name places of the machine that trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackOptions:
    """The form of each part."""

    encoder: StoredDtype = "int8"
    adapter: StoredDtype = "int8"
    projection: StoredDtype = "int8"
    policy: StoredDtype = "int8"
    adapter_rank: int | None = None
    """Cut the decoder's update to this rank; None leaves it."""
    chunk_size: int | None = None
    """Chunk size of an index that is built without saying; None leaves it."""


@dataclass(frozen=True, slots=True)
class PartReport:
    """What became of one part."""

    dtype: str
    weights: int
    """Numbers, without the scales of codes; a bit of signs is one."""
    bytes: int
    bytes_before: int
    relative_error: float
    """‖stored − given‖ / ‖given‖ over all weights; of an adapter, of its layers' whole updates."""


@dataclass(frozen=True, slots=True)
class PackReport:
    """What `pack_checkpoint` made."""

    output: str
    fingerprint: str
    encode_fingerprint: str
    bytes: int
    """Of config and weights."""
    bytes_before: int
    parts: Mapping[str, PartReport]
    notes: Sequence[str]
    """What a reader elsewhere may stumble over."""


def pack_options(
    dtype: str, parts: Sequence[str] = (), adapter_rank: int | None = None, chunk_size: int | None = None
) -> PackOptions:
    """The options of a command line: `dtype` for all parts, and `PART=DTYPE` for single ones. Raises UsageError."""
    known = get_args(StoredDtype)
    if dtype not in known:
        raise UsageError(f"--dtype is {dtype!r}; expected one of {', '.join(known)}")
    forms = dict.fromkeys(_PARTS, dtype)
    for given in parts:
        part, _, form = given.partition("=")
        if part not in forms or form not in known:
            raise UsageError(
                f"--part is {given!r}; expected one of {', '.join(_PARTS)}, then '=' and one of {', '.join(known)}"
            )
        forms[part] = form
    return PackOptions(**cast(dict[str, Any], forms), adapter_rank=adapter_rank, chunk_size=chunk_size)


def pack_checkpoint(checkpoint: Checkpoint, output: Path, options: PackOptions | None = None) -> PackReport:
    """Write the checkpoint to the folder `output` in the forms of `options`, its config last.

    A checkpoint that is there is replaced; a model card beside it stays. Names of models are made ones that mean the
    same on any machine, where `refrag_core.models.SHORT_NAMES` has one.

    Raises ConfigError for a checkpoint without trained weights or not trained for the chunk size, UsageError for an
    output that is something else, and what loading the checkpoint's weights raises.
    """
    options = options or PackOptions()
    source = _source(checkpoint, output)
    if options.chunk_size is not None and options.chunk_size not in checkpoint.config.chunk_sizes:
        known = ", ".join(map(str, checkpoint.config.chunk_sizes))
        raise ConfigError(f"checkpoint {source} is trained for chunk sizes {known}, not {options.chunk_size}")
    with new_checkpoint(output) as folder:
        notes = _write(checkpoint, folder, options)
        made = Checkpoint.load(folder)
        parts = {part: _part_report(part, getattr(options, part), checkpoint, made) for part in _PARTS}
        report = PackReport(
            output=str(output),
            fingerprint=made.fingerprint,
            encode_fingerprint=made.encode_fingerprint,
            bytes=_whole_size(made),
            bytes_before=_whole_size(checkpoint),
            parts={part: found for part, found in parts.items() if found.weights},
            notes=notes,
        )
        _copy_record(source, folder)
    return report


def _source(checkpoint: Checkpoint, output: Path) -> Path:
    """Where the checkpoint is, when it can be packed to `output`."""
    folder = trained_folder(checkpoint, "to pack")
    if folder.resolve() == output.resolve():
        raise UsageError(f"{output} is the checkpoint that is to be packed; expected another folder for --output")
    return folder


def _write(checkpoint: Checkpoint, folder: Path, options: PackOptions) -> list[str]:
    """The packed checkpoint but for its training record; what to say about it."""
    layers, adapter, config = checkpoint.load_trained_layers(), checkpoint.load_adapter(), checkpoint.config
    if layers is not None:
        files = write_weights(folder, "encoder", layers, dtype=options.encoder, exact=ENTRYWISE)
        config = replace(config, encoder_files=files)
    if adapter is not None:
        state = _cut(adapter, options.adapter_rank)
        files = write_weights(folder, "adapter", state, dtype=options.adapter)
        config = replace(config, adapter=AdapterConfig(adapter.scale, files))
    encoder, decoder = config.encoder, config.decoder
    config = replace(
        config,
        encoder=replace(encoder, reference=_portable(encoder.reference, encoder.fingerprint)),
        decoder=replace(decoder, reference=_portable(decoder.reference, decoder.fingerprint)),
        policy=replace(config.policy, dtype=options.policy),
        projection_dtype=options.projection,
        chunk_size=options.chunk_size or config.chunk_size,
    )
    replace(checkpoint, config=config, folder=folder).save(folder)
    return [
        f"it names {reference}, a folder of this machine: expected a package, a hub id or a short name"
        for reference in (config.encoder.reference, config.decoder.reference)
        if Path(reference).expanduser().exists()
    ]


@torch.no_grad()
def _cut(adapter: Adapter, rank: int | None) -> Mapping[str, Tensor]:
    """Factors of at most `rank` for the same updates: the leading ones where they are in order, else the closest.

    Signs stay what they are.
    """
    if rank is None:
        return adapter.state
    made = dict(adapter.state)
    for name in adapter.layers:
        given = adapter.update(name)
        down, up = given.down.float(), given.up.float()
        if len(down) > rank:
            cut = (down[:rank], up[:, :rank].contiguous()) if _in_order(up) else closest_factors(up @ down, rank, 1.0)
            made |= LayerUpdate(*cut, given.signs).state(name)
    return made


def _in_order(up: Tensor) -> bool:
    """Whether the columns of `up` `[out, rank]` are orthogonal, the longest first.

    Training leaves a whole update's factors so: in order of what they do to the layer's outputs, which the update
    itself no longer tells.
    """
    gram = up.double().T @ up.double()
    squares = gram.diagonal()
    apart = (gram - torch.diag(squares)).abs().max() <= _ORTHOGONAL * squares.max()
    return bool(apart and (squares[1:] <= squares[:-1] * (1 + _ORTHOGONAL)).all())


def _portable(reference: str, fingerprint: str) -> str:
    """The short name of the very same model, where there is one and it is installed; else the reference."""
    if reference in SHORT_NAMES:
        return reference
    for name in SHORT_NAMES:
        try:
            if fingerprint_model(resolve_model(name)) == fingerprint:
                return name
        except ModelNotFoundError:
            continue
    return reference


# --- files


def _files(part: str, checkpoint: Checkpoint) -> list[str]:
    config = checkpoint.config
    names = {
        "encoder": [file.name for file in config.encoder_files],
        "adapter": [file.name for file in config.adapter.files] if config.adapter else [],
        "projection": [PROJECTION_FILE],
        "policy": [POLICY_FILE],
    }
    return names[part]


def _size(checkpoint: Checkpoint, names: Sequence[str]) -> int:
    return sum(Path(checkpoint.folder or ".", name).stat().st_size for name in names)


def _whole_size(checkpoint: Checkpoint) -> int:
    return _size(checkpoint, [CONFIG_FILE, *(name for part in _PARTS for name in _files(part, checkpoint))])


def _copy_record(source: Path, folder: Path) -> None:
    """What the checkpoint was trained on, without the places of the machine that trained it."""
    path = source / TRAINING_FILE
    if path.is_file():
        record = _without_places(json.loads(path.read_text(encoding="utf-8")))
        (folder / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _without_places(value: Any, name: str = "") -> Any:
    """A record, or a part of it under that name, whose settings name files and folders alone."""
    if isinstance(value, dict):
        return {key: _without_places(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    is_place = name in _PATHS and isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if is_place else value


# --- what was lost


def _part_report(part: str, dtype: str, before: Checkpoint, after: Checkpoint) -> PartReport:
    given, stored = _weights(part, before), _weights(part, after)
    error = size = 0.0
    for own, other in zip(_compared(part, before, given), _compared(part, after, stored), strict=True):
        error += float((other.double() - own.double()).square().sum())
        size += float(own.double().square().sum())
    return PartReport(
        dtype=dtype,
        weights=sum(_count(weight) for weight in stored.values()),
        bytes=_size(after, _files(part, after)),
        bytes_before=_size(before, _files(part, before)),
        relative_error=math.sqrt(error / size) if size else 0.0,
    )


def _weights(part: str, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """All weights of a part, as they are after loading; none where the checkpoint has no such part."""
    if part == "encoder":
        return checkpoint.load_trained_layers() or {}
    if part == "adapter":
        adapter = checkpoint.load_adapter()
        return adapter.state if adapter else {}
    module = checkpoint.projection if part == "projection" else checkpoint.policy
    return module.state_dict()


def _count(weight: Tensor) -> int:
    """Numbers in a tensor; a byte of bits holds eight."""
    return weight.numel() * (8 if weight.dtype == torch.uint8 else 1)


def _compared(part: str, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The tensors that say what a part of the checkpoint with these weights does, by name."""
    if part == "adapter" and checkpoint.config.adapter is not None:
        adapter = Adapter(weights, checkpoint.config.adapter.scale)
        return (adapter.update(name).dense(adapter.scale) for name in adapter.layers)
    return (weights[name] for name in sorted(weights))
