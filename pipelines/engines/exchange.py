"""Where results come back from workers that only share the index's store with the driver.

A result is a small file among the work in progress of the index, named by the item that it is of. A repeated item
writes the same file again, and one that nobody waits for any more is harmless.
"""

import contextlib
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from refrag_core.storage import EXCHANGE, IndexLocation, Store, absolute, open_store

_ABANDONED_SECONDS = 86400.0


@lru_cache(maxsize=4)
def _store(location: str) -> Store:
    return open_store(location)


def _token() -> str:
    """Drawn, since not even two drivers on one machine and process id may ever read each other's results."""
    return secrets.token_hex(8)


@dataclass(frozen=True, slots=True)
class Exchange:
    """The results of one map; picklable, so that every worker has it."""

    location: str
    """Path or URI of the index."""
    token: str = field(default_factory=_token)

    @staticmethod
    def of(location: IndexLocation) -> "Exchange":
        """A new exchange below an index."""
        return Exchange(absolute(location))

    def _name(self, key: str) -> str:
        return f"{EXCHANGE}/{self.token}.{key}.json"

    def put(self, key: str, data: bytes) -> None:
        """Leave the result of an item for the driver."""
        _store(self.location).replace(self._name(key), data)

    def present(self) -> Iterator[str]:
        """The items whose results are there."""
        for name in _store(self.location).list(EXCHANGE):
            token, _, rest = name.partition(".")
            if token == self.token and rest.endswith(".json"):
                yield rest.removesuffix(".json")

    def take(self, key: str) -> bytes:
        """The result of an item that is there."""
        return _store(self.location).read(self._name(key))

    @property
    def _mark(self) -> str:
        return f"{EXCHANGE}/{self.token}.open"

    def open(self) -> None:
        """Begin: until the exchange is stopped, workers take up items."""
        _store(self.location).replace(self._mark, b"")

    def stop(self) -> None:
        """Let the workers begin no further item."""
        _store(self.location).remove(self._mark)

    def stopped(self) -> bool:
        """Whether nobody waits for results any more."""
        return not _store(self.location).exists(self._mark)

    def remove(self) -> None:
        """Stop, and remove the results, and what drivers that were killed have left a day ago or earlier."""
        store, before = _store(self.location), time.time() - _ABANDONED_SECONDS
        for path in (f"{EXCHANGE}/{name}" for name in store.list(EXCHANGE)):
            with contextlib.suppress(FileNotFoundError):  # another driver may clear up as well
                if path.startswith(f"{EXCHANGE}/{self.token}.") or store.modified(path) < before:
                    store.remove(path)
