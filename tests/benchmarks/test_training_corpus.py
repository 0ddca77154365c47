"""The data recipe of training: what is read out of a package, and which split it goes to."""

from pathlib import Path

import pytest

from benchmarks.training_corpus import CORE, CORPORA, DOCUMENTATION, REPORTED, extract
from refrag_core.errors import CorpusError

_SENTENCE = "The server reads this file when it is started, and it ignores a line that it does not know. " * 3


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _ids(root: Path, name: str = "postfix-doc") -> list[str]:
    return [key for key, text in CORPORA[name].read(root) if text]


def test_pages_without_translations_and_generated_references(tmp_path: Path) -> None:
    doc = tmp_path / "usr/share/doc/x"
    for number, name in enumerate(["a.html", "de/a.html", "a.ja.html", "pt-br/a.html", "api/a.html", "en/b.html"]):
        _write(doc / name, f"<p>Number {number}. {_SENTENCE}</p>")
    assert _ids(tmp_path) == ["doc/x/a.html", "doc/x/en/b.html"]


def test_written_sources_are_preferred_to_rendered_pages(tmp_path: Path) -> None:
    _write(tmp_path / "usr/share/doc/x/_sources/intro.rst.txt", f"Intro\n=====\n\n.. note::\n\n{_SENTENCE}")
    _write(tmp_path / "usr/share/doc/x/intro.html", f"<p>{_SENTENCE}</p>")
    ((key, text),) = CORPORA["postfix-doc"].read(tmp_path)
    assert (key, text) == ("doc/x/_sources/intro.rst.txt", f"Intro\n\n{_SENTENCE.strip()}")


def test_a_page_equal_to_an_earlier_one_has_nothing_left(tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        _write(tmp_path / "usr/share/doc/x" / name, f"<p>{_SENTENCE}</p>")
    assert _ids(tmp_path) == ["doc/x/a.html"]


def test_a_package_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "packages/postfix-doc").mkdir(parents=True)
    with pytest.raises(CorpusError, match="holds no document"):
        extract(tmp_path, ["postfix-doc"])


def test_documentation_is_neither_held_out_nor_reported() -> None:
    assert not set(DOCUMENTATION) & {*CORE, *REPORTED}
    assert list(CORPORA)[: len(CORE)] == list(CORE)
    assert set(REPORTED) <= set(CORPORA)
