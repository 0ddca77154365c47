"""An S3 server in a process of its own, and a proxy before it that fails on request."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from refrag_core.object_store import RemoteObjects
from refrag_core.storage import FolderStore

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def environment(endpoint: str) -> dict[str, str]:
    """What a client of the server at `endpoint` needs in its environment."""
    return CREDENTIALS | {"AWS_ENDPOINT_URL": endpoint}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's S3 server; yields its endpoint."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ)
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: "subprocess.Popen[bytes]", timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError("the S3 server did not start")
        time.sleep(0.05)


def make_bucket(endpoint: str, name: str) -> None:
    """Create a bucket."""
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc)
    connection.request("PUT", f"/{name}")
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    connection.close()


def copy_to_bucket(index: Path, uri: str) -> str:
    """Copy the files of an index to a URI, which is returned."""
    store, objects = FolderStore(index), RemoteObjects(uri)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: objects.put(name, store.path(name)), store.files()))
    return uri


@dataclass(slots=True)
class Fault:
    """What goes wrong with the next `times` requests of `method` whose path and query contain `part`.

    Kinds: `error` answers 500 and passes nothing on; `lost` passes the request on and drops the answer; `cut`
    sends half of the answer's body; `slow` waits `seconds` before the answer; `held` never answers.
    """

    kind: str
    method: str
    part: str
    times: int = 1
    seconds: float = 0.0


class FaultyServer:
    """A proxy before a server. `faults` are taken in order; `seen` lists the requests that came.

    Args:
        target: the server's endpoint.
        delay: seconds that every request takes longer, as over a network.
    """

    def __init__(self, target: str, delay: float = 0.0) -> None:
        self.delay = delay
        self.target = urlsplit(target).netloc
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str]] = []
        self.released = threading.Event()
        self._lock = threading.Lock()

    def fault_of(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, if any."""
        with self._lock:
            self.seen.append((method, path))
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and fault.part in path:
                    fault.times -= 1
                    return fault
        return None

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """Serve; yields the endpoint."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            self.released.set()
            server.shutdown()
            server.server_close()
            thread.join()


_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


def _handler(proxy: FaultyServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            fault = proxy.fault_of(self.command, self.path)
            kind = fault.kind if fault is not None else ""
            if proxy.delay:
                time.sleep(proxy.delay)
            if kind == "error":
                self.send_response(500)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if kind == "held":
                proxy.released.wait()
                self.close_connection = True
                return
            if fault is not None and kind == "slow":
                proxy.released.wait(fault.seconds)
            self._pass_on(body, kind)

        def _pass_on(self, body: bytes, kind: str) -> None:
            connection = http.client.HTTPConnection(proxy.target)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
            connection.close()
            if kind == "lost":
                self.close_connection = True
                return
            self.send_response(answer.status)
            length = answer.headers.get("Content-Length") if self.command == "HEAD" else None
            for name, value in answer.headers.items():
                if name.lower() not in _HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            if kind == "cut":
                data, self.close_connection = data[: len(data) // 2], True
            with contextlib.suppress(OSError):  # the client may be gone
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: tests look at `seen`."""

    return Handler
