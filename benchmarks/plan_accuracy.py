"""What `refrag index plan` predicts against what `refrag index build` then takes, at two sizes of a corpus.

    python -m benchmarks.plan_accuracy [--documents 150 600] [--corpus FILE.jsonl] [--output FILE]

Without `--corpus`, documents are pieces of the project's own pages. Plan and build run in processes of their own, one
after the other, so that each loads its models; the clock is around the whole command.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.measurement import add_output, finish, load, say

_AMOUNTS = ("tokens", "passages", "chunks")


def _refrag(*words: Any) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "refrag.cli", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout), time.perf_counter() - started


def write_corpus(path: Path, documents: int, corpus: Path | None) -> None:
    """The first `documents` records of a corpus, or so many pieces of the project's pages."""
    path.parent.mkdir(parents=True)
    if corpus is not None:
        with corpus.open(encoding="utf-8") as lines:
            path.write_text("".join(islice(lines, documents)), encoding="utf-8")
        return
    root = Path(__file__).resolve().parents[1]
    text = " ".join((root / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "schemas/BUNDLE.md"))
    pieces = (text[(at := n * 541 % (len(text) - 900)) : at + 250 + n * 37 % 650] for n in range(documents))
    records = (json.dumps({"id": f"{n:06d}", "text": piece}) + "\n" for n, piece in enumerate(pieces))
    path.write_text("".join(records), encoding="utf-8")


def compare(documents: int, corpus: Path | None, folder: Path) -> dict[str, Any]:
    """One size: predicted, real, and the relative errors."""
    write_corpus(folder / "corpus" / "records.jsonl", documents, corpus)
    shared = ("--device", "cpu")
    planned, plan_seconds = _refrag("index", "plan", folder / "corpus", "-o", folder / "index", *shared)
    say(f"{documents} documents: {planned['total_seconds']} s predicted, load {load()}")
    built, whole_seconds = _refrag("index", "build", folder / "corpus", "-o", folder / "index", *shared)
    say(
        f"{documents} documents: {built['seconds']} s of the build, {whole_seconds:.1f} s of the command, load {load()}"
    )
    disk = sum(path.stat().st_size for path in (folder / "index" / "shards").rglob("*.parquet"))
    steps = built["steps"]
    return {
        "documents": documents,
        "plan_command_seconds": round(plan_seconds, 1),
        "predicted_seconds": planned["total_seconds"],
        "build_seconds": built["seconds"],
        "build_command_seconds": round(whole_seconds, 1),
        "error_of_seconds": round(planned["total_seconds"] / built["seconds"] - 1, 3),
        "error_of_disk_bytes": round(planned["disk_bytes"] / disk - 1, 3),
        **{f"error_of_{name}": round(planned[name] / built[name] - 1, 4) for name in _AMOUNTS},
        "steps": {
            step: {"predicted": planned["seconds"].get(step), "built": steps.get(step)}
            for step in sorted(planned["seconds"].keys() | steps.keys())
        },
        "load_average": load(),
    }


def main() -> None:
    """Parse, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[150, 600])
    parser.add_argument("--corpus", type=Path, help="JSON lines with `id` and `text`")
    add_output(parser)
    given = parser.parse_args()
    found = []
    for documents in given.documents:
        with tempfile.TemporaryDirectory(prefix="refrag-plan-accuracy-") as folder:
            found.append(compare(documents, given.corpus, Path(folder)))
    named = given.corpus.name if given.corpus is not None else "the project's pages"
    finish("plan_accuracy", {"documents": given.documents, "corpus": named}, {"sizes": found}, given.output)


if __name__ == "__main__":
    main()
