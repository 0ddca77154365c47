"""The data recipe of training: what is read out of a package, and which split it goes to."""

import struct
import zlib
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


def test_a_book_is_cut_into_joined_chapters_without_markup(tmp_path: Path) -> None:
    samples = tmp_path / "usr/share/doc/sisu-markup-samples/samples"
    chapter = f"It was /{{so}}/ then.~{{ A note. }}~ {_SENTENCE}\n={{ index ; term }}\n\n"
    _write(
        samples / "generic/war_and_peace.x.sst",
        f"% SiSU 2.0\n\n@title: B\n\nA~ @title\n\n1~one One\n\n{chapter}1~ Two\n\n{chapter}",
    )
    _write(samples / "generic/not_free.x.sst", f"1~one One\n\n{chapter}")
    _write(samples / "minimal/war_and_peace.x.sst", "1~ Again\n\nThe same book in other marks.\n")
    ((key, text),) = CORPORA["sisu-markup-samples"].read(tmp_path)
    assert key == "war_and_peace/000"
    assert text.split("\n\n")[:2] == ["One", f"It was so then. {_SENTENCE.strip()}"]
    assert "Two" in text
    assert not {"index", "note", "SiSU", "@title"} & set(text.split())


def test_bible_books_are_read_without_notes_and_tags(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/sword/modules/texts/ztext/web"
    folder.mkdir(parents=True)
    blocks = [
        zlib.compress(text.encode()) for text in ("<note>n</note><w>In</w> the\n beginning <q>.</q>", "Next<lb/>.")
    ]
    places = [(0, len(blocks[0]), 0), (len(blocks[0]), len(blocks[1]), 0)]
    (folder / "ot.bzs").write_bytes(b"".join(struct.pack("<III", *place) for place in places))
    (folder / "ot.bzz").write_bytes(b"".join(blocks))
    assert list(CORPORA["bible-web"].read(tmp_path)) == [("ot/00", "In the beginning."), ("ot/01", "Next.")]


def test_sayings_are_joined_and_excluded_sources_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/games/fortunes"
    _write(folder / "law", "One saying.\n%\nTaken from the Jargon File.\n%\nTwo sayings.")
    _write(folder / "law.dat", "binary")
    assert list(CORPORA["fortunes"].read(tmp_path)) == [("law/00", "One saying.\n\nTwo sayings.")]


def test_narration_of_a_game_without_its_short_labels(tmp_path: Path) -> None:
    said = "The captain looks at you and asks whether you have seen the war."
    _write(
        tmp_path / "usr/share/games/endless-sky/data/intro.txt", f"dialog `{said}`\n\tname `Ship`\n\tdialog `{said}`"
    )
    assert list(CORPORA["endless-sky"].read(tmp_path)) == [("00000", said)]


def test_new_text_is_only_trained_on() -> None:
    assert list(CORPORA).index("austen") < min(map(list(CORPORA).index, ("moby-dick", "bible-kjv", "gdb-doc")))
