"""SIGKILL at random moments of updates, compactions, rollbacks and gc: what is committed stays readable and right."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from refrag_core.index_reader import IndexReader
from refrag_core.manifest import CURRENT, list_versions, read_manifest
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests import command_line
from tests.faults.kill_builds import build_arguments
from tests.small_index import documents, write_jsonl

COMMANDS = ("build", "compact", "rollback", "gc", "build")


def arguments_of(command: str, root: Path, index: Path) -> list[str]:
    """The command line of one step."""
    if command == "build":
        return [*build_arguments(root, index), "--delete-missing"]
    options = {
        "compact": ["--shard-bytes", "100000", "--workers", "0"],
        "rollback": [],
        "gc": ["--keep", "2", "--grace-hours", "0"],
    }
    return ["index", command, str(index), *options[command], "--json"]


def kill_generations(
    root: Path, *, kills: int, seed: int, log: Callable[[str], object] = lambda _: None
) -> dict[str, int]:
    """Kill `kills` commands on one index with a history, and check after each; how many died of each command.

    The content id of every generation must be one that a calm build of some edition of the corpus has.
    """
    generator = random.Random(seed)
    index, died = root / "index", dict.fromkeys(COMMANDS, 0)
    contents: set[str] = set()
    longest = 5.0
    for number in range(kills):
        command = COMMANDS[number % len(COMMANDS)] if number else "build"
        records = documents(24)
        generator.shuffle(records)
        write_jsonl(root / "corpus" / "records.jsonl", records[: generator.randint(12, 24)])
        process = command_line.start(*arguments_of(command, root, index))
        moment = time.monotonic() + generator.random() * longest
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.005)
        was_running = process.poll() is None
        died[command] += was_running
        command_line.kill_group(process)
        process.communicate()
        check(index, contents, complete=command != "build")
        started = time.monotonic()
        done = command_line.run(*arguments_of("build", root, index))
        assert done.code == 0, done.err
        longest = time.monotonic() - started
        contents.add(done.json["content_id"])
        assert verify_index(FolderStore(index)).problems == ()
        state = "killed" if was_running else "ended before its kill"
        log(f"{number}. {command} {state}; then version {done.json['version']}, {len(contents)} contents seen")
    return died


def check(index: Path, contents: set[str], *, complete: bool) -> None:
    """Every generation that is there opens whole; only a build that was killed may have brought new content."""
    store = FolderStore(index)
    versions = list_versions(store)
    if not versions:
        return
    assert {problem.file for problem in verify_index(store).problems} <= {CURRENT}
    for version in versions:
        IndexReader(index, version).close()
    if complete:
        assert {read_manifest(store, version).content_id for version in versions} <= contents
    else:
        contents.add(read_manifest(store).content_id)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_kills_leave_every_generation_readable(tmp_path: Path, own_cache: Path) -> None:
    died = kill_generations(tmp_path, kills=10, seed=0, log=print)
    assert sum(died.values()) > 0
