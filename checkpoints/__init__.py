"""Trained checkpoints that come with refrag: a folder each, with its model card in README.md.

`refrag checkpoint pack` makes them, and a build takes the one of its decoder unless another is named.
"""

from pathlib import Path

ROOT = Path(__file__).parent

_CONFIG_FILE = "config.json"


def shipped() -> list[Path]:
    """Folders of the checkpoints that are there, by name; one that is being packed has a name with a dot before it."""
    return sorted(path.parent for path in ROOT.glob(f"[!.]*/{_CONFIG_FILE}"))
