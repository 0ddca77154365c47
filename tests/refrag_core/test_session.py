"""A session's file: written whole or not at all, and nobody else's file is touched."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refrag_core.errors import SessionError
from refrag_core.session import Session, SessionFile, Turn

SESSION = Session(
    content_id="a" * 64,
    version=3,
    checkpoint="b" * 64,
    first_raw=1,
    turns=(Turn("Wer schrieb «Faust»?", "Goethe 🦊", ("doc-1", "doc-2")), Turn("And when?", "")),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "session.json"


def test_it_comes_back_as_it_was(path: Path) -> None:
    SessionFile(path).write(SESSION)
    assert SessionFile(path).read() == SESSION
    assert "Goethe 🦊" in path.read_text(encoding="utf-8")  # people may read it


def test_no_file_is_no_session(path: Path) -> None:
    assert SessionFile(path).read() is None


def test_folders_are_made(path: Path) -> None:
    SessionFile(path.parent / "a" / "b" / "session.json").write(SESSION)
    assert SessionFile(path.parent / "a" / "b" / "session.json").read() == SESSION


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, r"no saved conversation \(\$\.format: 'refrag-session' was expected\)"),
        ({"turns": [{"question": "q"}]}, r"\$\.turns\[0\]: 'answer' is a required property"),
        ({"turns": [{"question": "q", "answer": 1, "documents": []}]}, r"\$\.turns\[0\]\.answer: 1 is not of type"),
        ({"first_raw": 3}, r"\$\.first_raw: 3 of 2 turns"),
        ({"more": 1}, "'more' was unexpected"),
        ({"format_version": 2}, "has session format 2, this refrag reads up to 1: install a newer refrag"),
        ({"checkpoint": "B" * 64}, r"\$\.checkpoint"),
    ],
)
def test_another_json_is_refused_and_stays(path: Path, change: dict[str, Any], message: str) -> None:
    path.write_text(json.dumps(SESSION.to_json() | change))
    before = path.read_bytes()
    with pytest.raises(SessionError, match=message):
        SessionFile(path).read()
    with pytest.raises(SessionError, match="was written by something else"):
        SessionFile(path).write(SESSION)
    assert path.read_bytes() == before


@pytest.mark.parametrize("data", [b"notes\n", b"[]", b"\xff\xfe", b"[" * 100_000, b"", b'{"format": "refrag-ses'])
def test_what_is_no_json_object_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(SessionError, match=r"is no saved conversation .*it stays as it is"):
        SessionFile(path).read()
    assert path.read_bytes() == data


def test_two_processes_do_not_write_over_each_other(path: Path) -> None:
    first, second = SessionFile(path), SessionFile(path)
    first.write(SESSION)
    assert second.read() == SESSION
    first.write(replace(SESSION, first_raw=0))
    with pytest.raises(SessionError, match="save this conversation under another name"):
        second.write(SESSION)
    assert SessionFile(path).read() == replace(SESSION, first_raw=0)
    path.unlink()
    with pytest.raises(SessionError, match="was written by something else"):
        first.write(SESSION)  # it was removed, and by whom is not known


def test_a_write_that_fails_leaves_the_file_before_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SessionFile(path)
    file.write(SESSION)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refrag_core.session.sync_file", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(replace(SESSION, first_raw=2))
    assert [entry.name for entry in path.parent.iterdir()] == ["session.json"]
    assert SessionFile(path).read() == SESSION
