"""Text of HTML pages: what a reader sees, one line a block, without scripts, styles and navigation."""

import codecs
import re
from collections.abc import Iterator

from lxml import etree
from lxml import html as lxml_html

from refrag_core.corpus.document import RecordError, RejectReason

# fmt: off
_DROPPED = frozenset([
    "button", "canvas", "iframe", "nav", "noscript", "object", "script", "select", "style", "svg", "template", "title",
])
_PARAGRAPHS = frozenset([
    "article", "aside", "blockquote", "dl", "figure", "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr",
    "main", "ol", "p", "pre", "section", "table", "ul",
])
_LINES = frozenset([
    "address", "body", "br", "caption", "dd", "details", "dialog", "div", "dt", "fieldset", "figcaption", "form",
    "html", "legend", "li", "summary", "tbody", "tfoot", "thead", "tr",
])
# fmt: on
_CELLS = frozenset(["td", "th"])

_SPACES = re.compile(r"[ \t\n\r\f]+")
_CHARSET = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([a-z0-9_.:-]{1,40})""", re.IGNORECASE)
_CHARSET_WITHIN_BYTES = 4096


def decode_html(data: bytes) -> str:
    """`data` as UTF-8, else in the character set that the page declares.

    Raises RecordError (invalid_utf8) when it is neither.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        declared = _CHARSET.search(data[:_CHARSET_WITHIN_BYTES])
        name = declared.group(1).decode("ascii") if declared else None
        text = _decode_declared(data, name) if name else None
        if text is None:
            detail = f"byte {error.start} is not UTF-8, declared character set: {name or 'none'}"
            raise RecordError(RejectReason.INVALID_UTF8, detail) from None
        return text


def _decode_declared(data: bytes, name: str) -> str | None:
    try:
        return codecs.decode(data, name) if codecs.lookup(name)._is_text_encoding else None
    except (LookupError, ValueError):
        return None


def html_text(page: str) -> tuple[str, str]:
    """`(text, title)` of a page; both may be empty.

    Raises RecordError (unreadable_file) when the parser gives up (elements nested over 2,000 deep).
    """
    root = _parse(page)
    if root is None:
        return "", ""
    title = root.findtext(".//title") or ""
    lines = _TextLines()
    for text, breaks, preformatted in _visible(root):
        lines.break_line(breaks)
        lines.add(text, preformatted)
    return lines.text(), _SPACES.sub(" ", title).strip()


def _parse(page: str) -> etree._Element | None:
    # Bytes with a stated encoding: lxml refuses a str that begins with an XML declaration.
    parser = lxml_html.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    data = page.replace("\0", "\ufffd").encode("utf-8", "replace")
    try:
        root = lxml_html.document_fromstring(data, parser=parser)
    except etree.ParserError:  # nothing but comments and spaces
        root = None
    fatal = [entry.message for entry in parser.error_log if entry.level == etree.ErrorLevels.FATAL]
    if fatal:
        raise RecordError(RejectReason.UNREADABLE_FILE, f"not readable as HTML: {fatal[0]}")
    return root


def _visible(root: etree._Element) -> Iterator[tuple[str, int, bool]]:
    """`(text, newlines before it, preformatted)` in document order, dropped elements left out."""
    dropped = preformatted = 0
    for event, element in etree.iterwalk(root, events=("start", "end")):
        tag = element.tag
        if event == "start":
            dropped += bool(dropped or tag in _DROPPED)
            preformatted += tag == "pre"
            if not dropped:
                yield element.text or "", _breaks(tag), preformatted > 0
            continue
        after = 0 if dropped else _breaks(tag)
        dropped -= bool(dropped)
        preformatted -= tag == "pre"
        if not dropped:
            if tag in _CELLS:
                yield "\t", 0, True
            yield element.tail or "", after, preformatted > 0


def _breaks(tag: str) -> int:
    return 2 if tag in _PARAGRAPHS else int(tag in _LINES)


class _TextLines:
    """Joins pieces of text as a browser lays them out: spaces collapsed, breaks merged."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._breaks = 0

    def break_line(self, newlines: int) -> None:
        self._breaks = max(self._breaks, newlines)

    def add(self, text: str, preformatted: bool) -> None:
        if not preformatted:
            text = _SPACES.sub(" ", text)
            if self._breaks or not self._parts or self._parts[-1][-1].isspace():
                text = text.lstrip(" ")
        if not text or (text == "\t" and (self._breaks or not self._parts)):
            return
        if self._breaks and self._parts:
            self._parts[-1] = self._parts[-1].rstrip(" \t")
            self._parts.append("\n" * self._breaks)
        self._breaks = 0
        self._parts.append(text)

    def text(self) -> str:
        return "".join(self._parts).strip()
