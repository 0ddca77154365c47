"""What a small change of a large corpus costs: encode work and new bytes of an update against the full build's.

    python -m benchmarks.incremental [--passages 100000] [--change 0.01] [--output FILE]

The corpus is made from one seed (pseudo-words, Zipf frequencies) and built with tiny random models, so that the
figures are of the pipeline: encode work is counted in chunks encoded, bytes are those of the files that the new
generation names and its parent does not. Then one document in a hundred is edited, one in a thousand is removed and
as many are new; the index is brought up to date, and at the end compacted.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.measurement import add_output, finish, load, say
from benchmarks.memory import words, write_models

PASSAGES_A_DOCUMENT = 3
MAX_PASSAGE_TOKENS = 32
_SENTENCES = 8
_WORDS = 6
TARGET = 0.03


def documents(count: int, *, edition: int = 0, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records 0 to `count`; another `edition` gives other texts."""
    vocabulary = words(random.Random(seed))
    weights = list(accumulate(1 / rank for rank in range(1, len(vocabulary) + 1)))
    for number in range(count):
        generator = random.Random(f"{seed}/{edition}/{number}")
        drawn = generator.choices(vocabulary, cum_weights=weights, k=_SENTENCES * _WORDS)
        sentences = (" ".join(drawn[at : at + _WORDS]).capitalize() + "." for at in range(0, len(drawn), _WORDS))
        yield {"id": f"document-{number:08d}", "text": " ".join(sentences)}


def changed(count: int, share: float) -> Iterator[dict[str, Any]]:
    """The corpus after the change: `share` of the documents edited, a tenth as many removed, as many new."""
    picked = random.Random("change").sample(range(count), max(2, round(count * share * 1.1)))
    cut = max(1, len(picked) // 11)
    removed, edited = set(picked[:cut]), set(picked[cut:])
    extra = documents(count + len(removed), edition=1)
    for before, after in zip(documents(count), extra, strict=False):
        number = int(before["id"].rpartition("-")[2])
        if number not in removed:
            yield after if number in edited else before
    yield from extra


def write(folder: Path, records: Iterator[dict[str, Any]]) -> None:
    """One corpus file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def refrag(*arguments: object) -> Any:
    """Run one command of refrag in a process of its own; its JSON result."""
    command = [sys.executable, "-m", "refrag.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {done.returncode}")
    return json.loads(done.stdout)


def build(root: Path, models: tuple[Path, Path]) -> dict[str, Any]:
    """Bring the index up to the corpus; counts, seconds and the load beside them."""
    decoder, encoder = models
    report = refrag(
        *("index", "build", root / "corpus", "-o", root / "index", "--delete-missing", "--workers", 1),
        *("--decoder", decoder, "--encoder", encoder, "--retriever", encoder, "--device", "cpu"),
        *("--max-passage-tokens", MAX_PASSAGE_TOKENS, "--min-recall", 0.5),
    )
    kept = (
        "documents_in", "new", "changed", "deleted", "passages", "chunks", "encoded_chunks", "recall_at_10",
        "seconds", "steps", "content_id",
    )  # fmt: skip
    return {name: report[name] for name in kept} | {"load_average": load()}


def measure(num_passages: int, share: float) -> dict[str, Any]:
    """The full build, the update and a compaction, with what each added."""
    count = num_passages // PASSAGES_A_DOCUMENT
    with tempfile.TemporaryDirectory(prefix="refrag-incremental-") as temporary:
        root = Path(temporary)
        models = write_models(root / "models")
        write(root / "corpus", documents(count))
        say(f"full build of {count:,} documents")
        full = build(root, models)
        say(f"{full['passages']:,} passages in {full['seconds']:.0f} s; updating")
        write(root / "corpus", changed(count, share))
        update = build(root, models)
        say(f"{update['encoded_chunks']:,} chunks encoded in {update['seconds']:.0f} s; compacting")
        compact = refrag("index", "compact", root / "index", "--workers", 0)
        log = refrag("index", "log", root / "index")
        say("the same corpus from scratch")
        scratch = build_elsewhere(root, models)
    first = next(entry for entry in log if entry["version"] == 1)
    second = next(entry for entry in log if entry["version"] == 2)
    return {
        "full": full | _sizes(first),
        "update": update | _sizes(second),
        "compact": {name: compact[name] for name in ("seconds", "copied_chunks", "new_bytes", "bytes_after")},
        "encode_work": round(update["encoded_chunks"] / full["encoded_chunks"], 4),
        "new_bytes": round(second["new_bytes"] / second["bytes"], 4),
        "target": TARGET,
        "same_content_as_from_scratch": scratch["content_id"] == update["content_id"] == compact["content_id"],
    }


def build_elsewhere(root: Path, models: tuple[Path, Path]) -> dict[str, Any]:
    """A build of the corpus as it is now into an empty folder."""
    (root / "fresh").mkdir()
    (root / "corpus").rename(root / "fresh" / "corpus")
    return build(root / "fresh", models)


def _sizes(entry: dict[str, Any]) -> dict[str, Any]:
    names = ("bytes", "new_bytes", "new_files", "shards", "segments", "tombstoned_documents")
    return {name: entry[name] for name in names}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.incremental", description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=100_000, help="about so many passages, three a document")
    parser.add_argument("--change", type=float, default=0.01, help="share of the documents that are edited")
    add_output(parser)
    options = parser.parse_args(arguments)
    results = measure(options.passages, options.change)
    finish("incremental", {"passages": options.passages, "change": options.change}, results, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
