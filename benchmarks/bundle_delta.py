"""What a pull moves after 1% of a corpus changed, against the bytes of the whole bundle.

    python -m benchmarks.bundle_delta [--passages 100000] [--share 0.01] [--folder FOLDER] [--output FILE]

Builds an index over synthetic text with one-layer random models by the command line, exports and pulls it, rewrites
the given share of the documents, builds again, exports and pulls again. The second pull's bytes over the bundle's are
the figure; nothing in it depends on what the models say. With `--folder` the index is kept there and used again.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measurement import add_output, finish, load, say
from benchmarks.memory import build, write_corpus, write_models
from refrag_core.bundle import ExportOptions, export_bundle, open_bundle
from refrag_core.bundle_transfer import pull_bundle
from refrag_core.manifest import list_versions
from refrag_core.storage import FolderStore

PASSAGE_TOKENS = 96
WIDTH = 64
_BYTES_A_PASSAGE = 275


def rewritten(lines: Sequence[str], share: float, seed: int = 0) -> Iterator[str]:
    """The records, with a word put before the text of `share` of them, drawn evenly."""
    chosen = set(random.Random(seed).sample(range(len(lines)), round(share * len(lines))))
    for number, line in enumerate(lines):
        record = json.loads(line)
        yield json.dumps(record | {"text": f"Rewritten. {record['text']}"}) + "\n" if number in chosen else line


def build_generations(root: Path, passages: int, share: float) -> dict[str, Any]:
    """An index of two generations below `root`, the second after a change of `share` of the documents."""
    models, corpus, index = root / "models", root / "corpus", root / "index"
    decoder, encoder = models / "decoder", models / "encoder"
    if not models.is_dir():
        write_models(models, WIDTH)
    extra = ["--max-passage-tokens", str(PASSAGE_TOKENS)]
    reports = {}
    if not list_versions(FolderStore(index)):
        if not corpus.is_dir():
            write_corpus(corpus, passages * _BYTES_A_PASSAGE, "jsonl")
        say("building the index")
        reports["first_build"] = build(corpus, index, decoder, encoder, extra)
    if len(list_versions(FolderStore(index))) == 1:
        file = corpus / "documents.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(rewritten(lines, share)), encoding="utf-8")
        say("building it again after the change")
        reports["second_build"] = build(corpus, index, decoder, encoder, extra)
    return reports


def measure(root: Path) -> dict[str, Any]:
    """Export and pull both generations; what each pull moved, and a check of every byte that arrived."""
    index, exported, host = root / "index", root / "bundle", root / "host"
    for folder in (exported, host):
        shutil.rmtree(folder, ignore_errors=True)
    pulls = []
    for version in list_versions(FolderStore(index))[:2]:
        say(f"exporting and pulling generation {version}")
        export_bundle(index, exported, ExportOptions(version=version))
        pulls.append(asdict(pull_bundle(str(exported), host, version=version)))
    opened = open_bundle(host)
    last = pulls[-1]
    return {
        "pulls": pulls,
        "moved_share_of_second_pull": round(last["moved_bytes"] / last["bytes"], 5),
        "bytes_by_kind": dict(opened.bytes_by_kind),
        "passages": opened.passages,
        "chunks": opened.chunks,
        "load_average_after": load(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bundle_delta", description=__doc__.split("\n")[0])
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--share", type=float, default=0.01, help="of the documents that change")
    parser.add_argument("--folder", type=Path, help="keep the index here, and use the one that is here")
    add_output(parser)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="refrag-delta-") as temporary:
        root = options.folder or Path(temporary)
        builds = build_generations(root, options.passages, options.share)
        results = measure(root)
    shown = {"passages": options.passages, "share": options.share, "models": f"random, one layer, width {WIDTH}"}
    finish("bundle_delta", shown, {"builds": builds, **results}, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
