"""Real Ray clusters of several nodes on this machine, and the processes that belong to one."""

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import psutil

from tests.command_line import REPOSITORY

WAIT_SECONDS = 60.0


@dataclass(slots=True)
class RayCluster:
    """Nodes that are raylets of their own; the first is the head."""

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        """`host:port`, for `--ray-address`."""
        return str(self.cluster.address)

    def add_node(self, cpus: int = 2, **options: Any) -> Any:
        """Start one more node."""
        self.nodes.append(self.cluster.add_node(num_cpus=cpus, **options))
        self.cluster.wait_for_nodes()
        return self.nodes[-1]

    def remove_node(self, node: Any) -> None:
        """Kill a node with all that runs on it, as a machine that is taken away."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)


@contextlib.contextmanager
def ray_cluster(*cpus: int) -> Iterator[RayCluster]:
    """A cluster with a node for each number of CPUs; its workers can import the tests."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, PYTHONPATH=path, RAY_AUTH_MODE="disabled", HF_HUB_OFFLINE="1"):
        from ray.cluster_utils import Cluster

        head = {"num_cpus": cpus[0], "include_dashboard": False}
        running = RayCluster(Cluster(initialize_head=True, connect=False, head_node_args=head))
        try:
            for count in cpus[1:]:
                running.add_node(count)
            yield running
        finally:
            running.cluster.shutdown()


_NO_WORKERS = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")


def worker_processes(starter: int) -> list[psutil.Process]:
    """Actors, idle or at work, of the Ray that process `starter` has started on this machine."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and not title.startswith(_NO_WORKERS) and _is_of(process, starter):
                found.append(process)
    return found


def _is_of(process: psutil.Process, starter: int) -> bool:
    """Ray names a session's folder by the process that started it, and raylets are told that folder."""
    parent = process.parent()
    words = [] if parent is None else parent.cmdline()
    return any(re.search(rf"/session_[-_0-9]+_{starter}(/|$)", word) for word in words)


def wait_until_gone(processes: list[psutil.Process], seconds: float = WAIT_SECONDS) -> list[psutil.Process]:
    """Those of the processes that are still alive after a while."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition: Any, seconds: float = WAIT_SECONDS) -> Any:
    """Poll until `condition()` is true, and return that; AssertionError when time is up."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.05)
    return found
