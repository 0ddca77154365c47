"""A lease: the advisory lock of an index on an object store, which nobody's death can hold for long.

The object names its holder and is written again every third of its life. Whoever finds it waits until it would
have expired: if it was renewed meanwhile its holder lives, else it is taken over. Only the store's clock and
durations are compared, never the clocks of two machines. Correctness does not depend on any of this.
"""

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator

from refrag_core.errors import IndexLockedError, RefragError
from refrag_core.object_store import ObjectInfo, RemoteObjects

LEASE_SECONDS = 30.0
"""Life of a lease without renewal: the longest wait for a builder that died."""


class Lease:
    """The lease object `name` of an object store; one instance is one holder."""

    def __init__(self, objects: RemoteObjects, name: str, seconds: float | None = None) -> None:
        self._objects = objects
        self._name = name
        self._seconds = LEASE_SECONDS if seconds is None else seconds
        self._token = secrets.token_hex(16)
        self._renewals = 0
        self._ended = threading.Event()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lease, renewing it beside the work. Raises IndexLockedError while a living builder has it."""
        self._take()
        renewal = threading.Thread(target=self._renew, name="lease", daemon=True)
        renewal.start()
        try:
            yield
        finally:
            self._ended.set()
            renewal.join()
            self._give_back()

    def _body(self) -> bytes:
        holder = f"process {os.getpid()} on {os.uname().nodename}"
        return json.dumps(
            {"holder": holder, "token": self._token, "seconds": self._seconds, "renewals": self._renewals}
        ).encode()

    def _take(self) -> None:
        while not self._objects.create(self._name, self._body()):
            found = self._objects.head(self._name)
            if found is not None and self._take_over(found):
                return

    def _take_over(self, found: ObjectInfo) -> bool:
        """Wait until `found` would have expired; True when it had and is ours now, False when it went meanwhile."""
        holder, seconds = self._holder()
        time.sleep(max(0.0, seconds - self._age(found)))
        now = self._objects.head(self._name)
        if now is None:
            return False
        if now.e_tag != found.e_tag:
            raise IndexLockedError(
                f"another build is running on {self._objects.location} ({holder}): nothing was done; "
                "wait for it to end, or stop it, and run this command again"
            )
        return self._objects.update(self._name, self._body(), now.e_tag) or self._is_ours()

    def _age(self, found: ObjectInfo) -> float:
        """Seconds since `found` was written, by the store's own clock: an object written now says what it is."""
        probe = f"{self._name}-{self._token}"
        self._objects.put(probe, b"")
        now = self._objects.head(probe)
        self._objects.delete(probe)
        return (now.modified - found.modified).total_seconds() if now is not None else 0.0

    def _read(self) -> dict[str, object]:
        try:
            body = json.loads(self._objects.get(self._name))
        except (FileNotFoundError, ValueError):
            return {}
        return body if isinstance(body, dict) else {}

    def _holder(self) -> tuple[str, float]:
        body = self._read()
        seconds = body.get("seconds")
        known = isinstance(seconds, (int, float)) and 0 <= seconds <= 3600
        return str(body.get("holder", "holder unknown")), float(seconds) if known else self._seconds  # type: ignore[arg-type]

    def _is_ours(self) -> bool:
        return self._read().get("token") == self._token

    def _renew(self) -> None:
        """Write the lease again until the work ends, or until another builder has it."""
        while not self._ended.wait(self._seconds / 3):
            try:
                if not self._is_ours():
                    return
                self._renewals += 1  # other bytes: a store may call equal ones the same state
                self._objects.put(self._name, self._body())
            except (RefragError, OSError):
                continue  # the store's trouble shows in the work itself

    def _give_back(self) -> None:
        with contextlib.suppress(RefragError, OSError):  # it expires
            if self._is_ours():
                self._objects.delete(self._name)
