"""`refrag checkpoint average`: one checkpoint whose weights are the mean of several's.

Runs from one start with other seeds or tasks end in places whose mean is often better than each of them, and costs
nothing to run (model soups, arXiv:2203.05482). The decoder's updates are multiplied out, averaged as whole matrices and
stored as what comes closest to them again.
"""

import json
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from refrag_core.adapter import Adapter
from refrag_core.checkpoint import AdapterConfig, Checkpoint
from refrag_core.checkpoint_folder import new_checkpoint, trained_folder
from refrag_core.encoder import ENTRYWISE
from refrag_core.errors import ConfigError, UsageError
from refrag_core.stored_weights import write_weights
from refrag_core.training.low_rank import closest_update
from refrag_core.training.run_state import TRAINING_FILE

_FEWEST = 2
_REMEDY = "average runs that began from one checkpoint"

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class AverageOptions:
    """How the checkpoints are weighed and the decoder's mean update is stored."""

    weights: Sequence[float] = ()
    """One above 0 for each checkpoint, whatever their sum; none: all equal."""
    adapter_rank: int | None = None
    """Rank of the mean update; None: the highest of theirs."""
    adapter_signs: bool | None = None
    """Whether signs are stored for what the rank leaves out; None: where one of them has signs."""


@dataclass(frozen=True, slots=True)
class AverageReport:
    """What `average_checkpoints` made."""

    output: str
    fingerprint: str
    encode_fingerprint: str
    weights: Sequence[float]
    """Of each checkpoint, 1 together."""
    distances: Sequence[float]
    """Of each checkpoint, ‖own − mean‖ / ‖mean‖ over the decoder's whole updates; empty without an adapter, infinite
    where the mean is nothing and the own one is not."""
    relative_error: float
    """‖stored − mean‖ / ‖mean‖ over the decoder's whole updates: what rank and signs could not hold, before what is
    stored is rounded to float16; 0 without an adapter."""


def average_checkpoints(
    checkpoints: Sequence[Checkpoint], output: Path, options: AverageOptions | None = None
) -> AverageReport:
    """Write the weighted mean of trained checkpoints to the folder `output`, its config last.

    Encoder body, projection, policy and the decoder's update are averaged; encoder, update and a trained policy are
    stored in float16, the projection in float32. All else, such as the default chunk size and how encoder and decoder
    are named, is the first one's. What each was trained on goes into its training.json. A checkpoint that is in
    `output` is replaced.

    Raises UsageError for fewer than two checkpoints, for weights that do not fit them and for an output that is
    something else, ConfigError for checkpoints that differ in more than their weights, and what loading them raises.
    """
    options = options or AverageOptions()
    weights = _shares(options.weights, len(checkpoints))
    folders = [trained_folder(checkpoint, "to average") for checkpoint in checkpoints]
    origins = [_origin(*each) for each in zip(checkpoints, folders, weights, strict=True)]
    for checkpoint, own in zip(checkpoints, folders, strict=True):
        _expect_alike(checkpoints[0], checkpoint)
        if own.resolve() == output.resolve():
            raise UsageError(f"{output} is one of the checkpoints; expected another folder for --output")
    with new_checkpoint(output) as folder:
        distances, error = _write(checkpoints, weights, folder, options)
        record = json.dumps({"averaged": origins}, indent=2)
        (folder / TRAINING_FILE).write_text(f"{record}\n", encoding="utf-8")
        made = Checkpoint.load(folder)
    return AverageReport(
        output=str(output),
        fingerprint=made.fingerprint,
        encode_fingerprint=made.encode_fingerprint,
        weights=weights,
        distances=distances,
        relative_error=error,
    )


def _shares(weights: Sequence[float], count: int) -> list[float]:
    """The weights as parts of 1."""
    if count < _FEWEST:
        raise UsageError(f"checkpoints given: {count}; expected at least {_FEWEST} to average")
    given = list(weights) or [1.0] * count
    if len(given) != count or not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise UsageError(
            f"weights are {', '.join(map(str, given))} for {count} checkpoints; expected one number above 0 for each"
        )
    return [weight / sum(given) for weight in given]


def _expect_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Raise ConfigError unless their weights mean the same things."""
    own, its = _meaning(first), _meaning(other)
    odd = next((name for name in own if own[name] != its[name]), None)
    if odd is not None:
        raise ConfigError(
            f"checkpoints {first.folder} and {other.folder} differ in {odd} ({own[odd]} and {its[odd]}); expected the "
            f"same but for their weights: {_REMEDY}"
        )


def _meaning(checkpoint: Checkpoint) -> dict[str, Any]:
    """All of a checkpoint's config that two must share for a mean to make sense."""
    config = checkpoint.config
    return {
        "encoder": replace(config.encoder, reference=""),
        "decoder": replace(config.decoder, reference=""),
        "a trained encoder": bool(config.encoder_files),
        "a trained decoder update": config.adapter is not None,
        "policy": replace(config.policy, dtype=None),
        "prompt template": config.template.to_json(),
        "chunk sizes": config.chunk_sizes,
    }


def _write(
    checkpoints: Sequence[Checkpoint], weights: Sequence[float], folder: Path, options: AverageOptions
) -> tuple[list[float], float]:
    """The mean as a checkpoint in `folder`; how far each is from it, and what storing its update lost."""
    first = checkpoints[0]
    config, distances, error = first.config, list[float](), 0.0
    layers = [checkpoint.load_trained_layers() for checkpoint in checkpoints]
    present = [state for state in layers if state is not None]
    if present:
        files = write_weights(
            folder, "encoder", _mean_state(present, weights, "encoder"), dtype="float16", exact=ENTRYWISE
        )
        config = replace(config, encoder_files=files)
    adapters = [adapter for adapter in (checkpoint.load_adapter() for checkpoint in checkpoints) if adapter is not None]
    if adapters:
        state, distances, error = _mean_adapter(adapters, weights, options)
        files = write_weights(folder, "adapter", state, dtype="float16")
        config = replace(config, adapter=AdapterConfig(adapters[0].scale, files))
    config = replace(config, projection_dtype="float32", policy=replace(config.policy, dtype=None))
    Checkpoint(
        config=config,
        projection=_mean_module([checkpoint.projection for checkpoint in checkpoints], weights, "projection"),
        policy=_mean_module([checkpoint.policy for checkpoint in checkpoints], weights, "policy"),
        folder=folder,
    ).save(folder)
    return distances, error


def _origin(checkpoint: Checkpoint, folder: Path, weight: float) -> dict[str, Any]:
    path = folder / TRAINING_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); expected a record: get it again, or delete it") from error
    return {"fingerprint": checkpoint.fingerprint, "weight": weight, "training": record}


# --- means


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """In float64, as float32."""
    total = sum(weight * tensor.double() for tensor, weight in zip(tensors, weights, strict=True))
    assert isinstance(total, Tensor)
    return total.float()


def _mean_state(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float], part: str) -> dict[str, Tensor]:
    shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        raise ConfigError(
            f"the checkpoints' {part} weights differ in names or shapes; expected the same in each: {_REMEDY}"
        )
    return {name: _mean([state[name] for state in states], weights) for name in states[0]}


def _mean_module(modules: Sequence[Module], weights: Sequence[float], part: str) -> Module:
    made = deepcopy(modules[0])
    made.load_state_dict(_mean_state([module.state_dict() for module in modules], weights, part))
    return made


@torch.no_grad()
def _mean_adapter(
    adapters: Sequence[Adapter], weights: Sequence[float], options: AverageOptions
) -> tuple[dict[str, Tensor], list[float], float]:
    """The stored mean, each adapter's distance from the mean, and the stored one's; one layer at a time."""
    names, scale = adapters[0].layers, adapters[0].scale
    if any(adapter.layers != names for adapter in adapters):
        raise ConfigError(
            f"the checkpoints adapt other layers of the decoder; expected the same adapter_targets in each: {_REMEDY}"
        )
    rank = max(adapter.rank for adapter in adapters) if options.adapter_rank is None else options.adapter_rank
    signs = any(adapter.has_signs for adapter in adapters) if options.adapter_signs is None else options.adapter_signs
    state: dict[str, Tensor] = {}
    apart, lost, size = [0.0] * len(adapters), 0.0, 0.0
    for name in names:
        updates = _updates(adapters, name)
        mean = _mean(updates, weights)
        stored = closest_update(mean, rank, scale, signs=signs)
        state |= stored.state(name)
        apart = [total + _squares(update - mean) for total, update in zip(apart, updates, strict=True)]
        lost += _squares(stored.dense(scale) - mean)
        size += _squares(mean)
    return state, [_share(squares, size) for squares in apart], _share(lost, size)


def _share(squares: float, whole: float) -> float:
    """Of a length in another, by their squares."""
    if not squares:
        return 0.0
    return math.sqrt(squares / whole) if whole else math.inf


def _updates(adapters: Sequence[Adapter], name: str) -> list[Tensor]:
    """Each adapter's whole update of a layer. Raises ConfigError where their shapes differ."""
    found = [adapter.update(name).dense(adapter.scale) for adapter in adapters]
    if any(update.shape != found[0].shape for update in found):
        raise ConfigError(f"the checkpoints' updates of {name!r} differ in shape; expected the same: {_REMEDY}")
    return found


def _squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
