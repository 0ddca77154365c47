"""The Ray engine: actors on a cluster, fed by this process; only shard specs and receipts travel.

Ray core rather than Ray Data. Measured with stages that sleep .2 s on 2 workers (benchmarks/README.md), Ray Data
took 1.28 times the ideal and core 1.02, since every execution of a dataset starts its actors anew. And what a build
needs beyond mapping is per shard: another node after a failure, a time limit, a death that is no fault of the
shard's. Ray Data retries blocks and drops or fails the rest.

There are two pools of actors: CPU stages (scan, tokenize, segments of the vector index) take a CPU each, device stages
(encode, embed, score) a GPU, a share of one, or a CPU. An actor loads its models once. `dispatch` decides who runs
what; this file starts, feeds and ends the actors.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

from refrag.pipelines.engines import node_checks
from refrag.pipelines.engines.dispatch import Died, Dispatcher, Done, Event, Limits, Raised, Ready, Work
from refrag.pipelines.engines.node_checks import Needs
from refrag.pipelines.engines.placement import Layout, Node, Wanted, bundles, describe, lay_out
from refrag.pipelines.plan import ShardSpec
from refrag.pipelines.preflight import Machine, check_workers, look, needs_of
from refrag.pipelines.progress import Progress, Silent
from refrag.pipelines.receipts import Receipt
from refrag.pipelines.stages import DeviceStage, ShardResult, Stages, run_device_stages
from refrag_core.batching import is_out_of_memory
from refrag_core.devices import available_cores
from refrag_core.errors import ClusterError, ConfigError, MissingExtraError, RefragError
from refrag_core.storage import Store, absolute, is_uri

try:
    import ray
    import ray.util.client
    from ray.exceptions import (
        ActorUnavailableError,
        AuthenticationError,
        GetTimeoutError,
        OutOfMemoryError,
        RayError,
        RayTaskError,
    )
    from ray.util.metrics import Counter, Gauge
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise MissingExtraError("--engine ray needs the packages of an extra: pip install 'refrag[ray]'") from error

Item = TypeVar("Item")
Made = TypeVar("Made")

CPU, DEVICE = "cpu", "device"
"""The pools."""

_OWN = "local"
"""What Ray calls a cluster of this process's own."""
_LOOK_SECONDS = 5.0
"""How often the cluster is looked at for nodes that came or went."""
_PROBE_SECONDS = 120.0
_CONNECT_SECONDS = 10.0
_AHEAD = 16
"""Results that wait for an earlier one, a worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """How `refrag index build --engine ray` uses a cluster."""

    address: str | None = None
    """`auto`, `ray://host:port` or `host:port`; None is $RAY_ADDRESS, and without that a Ray of this process's own."""
    workers: int | None = None
    """Workers for the CPU stages at most; None takes what there is."""
    device_workers: tuple[int, int] | None = None
    """Workers for the device stages, at least and at most."""
    gpus_per_worker: float | None = None
    """GPUs of a device worker, a fraction or whole; None is 1 where the cluster has any."""
    device: str = "auto"
    """`cpu`, `cuda` or `auto`: which GPU a worker gets is Ray's to say."""
    shard_timeout: float = 3600.0
    """Seconds after which a shard's stage is ended and run again elsewhere."""
    wait_for_nodes: float = 0.0
    """Seconds to wait at the start for nodes that an autoscaler is asked for; 0 asks for none."""
    locations: Sequence[str] = ()
    """Corpora and output: folders must be the same on all nodes."""
    output: str | None = None
    """Where every node has to write."""
    local_cpus: int | None = None
    """CPUs of a Ray of this process's own; None is the cores."""

    @property
    def cluster(self) -> str:
        """The address to connect to; one that is not given must not become whatever cluster someone else started."""
        return self.address or os.environ.get("RAY_ADDRESS") or _OWN

    @property
    def wanted(self) -> Wanted:
        """What the workers are to be."""
        return Wanted(
            workers=self.workers,
            device_workers=self.device_workers,
            gpus_per_worker=self.gpus_per_worker,
            device=self.device,
        )


def check_options(options: RayOptions) -> None:
    """Raise ConfigError for settings that no cluster can serve."""
    if options.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device is {options.device!r}; expected auto, cpu or cuda with --engine ray: each worker gets a GPU of "
            "its own from Ray"
        )
    if options.workers == 0:
        raise ConfigError("--workers is 0, expected at least 1 with --engine ray: leave it out, or take --engine local")
    gpus = options.gpus_per_worker
    if gpus is not None and (gpus < 0 or (gpus > 1 and gpus != int(gpus))):
        raise ConfigError(f"--gpus-per-worker is {gpus:g}; expected a fraction up to 1, or a whole number of GPUs")
    if gpus is not None and options.device != "auto" and (gpus > 0) != (options.device == "cuda"):
        raise ConfigError(
            f"--gpus-per-worker is {gpus:g} and --device is {options.device}; expected them to agree: leave one out"
        )


# --- what runs on the workers -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a call came to: a value, or an error that survives the way to the driver."""

    value: Any = None
    error: Exception | None = None


def _portable(error: Exception) -> Exception:
    """The error itself where its class is sure to unpickle, else its text with where it was raised."""
    if isinstance(error, RefragError):
        return error
    if is_out_of_memory(error):
        return MemoryError(str(error))
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno else OSError(str(error))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return RuntimeError(f"{type(error).__name__}: {error} ({os.path.basename(frame.filename)}:{frame.lineno})")


class _RefragWorker:
    """An actor. Models stay in its process, loaded once by the first call that needs them."""

    def __init__(self, pool: str, number: int, device: str) -> None:
        self._name = f"refrag-{pool}-{number}"
        if device == "cpu":
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker has one CPU
        self._memory = _gauge("gpu_memory_bytes", "Peak of the memory that PyTorch took on a worker's GPU.", "worker")
        self._use = _gauge("gpu_utilization", "Percent of the time in which a worker's GPU was at work.", "worker")

    def __repr__(self) -> str:
        return self._name

    def ready(self) -> tuple[str, str]:
        """Id and host name of the node that it runs on."""
        return str(ray.get_runtime_context().get_node_id()), os.uname().nodename

    def run(self, call: Callable[[], Any]) -> _Answer:
        """Make a call; errors are answers."""
        try:
            return _Answer(call())
        except Exception as error:
            traceback.print_exc()  # into the worker's log
            return _Answer(error=_portable(error))
        finally:
            self._measure_gpu()

    def _measure_gpu(self) -> None:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available():
            return
        self._memory.set(torch.cuda.max_memory_allocated(), {"worker": self._name})
        with contextlib.suppress(Exception):  # needs NVIDIA's Python library
            self._use.set(torch.cuda.utilization(), {"worker": self._name})


def _gauge(name: str, description: str, *tags: str) -> Any:
    return Gauge(f"refrag_{name}", description=description, tag_keys=tags)


def _on_device(stage: Any, device: str) -> Any:
    """The same stage for a worker's own device, which is no part of what it makes."""
    has_device = is_dataclass(stage) and any(field.name == "device" for field in fields(stage))
    return replace(stage, device=device) if has_device else stage


# --- the actors -------------------------------------------------------------------------------------


class _Actors:
    """Starts, feeds and ends actors; see dispatch.Fleet."""

    def __init__(self) -> None:
        self.layout: Layout | None = None
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._waiting: dict[Any, tuple[int, str]] = {}
        """Object references → the worker that answers, and whether it is `ready` or `run` that it answers to."""

    def start(self, worker: int, pool: str) -> None:
        """See Fleet."""
        layout = self.layout
        assert layout is not None
        device = "cuda" if pool == DEVICE and layout.device_gpus else "cpu"
        actor = ray.remote(_RefragWorker).options(
            num_cpus=layout.device_cpus if pool == DEVICE else layout.worker_cpus,
            num_gpus=layout.device_gpus if pool == DEVICE else 0,
            max_restarts=0,
            scheduling_strategy="DEFAULT" if 0 < layout.device_gpus < 1 and pool == DEVICE else "SPREAD",
        )
        self._actors[worker] = actor.remote(pool, worker, device)
        self._waiting[self._actors[worker].ready.remote()] = (worker, "ready")

    def submit(self, worker: int, work: Work) -> None:
        """See Fleet."""
        reference = self._actors[worker].run.options(name=work.name).remote(work.call)
        self._waiting[reference] = (worker, "run")

    def stop(self, worker: int) -> None:
        """See Fleet."""
        self._waiting = {ref: asked for ref, asked in self._waiting.items() if asked[0] != worker}
        with contextlib.suppress(RayError, ConnectionError):
            ray.kill(self._actors.pop(worker), no_restart=True)

    def poll(self, seconds: float) -> Iterable[Event]:
        """See Fleet."""
        if not self._waiting:
            time.sleep(min(seconds, 0.1))
            return []
        references = list(self._waiting)
        ready, _ = ray.wait(references, num_returns=1, timeout=seconds)
        if ready and len(references) > 1:
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        return [self._event(reference) for reference in ready]

    def _event(self, reference: Any) -> Event:
        worker, asked = self._waiting.pop(reference)
        try:
            answer = ray.get(reference)
        except RayTaskError as error:  # the call or its answer could not be carried
            return Raised(worker, RuntimeError(_last_line(error)))
        except RayError as error:
            return Died(worker, _reason(error), self._is_node_lost(worker, error))
        if asked == "ready":
            self._nodes[worker], host = answer
            return Ready(worker, _shown(host, answer[0]))
        return Done(worker, answer.value) if answer.error is None else Raised(worker, answer.error)

    def _is_node_lost(self, worker: int, error: RayError) -> bool:
        return bool(getattr(error, "preempted", False)) or (
            worker in self._nodes and not _is_node_alive(self._nodes[worker])
        )


def _is_node_alive(node: str) -> bool:
    """Whether a node is there. Ray takes a quarter of a minute to see that one is not; its own port tells at once."""
    found = next((entry for entry in ray.nodes() if entry["NodeID"] == node and entry["Alive"]), None)
    if found is None:
        return False
    if ray.util.client.ray.is_connected():  # the nodes' ports need not be open to this machine
        return True
    try:
        with socket.create_connection((found["NodeManagerAddress"], found["NodeManagerPort"]), timeout=2.0):
            return True
    except OSError:
        return False


def _shown(host: str, node: str) -> str:
    """A node in messages; several may be on one host."""
    return f"{host}/{node[:8]}"


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _reason(error: RayError) -> str:
    """Why an actor died, in a few words."""
    if isinstance(error, OutOfMemoryError):
        return "Ray ended it, since its node ran out of memory"
    if isinstance(error, ActorUnavailableError):
        return "it does not answer any more"
    text = " ".join(str(error).split())
    for sign, reason in (
        ("node failure", "its node is gone"),
        ("node was terminated", "its node is gone"),
        ("SYSTEM_ERROR", "its process ended unexpectedly"),
        ("connection error code", "its process ended unexpectedly"),
    ):
        if sign in text:
            return reason
    return f"{type(error).__name__}: {text[-200:]}"


def cluster_nodes() -> list[Node]:
    """The living nodes that work can be sent to, ordered by host and id."""
    found = [
        Node(
            str(node["NodeID"]),
            str(node["NodeManagerHostname"]),
            float(node["Resources"].get("CPU", 0)),
            float(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted((node for node in found if node.cpus or node.gpus), key=lambda node: (node.host, node.id))


class _Metrics:
    """A build's figures among Ray's own, and its log lines to the driver's; see dispatch.Telemetry."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._states = {name: _gauge(name, text, "pool") for name, text in _STATES.items()}
        self._retries = Counter(
            "refrag_retries_total", description="Work that was run again.", tag_keys=("pool", "reason")
        )
        self._finished = Counter("refrag_work_total", description="Finished pieces of work.", tag_keys=("pool",))
        self._seconds = Counter(
            "refrag_work_seconds_total", description="Seconds that finished work took.", tag_keys=("pool",)
        )
        self._rows = Counter("refrag_rows_total", description="Rows that stages have made.", tag_keys=("table",))

    def note(self, message: str) -> None:
        """See Telemetry."""
        self._progress.note(message)

    def retried(self, pool: str, reason: str) -> None:
        """See Telemetry."""
        self._retries.inc(1, {"pool": pool, "reason": reason})

    def finished(self, pool: str, seconds: float) -> None:
        """See Telemetry."""
        self._finished.inc(1, {"pool": pool})
        if seconds > 0:
            self._seconds.inc(seconds, {"pool": pool})

    def state(self, pool: str, *, queued: int, running: int, workers: int) -> None:
        """See Telemetry."""
        for name, value in (("queue_length", queued), ("in_flight", running), ("workers", workers)):
            self._states[name].set(value, {"pool": pool})

    def made(self, receipts: Iterable[Receipt]) -> None:
        """Count the rows of a shard's receipts, but for those that were there already."""
        for receipt in receipts:
            for table, rows in receipt.rows.items():
                if rows > 0 and not receipt.reused:
                    self._rows.inc(rows, {"table": table})


_STATES = {
    "queue_length": "Work that waits for a worker.",
    "in_flight": "Work that a worker is at.",
    "workers": "Workers, starting ones too.",
}


# --- the engine -------------------------------------------------------------------------------------


class RayEngine:
    """A Ray cluster, or a Ray of this process's own. Use as a context manager: leaving it ends the actors.

    Entering raises ClusterError where the cluster cannot be reached, has no room for the fewest workers, or a node
    lacks software or a folder. A Ray that this process is connected to already is used, and left as it is.
    """

    def __init__(self, options: RayOptions | None = None, progress: Progress | None = None) -> None:
        self.options = options or RayOptions()
        check_options(self.options)
        self._progress = progress or Silent()
        self._connection = contextlib.ExitStack()

    @property
    def spans_machines(self) -> bool:
        """Whether workers run on other machines, or may as nodes join."""
        return self.options.cluster != _OWN or any(node.host != _this_host() for node in cluster_nodes())

    def __enter__(self) -> "RayEngine":
        self._last: dict[str, tuple[int, int]] = {}
        try:
            self._connect()
            self._layout = self._first_layout()
            self._check_nodes(self._needs())
            self._metrics = _Metrics(self._progress)
            self._actors = _Actors()
            self._dispatcher = Dispatcher(
                self._actors, self._metrics, Limits(timeout=self.options.shard_timeout), room=_room
            )
        except BaseException:
            self._disconnect()
            raise
        self._looked, self._phase = time.monotonic(), "map"
        self._resize()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._dispatcher.close()
        finally:
            self._disconnect()

    def _connect(self) -> None:
        if ray.is_initialized():
            check_connected_to(self.options.address)
            return
        # Ray prints what it has to say of workers on stdout, from a thread of its own; that is for the result alone.
        self._connection.enter_context(contextlib.redirect_stdout(sys.stderr))
        self._connection.callback(ray.shutdown)  # an interrupted start, too, has to be undone
        connect(self.options)

    def _disconnect(self) -> None:
        if self.options.wait_for_nodes and ray.is_initialized():
            _ask_autoscaler([])
        self._connection.close()

    # --- before the start

    def _first_layout(self) -> Layout:
        """The layout on the nodes that there are, or that come within the time to wait for them."""
        deadline = time.monotonic() + self.options.wait_for_nodes
        if self.options.wait_for_nodes:
            _ask_autoscaler(bundles(self.options.wanted, None))
        told = False
        while True:
            try:
                return lay_out(cluster_nodes(), self.options.wanted)
            except ClusterError as error:
                if time.monotonic() >= deadline:
                    raise
                if not told:
                    told = True
                    self._progress.note(f"waiting {self.options.wait_for_nodes:,.0f} s for nodes: {error}")
            time.sleep(1.0)

    def _needs(self) -> Needs:
        folders = [absolute(location) for location in self.options.locations if not is_uri(location)]
        output = self.options.output
        return Needs(
            modules=node_checks.modules_for([*self.options.locations, *([output] if output else [])]),
            readable=[folder for folder in folders if os.path.exists(folder)],  # a glob is no path
            shared=[absolute(output)] if output and not is_uri(output) else [],
        )

    def _check_nodes(self, needs: Needs) -> None:
        """Ask every node whether it has what it needs. Raises ClusterError that names those that have not."""
        nodes, token = cluster_nodes(), f".refrag-reach-{os.uname().nodename}-{os.getpid()}"
        check = node_checks.make_check(needs, token)
        with node_checks.tokens(needs.shared, token):
            asked = {node: _on_node(check, node, node.id) for node in nodes}
            problems: dict[str, list[str]] = {}
            for node, reference in asked.items():
                found = _answer_of(reference)
                if not found:
                    found = node_checks.unanswered(needs.shared, token, node.id)
                problems[_shown(node.host, node.id)] = found
        node_checks.refuse(problems)

    # --- the work

    def map(self, function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """Results in the order of the items. Bounded: a straggler holds up what is far behind it."""
        self._enter_phase("map")
        made: dict[int, Made] = {}
        source, first, last, ended = iter(items), 0, 0, False
        try:
            while True:
                while not ended and self._has_room(CPU, self._layout.workers) and last - first < self._window():
                    try:
                        item = next(source)
                    except StopIteration:
                        ended = True
                    else:
                        self._dispatcher.put(Work(CPU, _label(function, item, last), partial(function, item), last))
                        last += 1
                if ended and first == last:
                    return
                made |= {work.subject: value for work, value in self._step()}
                while first in made:
                    yield made.pop(first)
                    first += 1
        finally:
            self._dispatcher.clear()

    def _window(self) -> int:
        return _AHEAD * self._layout.workers

    def _has_room(self, pool: str, workers: int) -> bool:
        """Whether a pool can take more: as much again as it works on may wait."""
        return self._dispatcher.outstanding(pool) < 2 * workers

    def run(self, store: Store, stages: Stages, specs: Iterable[ShardSpec]) -> Iterator[ShardResult]:
        """Every shard through tokenize on a CPU worker, then through the device stages on a device worker."""
        self._compare_machines(stages)
        device = "cuda" if self._layout.device_gpus else "cpu"
        on_device = [_on_device(stage, device) for stage in stages.device]
        self._enter_phase("run")
        source, ended = iter(specs), False
        try:
            while True:
                while not ended and self._has_room(CPU, self._layout.tokenizers) and self._device_has_room():
                    spec = next(source, None)
                    if spec is None:
                        ended = True
                    else:
                        call = partial(stages.tokenize, store, spec)
                        self._dispatcher.put(Work(CPU, f"tokenize {spec.name[:12]}", call, spec))
                if ended and not self._dispatcher.outstanding(CPU):
                    if not self._dispatcher.outstanding(DEVICE):
                        return
                    self._enter_phase("last")
                for work, value in self._step():
                    yield from self._next_stage(store, on_device, work, value)
        finally:
            self._dispatcher.clear()

    def _device_has_room(self) -> bool:
        return self._has_room(DEVICE, self._layout.max_device_workers)

    def _next_stage(
        self, store: Store, on_device: Sequence[DeviceStage], work: Work, value: Any
    ) -> Iterator[ShardResult]:
        """A tokenized shard goes on to the device stages; a shard that is through is a result."""
        if work.pool == CPU and on_device and value.rows["documents"]:
            call = partial(run_device_stages, store, on_device, work.subject, value)
            self._dispatcher.put(Work(DEVICE, f"encode {work.subject.name[:12]}", call, work.subject))
            return
        result = run_device_stages(store, (), work.subject, value) if work.pool == CPU else value
        self._metrics.made(result.receipts)
        yield result

    def _compare_machines(self, stages: Stages) -> None:
        """Compare the packages, code and models of other machines with this one's. Raises ClusterError."""
        others = [node for node in cluster_nodes() if node.host != _this_host()]
        if not others:
            return
        uri = any(is_uri(location) for location in (*self.options.locations, self.options.output or ""))
        needs = needs_of(stages, extras=("cpu", "ray", *(["s3"] if uri else [])))
        asked = {node: _on_node(look, node, needs) for node in others}
        check_workers(needs, look(needs), [_machine(node, reference) for node, reference in asked.items()])

    # --- the pools

    def _step(self) -> list[tuple[Work, Any]]:
        if time.monotonic() - self._looked >= _LOOK_SECONDS:
            self._look()
        return self._dispatcher.step()

    def _look(self) -> None:
        """Take nodes into account that came or went."""
        self._looked = time.monotonic()
        with contextlib.suppress(ClusterError):  # too few just now; the dispatcher knows how long to wait for more
            self._layout = lay_out(cluster_nodes(), self.options.wanted)
        self._resize()

    def _enter_phase(self, phase: str) -> None:
        if phase != self._phase:
            self._phase = phase
            self._resize()

    def _resize(self) -> None:
        layout = self._actors.layout = self._layout
        makes_room = layout.last_device_workers > layout.max_device_workers
        sizes = {
            "map": {DEVICE: (0, 0), CPU: (0, layout.workers)},
            "run": {CPU: (0, layout.tokenizers), DEVICE: (layout.min_device_workers, layout.max_device_workers)},
            "last": {CPU: (0, 0 if makes_room else layout.tokenizers), DEVICE: (0, layout.last_device_workers)},
        }[self._phase]
        if sizes != self._last:
            self._last = sizes
            for pool, (fewest, most) in sizes.items():
                self._dispatcher.resize(pool, fewest, most)


def _label(function: Callable[..., Any], item: Any, number: int) -> str:
    """What a call is named in messages and dashboards: the function, and the item's name or number."""
    name = getattr(getattr(function, "func", function), "__name__", type(function).__name__)
    return f"{name.strip('_').replace('_', ' ')} {getattr(item, 'name', number)}"


def _this_host() -> str:
    return os.uname().nodename


def _on_node(function: Callable[..., Any], node: Node, *arguments: Any) -> Any:
    here = NodeAffinitySchedulingStrategy(node.id, soft=False)
    asked = ray.remote(function).options(num_cpus=0, scheduling_strategy=here, name="refrag check node", max_retries=0)
    return asked.remote(*arguments)


def _machine(node: Node, reference: Any) -> Machine:
    """What `look` saw on a node, under the node's name. Raises ClusterError where it gave no answer."""
    name = f"{node.host} ({node.id[:8]})"
    try:
        seen: Machine = ray.get(reference, timeout=_PROBE_SECONDS)
    except (GetTimeoutError, RayError) as error:
        raise ClusterError(
            f"node {name} could not be looked at ({_last_line(error)[:200]}), expected it to import this machine's "
            "refrag: start every node from one image"
        ) from error
    return replace(seen, name=name)


def _answer_of(reference: Any) -> list[str]:
    try:
        return list(ray.get(reference, timeout=_PROBE_SECONDS))
    except GetTimeoutError:
        return [f"did not answer within {_PROBE_SECONDS:,.0f} s"]
    except RayError as error:
        return [f"cannot run the check ({_last_line(error)[:200]})"]


def _ask_autoscaler(wanted: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    with contextlib.suppress(RayError, ConnectionError):
        request_resources(bundles=wanted)


def _room() -> str:
    free = ray.available_resources()
    return f"{describe(cluster_nodes())}; free: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs"


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """Ray puts handlers of its own in place; an interrupted build ends as the command line says."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_reachable(address: str) -> None:
    """Raise ConnectionError where nothing listens at `host:port`: Ray itself would try on without end."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname and parts.port:
        with socket.create_connection((parts.hostname, parts.port), timeout=_CONNECT_SECONDS):
            pass


def check_connected_to(address: str | None) -> None:
    """Raise ConfigError where this process is connected to another cluster than that at `host:port`."""
    found = str(ray.get_runtime_context().gcs_address)
    if address is not None and address != "auto" and "://" not in address and address != found:
        raise ConfigError(
            f"this process is connected to the Ray cluster at {found}, {address} was asked for; expected the same: "
            "leave the address out, or call ray.shutdown() first"
        )


def connect(options: RayOptions) -> None:
    """Connect this process to the cluster, or start a Ray of its own. Raises ClusterError."""
    address = options.cluster
    own = {"num_cpus": options.local_cpus or available_cores(), "include_dashboard": False}
    try:
        _check_reachable(address)
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster at {address} ({error}), expected one that answers: start it with `ray start --head`, mend "
            "--ray-address, or leave that out to use this machine alone"
        ) from error
    try:
        with _kept_signals():
            ray.init(address, log_to_driver=False, logging_level="error", **(own if address == _OWN else {}))
    except (AuthenticationError, ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            f"Ray at {address} does not take this client ({_last_line(error)}), expected to be let in: where the "
            "cluster asks for a token (Ray does by default) set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH to the cluster's; else look at its logs"
        ) from error
