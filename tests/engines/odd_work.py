"""Work for engines in tests, in a module that workers import quickly."""

import time
from pathlib import Path


def fail_oddly(item: int) -> int:
    """An error that is none of refrag's."""
    if item == 1:
        raise LookupError("nobody knows")
    return item


def hang_once(folder: Path, item: int) -> int:
    """The first that comes to item 2 never ends."""
    if item == 2:
        try:
            (folder / "hangs").touch(exist_ok=False)
        except FileExistsError:
            return item
        time.sleep(600)
    return item


def node_of(item: int) -> str:
    """Where it ran."""
    import ray

    time.sleep(0.3)
    return str(ray.get_runtime_context().get_node_id())
