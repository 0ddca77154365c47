"""Holds on files that who collects may read, but not write."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from refrag_core.holds import hold, unheld
from refrag_core.storage import FolderStore


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of another user, which this one may only read; also where this one is root."""
    path, real = tmp_path / "file", os.open
    path.write_bytes(b"x")

    def reading_alone(name: Any, flags: int, *rest: Any, **named: Any) -> int:
        if Path(name) == path and flags & os.O_ACCMODE != os.O_RDONLY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(name, flags, *rest, **named)

    monkeypatch.setattr(os, "open", reading_alone)
    return path


def test_a_file_of_another_user_is_held_and_let_go(foreign: Path) -> None:
    held = hold(foreign)
    assert held is not None
    with unheld(foreign) as free:
        assert not free
    held.release()
    with unheld(foreign) as free:
        assert free


def test_it_is_removed_when_nobody_holds_it(foreign: Path) -> None:
    store = FolderStore(foreign.parent)
    held = store.hold("file")
    assert held is not None
    assert store.is_held("file")
    assert not store.remove_unheld("file")
    held.release()
    assert store.remove_unheld("file")
    assert not foreign.exists()


def test_where_an_exclusive_lock_is_not_to_be_had_nothing_is_removed(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert hold(foreign) is not None
    assert not FolderStore(foreign.parent).remove_unheld("file")
    assert foreign.exists()
