"""A run's saved state: weights, the optimizer's moments and the position, written whole or not at all.

    state/state.json              step and other counters, and fingerprints of what must not change
    state/weights.safetensors
    state/optimizer.safetensors   moments by "WEIGHT::KIND"; absent moments start anew

`state.previous/` is the one before, there only from one rename to the next.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from refrag_core.digests import JSON, digest_json
from refrag_core.errors import ConfigError, RunLockedError, TrainingDivergedError, TrainingStateError

STATE_FILE = "state.json"
WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINING_FILE = "training.json"
EVALUATION_FILE = "evaluation.json"

_STATE, _PREVIOUS = "state", "state.previous"


@dataclass(frozen=True, slots=True)
class Bindings:
    """What a run and its continuation must have in common."""

    settings: Mapping[str, JSON]
    """All settings that decide what a step computes."""
    fingerprints: Mapping[str, tuple[str, str | None]]
    """Of whatever else does, by its key in the JSON: (what it is called, fingerprint or None for none of it)."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """A state that fits the run."""

    folder: Path
    counters: Mapping[str, Any]
    """Step and whatever else was given to `save_state`."""

    def weights(self, device: torch.device) -> dict[str, Tensor]:
        """All saved weights by name. Raises TrainingStateError."""
        return self._load(WEIGHTS_FILE, device)

    def moments(self, device: torch.device) -> Iterator[tuple[str, str, Tensor]]:
        """(weight, kind, value) of every moment. Raises TrainingStateError."""
        for key, value in self._load(OPTIMIZER_FILE, device).items():
            name, _, kind = key.partition("::")
            yield name, kind, value

    def _load(self, name: str, device: torch.device) -> dict[str, Tensor]:
        try:
            loaded: dict[str, Tensor] = load_file(self.folder / name, device=str(device))
        except (OSError, SafetensorError) as error:
            raise unusable(self.folder / name, str(error)) from error
        return loaded


def unusable(path: Path, found: str) -> TrainingStateError:
    """The error for a state that cannot be gone on from."""
    return TrainingStateError(
        f"{path} cannot be resumed from ({found}); expected what the run saved: delete {path.parent} to start again"
    )


def save_state(
    folder: Path,
    *,
    bindings: Bindings,
    counters: Mapping[str, JSON],
    weights: Mapping[str, Tensor],
    moments: Mapping[tuple[str, str], Tensor],
) -> None:
    """Write `folder/state`, the whole or nothing of it; `moments` are by (weight, kind).

    Raises TrainingDivergedError, with the state before it kept, for weights that are no numbers.
    """
    _check_finite(folder, weights, counters)
    temporary = folder / f"{_STATE}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, temporary / WEIGHTS_FILE)
    flat = {f"{name}::{kind}": value.detach().contiguous() for (name, kind), value in moments.items()}
    save_file(flat, temporary / OPTIMIZER_FILE)
    fingerprints = {key: found for key, (_, found) in bindings.fingerprints.items()}
    state = {**counters, "config": digest_json(bindings.settings), "settings": bindings.settings, **fingerprints}
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    final, previous = folder / _STATE, folder / _PREVIOUS
    shutil.rmtree(previous, ignore_errors=True)
    if final.exists():
        final.rename(previous)
    temporary.rename(final)
    shutil.rmtree(previous, ignore_errors=True)


def _check_finite(folder: Path, weights: Mapping[str, Tensor], counters: Mapping[str, JSON]) -> None:
    odd = [name for name, weight in weights.items() if not bool(torch.isfinite(weight).all())]
    if odd:
        raise diverged(folder, f"the weights of {odd[0]} are", counters["step"])


def diverged(folder: Path, what: str, step: JSON) -> TrainingDivergedError:
    """The error for numbers that are none any more; `what` ends with its verb."""
    return TrainingDivergedError(
        f"{what} not a number at step {step}; expected finite ones: lower the learning rates and start again in "
        f"another output folder; what {folder} holds of the steps before is kept"
    )


def load_state(folder: Path, bindings: Bindings) -> SavedState | None:
    """The state in `folder`, or the one before where a kill hit the moment between the two; None without any.

    Raises ConfigError when it is of a run with other settings or other data, and TrainingStateError when it is
    damaged.
    """
    for name in (_STATE, _PREVIOUS):
        path = folder / name / STATE_FILE
        if path.is_file():
            state = _read(path)
            _check_bindings(path.parent, state, bindings)
            return SavedState(path.parent, state)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        assert {"step", "elapsed", "config"} <= state.keys()
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise unusable(path, str(error) or "it lacks its counters") from error
    assert isinstance(state, dict)
    return state


def _check_bindings(folder: Path, state: Mapping[str, Any], bindings: Bindings) -> None:
    known = {"config": ("settings", digest_json(bindings.settings)), **bindings.fingerprints}
    for key, (name, found) in known.items():
        if state.get(key) == found:
            continue
        different = _differences(state.get("settings"), bindings.settings) if key == "config" else ""
        raise ConfigError(
            f"{folder} was saved by a run with other {name}{different}; expected the same to resume: take another "
            f"output folder, and give that run's checkpoint as `checkpoint` to go on from its weights"
        )


def _differences(saved: Any, settings: Mapping[str, JSON]) -> str:
    """What differs, where the state says what it was."""
    # As JSON has them: tuples are lists there.
    now = json.loads(json.dumps(settings))
    if not isinstance(saved, dict):
        return ""
    odd = sorted(key for key in now.keys() | saved.keys() if now.get(key) != saved.get(key))
    return f" ({', '.join(f'{key} {saved.get(key)!r}, now {now.get(key)!r}' for key in odd[:3])})"


@contextmanager
def claimed(folder: Path, *, active: bool = True) -> Iterator[None]:
    """Hold a run's folder, without what kills left half-written in it; the kernel lets go with the process.

    Args:
        active: False in all processes of a run but the first, which holds it for them.

    Raises RunLockedError while another live process holds it.
    """
    if not active:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockedError(
                f"another process trains in {folder}; expected it to be free: wait for its end, or give another output "
                f"folder"
            ) from None
        for path in folder.glob("*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        os.close(handle)


def was_finished(folder: Path, *, part: str | None = None) -> bool:
    """Whether the run in `folder` came to its very end: its checkpoint's record holds the whole evaluation.

    Args:
        part: of the record that the evaluation is in, None for the record itself.
    """
    try:
        record = json.loads((folder / "checkpoint" / TRAINING_FILE).read_text(encoding="utf-8"))
        evaluation = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
        return bool((record if part is None else record[part])["evaluation"] == evaluation)
    except (OSError, ValueError, KeyError, TypeError):
        return False
