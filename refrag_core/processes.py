"""Names that tell which process of which machine made a thing, so that what dead ones left can be told apart."""

import contextlib
import os
import re


def process_name() -> str:
    """Of this process: its machine and its number there."""
    return f"{os.uname().nodename}-{os.getpid()}"


def is_of_dead_process(name: str) -> bool:
    """Whether `name` starts as `process_name` names one of this machine that has ended."""
    found = re.match(rf"{re.escape(os.uname().nodename)}-(\d+)(-|$)", name)
    if found is None:
        return False
    try:
        with contextlib.suppress(PermissionError):  # it lives, as another user's
            os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    return False
