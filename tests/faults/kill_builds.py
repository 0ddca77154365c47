"""Kill builds at random moments and show that the last one ends as if nothing had happened.

    python -m tests.faults.kill_builds --kills 20 [--seed 0] [--documents 150]

An undisturbed build says what the ids have to be and how long it takes. Then `refrag index build` is started
again and again on one index and killed with SIGKILL, workers and all, at moments spread over that time. A run
that ends before its moment counts as no kill: its ids are compared, and the next run begins with an empty index.
So does the one after a kill that came behind the commit, once a further run has tidied up.
"""

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from refrag_core.manifest import list_versions, read_manifest
from refrag_core.storage import WORK, FolderStore
from refrag_core.verification import verify_index
from tests import command_line
from tests.small_index import documents, models_folder, write_jsonl

STAGES = ("tokenize", "embeddings", "vectors")


@dataclass(frozen=True, slots=True)
class Killed:
    """How far a killed run had come."""

    after: float
    """Seconds from its start."""
    index: str
    """What stood in the index's folder."""

    def __str__(self) -> str:
        return f"killed after {self.after:5.2f} s: {self.index}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a series of kills came to."""

    killed: tuple[Killed, ...]
    ids: tuple[tuple[str, str], ...]
    """(content id, build id) of every completed run, the last one included."""
    expected: tuple[str, str]
    """Those of the undisturbed build."""
    problems: tuple[str, ...]
    """What `verify` finds in the completed indexes, and what lies in their folders without being part of them."""

    @property
    def unharmed(self) -> bool:
        """Whether every completed run is the undisturbed one, byte for byte."""
        return set(self.ids) == {self.expected} and not self.problems


def build_arguments(root: Path, index: Path, *, checkpoint: Path | None = None, shard_bytes: int = 4000) -> list[str]:
    """`refrag index build` over the corpus in `root`: many shards, two workers."""
    models = models_folder()
    return [
        *("index", "build", str(root / "corpus"), "--output", str(index), "--workers", "2", "--json"),
        *("--checkpoint", str(checkpoint or models / "checkpoint"), "--retriever", str(models / "encoder")),
        *("--device", "cpu", "--max-passage-tokens", "64", "--min-recall", "0.5", "--shard-bytes", str(shard_bytes)),
    ]


def how_far(index: Path) -> str:
    """What a build that is gone has left: receipts by stage, and whether it had committed."""
    names = [path.name for path in (index / WORK / "receipts").glob("*.json")]
    done = ", ".join(f"{stage} {sum(name.startswith(stage) for name in names)}" for stage in STAGES)
    segments = len(list((index / "segments").glob("*.faiss")))
    if versions := list_versions(FolderStore(index)):
        return f"version {versions[-1]} committed{', work/ still there' if (index / WORK).exists() else ''}"
    if not names:
        return "nothing yet" if not (index / WORK).exists() else "locked, no shard done"
    return f"shards: {done}" + (f", {segments} index files" if segments else "")


def ids_of(index: Path) -> tuple[str, str]:
    """Content id and build id of the newest generation."""
    manifest = read_manifest(FolderStore(index))
    return manifest.content_id, manifest.build_id


def problems_of(index: Path) -> Iterator[str]:
    """Everything in an index's folder that should not be there or not be so."""
    result = verify_index(FolderStore(index))
    yield from (f"{problem.file}: {problem.found}" for problem in result.problems)
    yield from (f"{name}: not part of any generation" for name in result.unlisted)
    if (index / WORK).exists():
        yield f"{WORK}/ is left over"


def complete(root: Path, index: Path) -> float:
    """Run a build to its end; its seconds. Raises AssertionError with its log when it fails."""
    started = time.monotonic()
    done = command_line.run(*build_arguments(root, index))
    assert done.code == 0, done.err
    return time.monotonic() - started


def kill_after(root: Path, index: Path, seconds: float) -> Killed | None:
    """Start a build and kill it, or None when it had ended by then."""
    started = time.monotonic()
    process = command_line.start(*build_arguments(root, index))
    while time.monotonic() - started < seconds:
        if process.poll() is not None:
            done = command_line.finish(process)
            assert done.code == 0, done.err
            return None
        time.sleep(0.005)
    command_line.kill_group(process)
    return Killed(time.monotonic() - started, how_far(index))


def moments(kills: int, longest: float, generator: random.Random) -> list[float]:
    """`kills` moments in random order, one in each equal stretch of `longest` seconds."""
    spread = [longest * (number + generator.random()) / kills for number in range(kills)]
    generator.shuffle(spread)
    return spread


def kill_builds(
    root: Path, *, kills: int, seed: int, num_documents: int, log: Callable[[str], object] = lambda line: None
) -> Outcome:
    """Kill `kills` builds below `root`, let the last one finish, and compare."""
    generator = random.Random(seed)
    write_jsonl(root / "corpus" / "records.jsonl", documents(num_documents))
    calm, index = root / "undisturbed", root / "index"
    longest = complete(root, calm)
    expected = ids_of(calm)
    log(f"undisturbed: {longest:.2f} s, content id {expected[0][:16]}, build id {expected[1][:16]}")
    killed: list[Killed] = []
    ids: list[tuple[str, str]] = []
    problems: list[str] = []
    for moment in moments(kills, longest, generator):
        while (found := kill_after(root, index, moment)) is None:
            ids.append(ids_of(index))
            log(f"ended before its kill at {moment:.2f} s, as the undisturbed one: {ids[-1] == expected}")
            shutil.rmtree(index)
        killed.append(found)
        log(f"{len(killed):>3}. {found}")
        if list_versions(FolderStore(index)):  # what is left of this build is done by one more run; then from the start
            complete(root, index)
            ids.append(ids_of(index))
            problems += problems_of(index)
            shutil.rmtree(index)
    complete(root, index)
    outcome = Outcome(tuple(killed), (*ids, ids_of(index)), expected, (*problems, *problems_of(index)))
    log(f"at the end: content id {outcome.ids[-1][0][:16]}, build id {outcome.ids[-1][1][:16]}")
    return outcome


def main() -> None:
    """Parse, kill, print; exit 1 when anything differs from the undisturbed build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=150)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="refrag-kills-") as folder:
        outcome = kill_builds(
            Path(folder), kills=options.kills, seed=options.seed, num_documents=options.documents, log=print
        )
    for problem in outcome.problems:
        print(problem)
    state = "unharmed" if outcome.unharmed else "HARMED"
    print(f"{len(outcome.killed)} kills, {len(outcome.ids)} completed builds: {state}")
    raise SystemExit(0 if outcome.unharmed else 1)


if __name__ == "__main__":
    main()
