"""Results and errors as JSON: what comes back from workers through files, without a pickle.

Values are made of None, numbers and arrays of them, strings, bytes, paths, tuples, lists, dicts, and the dataclasses of
refrag, which come back equal to what they were. Reading a message makes nothing else, whoever wrote it.
"""

import base64
import dataclasses
import importlib
import json
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refrag_core import errors
from refrag_core.digests import JSON
from refrag_core.errors import RefragError, StageError

_PACKAGES = ("refrag", "refrag_core")


def encode(value: Any) -> bytes:
    """A value as JSON. Raises StageError for one that no message can hold."""
    return json.dumps(_plain(value)).encode()


def decode(data: bytes) -> Any:
    """The value that `encode` was given; a subclass of str comes back as plain str."""
    return _value(json.loads(data))


def _plain(value: Any) -> JSON:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return {"array": [value.dtype.str, list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(each) for each in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(each)] for key, each in value.items()]}
    if dataclasses.is_dataclass(value) and _is_ours(type(value).__module__):
        kind = type(value)
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": [kind.__module__, kind.__qualname__], "fields": fields}
    raise StageError(
        f"a worker made a {type(value).__module__}.{type(value).__qualname__}, expected numbers, strings, lists, "
        "tuples, dicts, arrays or a dataclass of refrag: engines carry specs and receipts; write the rest into the "
        "index"
    )


def _value(body: Any) -> Any:
    if isinstance(body, list):
        return [_value(each) for each in body]
    if not isinstance(body, dict):
        return body
    if "class" in body:
        module, name = body["class"]
        return _instance(module, name, body["fields"])
    ((kind, inner),) = body.items()
    if kind == "bytes":
        return base64.b64decode(inner)
    if kind == "array":
        dtype, shape, data = inner
        return np.frombuffer(base64.b64decode(data), np.dtype(dtype)).reshape(shape).copy()
    if kind == "path":
        return Path(inner)
    if kind == "tuple":
        return tuple(_value(each) for each in inner)
    return {_value(key): _value(each) for key, each in inner}


def _is_ours(module: str) -> bool:
    return module.split(".")[0] in _PACKAGES


def _instance(module: str, name: str, fields: dict[str, Any]) -> Any:
    kind = getattr(importlib.import_module(module), name, None) if _is_ours(module) else None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise StageError(
            f"a worker's message holds a {module}.{name}, expected a dataclass of refrag: the workers run another "
            "version of refrag than the driver; install the same one on both"
        )
    return kind(**{field: _value(each) for field, each in fields.items()})


@dataclass(frozen=True, slots=True)
class Failure:
    """An exception of a worker, as data."""

    kind: str
    """Name of its class."""
    message: str
    number: int | None = None
    """The errno of an OSError."""
    file: str | None = None
    """The file of an OSError."""
    trace: str = ""
    """The worker's traceback."""

    @property
    def error(self) -> Exception:
        """The exception to raise: RefragErrors and OSErrors as they were, anything else as a StageError.

        The worker's traceback is a note of it.
        """
        error = self._error()
        error.add_note(self.trace)
        return error

    def _error(self) -> Exception:
        kind = getattr(errors, self.kind, None) if self.kind in errors.__all__ else None
        if kind is not None and issubclass(kind, RefragError):
            return kind(self.message)  # type: ignore[no-any-return]
        if self.number is not None:
            return OSError(self.number, self.message, self.file)
        return StageError(
            f"a worker failed with {self.kind}: {self.message}; expected the stages to finish, or to say which record "
            "is at fault: run with --engine local to see where it comes from"
        )


def failure_of(error: BaseException) -> Failure:
    """What is to be told of an exception."""
    kind, trace = type(error).__name__, "".join(traceback.format_exception(error))
    if isinstance(error, OSError) and error.errno is not None:
        file = None if error.filename is None else str(error.filename)
        return Failure(kind, error.strerror or str(error), error.errno, file, trace)
    return Failure(kind, str(error), trace=trace)
