"""The same corpus built by every engine: equal content ids, and every file equal byte for byte.

    python -m benchmarks.engine_parity --corpus made|leads|mixed [--documents 200] [--megabytes 150] [--text DIR]
        [--engines NAME …] [--also NAME=OPTIONS …] [--work DIR] [--wheels DIR] [--output FILE]

- `made`: `--documents` documents of pseudo-words, with tiny random models; seconds of work.
- `leads`: the Wikipedia leads with the models of the demo (`--documents 0` takes all 10,033).
- `mixed`: `--megabytes` of the JSON lines (`id`, `text`) in `--text`, as `benchmarks.training_corpus extract` writes
  them, made into .jsonl, .jsonl.zst and .parquet in turn; a tiny random encoder and retriever over the demo's decoder.

Each engine builds through the command line, in a process and an index of its own below `--work`. What is finished
there is not built again, and a build that was interrupted goes on: run the command again. `--also` adds an engine with
options of its own, such as `--also "cluster=--engine ray --ray-address auto"`. Exits 1 when anything differs.
"""

import argparse
import importlib.util
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from benchmarks import corpora
from benchmarks.corpora import write_text
from benchmarks.incremental import documents
from benchmarks.measurement import add_output, finish, load, say
from benchmarks.memory import write_models

PORTABLE = ("--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK")
ENGINES: dict[str, tuple[str, ...]] = {
    "local": ("--engine", "local", "--workers", "2"),  # what the others are compared with
    "ray": ("--engine", "ray", "--workers", "2"),
    "beam-direct": ("--engine", "beam"),
    "beam-processes": ("--engine", "beam", "--workers", "2"),
    "beam-portable": ("--engine", "beam", *(f"--beam-option={option}" for option in PORTABLE)),
}
PACKAGES = {"ray": "ray", "beam": "apache_beam"}


# --- corpora ----------------------------------------------------------------------------------------


def write_corpus(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Write the corpus `name` into `folder`, unless it is there from an earlier run."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="corpus-") as temporary:
        made = Path(temporary, "corpus")
        made.mkdir()
        if name == "made":
            write_lines(made / "documents.jsonl", documents(options.documents))
        elif name == "leads":
            write_lines(made / "leads.jsonl", leads(options.documents, options.wheels))
        else:
            write_mixed(made, mixed(options.text, options.megabytes << 20))
        made.rename(folder)


def leads(limit: int, wheels: Path | None) -> list[dict[str, str]]:
    """The Wikipedia leads, `limit` of them or all for 0."""
    source = corpora.SOURCES["wikipedia-leads"]
    data = corpora.read_member(corpora.locate_wheel(source, wheels), source.member)
    return corpora.wikipedia_leads(data, limit)


def mixed(folder: Path, num_bytes: int) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Records of the JSON lines in `folder`, file by file in the order of their names, until there are `num_bytes`."""
    left = num_bytes
    for path in sorted(folder.glob("*.jsonl")):
        records = []
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            records.append({"id": f"{path.stem}/{record['id']}", "text": record["text"], "source": path.stem})
            left -= len(record["text"].encode())
            if left <= 0:
                yield path.stem, records
                return
        yield path.stem, records
    raise SystemExit(
        f"{folder} holds {(num_bytes - left) >> 20} MB of text, expected {num_bytes >> 20}: add some to it"
    )


def write_lines(path: Path, records: Iterator[dict[str, Any]] | Sequence[dict[str, str]]) -> None:
    """JSON lines."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_mixed(folder: Path, files: Iterator[tuple[str, list[dict[str, str]]]]) -> None:
    """Each file in the next format: plain, compressed, columns."""
    for (stem, records), suffix in zip(files, itertools.cycle((".jsonl", ".jsonl.zst", ".parquet")), strict=False):
        path = folder / f"{stem}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(records), path, row_group_size=500)
            continue
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
        path.write_bytes(zstandard.compress(data) if suffix.endswith(".zst") else data)


def model_options(corpus: str, work: Path) -> list[str]:
    """The models of a corpus, as options of `index build`."""
    common = ["--device", "cpu"]
    if corpus == "leads":
        return common
    if not (work / "models").exists():
        with tempfile.TemporaryDirectory(dir=work, prefix="models-") as temporary:
            write_models(Path(temporary, "models"))
            Path(temporary, "models").rename(work / "models")
    decoder, encoder = (work / "models" / name for name in ("decoder", "encoder"))
    tiny = [*common, "--encoder", str(encoder), "--retriever", str(encoder), "--min-recall", "0.5"]
    if corpus == "made":
        return [*tiny, "--decoder", str(decoder), "--max-passage-tokens", "32", "--shard-bytes", "4000"]
    return tiny


# --- builds -----------------------------------------------------------------------------------------


def missing_package(options: Sequence[str]) -> str | None:
    """The package of an extra that an engine's options ask for and that is not installed."""
    name = options[options.index("--engine") + 1] if "--engine" in options else ""
    package = PACKAGES.get(name)
    return package if package is not None and importlib.util.find_spec(package) is None else None


def built(name: str, options: Sequence[str], arguments: Sequence[str], work: Path) -> dict[str, Any]:
    """Build with one engine, or what an earlier run of this script said of the same build."""
    record = work / f"{name}.json"
    asked = [*arguments, *options]
    if record.exists() and (before := json.loads(record.read_text()))["asked"] == asked:
        say(f"{name}: built by an earlier run")
        return dict(before)
    say(f"{name}: building, load {load()}")
    before_load = load()
    index = work / "indexes" / name
    command = [sys.executable, "-m", "refrag.cli", "index", "build", *asked, "--output", str(index), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode not in (0, 3):
        raise SystemExit(f"{name}: {shlex.join(command)} failed with exit code {done.returncode}; run again to go on")
    found = {"asked": asked, **facts(json.loads(done.stdout), index), "load_average": [before_load, load()]}
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.replace(record)
    return found


def facts(report: Mapping[str, Any], index: Path) -> dict[str, Any]:
    """Ids, counts and seconds of a build, and the digest of every file that its generation names."""
    from refrag_core.manifest import read_manifest
    from refrag_core.storage import FolderStore

    manifest = read_manifest(FolderStore(index))
    kept = ("documents_in", "indexed", "quarantined", "passages", "chunks", "tokens", "recall_at_10", "seconds")
    return {
        "content_id": manifest.content_id,
        "build_id": manifest.build_id,
        **{name: report[name] for name in kept},
        "files": {record.name: record.digest for record in manifest.files.values()},
    }


def differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Where two builds are not the same, in words; none when every byte is equal."""
    found = [f"{name} differs" for name in ("content_id", "build_id") if first[name] != other[name]]
    ours, theirs = first["files"], other["files"]
    for file in sorted(ours.keys() | theirs.keys()):
        if ours.get(file) != theirs.get(file):
            state = "missing" if file not in theirs else "in this one only" if file not in ours else "other bytes"
            found.append(f"{file}: {state}")
    return found


def measure(options: argparse.Namespace, engines: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Build with all engines and compare."""
    work: Path = options.work / options.corpus
    work.mkdir(parents=True, exist_ok=True)
    write_corpus(options.corpus, work / "corpus", options)
    arguments = [str(work / "corpus"), *model_options(options.corpus, work)]
    results, skipped = {}, {}
    for name, asked in engines.items():
        if (package := missing_package(asked)) is not None:
            skipped[name] = f"{package} is not installed"
            continue
        results[name] = built(name, asked, arguments, work)
    first = results[next(iter(results))]
    told = {name: _summary(found) | {"differences": differences(first, found)} for name, found in results.items()}
    return {
        "engines": told,
        "skipped": skipped,
        "files": len(first["files"]),
        "equal": not any(entry["differences"] for entry in told.values()),
    }


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name not in ("asked", "files")}


# --- command line -----------------------------------------------------------------------------------


def chosen(options: argparse.Namespace) -> dict[str, Sequence[str]]:
    """The engines to run with their options, the local one first."""
    found: dict[str, Sequence[str]] = {name: ENGINES[name] for name in ENGINES if name in options.engines}
    for entry in options.also:
        name, _, words = entry.partition("=")
        found[name] = shlex.split(words)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, build, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", choices=("made", "leads", "mixed"), default="made")
    parser.add_argument("--documents", type=int, default=200, help="documents of `made` and `leads`; 0: all leads")
    parser.add_argument("--megabytes", type=int, default=150, help="text of `mixed`")
    parser.add_argument("--text", type=Path, help="folder of JSON lines for `mixed`")
    parser.add_argument("--engines", nargs="+", choices=tuple(ENGINES), default=list(ENGINES))
    parser.add_argument("--also", action="append", default=[], metavar="NAME=OPTIONS", help="another engine's options")
    parser.add_argument("--work", type=Path, default=Path(".parity"), help="what is built lies and stays here")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for `leads`")
    add_output(parser)
    options = parser.parse_args(arguments)
    if options.corpus == "mixed" and options.text is None:
        parser.error("--corpus mixed needs --text: a folder of JSON lines, see `benchmarks.training_corpus extract`")
    options.work = options.work.resolve()
    results = measure(options, chosen(options))
    sizes = {"made": ("documents",), "leads": ("documents",), "mixed": ("megabytes",)}[options.corpus]
    given = {"corpus": options.corpus, **{name: getattr(options, name) for name in sizes}}
    finish("engine_parity", given, results, options.output)
    return 0 if results["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
