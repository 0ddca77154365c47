"""Documentation formats as plain English text, and the prose of a text that mixes prose with code and tables."""

import bz2
import html
import lzma
import re
import struct
import zlib
from collections.abc import Iterable, Iterator


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


# fmt: off
_COMMON_WORDS = frozenset([
    "the", "of", "and", "to", "a", "in", "is", "that", "for", "it", "with", "as", "be", "on", "are", "this", "by", "or",
    "not", "from", "at", "an", "which", "you", "can", "will", "if", "have", "has", "was", "were", "but", "they",
    "their", "its", "we", "your", "when", "all", "more", "may", "then", "than", "so", "no", "any", "one", "other",
    "such", "there", "also", "only", "these", "some", "into", "would", "should", "been", "must", "what", "who", "do",
    "does", "he", "his", "her", "she", "him", "i", "my", "me", "had",
])
# fmt: on
_WORD = re.compile(r"[A-Za-z']+")
_MIN_BLOCK_CHARACTERS = 60
_MIN_COMMON_WORDS = 0.22
_MIN_LETTERS = 0.8
_MAX_HEADING_CHARACTERS = 80


def is_prose(block: str) -> bool:
    """Whether a block reads as English sentences: long enough, mostly letters, a fair share of function words.

    Code, tables, option lists, navigation and other languages fail it.
    """
    if len(block) < _MIN_BLOCK_CHARACTERS:
        return False
    if sum(c.isalpha() or c.isspace() for c in block) < _MIN_LETTERS * len(block):
        return False
    words = [word.lower() for word in _WORD.findall(block)]
    return sum(word in _COMMON_WORDS for word in words) >= _MIN_COMMON_WORDS * max(1, len(words))


def prose_of(text: str, seen: set[str] | None = None) -> str:
    """The blocks of `text` that are prose, each with the short heading before it.

    Blocks in `seen` (licence notices, navigation, text shared by pages) are left out; those kept are added to it.
    """
    kept: list[str] = []
    heading = ""
    for block in text.split("\n\n"):
        if is_prose(block) and (seen is None or block not in seen):
            kept += [heading, block] if heading else [block]
            heading = ""
            if seen is not None:
                seen.add(block)
        else:
            heading = block if len(block) <= _MAX_HEADING_CHARACTERS and "\n" not in block else ""
    return "\n\n".join(kept)


def unwrap(text: str) -> str:
    """Paragraphs of indented, wrapped text on one line each."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


_NOT_IN_ENTRIES = re.compile(r"\[1913 Webster\]|\[PJC\]|\[Webster 1913 Suppl\.\]| ?\\[^\\\n]{1,80}\\|[{}]")


def dictionary_entries(lines: Iterable[str], *, skipped_source: str) -> Iterator[str]:
    """Entries of a dictd dictionary: an unindented headword, then its indented body.

    Source marks and pronunciations go; paragraphs that `skipped_source` marks as their source go too.
    """
    entry: list[str] = []
    for line in [*lines, "end"]:
        if line[:1].strip() and entry:
            paragraphs = re.split(r"\n\s*\n", _marked("\n".join(entry), skipped_source))
            yield unwrap("\n\n".join(_NOT_IN_ENTRIES.sub("", paragraph) for paragraph in paragraphs))
            entry = []
        entry.append(line.rstrip())


def _marked(entry: str, skipped_source: str) -> str:
    """`entry` without the paragraphs whose last line names `skipped_source`."""
    paragraphs = re.split(r"\n\s*\n", entry)
    return "\n\n".join(p for p in paragraphs if skipped_source not in p.rstrip().rsplit("\n", 1)[-1])


def joined(pieces: Iterable[str], *, characters: int) -> Iterator[str]:
    """Consecutive pieces joined into texts of at least `characters`, the last one excepted."""
    text: list[str] = []
    for piece in pieces:
        text.append(piece)
        if sum(map(len, text)) >= characters:
            yield "\n\n".join(text)
            text = []
    if text:
        yield "\n\n".join(text)


_R_STRING = b"\x00\x04\x00\x09"


def r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """Character vectors of an R package's lazily loaded data (`Rdata.rdb`), one after another.

    Each object is its length, a letter for its compression unless that is zlib, and R's XDR serialisation; of
    that only what a plain character vector needs is read: ASCII strings, each behind its type and length.
    """
    while database:
        kind, start = database[4:5], 4 if database[4:5] == b"x" else 5
        reader = {b"2": bz2.BZ2Decompressor, b"Z": lzma.LZMADecompressor}.get(kind, zlib.decompressobj)()
        yield _r_strings(reader.decompress(database[start:]))
        database = reader.unused_data


def _r_strings(data: bytes) -> list[str]:
    strings = []
    place = data.find(_R_STRING)
    while place >= 0:
        length = int.from_bytes(data[place + 4 : place + 8], "big")
        strings.append(data[place + 8 : place + 8 + length].decode("latin-1"))
        place = data.find(_R_STRING, place + 8 + length)
    return strings


_SISU_ASIDE = re.compile(r"~\{.*?\}~|~\[.*?\]~", re.DOTALL)
_SISU_LINK = re.compile(r"\{(?:~\^)?\s*([^{}]*?)\s*\}(?:https?://|\.\./|image|#|:)\S*")
_SISU_EMPHASIS = re.compile(r"[*/_!\"^,+-]\{(.*?)\}[*/_!\"^,+-]", re.DOTALL)
_SISU_LINE = re.compile(
    r"^(?::?[A-Z1-6]~[\w?!-]*|_[\d*]+|#|`{3}.*|(?:quote|poem|group|code|verse|block)\{|\}(?:quote|poem|group|code|verse)|"
    r"<:\w+>|-\\+-|~[#+]|-#)[ \t]*",
    re.MULTILINE,
)


def plain_sisu(text: str) -> str:
    """A book in SiSU markup without its header, index terms, notes and marks."""
    text = re.sub(r"\A.*?(?=^:?[A-D1]~|\Z)", "", text, count=1, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^=\{[^{}]*\}", "", text, flags=re.MULTILINE)
    text = _SISU_LINK.sub(r"\1", _SISU_ASIDE.sub("", re.sub(r"^%.*$", "", text, flags=re.MULTILINE)))
    for _ in range(2):  # emphasis nests
        text = _SISU_EMPHASIS.sub(r"\1", text)
    text = _SISU_LINE.sub("", text).replace("\\\\", " ").replace("@title", "").replace("@creator", "")
    return tidy(re.sub(r"~\^|(?:scene # )?~#|^\[?\w*\]? ?-#$|\*~\w+|<br>", "", text, flags=re.MULTILINE))


_BLOCK_PLACE_BYTES = 12


def sword_books(index: bytes, content: bytes) -> Iterator[str]:
    """Books of a Bible in SWORD's zText form with one block a book.

    `index` holds each block's offset, compressed size and size (three little-endian uint32) in `content`,
    zlib-compressed OSIS: verses, one after another, of which notes, headings and tags go.
    """
    for place in range(0, len(index), _BLOCK_PLACE_BYTES):
        offset, size = struct.unpack_from("<II", index, place)
        text = zlib.decompress(content[offset : offset + size]).decode("utf-8", "replace") if size else ""
        yield _plain_osis(text)


def _plain_osis(text: str) -> str:
    text = re.sub(r"<(note|title|rdg)\b[^>]*>.*?</\1>", " ", text, flags=re.DOTALL)
    text = re.sub(r"<(?:p|lg|chapter|div)\b[^>]*>|</(?:p|lg)>", "\n\n", re.sub(r"[\s¶]+", " ", text))
    return re.sub(r" ([.,;:?!])", r"\1", tidy(html.unescape(re.sub(r"<(?:/l\b|/?[a-zA-Z])[^>]*>", " ", text))))


_MIN_STRING_CHARACTERS = 40


def long_strings(text: str, pattern: str) -> str:
    """What group 1 of `pattern` finds in a game's script, where it is long enough to be narration or dialogue."""
    found = (" ".join(string.split()) for string in re.findall(pattern, text))
    return "\n\n".join(dict.fromkeys(string for string in found if len(string) >= _MIN_STRING_CHARACTERS))
