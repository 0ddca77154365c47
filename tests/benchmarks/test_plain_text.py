"""Documentation formats as plain text, and the prose in them."""

import zlib

from benchmarks.plain_text import dictionary_entries, is_prose, joined, prose_of, r_character_vectors, unwrap

_SENTENCE = "The server reads this file when it is started, and it ignores a line that it does not know."
_CODE = "for (size_t i = 0; i < count; ++i) { total += values[i] * weights[i]; } return total / count;"


def test_sentences_are_prose_and_code_tables_and_short_lines_are_not() -> None:
    table = "address 0x10 0x14 0x18 0x1c 0x20 0x24 0x28 0x2c 0x30 0x34 0x38 0x3c 0x40 0x44 0x48"
    names = "Index Modules Previous Next Overview Contents Glossary Downloads Community Support Contact"
    assert is_prose(_SENTENCE)
    assert not any(map(is_prose, [_CODE, table, names, "It is in the file."]))


def test_other_languages_are_not_prose() -> None:
    assert not is_prose("Der Server liest diese Datei beim Start und übergeht jede Zeile, die er nicht kennt.")


def test_prose_keeps_the_heading_before_a_kept_block_only() -> None:
    text = f"Menu\n\nSyntax\n\n{_CODE}\n\nConfiguration\n\n{_SENTENCE}"
    assert prose_of(text) == f"Configuration\n\n{_SENTENCE}"


def test_blocks_seen_on_an_earlier_page_are_left_out() -> None:
    seen: set[str] = set()
    other = "This is what the second page has to say about it, and nothing that was on the first one."
    assert prose_of(_SENTENCE, seen) == _SENTENCE
    assert prose_of(f"{_SENTENCE}\n\n{other}", seen) == other


def test_unwrap_joins_the_lines_of_a_paragraph() -> None:
    assert unwrap("  one\n  two\n \n  three\n\n\n") == "one two\n\nthree"


def test_dictionary_entries_lose_marks_and_the_other_dictionarys_senses() -> None:
    lines = [
        "Cob \\Cob\\, n. [W. cob head.]",
        "   1. A {spider}; a web.",
        "      [1913 Webster]",
        "",
        "   2. A borrowed sense.",
        "      [WordNet 1.5]",
        "",
        'Coble \\Co"ble\\, n.',
        "   A boat.",
    ]
    entries = list(dictionary_entries(lines, skipped_source="[WordNet 1.5]"))
    assert entries == ["Cob, n. [W. cob head.] 1. A spider; a web.", "Coble, n. A boat."]


def test_joined_reaches_the_length_and_keeps_the_rest() -> None:
    assert list(joined(["aaa", "bb", "cc", "d"], characters=5)) == ["aaa\n\nbb", "cc\n\nd"]


def _r_object(strings: list[bytes], compression: str = "") -> bytes:
    data = b"X\n" + b"".join(b"\x00\x04\x00\x09" + len(s).to_bytes(4, "big") + s for s in strings)
    return len(data).to_bytes(4, "big") + compression.encode() + zlib.compress(data)


def test_r_character_vectors_are_read_object_by_object() -> None:
    database = _r_object([b"CHAPTER I", b"", b"It is a truth"]) + _r_object([b"Emma"])
    assert list(r_character_vectors(database)) == [["CHAPTER I", "", "It is a truth"], ["Emma"]]
