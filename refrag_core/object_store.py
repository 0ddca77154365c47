"""Objects under names: an object store (s3://, gs://, az://), or a folder that stands in for one.

Six plain verbs: get, put, create, head, list, delete. What they promise is what the rest builds on: an object
appears whole or not at all, `create` succeeds for one of any number of writers, and nothing is ever renamed.
Requests are repeated with growing pauses after server errors, dropped connections and time-outs. Credentials
and endpoints come from the environment (AWS_*, GOOGLE_*, AZURE_*) and go nowhere else.
"""

import contextlib
import errno
import importlib.util
import io
import itertools
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar
from urllib.parse import unquote, urlsplit

from refrag_core.errors import MissingExtraError, ObjectStoreError, UsageError

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "abfss")
"""Schemes of URIs that are object stores."""

PART_BYTES = 16 << 20
"""Larger objects travel in parts of this many bytes, a few at a time; each part is repeated by itself."""

CREATE_BYTES = 64 << 20
"""Up to this size an object is created in one conditional request; a larger one is uploaded aside and copied."""

UPLOADS = "work/uploads"
"""Where large objects are uploaded before they get their name; left-overs there have no meaning."""

ATTEMPTS = 3
"""Rounds of requests, each with its own repetitions by the client."""

TIMEOUT_SECONDS = 120.0
"""For one request, answer included."""

RETRY_SECONDS = 60.0
"""How long the client repeats a request within one round."""

_PARALLEL_PARTS = 4
_DELETED_TOGETHER = 1000
_WRITER = "refragwriter"  # Azure takes no hyphens
_counter = itertools.count()

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as it is now."""

    name: str
    """POSIX path below the store's location."""
    bytes: int
    e_tag: str | None
    """What the store calls this state of the object; None for files."""
    modified: datetime
    """By the store's clock."""


FolderListing: TypeAlias = tuple[list[str], list[ObjectInfo]]
"""Names of the folders directly below one, and the objects."""


class ObjectStore(Protocol):
    """Where objects lie. Names are relative POSIX paths."""

    @property
    def location(self) -> str:
        """URI or path of the store."""

    def get(self, name: str) -> bytes:
        """The bytes of a small object. Raises FileNotFoundError."""

    def download(self, name: str, path: Path) -> ObjectInfo:
        """Write an object to a local file, in parts where it is large. Raises FileNotFoundError."""

    def put(self, name: str, source: bytes | Path) -> None:
        """Store bytes or a file, in place of whatever has that name."""

    def create(self, name: str, source: bytes | Path) -> bool:
        """Store bytes or a file if no object has that name; False, and nothing changed, when one has."""

    def head(self, name: str) -> ObjectInfo | None:
        """An object's size and state, None where there is none."""

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects below the folder `prefix`, at any depth, ordered by name."""

    def delete(self, name: str) -> None:
        """Remove an object, if it is there."""


def is_object_store(location: str) -> bool:
    """True for a URI of a scheme that `open_objects` knows."""
    return urlsplit(location).scheme in SCHEMES


def has_client() -> bool:
    """Whether the library behind object stores (the extra `s3`) is installed."""
    return importlib.util.find_spec("obstore") is not None


def open_objects(location: str | Path) -> ObjectStore:
    """The objects at a path or URI; no request is made yet.

    Raises UsageError for a scheme that is no object store's, and MissingExtraError without the library.
    """
    text = str(location)
    parts = urlsplit(text)
    if parts.scheme == "file":
        return FolderObjects(Path(unquote(parts.path)))
    return RemoteObjects(text) if "://" in text else FolderObjects(Path(text))


# --- a folder ---------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Let the names in a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Create a folder and those above it so that their names outlive a power cut."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Let a file's bytes outlive a power cut."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _link_if_absent(temporary: Path, final: Path) -> bool:
    """Give `temporary` the name `final` unless that is taken; False when it was."""
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
            raise
        # A file system without hard links: exclusive creation decides the winner, the rename fills it. An empty
        # file is what a writer left that was killed between the two: the name is still free.
        try:
            os.close(os.open(final, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            if final.stat().st_size > 0:
                return False
        os.replace(temporary, final)
    return True


def _writer_of(source: bytes | Path) -> Callable[[Path], object]:
    if isinstance(source, bytes):
        return lambda path: path.write_bytes(source)
    return lambda path: shutil.copyfile(source, path)


class FolderObjects:
    """A folder of a POSIX file system.

    Args:
        root: the folder; made when something is first written.
        temporary: folder below the root for what is being written.
    """

    def __init__(self, root: Path, temporary: str = "work/tmp") -> None:
        self.root = root
        self._temporary_folder = temporary

    @property
    def location(self) -> str:
        """See ObjectStore."""
        return str(self.root)

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """A path of this process's own for a file that is being written; removed at the end if it is still there."""
        folder = self.root / self._temporary_folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{os.uname().nodename}-{os.getpid()}-{next(_counter)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def write(self, name: str, write: Callable[[Path], object], *, overwrite: bool) -> bool:
        """Let `write` make a file under a temporary name, sync it, and give it its name; False if that was taken."""
        final = self.root / name
        with self.temporary() as temporary:
            write(temporary)
            sync_file(temporary)
            make_folder(final.parent)
            if overwrite:
                os.replace(temporary, final)
            written = overwrite or _link_if_absent(temporary, final)
        sync_folder(final.parent)
        return written

    def get(self, name: str) -> bytes:
        """See ObjectStore."""
        return (self.root / name).read_bytes()

    def download(self, name: str, path: Path) -> ObjectInfo:
        """See ObjectStore."""
        shutil.copyfile(self.root / name, path)
        return self._info(self.root / name)

    def put(self, name: str, source: bytes | Path) -> None:
        """See ObjectStore."""
        self.write(name, _writer_of(source), overwrite=True)

    def create(self, name: str, source: bytes | Path) -> bool:
        """See ObjectStore."""
        return self.write(name, _writer_of(source), overwrite=False)

    def head(self, name: str) -> ObjectInfo | None:
        """See ObjectStore."""
        path = self.root / name
        return self._info(path) if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See ObjectStore; what is being written is left out."""
        hidden = self.root / self._temporary_folder
        for path in sorted((self.root / prefix).rglob("*")):
            if path.is_file() and hidden not in path.parents:
                yield self._info(path)

    def delete(self, name: str) -> None:
        """See ObjectStore."""
        (self.root / name).unlink(missing_ok=True)

    def _info(self, path: Path) -> ObjectInfo:
        found = path.stat()
        modified = datetime.fromtimestamp(found.st_mtime, UTC)
        return ObjectInfo(path.relative_to(self.root).as_posix(), found.st_size, None, modified)


# --- an object store --------------------------------------------------------------------------------


_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)
_METADATA_SERVICE = ("169.254.169.254", 80)
_NO_ROLE = re.compile(r"/latest/(api/token|meta-data)|Missing (AccessKeyId|SecretAccessKey)")
_NO_BUCKET = re.compile(r"NoSuchBucket|specified bucket does not exist|ContainerNotFound|InvalidBucketName")
_REFUSED = re.compile(r"status code: 4(?!08|09|29)\d\d")
_SECRETS = re.compile(r"((?i:\b(?:sig|token|signature|credential)|x-amz-[\w-]+)=|://(?=[^/\s]*@))[^&@\s\"')]*")
_CODE = re.compile(r"<Code>(\w+)</Code>(?:\s*<Message>([^<]*)</Message>)?")


def _reason(error: BaseException) -> str:
    """What the server said, in one line without markup, nor what a URL may hold of credentials."""
    text = _SECRETS.sub(r"\1…", str(error))
    if found := _CODE.search(text):
        return ": ".join(part for part in found.groups() if part)
    return " ".join(text.split("<?xml")[0].split("\n\n")[0].split())[:300]


def _check_credentials(location: str) -> None:
    """Without this the client asks the metadata service of a cloud machine for minutes, on any machine."""
    if not location.startswith("s3") or any(os.environ.get(name) for name in _CREDENTIALS):
        return
    try:
        socket.create_connection(_METADATA_SERVICE, timeout=1).close()
    except OSError:
        raise _no_credentials(location) from None


def _no_credentials(location: str) -> ObjectStoreError:
    return ObjectStoreError(
        f"{location}: no credentials were found, expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the "
        "environment (or a role of this machine): set them, and AWS_ENDPOINT_URL for a store other than Amazon's"
    )


def _connect(location: str) -> Any:
    from obstore.store import from_url

    _check_credentials(location)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    retry = {
        "max_retries": 8,
        "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2},
        "retry_timeout": timedelta(seconds=RETRY_SECONDS),
    }
    client: Any = {"timeout": timedelta(seconds=TIMEOUT_SECONDS), "allow_http": endpoint.startswith("http://")}
    s3: Any = {"copy_if_not_exists": "multipart"} if location.startswith("s3") else {}
    return from_url(location, client_options=client, retry_config=retry, **s3)  # type: ignore[call-overload]


class RemoteObjects:
    """Objects of a bucket below a prefix, through the library `obstore`. Raises ObjectStoreError.

    Pickles as its URI: credentials never travel, each process takes them from its own environment.
    """

    def __init__(self, location: str) -> None:
        if not is_object_store(location) or not urlsplit(location).netloc:
            raise UsageError(
                f"{location}: expected a folder, or a bucket and a path like s3://bucket/path (also "
                f"{', '.join(f'{scheme}://' for scheme in SCHEMES[1:])}): give another location"
            )
        if not has_client():
            raise MissingExtraError(
                f"{location} is an object store, which needs the extra `s3`: run `pip install 'refrag[s3]'`"
            )
        if urlsplit(location).password is not None:
            raise UsageError(
                f"a URI of {urlsplit(location).hostname} has a password in it, expected none: put credentials into the "
                "environment, where messages and records do not repeat them"
            )
        self._location = location.rstrip("/")

    def __reduce__(self) -> tuple[type["RemoteObjects"], tuple[str]]:
        return RemoteObjects, (self._location,)

    @property
    def location(self) -> str:
        """See ObjectStore."""
        return self._location

    @cached_property
    def _client(self) -> Any:
        return _connect(self._location)

    def _run(self, name: str, request: Callable[[], Result]) -> Result:
        """Run a request, again with growing pauses where its failure may pass; errors in refrag's words."""
        from obstore.exceptions import BaseError

        for attempt in range(1, ATTEMPTS + 1):
            try:
                return request()
            except (BaseError, FileNotFoundError) as error:
                self._raise_lasting(name, error)
                if attempt == ATTEMPTS:
                    raise ObjectStoreError(
                        f"{self._location}/{name}: the object store did not answer as expected, in {ATTEMPTS} rounds "
                        f"of requests ({_reason(error)}): check the endpoint and the network, then run this again"
                    ) from error
            time.sleep(0.2 * 2**attempt)
        raise AssertionError("unreachable")

    def _raise_lasting(self, name: str, error: Exception) -> None:
        """Raise what trying again cannot mend."""
        from obstore import exceptions as known

        if _NO_ROLE.search(str(error)):
            raise _no_credentials(self._location) from error
        if _NO_BUCKET.search(str(error)):
            raise ObjectStoreError(
                f"{self._location}: its bucket does not exist, expected one to write to: make it, or mend the name"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{self._location}/{name}") from error
        if isinstance(error, (known.AlreadyExistsError, known.PreconditionError)):
            raise error
        if isinstance(error, (known.PermissionDeniedError, known.UnauthenticatedError)):
            raise ObjectStoreError(
                f"{self._location}/{name}: access was denied ({_reason(error)}), expected permission to list, read "
                "and write: check the credentials in the environment and the bucket's policy"
            ) from error
        if isinstance(error, known.NotSupportedError) or _REFUSED.search(str(error)):
            raise ObjectStoreError(
                f"{self._location}/{name}: the object store refused the request ({_reason(error)}), expected it "
                "to be served: check the location; a store must support conditional writes (If-None-Match)"
            ) from error

    def get(self, name: str) -> bytes:
        """See ObjectStore."""
        import obstore

        return self._run(name, lambda: bytes(obstore.get(self._client, name).bytes()))

    def download(self, name: str, path: Path) -> ObjectInfo:
        """See ObjectStore."""
        import obstore

        def whole() -> tuple[ObjectInfo, bytes | None]:
            found = obstore.get(self._client, name)
            info = _info(found.meta)
            return info, bytes(found.bytes()) if info.bytes <= PART_BYTES else None

        info, data = self._run(name, whole)
        with path.open("wb") as stream:
            if data is None:
                self._download_parts(info, stream.fileno())
            else:
                stream.write(data)
        return info

    def _download_parts(self, info: ObjectInfo, handle: int) -> None:
        import obstore

        def part(start: int) -> None:
            options: Any = {"range": (start, min(start + PART_BYTES, info.bytes))}
            if info.e_tag is not None:  # all parts of one state of the object
                options["if_match"] = info.e_tag
            data = self._run(info.name, lambda: obstore.get(self._client, info.name, options=options).bytes())
            os.pwrite(handle, data, start)

        with ThreadPoolExecutor(_PARALLEL_PARTS) as pool:
            list(pool.map(part, range(0, info.bytes, PART_BYTES)))

    def get_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes of an object from `start` on (fewer at its end). Raises FileNotFoundError."""
        import obstore

        return self._run(name, lambda: bytes(obstore.get_range(self._client, name, start=start, length=length)))

    def put(self, name: str, source: bytes | Path) -> None:
        """See ObjectStore."""
        self._upload(name, source)

    def _upload(self, name: str, source: bytes | Path, **options: Any) -> None:
        import obstore

        def request() -> None:
            obstore.put(self._client, name, source, chunk_size=PART_BYTES, max_concurrency=_PARALLEL_PARTS, **options)

        self._run(name, request)

    def create(self, name: str, source: bytes | Path) -> bool:
        """See ObjectStore."""
        large = isinstance(source, Path) and source.stat().st_size > CREATE_BYTES
        return self._create_large(name, source) if large else self._create(name, source)

    def _create(self, name: str, source: bytes | Path) -> bool:
        """One conditional request. Where its answer was lost and it was sent again, the second finds the first's
        object: a random word of this call in the object's metadata tells whose it is."""
        from obstore.exceptions import AlreadyExistsError

        writer = secrets.token_hex(16)
        try:
            self._upload(name, source, mode="create", attributes={_WRITER: writer}, use_multipart=False)
        except AlreadyExistsError:
            return self._writer(name) == writer
        return True

    def _writer(self, name: str) -> str | None:
        import obstore

        found = self._run(name, lambda: obstore.get(self._client, name, options={"head": True}))
        return found.attributes.get(_WRITER)

    def _create_large(self, name: str, source: bytes | Path) -> bool:
        """Upload in parts under a name of its own, then let the store copy it if the final name is free."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        if self.head(name) is not None:
            return False
        aside = f"{UPLOADS}/{secrets.token_hex(16)}"
        try:
            self._upload(aside, source, use_multipart=True)
            self._run(name, lambda: obstore.copy(self._client, aside, name, overwrite=False))
        except AlreadyExistsError:
            return False
        finally:
            self.delete(aside)
        return True

    def update(self, name: str, data: bytes, e_tag: str | None) -> bool:
        """Store `data` if the object is still in the state `e_tag`; False when it is not."""
        from obstore.exceptions import PreconditionError

        try:
            self._upload(name, data, mode={"e_tag": e_tag}, use_multipart=False)
        except (PreconditionError, FileNotFoundError):
            return False
        return True

    def head(self, name: str) -> ObjectInfo | None:
        """See ObjectStore."""
        import obstore

        try:
            return _info(self._run(name, lambda: obstore.head(self._client, name)))
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """See ObjectStore."""
        import obstore

        batches = self._run(prefix, lambda: list(obstore.list(self._client, prefix or None)))
        yield from sorted((_info(found) for batch in batches for found in batch), key=lambda info: info.name)

    def list_folder(self, folder: str) -> FolderListing:
        """What lies directly below `folder`; "" is the whole store's."""
        import obstore

        found = self._run(folder, lambda: obstore.list_with_delimiter(self._client, folder or None))
        folders = [name.rstrip("/") for name in found["common_prefixes"]]
        objects = [_info(each) for each in found["objects"]]
        # An object that only marks a folder has the folder's name.
        return folders, [info for info in objects if info.name != folder and info.name not in folders]

    def delete(self, name: str) -> None:
        """See ObjectStore."""
        import obstore

        with contextlib.suppress(FileNotFoundError):
            self._run(name, lambda: obstore.delete(self._client, name))

    def delete_all(self, names: Iterable[str]) -> None:
        """Remove many objects, hundreds with one request where the store can."""
        import obstore

        waiting = iter(names)
        while batch := list(itertools.islice(waiting, _DELETED_TOGETHER)):
            try:
                self._run(batch[0], partial(obstore.delete, self._client, batch))
            except (FileNotFoundError, ObjectStoreError):  # some are gone, or the store knows no such request
                for name in batch:
                    self.delete(name)


def _info(found: Any) -> ObjectInfo:
    return ObjectInfo(found["path"], found["size"], found["e_tag"], found["last_modified"])


class ObjectFile(io.RawIOBase):
    """An object read as a file that can be sought: each read is a request, so put a buffer before it.

    Raises FileNotFoundError when it is opened, and ObjectStoreError.
    """

    def __init__(self, objects: RemoteObjects, name: str) -> None:
        super().__init__()
        found = objects.head(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", f"{objects.location}/{name}")
        self._objects = objects
        self._info = found
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset from the start, from here, or from the end."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._info.bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the object goes; bytes read."""
        view = memoryview(buffer).cast("B")
        length = min(len(view), self._info.bytes - self._at)
        if length <= 0:
            return 0
        data = self._objects.get_range(self._info.name, self._at, length)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)
