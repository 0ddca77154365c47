"""Putting a finished checkpoint in the place of an older one."""

from pathlib import Path

from refrag_core.checkpoint import CONFIG_FILE
from refrag_core.errors import UsageError
from refrag_core.training.run_state import TRAINING_FILE

_MODEL_CARD = "README.md"


def expect_checkpoint_folder(output: Path) -> None:
    """Raise UsageError unless `output` is new, empty, or holds a checkpoint, which `install_checkpoint` replaces."""
    held = {path.name for path in output.iterdir()} if output.is_dir() else set()
    strange = {name for name in held - {_MODEL_CARD, TRAINING_FILE} if not name.endswith(".safetensors")}
    if output.is_file() or (strange and CONFIG_FILE not in held):
        raise UsageError(f"{output} holds files and no checkpoint; expected a new folder, or a checkpoint to replace")


def install_checkpoint(made: Path, output: Path) -> None:
    """Move all files of the folder `made` over, the config last, then drop weights that it does not name.

    Without a config it is no checkpoint: one that is half moved is none. A model card that was there stays.
    """
    output.mkdir(exist_ok=True)
    (output / CONFIG_FILE).unlink(missing_ok=True)
    names = sorted((path.name for path in made.iterdir()), key=lambda name: name == CONFIG_FILE)
    for name in names:
        (made / name).replace(output / name)
    for path in (*output.glob("*.safetensors"), output / TRAINING_FILE):
        if path.name not in names:
            path.unlink(missing_ok=True)
