"""Builds on a Ray cluster under injected faults: does each end as the build that was left in peace?

    python -m benchmarks.engine_faults [--faults NAME …] [--output FILE]
    python -m benchmarks.engine_faults --local [--documents 10000] [--wheels DIR] [--output FILE]

The faults are those of tests/faults/engine_faults.py: a cluster of three nodes of two CPUs each on this machine, 200
documents (10,000 for one fault), tiny random models. The first fault's seconds include the calm build that all are
compared with. `--local` plays one on the local engine with two workers instead: of `--documents` Wikipedia leads the
tokenizer raises on one, always.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.engine_parity import leads
from benchmarks.measurement import add_output, finish, load, say

_LOCAL_SHARD_BYTES = 1 << 17


def play_all(faults: Sequence[str]) -> dict[str, Any]:
    """Each fault on one Ray cluster; what became of the build, or the error."""
    from tests.faults.engine_faults import FAULTS, play, scene

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="refrag-faults-") as folder, scene(Path(folder)) as at:
        for name in faults:
            try:
                ending = play(at, name)
            except Exception as error:
                found[name] = {"fault": FAULTS[name].__doc__, "unharmed": False, "error": f"{error}"}
            else:
                found[name] = {"fault": FAULTS[name].__doc__, "unharmed": ending.unharmed, **asdict(ending)}
            state = "unharmed" if found[name]["unharmed"] else f"HARMED {found[name].get('error', '')}"
            say(f"{name}: {state}, load {load()}")
    return found


def play_local(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The fault of the local engine."""
    from tests.faults.engine_faults import one_record_on_the_local_engine as fault

    with tempfile.TemporaryDirectory(prefix="refrag-faults-") as folder:
        ending = fault(Path(folder), records, workers=2, shard_bytes=_LOCAL_SHARD_BYTES)
    return {fault.__name__: {"fault": fault.__doc__, "unharmed": ending.unharmed, **asdict(ending)}}


def main(arguments: list[str] | None = None) -> int:
    """Parse, play, print; exit 1 when a build ended otherwise."""
    from tests.faults.engine_faults import FAULTS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--local", action="store_true", help="one record in many, on the local engine")
    parser.add_argument("--documents", type=int, default=10_000, help="leads of `--local`; 0: all")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for `--local`")
    add_output(parser)
    options = parser.parse_args(arguments)
    local = options.local
    found = play_local(list(leads(options.documents, options.wheels))) if local else play_all(options.faults)
    given = {"documents": options.documents} if local else {"faults": options.faults}
    unharmed = all(entry["unharmed"] for entry in found.values())
    results = {"ray": None if local else version("ray"), "unharmed": unharmed, "faults": found}
    finish("engine_faults", given, results, options.output)
    return 0 if unharmed else 1


if __name__ == "__main__":
    sys.exit(main())
