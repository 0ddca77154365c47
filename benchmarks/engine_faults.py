"""Builds on a Ray cluster under injected faults: does each end as the build that was left in peace?

    python -m benchmarks.engine_faults [--faults NAME …] [--output FILE]

The faults are those of tests/faults/engine_faults.py: a cluster of three nodes of two CPUs each on this machine, 200
documents (10,000 for one fault), tiny random models. The first fault's seconds include the calm build that all are
compared with.
"""

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measurement import add_output, finish, load, say


def main(arguments: list[str] | None = None) -> int:
    """Parse, play, print; exit 1 when a build ended otherwise."""
    from tests.faults.engine_faults import FAULTS, play, scene

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    add_output(parser)
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="refrag-faults-") as folder, scene(Path(folder)) as at:
        for name in options.faults:
            try:
                ending = play(at, name)
            except Exception as error:
                found[name] = {"fault": FAULTS[name].__doc__, "unharmed": False, "error": f"{error}"}
            else:
                found[name] = {"fault": FAULTS[name].__doc__, "unharmed": ending.unharmed, **asdict(ending)}
            state = "unharmed" if found[name]["unharmed"] else f"HARMED {found[name].get('error', '')}"
            say(f"{name}: {state}, load {load()}")
    unharmed = all(entry["unharmed"] for entry in found.values())
    from importlib.metadata import version

    results = {"ray": version("ray"), "unharmed": unharmed, "faults": found}
    finish("engine_faults", {"faults": options.faults}, results, options.output)
    return 0 if unharmed else 1


if __name__ == "__main__":
    sys.exit(main())
