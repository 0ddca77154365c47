"""Folders of checkpoints that are made of others: where they may come from, and putting one in an older one's place."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from refrag_core.checkpoint import CONFIG_FILE, FORMAT, POLICY_FILE, PROJECTION_FILE, Checkpoint
from refrag_core.errors import ConfigError, UsageError
from refrag_core.training.run_state import TRAINING_FILE

_MODEL_CARD = "README.md"
_WEIGHTS = re.compile(rf"{re.escape(PROJECTION_FILE)}|{re.escape(POLICY_FILE)}|(encoder|adapter)-\d{{5}}\.safetensors")
_EXPECTED = "expected a new folder, or a checkpoint to replace"


def trained_folder(checkpoint: Checkpoint, purpose: str) -> Path:
    """The checkpoint's folder, when it holds trained weights over models that others can follow.

    Args:
        purpose: what they are wanted for, like "to pack".

    Raises ConfigError for any other.
    """
    folder = checkpoint.folder
    if folder is None or not checkpoint.config.trained:
        raise ConfigError(f"checkpoint {folder} is not trained; expected trained weights {purpose}: train it first")
    if checkpoint.config.carries_models:
        raise ConfigError(
            f"checkpoint {folder} carries a model of its own; expected references that others can follow {purpose}: "
            f"name a package, a hub id or a short name in its {CONFIG_FILE}"
        )
    return folder


@contextmanager
def new_checkpoint(output: Path) -> Iterator[Path]:
    """An empty folder for a checkpoint, which takes the place of `output` when the context ends without an error.

    A model card that was there stays. Raises UsageError unless `output` is new, empty, or holds a checkpoint.
    """
    _expect_checkpoint_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        yield Path(folder)
        _install(Path(folder), output)


def _expect_checkpoint_folder(output: Path) -> None:
    if output.is_file():
        raise UsageError(f"{output} is a file; {_EXPECTED}")
    held = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if CONFIG_FILE in held:
        if not _is_ours(output / CONFIG_FILE):
            raise UsageError(f"{output / CONFIG_FILE} is no checkpoint's; {_EXPECTED}")
    elif strange := sorted(name for name in held - {_MODEL_CARD, TRAINING_FILE} if not _WEIGHTS.fullmatch(name)):
        raise UsageError(f"{output} holds {strange[0]} and no checkpoint; {_EXPECTED}")


def _is_ours(config: Path) -> bool:
    try:
        value = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(value, dict) and value.get("format") == FORMAT


def _install(made: Path, output: Path) -> None:
    """Move all files over, the config last, then drop weights that it does not name. Without a config it is none."""
    output.mkdir(exist_ok=True)
    (output / CONFIG_FILE).unlink(missing_ok=True)
    names = sorted((path.name for path in made.iterdir()), key=lambda name: name == CONFIG_FILE)
    for name in names:
        (made / name).replace(output / name)
    held = [path for path in output.iterdir() if path.name == TRAINING_FILE or _WEIGHTS.fullmatch(path.name)]
    for path in held:
        if path.name not in names:
            path.unlink(missing_ok=True)
