"""A conversation as it is saved: its turns as text, and what they were answered from (`schemas/session.schema.json`).

Nothing of a model is saved. The same index, checkpoint and options make the same next prompt of it, and chunk
embeddings of its turns come from the chunk cache.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jsonschema

from refrag.schemas import session_schema
from refrag_core.digests import digest_bytes
from refrag_core.errors import IndexNotFoundError, SessionError
from refrag_core.generations import read_removed
from refrag_core.manifest import read_manifest
from refrag_core.object_store import make_folder, sync_file, sync_folder
from refrag_core.runtime import Runtime

FORMAT = "refrag-session"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer, as text."""

    question: str
    answer: str
    documents: tuple[str, ...] = ()
    """Ids of the documents that it was given from, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The state of a conversation."""

    content_id: str
    """Of the generation that the last turn was answered from."""
    version: int
    """Number of that generation."""
    checkpoint: str
    """Fingerprint of the checkpoint that it was answered with."""
    first_raw: int = 0
    """The first turn, from 0, that was raw in the last prompt."""
    turns: tuple[Turn, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """What a session's file holds."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}


def new_session(runtime: Runtime) -> Session:
    """A conversation without turns over the runtime's generation."""
    manifest = runtime.reader.manifest
    return Session(content_id=manifest.content_id, version=manifest.version, checkpoint=runtime.checkpoint.fingerprint)


def check_session(session: Session, runtime: Runtime) -> None:
    """Raise SessionError when the session is of another checkpoint, or of no generation that the index has had."""
    checkpoint = runtime.checkpoint.fingerprint
    if session.checkpoint != checkpoint:
        raise SessionError(
            f"the session was answered with checkpoint {session.checkpoint[:12]}, and this index is open with "
            f"{checkpoint[:12]}; expected the same one: give it with --checkpoint, or go on all the same with --adopt"
        )
    found = runtime.reader.manifest
    if session.content_id not in (found.content_id, _content_of(runtime, session.version)):
        raise SessionError(
            f"the session's last turn was answered from content {session.content_id[:12]} (generation "
            f"{session.version}), and {runtime.reader.store.location} has {found.content_id[:12]} (generation "
            f"{found.version}); expected an index that has or had that generation: open the one it was begun with, or "
            f"go on all the same with --adopt"
        )


def _content_of(runtime: Runtime, version: int) -> str | None:
    """Content id of an earlier generation of the index, also of one that gc has removed; None where it is unknown."""
    store = runtime.reader.store
    try:
        return read_manifest(store, version).content_id
    except IndexNotFoundError:
        removed = read_removed(store).get(version)
        return None if removed is None else removed.content_id


class SessionFile:
    """A file that holds one session, for one process at a time.

    It is replaced as a whole: killed at any moment, it holds the last session that was written. What this process
    has not read or written itself is never written over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: str | None = None

    def read(self) -> Session | None:
        """The session in the file; None where there is no file. Raises SessionError for a file of anything else."""
        data = self._data()
        if data is None:
            return None
        session = _decode(data, self.path)
        self._known = digest_bytes(data)
        return session

    def write(self, session: Session) -> None:
        """Replace the file. Raises SessionError when it is not as this process has last seen it."""
        data = json.dumps(session.to_json(), ensure_ascii=False, indent=2).encode() + b"\n"
        found = self._data()
        if (None if found is None else digest_bytes(found)) != self._known:
            raise SessionError(
                f"{self.path} was written by something else, expected it as this process has left it: it stays as it "
                f"is; save this conversation under another name"
            )
        make_folder(self.path.absolute().parent)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            sync_file(temporary)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self.path.absolute().parent)
        self._known = digest_bytes(data)

    def _data(self) -> bytes | None:
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None


def _decode(data: bytes, path: Path) -> Session:
    body = _parse(data, path)
    version = body.get("format_version")
    if body.get("format") == FORMAT and type(version) is int and version > FORMAT_VERSION:
        raise SessionError(
            f"{path} has session format {version}, this refrag reads up to {FORMAT_VERSION}: install a newer refrag"
        )
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(session_schema()).iter_errors(body))
    if error is not None:
        raise _no_session(path, f"{error.json_path}: {error.message[:200]}")
    fields = {name: value for name, value in body.items() if name not in ("format", "format_version", "turns")}
    turns = tuple(Turn(t["question"], t["answer"], tuple(t["documents"])) for t in body["turns"])
    if fields["first_raw"] > len(turns):
        raise _no_session(path, f"$.first_raw: {fields['first_raw']} of {len(turns)} turns")
    return Session(**fields, turns=turns)


def _parse(data: bytes, path: Path) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise _no_session(path, "no JSON") from None
    if not isinstance(body, dict):
        raise _no_session(path, "no JSON object")
    return body


def _no_session(path: Path, found: str) -> SessionError:
    return SessionError(
        f"{path} is no saved conversation ({found}), expected one that `refrag chat` saved: it stays as it is; give "
        f"another file, or one that does not exist to begin a conversation"
    )
