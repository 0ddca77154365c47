"""`refrag checkpoint average`: one checkpoint whose weights are the mean of several's.

Runs from one start with other seeds or tasks end in places whose mean is often better than each of them, and costs
nothing to run (model soups, arXiv:2203.05482). The decoder's updates are multiplied out, averaged as whole matrices and
stored as what comes closest to them again.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from refrag_core.adapter import Adapter
from refrag_core.checkpoint import AdapterConfig, Checkpoint
from refrag_core.checkpoint_folder import expect_checkpoint_folder, install_checkpoint
from refrag_core.encoder import ENTRYWISE
from refrag_core.errors import ConfigError, UsageError
from refrag_core.stored_weights import write_weights
from refrag_core.training.low_rank import closest_update
from refrag_core.training.run_state import TRAINING_FILE

_FEWEST = 2

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
    """Of each checkpoint, ‖own − mean‖ / ‖mean‖ over the decoder's whole updates; empty without an adapter."""
    relative_error: float
    """‖stored − mean‖ / ‖mean‖ over the decoder's whole updates: what rank and signs could not hold."""


def average_checkpoints(
    checkpoints: Sequence[Checkpoint], output: Path, options: AverageOptions | None = None
) -> AverageReport:
    """Write the weighted mean of trained checkpoints to the folder `output`, its config last.

    Encoder body, projection, policy and the decoder's update are averaged; encoder and update are stored in float16,
    the projection in float32. What each was trained on goes into its training.json. A checkpoint that is in `output`
    is replaced.

    Raises UsageError for fewer than two checkpoints, for weights that do not fit them and for an output that is
    something else, ConfigError for checkpoints that differ in more than their weights, and what loading them raises.
    """
    options = options or AverageOptions()
    weights = _shares(options.weights, len(checkpoints))
    for checkpoint in checkpoints:
        _expect_alike(checkpoints[0], checkpoint)
        if checkpoint.folder is not None and checkpoint.folder.resolve() == output.resolve():
            raise UsageError(f"{output} is one of the checkpoints; expected another folder for --output")
    expect_checkpoint_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        distances, error = _write(checkpoints, weights, Path(folder), options)
        made = Checkpoint.load(Path(folder))
        report = AverageReport(
            output=str(output),
            fingerprint=made.fingerprint,
            encode_fingerprint=made.encode_fingerprint,
            weights=weights,
            distances=distances,
            relative_error=error,
        )
        install_checkpoint(Path(folder), output)
    return report


def _shares(weights: Sequence[float], count: int) -> list[float]:
    """The weights as parts of 1."""
    if count < _FEWEST:
        raise UsageError(f"{count} checkpoint is given; expected at least {_FEWEST} to average")
    given = list(weights) or [1.0] * count
    if len(given) != count or not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise UsageError(
            f"weights are {', '.join(map(str, given))} for {count} checkpoints; expected one number above 0 for each"
        )
    return [weight / sum(given) for weight in given]


def _expect_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Raise ConfigError unless their weights mean the same things."""
    for checkpoint in (first, other):
        if checkpoint.folder is None or not checkpoint.config.trained:
            raise ConfigError(f"checkpoint {checkpoint.folder} is not trained; expected trained weights to average")
    own, its = _meaning(first), _meaning(other)
    odd = [name for name in own if own[name] != its[name]]
    if odd:
        raise ConfigError(
            f"checkpoints {first.folder} and {other.folder} differ in {', '.join(odd)}; expected the same but for "
            f"their weights: average runs that began from one checkpoint"
        )


def _meaning(checkpoint: Checkpoint) -> dict[str, Any]:
    """All of a checkpoint's config that two must share for a mean to make sense."""
    config = checkpoint.config
    return {
        "encoder": replace(config.encoder, reference=""),
        "decoder": replace(config.decoder, reference=""),
        "trained encoder layers": bool(config.encoder_files),
        "adapter": None if config.adapter is None else config.adapter.scale,
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
        projection=_mean_module([checkpoint.projection for checkpoint in checkpoints], weights),
        policy=_mean_module([checkpoint.policy for checkpoint in checkpoints], weights),
        folder=folder,
    ).save(folder)
    record = {"averaged": [_origin(*pair) for pair in zip(checkpoints, weights, strict=True)]}
    (folder / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return distances, error


def _origin(checkpoint: Checkpoint, weight: float) -> dict[str, Any]:
    path = Path(checkpoint.folder or ".", TRAINING_FILE)
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
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
        raise ConfigError(f"the checkpoints' {part} has other weights; expected the same names and shapes in each")
    return {name: _mean([state[name] for state in states], weights) for name in states[0]}


def _mean_module(modules: Sequence[Module], weights: Sequence[float]) -> Module:
    made = deepcopy(modules[0])
    made.load_state_dict(_mean_state([module.state_dict() for module in modules], weights, type(made).__name__))
    return made


@torch.no_grad()
def _mean_adapter(
    adapters: Sequence[Adapter], weights: Sequence[float], options: AverageOptions
) -> tuple[dict[str, Tensor], list[float], float]:
    """The stored mean, each adapter's distance from the mean, and the stored one's; one layer at a time."""
    names, scale = adapters[0].layers, adapters[0].scale
    rank = options.adapter_rank or max(adapter.rank for adapter in adapters)
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
    share: Callable[[float], float] = lambda squares: math.sqrt(squares / size) if size else 0.0  # noqa: E731
    return state, [share(squares) for squares in apart], share(lost)


def _updates(adapters: Sequence[Adapter], name: str) -> list[Tensor]:
    """Each adapter's whole update of a layer. Raises ConfigError where they adapt other layers."""
    if any(adapter.layers != adapters[0].layers for adapter in adapters):
        raise ConfigError(
            "the checkpoints adapt other layers of the decoder; expected the same adapter_targets in each"
        )
    found = [adapter.update(name).dense(adapter.scale) for adapter in adapters]
    if any(update.shape != found[0].shape for update in found):
        raise ConfigError(f"the checkpoints' updates of {name!r} have other shapes; expected the same decoder")
    return found


def _squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
