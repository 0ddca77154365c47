"""What every node of a cluster must have before work is sent to it: refrag itself, its packages, and the folders.

The check is sent to the nodes as code, since a node that lacks refrag could not import it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from refrag_core.errors import ClusterError
from refrag_core.storage import is_uri

BASE_MODULES = ("torch", "transformers", "tokenizers", "pyarrow", "faiss")
"""What the stages of any build import."""

_SHOWN = 8

Check = Callable[[str], list[str]]
"""From a node's id to what is wrong there; nothing but the standard library is needed to run it."""


@dataclass(frozen=True, slots=True)
class Needs:
    """What a node must have."""

    modules: Sequence[str] = BASE_MODULES
    readable: Sequence[str] = ()
    """Folders and files that must be there."""
    shared: Sequence[str] = ()
    """Folders in which a node must see what this machine writes, and the other way round."""


def modules_for(locations: Sequence[str]) -> tuple[str, ...]:
    """The modules that a build with these corpora and this output imports on its workers."""
    return (*BASE_MODULES, "obstore") if any(is_uri(location) for location in locations) else BASE_MODULES


def make_check(needs: Needs, token: str) -> Check:
    """The check that runs on a node; it carries no reference to refrag.

    Args:
        token: name and content of the file that lies in each shared folder.
    """
    expected, modules = version("refrag"), tuple(needs.modules)
    readable, shared = tuple(needs.readable), tuple(needs.shared)

    def check(node: str) -> list[str]:
        import importlib.metadata
        import importlib.util
        import os
        import time

        def seen(path: str) -> bool:
            for _ in range(10):  # a network file system may take seconds to show what another machine wrote
                if os.path.exists(path):
                    return True
                time.sleep(0.5)
            return False

        found = []
        try:
            there = importlib.metadata.version("refrag")
            if there != expected:
                found.append(f"has refrag {there}, expected {expected}")
        except importlib.metadata.PackageNotFoundError:
            found.append("has no refrag")
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            found.append(f"lacks the packages {', '.join(missing)}")
        found += [f"has no {path}" for path in readable if not os.path.exists(path)]
        for folder in shared:
            if not seen(os.path.join(folder, token)):
                found.append(f"does not see what this machine writes to {folder}")
                continue
            try:
                with open(os.path.join(folder, f"{token}-{node}"), "w") as file:
                    file.write(token)
            except OSError as error:
                found.append(f"cannot write to {folder} ({error.strerror})")
        return found

    return check


@contextlib.contextmanager
def tokens(folders: Sequence[str], token: str) -> Iterator[None]:
    """A file `token` in each folder, and at the end neither it nor any node's answer; folders made here go, too."""
    made = [Path(folder) for folder in folders if not os.path.isdir(folder)]
    try:
        for folder in folders:
            os.makedirs(folder, exist_ok=True)
            Path(folder, token).write_text(token)
        yield
    finally:
        for folder in folders:
            for path in Path(folder).glob(f"{token}*"):
                path.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def unanswered(folders: Sequence[str], token: str, node: str) -> list[str]:
    """The shared folders in which this machine does not see what a node has written."""
    return [
        f"writes to another {folder} than this machine's"
        for folder in folders
        if not Path(folder, f"{token}-{node}").exists()
    ]


def refuse(problems: Mapping[str, Sequence[str]]) -> None:
    """Raise ClusterError for what is wrong on some nodes, by their names; nothing to do when nothing is."""
    wrong = {host: found for host, found in problems.items() if found}
    if not wrong:
        return
    told = "; ".join(f"{host} {', '.join(found)}" for host, found in list(wrong.items())[:_SHOWN])
    rest = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    raise ClusterError(
        f"{len(wrong)} of {len(problems)} nodes are not ready: {told}{rest}. Expected on every node the same refrag "
        "with its packages (`pip install 'refrag[cpu,ray]'`, or one image for all), and the corpus and output under "
        "the same paths (a shared file system, or s3://…): nothing was started"
    )
