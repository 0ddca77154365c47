import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refrag_core.corpus import filesystem, sources
from refrag_core.corpus.readers import read_unit
from refrag_core.corpus.sources import CorpusOptions, file_format, list_files, scan_units
from refrag_core.errors import ConfigError, CorpusError


def make(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")


def relatives(*roots: str) -> list[str]:
    return [file.source for file in list_files(CorpusOptions(roots))]


def test_a_folder_is_listed_recursively_by_path_components(tmp_path: Path) -> None:
    make(tmp_path, "b.txt", "a/z.md", "a.txt", "a/y/x.html", "c/d.jsonl")
    assert relatives(str(tmp_path)) == ["a/y/x.html", "a/z.md", "a.txt", "b.txt", "c/d.jsonl"]


def test_sources_are_relative_to_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "corpus/a/b.txt")
    monkeypatch.chdir(tmp_path)
    for root, source in (
        ("corpus", "a/b.txt"),
        ("corpus/", "a/b.txt"),
        ("corpus/*", "a/b.txt"),
        ("corpus/a/b.txt", "b.txt"),
    ):
        (file,) = list_files(CorpusOptions((root,)))
        assert file.source == source
        assert file.path == str(tmp_path / "corpus/a/b.txt")
    (file,) = list_files(CorpusOptions(("**/b.txt",)))
    assert file.source == "corpus/a/b.txt"


def test_hidden_files_and_unknown_suffixes_are_left_out_and_the_latter_counted(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", ".hidden.txt", ".git/b.txt", "c.pdf", "d.PDF", "LICENSE", "e.tar.gz")
    ignored: Counter[str] = Counter()
    assert [f.source for f in list_files(CorpusOptions((str(tmp_path),)), ignored=ignored)] == ["a.txt"]
    assert ignored == {".pdf": 2, "no suffix": 1, ".gz": 1}


def test_a_glob_names_documents_from_its_longest_plain_folder(tmp_path: Path) -> None:
    make(tmp_path, "x/2024-a/one.txt", "x/2024-b/two.txt", "x/2023/three.txt", "x/2024-b/four.md")
    assert relatives(f"{tmp_path}/x/2024-*/*.txt") == ["2024-a/one.txt", "2024-b/two.txt"]
    assert relatives(f"{tmp_path}/x/2024-*") == ["2024-a/one.txt", "2024-b/four.md", "2024-b/two.txt"]
    assert relatives(f"{tmp_path}/**/*.txt") == ["x/2023/three.txt", "x/2024-a/one.txt", "x/2024-b/two.txt"]
    assert relatives(f"{tmp_path}/**/2023/**") == ["x/2023/three.txt"]
    assert relatives(f"{tmp_path}/x/202[4]-?/t*.txt") == ["2024-b/two.txt"]
    assert len(relatives(f"{tmp_path}/**")) == 4


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    make(tmp_path, "a[1].txt", "a1.txt")
    assert relatives(f"{tmp_path}/a[1].txt") == ["a[1].txt"]


def test_a_single_file_is_named_by_its_name(tmp_path: Path) -> None:
    make(tmp_path, "deep/down/a.txt")
    assert relatives(str(tmp_path / "deep/down/a.txt")) == ["a.txt"]


def test_links_to_files_are_read_and_links_to_folders_are_not(tmp_path: Path) -> None:
    make(tmp_path, "real/a.txt", "root/b.txt")
    (tmp_path / "root/link.txt").symlink_to(tmp_path / "real/a.txt")
    (tmp_path / "root/loop").symlink_to(tmp_path / "root")
    (tmp_path / "root/broken.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "linked-root").symlink_to(tmp_path / "root")
    assert relatives(str(tmp_path / "root")) == ["b.txt", "broken.txt", "link.txt"]
    assert relatives(str(tmp_path / "linked-root")) == ["b.txt", "broken.txt", "link.txt"]


def test_pipes_are_never_opened(tmp_path: Path) -> None:
    make(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert relatives(str(tmp_path)) == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", ("txt", None)),
        ("A.HTM", ("html", None)),
        ("a.b.ndjson", ("jsonl", None)),
        ("a.jsonl.gz", ("jsonl", "gzip")),
        ("a.md.zst", ("md", "zstd")),
        ("a.parquet", ("parquet", None)),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("txt", None),
        ("a.json", None),
    ],
)
def test_file_format(name: str, expected: tuple[str, str | None] | None) -> None:
    assert file_format(name) == expected


def test_a_missing_root_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        relatives(f"{tmp_path}/gone")
    assert str(caught.value) == (f"{tmp_path}/gone is not there: expected a folder, a file or a glob. Check the path.")


def test_a_glob_in_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        relatives(f"{tmp_path}/gone/*.txt")
    assert str(caught.value) == (
        f"{tmp_path}/gone, which {tmp_path}/gone/*.txt starts from, is not there. Name a folder that exists."
    )


def test_nothing_to_read_is_an_error_that_says_what_was_there(tmp_path: Path) -> None:
    make(tmp_path, "a.pdf", "b.pdf")
    with pytest.raises(CorpusError) as caught:
        relatives(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: only files of other kinds (2 .pdf), expected .htm .html .jsonl .md .ndjson .parquet .txt "
        "(also .gz, .zst). Check the path."
    )


def test_a_named_file_of_unknown_format_is_an_error(tmp_path: Path) -> None:
    make(tmp_path, "a.pdf")
    with pytest.raises(CorpusError, match="is not of a known format"):
        relatives(str(tmp_path / "a.pdf"))


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "a/b.txt")

    def refuse(path: str) -> list[filesystem.Entry]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(sources, "list_folder", refuse)
    with pytest.raises(CorpusError) as caught:
        relatives(str(tmp_path))
    assert str(caught.value) == f"{tmp_path} cannot be listed (Permission denied). Check its permissions."


@pytest.mark.parametrize(
    "wrong", [{"roots": ()}, {"roots": ("",)}, {"text_field": ""}, {"max_line_bytes": 0}, {"max_document_bytes": -1}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        CorpusOptions(**({"roots": (".",)} | wrong))  # type: ignore[arg-type]


# --- units ------------------------------------------------------------------------------------------


def test_small_files_share_a_unit_up_to_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text("x" * 40)
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    units = list(scan_units(CorpusOptions((str(tmp_path),))))
    assert [[piece.file.source for piece in unit.pieces] for unit in units] == [
        ["a.txt", "b.txt"],
        ["c.txt", "d.txt"],
        ["e.txt"],
    ]
    monkeypatch.setattr(sources, "UNIT_PIECES", 1)
    assert len(list(scan_units(CorpusOptions((str(tmp_path),))))) == 5


def test_a_large_jsonl_file_is_cut_into_byte_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"x" * 250)
    monkeypatch.setattr(sources, "RANGE_BYTES", 100)
    monkeypatch.setattr(sources, "UNIT_BYTES", 50)
    units = list(scan_units(CorpusOptions((str(tmp_path),))))
    assert [(u.pieces[0].start, u.pieces[0].stop) for u in units] == [(0, 100), (100, 200), (200, 250)]
    assert [u.name for u in units] == ["000000-0000000000", "000000-0000000064", "000000-00000000c8"]


def test_parquet_is_cut_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"id": list(range(10)), "text": ["x" * 50] * 10})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    monkeypatch.setattr(sources, "RANGE_BYTES", 1)
    units = list(scan_units(CorpusOptions((str(tmp_path),))))
    pieces = [piece for unit in units for piece in unit.pieces]
    assert [(piece.start, piece.stop) for piece in pieces] == [(n, n + 1) for n in range(5)]


def test_an_empty_jsonl_file_and_a_broken_parquet_file_are_one_piece(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    (unit,) = scan_units(CorpusOptions((str(tmp_path),)))
    assert [(piece.start, piece.stop) for piece in unit.pieces] == [(0, -1), (0, -1)]


# --- URLs -------------------------------------------------------------------------------------------


@pytest.fixture
def bucket() -> str:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    memory.pipe({"/bucket/a.txt": b"first", "/bucket/in/b.jsonl": b'{"id": 1, "text": "second"}\n'})
    memory.pipe({"/bucket/.hidden.txt": b"no", "/bucket/c.bin": b"no"})
    return "memory://bucket"


@pytest.mark.parametrize("root", ["memory://bucket", "memory://bucket/", "memory://bucket/**"])
def test_urls_are_listed_and_read_like_folders(bucket: str, root: str) -> None:
    options = CorpusOptions((root,))
    files = list(list_files(options))
    assert [(f.source, f.path) for f in files] == [
        ("a.txt", f"{bucket}/a.txt"),
        ("in/b.jsonl", f"{bucket}/in/b.jsonl"),
    ]
    texts = [record.document.text for unit in scan_units(options) for record in read_unit(unit, options)]
    assert texts == ["first", "second"]


def test_a_missing_url_is_an_error(bucket: str) -> None:
    with pytest.raises(CorpusError, match="is not there"):
        relatives(f"{bucket}/gone")


def test_without_an_fsspec_driver_arrow_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def refuse(_: str) -> None:
        raise ImportError("Install it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    make(tmp_path, "a.txt", "b/c.txt")
    options = CorpusOptions((f"file://{tmp_path}",))
    texts = [record.document.text for unit in scan_units(options) for record in read_unit(unit, options)]
    assert texts == ["text of a.txt", "text of b/c.txt"]


def test_the_index_is_never_part_of_its_own_corpus(tmp_path: Path) -> None:
    make(tmp_path, "a.txt", "refrag-index/shards/x/passages.parquet", "refrag-index-notes.txt")
    options = CorpusOptions((str(tmp_path),), excluded_folder=str(tmp_path / "refrag-index"))
    assert [file.source for file in list_files(options)] == ["a.txt", "refrag-index-notes.txt"]
