"""The Beam engine: maps and builds as Beam pipelines over shard specs, on whatever runner the options name.

`BuildIndex` is the transform that people put into pipelines of their own. `BeamEngine` drives a whole build with it:
specs go in with the pipeline, results come back as small files among the index's work in progress (`exchange.py`),
which works on every runner and shows progress while the pipeline runs. Embeddings travel neither way.
"""

import contextlib
import io
import logging
import os
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from refrag.pipelines.engines.beam_worker import PREFIX
from refrag.pipelines.engines.exchange import Exchange
from refrag.pipelines.engines.messages import Failure, decode, encode, failure_of
from refrag.pipelines.plan import ShardSpec
from refrag.pipelines.stages import ShardResult, Stages, run_device_stages
from refrag_core.devices import available_cores
from refrag_core.errors import ConfigError, MissingExtraError, ObjectStoreError, StageError
from refrag_core.processes import is_alive
from refrag_core.storage import IndexLocation, Store


@contextlib.contextmanager
def _logged_to(handler: logging.Handler) -> Iterator[None]:
    """Give the root logger a handler where it has none: what Beam has to say would go to the terminal."""
    root = logging.getLogger()
    quiet = not root.handlers
    if quiet:
        root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


with _logged_to(logging.NullHandler()):
    try:
        import apache_beam as beam
        from apache_beam.metrics import Metrics
        from apache_beam.options.pipeline_options import (
            DirectOptions,
            PipelineOptions,
            PortableOptions,
            StandardOptions,
        )
        from apache_beam.portability.api import beam_provision_api_pb2
        from apache_beam.runners.portability.fn_api_runner import fn_runner
        from apache_beam.runners.portability.portable_runner import JobServiceHandle
        from apache_beam.runners.runner import create_runner
        from apache_beam.transforms.environments import SubprocessSDKEnvironment
        from apache_beam.utils.shared import Shared
    except ImportError as missing:
        raise MissingExtraError(
            "the Beam engine needs the packages of an extra: pip install 'refrag[beam]'"
        ) from missing

Item = TypeVar("Item")
Made = TypeVar("Made")

Pipe = Callable[[Any, Exchange, Mapping[str, Any]], None]
"""Puts the items into a pipeline, and their results from there into an exchange."""

RESULTS = "results"
FAILED = "failed"
NAMESPACE = "refrag"
"""Of Beam's metrics: counters shards, documents, passages, chunks, rejected, reused, retries and failed; distributions
`<stage>_ms` of the stages tokenize, embeddings, vectors and scores."""

_ATTEMPTS = 3
_PAUSE_SECONDS = 1.0
_ITEMS_A_PIPELINE = 10_000
_BYTES_A_PIPELINE = 4 << 20
"""Of its items, as Beam codes them. A job's description may have 10 MB on some runners, and a million specs are not
held at once."""

_POLL_SECONDS = (0.05, 10.0)
_POLL_FACTOR = 20
"""Looking for results takes at most a twentieth of the driver's time, whatever a listing costs."""

_CLOSING_SECONDS = 5.0
_DEVICE_STAGES = threading.Lock()
"""Several threads of one worker tokenize side by side, but share one device and one copy of the models."""


# --- transforms -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FailedShard:
    """A dead letter: a shard that no stage could finish, and why."""

    spec: ShardSpec
    failure: Failure


class BuildIndex(beam.PTransform):  # type: ignore[misc]
    """A composite transform from shard specs to shard results, with every stage in between.

    In: a PCollection of `refrag.pipelines.plan.ShardSpec`. Out: `.results`, a PCollection of
    `refrag.pipelines.stages.ShardResult` whose tables lie in the store, and `.failed`, one of `FailedShard`. A result
    whose `shard` is None names the documents that have to leave the shard first (`ShardResult.rejected`). Embeddings
    are in neither. A spec that comes twice, or again, gives the same result and changes nothing.

    Args:
        store: where the index is; every worker must reach it.
        stages: of `refrag.pipelines.components.resolve_models(…).stages(…)`; every worker must reach the model folders.
        cancelled: asked before each shard; once it says True, specs are dropped.
    """

    def __init__(self, store: Store, stages: Stages, *, cancelled: Callable[[], bool] | None = None) -> None:
        super().__init__()
        self._work = _BuildShard(store, stages, cancelled)

    def expand(self, specs: Any) -> Any:
        """Spread the specs over all workers, and build each."""
        return (
            specs | "Spread" >> beam.Reshuffle() | "Build" >> beam.ParDo(self._work).with_outputs(FAILED, main=RESULTS)
        )


class _Models:
    """The models of all device stages, loaded; they are kept by the stages' own caches."""

    def __init__(self, stages: Stages) -> None:
        self.loaded = [stage.load() for stage in stages.device if hasattr(stage, "load")]


class _BuildShard(beam.DoFn):  # type: ignore[misc]
    """One shard through all stages. What cannot be processed is an output, so that the runner does not repeat it."""

    def __init__(self, store: Store, stages: Stages, cancelled: Callable[[], bool] | None) -> None:
        self._store, self._stages, self._cancelled = store, stages, cancelled
        self._shared = Shared()
        self._failure: Failure | None = None

    def setup(self) -> None:
        """Load the models, once a process."""
        try:
            self._models = self._shared.acquire(partial(_Models, self._stages))
        except Exception as error:  # raised here it would reach nobody but the runner, which tries again
            self._failure = failure_of(error)

    def process(self, spec: ShardSpec) -> Iterator[Any]:
        """The result of a shard, or a dead letter."""
        if self._cancelled is not None and self._cancelled():
            return
        made = self._failure or self._attempt(spec)
        if isinstance(made, Failure):
            _count("failed", 1)
            yield beam.pvalue.TaggedOutput(FAILED, FailedShard(spec, made))
            return
        _count_result(made)
        yield made

    def _attempt(self, spec: ShardSpec) -> ShardResult | Failure:
        return _attempted(partial(_through_stages, self._store, self._stages, spec))


def _through_stages(store: Store, stages: Stages, spec: ShardSpec) -> ShardResult:
    tokenized = stages.tokenize(store, spec)
    with _DEVICE_STAGES:
        return run_device_stages(store, stages.device, spec, tokenized)


class _Call(beam.DoFn):  # type: ignore[misc]
    """Any function over items that carry their keys."""

    def __init__(self, function: Callable[[Any], Any], cancelled: Callable[[], bool]) -> None:
        self._function, self._cancelled = function, cancelled

    def process(self, keyed: tuple[str, Any]) -> Iterator[tuple[str, Any]]:
        """The key, and the item's result or failure."""
        if not self._cancelled():
            yield keyed[0], _attempted(partial(self._function, keyed[1]))


def _attempted(call: Callable[[], Made]) -> Made | Failure:
    """The result; errors of connections and of object stores get three attempts, all others are failures at once."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if attempt == _ATTEMPTS or not isinstance(error, (ConnectionError, TimeoutError, ObjectStoreError)):
                return failure_of(error)
            _count("retries", 1)
            time.sleep(_PAUSE_SECONDS * attempt)
    raise AssertionError("unreachable")


def _count(name: str, amount: int) -> None:
    Metrics.counter(NAMESPACE, name).inc(amount)


def _count_result(result: ShardResult) -> None:
    _count("shards", result.shard is not None)
    _count("rejected", len(result.rejected))
    for receipt in result.receipts:
        _count("reused", receipt.reused)
        if not receipt.reused:
            Metrics.distribution(NAMESPACE, f"{receipt.stage}_ms").update(round(1000 * receipt.seconds))
    for name in ("documents", "passages", "chunks"):
        _count(name, 0 if result.shard is None else getattr(result.shard, name))


# --- how results come back --------------------------------------------------------------------------


def _deliver(exchange: Exchange, keyed: tuple[str, Any]) -> None:
    key, made = keyed
    try:
        data = encode(made)
    except StageError as error:
        data = encode(failure_of(error))
    exchange.put(key, data)


def _delivered(exchange: Exchange, label: str) -> Any:
    return label >> beam.Map(partial(_deliver, exchange))


def _keyed_result(result: ShardResult) -> tuple[str, ShardResult]:
    return result.spec.name, result


def _keyed_failure(failed: FailedShard) -> tuple[str, Failure]:
    return failed.spec.name, failed.failure


def _build_pipeline(store: Store, stages: Stages, pipeline: Any, exchange: Exchange, items: Mapping[str, Any]) -> None:
    """Specs through BuildIndex; each result is written as soon as it is made."""
    specs = pipeline | "Specs" >> beam.Create(list(items.values()), reshuffle=False)
    built = specs | "Build index" >> BuildIndex(store, stages, cancelled=exchange.stopped)
    # Not flattened before: that would hold the results of a bundle until its end.
    built[RESULTS] | "Name results" >> beam.Map(_keyed_result) | _delivered(exchange, "Deliver results")
    built[FAILED] | "Name failures" >> beam.Map(_keyed_failure) | _delivered(exchange, "Deliver failures")


def _map_pipeline(function: Callable[[Any], Any], pipeline: Any, exchange: Exchange, items: Mapping[str, Any]) -> None:
    """Items through a function; each result is written as soon as it is made."""
    keyed = pipeline | "Items" >> beam.Create(list(items.items()), reshuffle=False) | "Spread" >> beam.Reshuffle()
    keyed | "Map" >> beam.ParDo(_Call(function, exchange.stopped)) | _delivered(exchange, "Deliver")


# --- running pipelines ------------------------------------------------------------------------------


_CODER = beam.coders.FastPrimitivesCoder()


def _parts(items: Iterable[Item]) -> Iterator[list[Item]]:
    """The items of one pipeline after another."""
    part, size = list[Item](), 0
    for item in items:
        part.append(item)
        size += len(_CODER.encode(item))
        if len(part) >= _ITEMS_A_PIPELINE or size >= _BYTES_A_PIPELINE:
            yield part
            part, size = [], 0
    if part:
        yield part


class _Running:
    """A pipeline that runs in a thread, since some runners return at the end only."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="refrag-beam", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._pipeline.run()
            self._result.wait_until_finish()
        except BaseException as error:
            self.error = error

    @property
    def ended(self) -> bool:
        """Whether the runner has let go of the pipeline."""
        return not self._thread.is_alive()

    def wait(self, seconds: float) -> None:
        """Wait for the end, `seconds` at most."""
        self._thread.join(seconds)

    def cancel(self) -> None:
        """Ask the runner to stop, where it can be asked."""
        if self._result is not None:
            with contextlib.suppress(Exception):
                self._result.cancel()

    def counters(self) -> dict[str, int]:
        """The counters of refrag, of a pipeline that has ended."""
        if self._result is None:
            return {}
        found = self._result.metrics().query(beam.metrics.MetricsFilter().with_namespace(NAMESPACE))
        return {counter.key.metric.name: int(counter.result or 0) for counter in found["counters"]}


@dataclass(frozen=True, slots=True)
class _Workers:
    """The worker processes that a runner started on this machine, by the files that they keep in a folder."""

    folder: Path

    def _pids(self) -> list[int]:
        return [int(path.name.removeprefix(PREFIX)) for path in self.folder.glob(f"{PREFIX}*")]

    def any_lost(self) -> bool:
        """Whether one has died before its end."""
        return any(not is_alive(pid) for pid in self._pids())

    def kill(self) -> None:
        """End those that still run."""
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
            (self.folder / f"{PREFIX}{pid}").unlink(missing_ok=True)


class _WorkerLost(Exception):
    """A worker process died; the runner would wait for it for ever."""


class BeamEngine:
    """Builds on any Beam runner. Use as a context manager: leaving it ends what it started.

    Args:
        options: Beam's PipelineOptions as on a command line, `--runner=FlinkRunner` …; without a runner this process
            does the work, or with `--direct_running_mode=multi_processing` processes on this machine.
        exchange: an index's path or URI, below which results of `map` come back; must be reached by the workers. Only
            runners of this machine do without.
        workers: processes of the direct runner, 0 for this process alone; None leaves that to the options.

    Raises ConfigError for options that Beam refuses.
    """

    def __init__(
        self, options: Sequence[str] = (), *, exchange: IndexLocation | None = None, workers: int | None = None
    ) -> None:
        self._exchange = exchange
        self._failed = False
        self.counters: dict[str, int] = {}
        """Beam's counters of refrag, summed over all pipelines that have ended."""
        self._folder = Path(tempfile.mkdtemp(prefix="refrag-beam-"))
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_logged_to(logging.FileHandler(self._folder / "driver.log", delay=True)))
        self._quiet.enter_context(_quiet_threads())
        try:
            _check_workers_once(options, workers)
            self._flags = _checked([*options, *_flags_of(workers)], workers)
            self.runner = _runner_of(self._flags)
        except BaseException:
            self._end()
            raise

    @property
    def spans_machines(self) -> bool:
        """Whether workers may run on other machines than the driver."""
        portable = _parsed(self._flags).view_as(PortableOptions)
        return not _is_direct(self.runner) and portable.environment_type != "LOOPBACK"

    def __enter__(self) -> "BeamEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        _Workers(self._folder).kill()
        self._quiet.close()
        if not self._failed:  # the message of the error names the log
            shutil.rmtree(self._folder, ignore_errors=True)

    def map(self, function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """Results in the order of the items; the worker's own error where one fails.

        An item that is alone is run here, and fails as it would elsewhere: starting a pipeline for it takes seconds, on
        a service minutes.
        """
        for part in _parts(items):
            if len(part) == 1:
                alone = _attempted(partial(function, part[0]))
                if isinstance(alone, Failure):
                    raise alone.error
                yield alone
                continue
            keyed = {f"{number:08d}": item for number, item in enumerate(part)}
            location = self._exchange or self._own_folder()
            waiting: dict[str, Made] = {}
            keys = iter(keyed)
            upcoming = next(keys)
            for key, made in self._execute(location, keyed, partial(_map_pipeline, function)):
                waiting[key] = made
                while upcoming in waiting:
                    yield waiting.pop(upcoming)
                    upcoming = next(keys, "")

    def run(self, store: Store, stages: Stages, specs: Iterable[ShardSpec]) -> Iterator[ShardResult]:
        """Every shard through every stage, largest first, so that no large one is left over at the end."""
        for part in _parts(specs):
            part.sort(key=lambda spec: (-spec.num_bytes, spec.name))
            keyed = {spec.name: spec for spec in part}
            for _, result in self._execute(store.location, keyed, partial(_build_pipeline, store, stages)):
                yield result

    def _own_folder(self) -> Path:
        if self.spans_machines:
            raise ConfigError(
                f"{self.runner} has workers elsewhere, and the engine was told of no place where their results come "
                "back; expected the index's location: BeamEngine(options, exchange=…)"
            )
        return self._folder

    def _execute(self, location: IndexLocation, items: Mapping[str, Any], build: Pipe) -> Iterator[tuple[str, Any]]:
        """Results with their keys as they come; the items of a worker that died go into a pipeline of their own."""
        left = dict(items)
        deaths = 0
        while left:
            before = len(left)
            with contextlib.suppress(_WorkerLost):
                for key, made in self._outcomes(location, dict(left), build):
                    del left[key]
                    yield key, made
            deaths = deaths + 1 if len(left) == before else 0
            if deaths == _ATTEMPTS:
                raise self._failure(
                    f"a worker process died {_ATTEMPTS} times on the same work (out of memory?), expected it to "
                    "finish: use fewer --workers or a smaller --shard-bytes and run the command again"
                )

    def _outcomes(self, location: IndexLocation, items: Mapping[str, Any], build: Pipe) -> Iterator[tuple[str, Any]]:
        """One pipeline: results with their keys as they come. Raises _WorkerLost, or the error of an item."""
        exchange = Exchange.of(location)
        with self._launched(exchange, items, build) as running:
            seen: set[str] = set()
            while len(seen) < len(items):
                ended = running.ended  # asked before the listing, so that nothing that came before the end is missed
                started = time.monotonic()
                for key in [key for key in exchange.present() if key not in seen]:
                    seen.add(key)
                    made = decode(exchange.take(key))
                    if isinstance(made, Failure):
                        raise made.error
                    yield key, made
                if ended and len(seen) < len(items):
                    raise self._broken(running.error, len(items) - len(seen))
                self._wait(running, _POLL_FACTOR * (time.monotonic() - started))
            while not running.ended:
                self._wait(running, 0.0)
            for name, amount in running.counters().items():
                self.counters[name] = self.counters.get(name, 0) + amount

    def _wait(self, running: _Running, seconds: float) -> None:
        low, high = _POLL_SECONDS
        running.wait(min(max(seconds, low), high))
        if not running.ended and _Workers(self._folder).any_lost():
            raise _WorkerLost

    @contextlib.contextmanager
    def _launched(self, exchange: Exchange, items: Mapping[str, Any], build: Pipe) -> Iterator[_Running]:
        """Start a pipeline; at the end, however it comes, nothing of it goes on."""
        pipeline = self._pipeline(len(items))
        exchange.open()
        build(pipeline, exchange, items)
        running = _Running(pipeline)
        try:
            yield running
        finally:
            if not running.ended:
                exchange.stop()
                running.cancel()
                self._close(running)
            exchange.remove()

    def _close(self, running: _Running) -> None:
        """Wait for what ends now, but neither for long work nor for a runner that misses a worker."""
        deadline = time.monotonic() + _CLOSING_SECONDS
        with contextlib.suppress(_WorkerLost):
            while not running.ended and time.monotonic() < deadline:
                self._wait(running, 0.0)
        _Workers(self._folder).kill()

    def _pipeline(self, num_items: int) -> Any:
        options = _parsed(self._flags)
        if not _is_direct(self.runner):
            return beam.Pipeline(runner=self.runner, options=options)
        return beam.Pipeline(runner=self._local_runner(options, num_items), options=options)

    def _local_runner(self, options: Any, num_items: int) -> Any:
        """Beam's runner of this machine itself: by the name DirectRunner it would first look for one to download."""
        direct = options.view_as(DirectOptions)
        settings = JobServiceHandle.encode_pipeline_options(options.get_all_options())
        told = fn_runner.ExtendedProvisionInfo(beam_provision_api_pb2.ProvisionInfo(pipeline_options=settings))
        if direct.direct_running_mode != "multi_processing":
            return fn_runner.FnApiRunner(provision_info=told)
        workers = direct.direct_num_workers or available_cores()
        direct.direct_num_workers = min(workers, num_items)
        direct.direct_running_mode = "in_memory"  # else the runner takes a command of its own
        return fn_runner.FnApiRunner(self._worker_environment(workers), provision_info=told)

    def _worker_environment(self, workers: int) -> Any:
        threads = max(1, available_cores() // workers)
        words = [sys.executable, "-m", "refrag.pipelines.engines.beam_worker", self._folder, os.getpid(), threads]
        command = " ".join(shlex.quote(str(word)) for word in words)
        log = shlex.quote(str(self._folder / "workers.log"))
        # The shell makes the mark, under the process id that is the worker's: not even a start that fails goes unseen.
        mark = f"{shlex.quote(str(self._folder / PREFIX))}$$"
        return SubprocessSDKEnvironment.from_command_string(f": >{mark}; exec {command} >>{log} 2>&1")

    def _failure(self, message: str) -> StageError:
        self._failed = True
        return StageError(f"{message}; Beam's logs are in {self._folder}")

    def _broken(self, error: BaseException | None, missing: int) -> StageError:
        lines = [line.strip() for line in str(error or "").splitlines() if line.strip()]
        reason = lines[-1] if lines else "it ended without a word"
        (self._folder / "pipeline.log").write_text(str(error))
        return self._failure(
            f"the pipeline on {self.runner} ended without the results of {missing} items ({reason}), expected all: "
            "look at the runner's own log, mend the cause and run the command again"
        )


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Log what Beam's own threads raise when a worker goes; they would print it."""
    before = threading.excepthook

    def log(raised: threading.ExceptHookArgs) -> None:
        logging.getLogger(__name__).warning("a thread of Beam ended: %s", raised.exc_value)

    threading.excepthook = log
    try:
        yield
    finally:
        threading.excepthook = before


# --- options ----------------------------------------------------------------------------------------


def _flags_of(workers: int | None) -> list[str]:
    if workers is None:
        return []
    if workers == 0:
        return ["--direct_running_mode=in_memory"]
    return ["--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]


def _check_workers_once(options: Sequence[str], workers: int | None) -> None:
    said = [option for option in options if option.startswith(("--direct_running_mode", "--direct_num_workers"))]
    if said and workers is not None:
        raise ConfigError(
            f"--workers {workers} was given with Beam's own {said[0]}; expected one of the two: leave the other out"
        )


def _parsed(flags: Sequence[str]) -> Any:
    """PipelineOptions of `flags`. Raises ConfigError where argparse would print its usage and exit."""
    with io.StringIO() as said, contextlib.redirect_stderr(said):
        try:
            options = PipelineOptions(list(flags))
            options.get_all_options()
        except SystemExit:
            reason = said.getvalue().strip().rpartition("error: ")[2]
            raise ConfigError(
                f"Beam refuses its options {' '.join(flags)}: {reason}; expected PipelineOptions of Beam"
            ) from None
    return options


def _runner_of(flags: Sequence[str]) -> str:
    return str(_parsed(flags).view_as(StandardOptions).runner or "DirectRunner")


def _is_direct(runner: str) -> bool:
    return runner.lower() in ("directrunner", "direct", "switchingdirectrunner", "fnapirunner")


def _checked(flags: list[str], workers: int | None) -> list[str]:
    """The flags, unless they are wrong. The direct runner itself would pass over an option that is misspelt."""
    runner, options = _runner_of(flags), _parsed(flags)
    if not _is_direct(runner) and workers is not None:
        raise ConfigError(
            f"--workers counts processes of Beam's direct runner, and {runner} was asked for; expected the runner's "
            "own option, such as --beam-option=--num_workers=8"
        )
    try:
        create_runner(runner)
    except (ValueError, ImportError, AttributeError) as error:
        raise ConfigError(f"Beam has no runner {runner} here ({error}); expected one that is installed") from error
    unknown = set(options.get_all_options(retain_unknown_options=True)) - set(options.get_all_options())
    if _is_direct(runner) and unknown:
        raise ConfigError(
            f"Beam's direct runner has no option --{min(unknown)}; expected one of its PipelineOptions, such as "
            "--direct_num_workers=4"
        )
    return flags
