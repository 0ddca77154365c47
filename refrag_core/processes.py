"""Names that tell which process of which machine made a thing, so that what dead ones left can be told apart."""

import contextlib
import os
import re
import threading
import time

_PARENT_CHECK_SECONDS = 0.5


def process_name() -> str:
    """Of this process: its machine and its number there."""
    return f"{os.uname().nodename}-{os.getpid()}"


def is_of_dead_process(name: str) -> bool:
    """Whether `name` starts as `process_name` names one of this machine that has ended."""
    found = re.match(rf"{re.escape(os.uname().nodename)}-(\d+)(-|$)", name)
    return found is not None and not is_alive(int(found[1]))


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of that number."""
    try:
        with contextlib.suppress(PermissionError):  # it lives, as another user's
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def end_with_parent(parent: int) -> None:
    """End this process soon after the process `parent`, which started it, is gone, however that went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
