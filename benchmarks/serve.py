"""A server under load: requests a second and latencies by concurrent clients, compressed against full context.

    refrag bench serve my-index --clients 1,4,16,64 --json --output benchmarks/results/serve.json
    refrag bench serve my-index --soak 1200 --clients 16 --json --output benchmarks/results/serve-soak.json

The server is `refrag serve` in a process of its own, at loopback; the load comes from this one: each client asks, reads
the stream to its end, and asks again. `compressed` and `full` differ in the policy alone, on the same model, questions
and passages; where the checkpoint is untrained the answers of `compressed` are noise, and its times what they are. A
first token counts when its text arrives; times between tokens are an answer's mean. With `--turns` clients hold
conversations: every request carries the turns before it, whose answers are scripted. A soak always has them, so that
the history's passages, the chunk cache and the prompts that slots keep are part of it.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count, cycle
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from refrag.benchmarks.measurement import environment, load, say
from refrag_core.errors import EngineError
from refrag_core.index_reader import IndexReader, PassageRef
from refrag_core.storage import IndexLocation

_QUESTION_WORDS = 12
_QUESTIONS = 200
_SAMPLES = 60
_SOAK_TURNS = 6
_SOAK_HISTORY = 160
"""Decoder positions of the history, so that the last of so many turns find the first as passages, or dropped."""
_REPLY = "The passages tell of it, though not everything that one might want to know."
"""What conversations have for an answer."""
_LEAVES = 10
"""In a soak every so-many-th request's client hangs up after its first token."""
_FLAT = 0.05
"""Growth of the last third's memory over the middle third's up to which it is called flat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeBenchOptions:
    """What is measured."""

    index: IndexLocation
    clients: tuple[int, ...] = (1, 4, 16, 64)
    requests: int | None = None
    """Of each row; None for 4 a client, at least 16."""
    new_tokens: int = 32
    top_k: int = 5
    policy: str = "none"
    """Of the compressed rows."""
    expansion_fraction: float = 0.1
    slots: int = 16
    max_positions: int = 2048
    turns: int = 1
    """Of a conversation; a client begins a new one after so many."""
    device: str = "auto"
    soak_seconds: float = 0.0
    """Instead of rows: one load for so long, with the server's memory."""
    server_options: tuple[str, ...] = ()
    """More options of `refrag serve`."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One request as its client saw it, in seconds."""

    first_token: float
    whole: float
    tokens: int
    positions: int
    context_tokens: int
    cached: int = 0
    """Positions that the server had not to read, since a prompt before began alike."""

    @property
    def between_tokens(self) -> float:
        """Mean time between tokens; NaN for a single one."""
        return (self.whole - self.first_token) / (self.tokens - 1) if self.tokens > 1 else float("nan")


# --- the server ---------------------------------------------------------------------------------------


@contextmanager
def running_server(options: ServeBenchOptions) -> Iterator[tuple[str, int]]:
    """A server in a process of its own; its URL and process id. Raises EngineError when it ends before it is up."""
    command = [sys.executable, "-m", "refrag.cli", "serve", str(options.index), "--port", "0", "--allow-untrained"]
    command += ["--slots", str(options.slots), "--max-positions", str(options.max_positions)]
    command += ["--queue-limit", str(2 * max(options.clients)), "--device", options.device, *options.server_options]
    command += ["--request-seconds", "3600"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            if not url:
                log.seek(0)
                raise EngineError(f"the server did not come up; its log ends: {log.read()[-500:]}")
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(60)
            process.stdout.close()


def memory_megabytes(process_id: int) -> float:
    """Resident memory of a process, MB (10^6 bytes)."""
    import psutil

    return round(float(psutil.Process(process_id).memory_info().rss) / 1e6, 1)


# --- a client -----------------------------------------------------------------------------------------


async def ask(url: str, body: Mapping[str, Any], *, leave: bool = False) -> Timing | None:
    """One streamed request, timed; None where the client leaves after the first token. Raises EngineError."""
    place = urlsplit(url)
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    try:
        data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        status = (await reader.readline()).split(b" ", 2)[1:2]
        if status != [b"200"]:
            raise EngineError(f"the server answered {status}; expected 200: {(await reader.read(2000))[-300:]!r}")
        return await _read(reader, started, leave=leave)
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, started: float, *, leave: bool) -> Timing | None:
    first, usage = 0.0, None
    async for event in _events(reader):
        if "error" in event:
            raise EngineError(f"the server broke an answer off: {event['error']['message']}")
        usage = event.get("usage") or usage
        text = any(choice["delta"].get("content") for choice in event["choices"])
        if text and not first:
            first = time.perf_counter() - started
            if leave:
                return None
    whole = time.perf_counter() - started
    if usage is None:
        raise EngineError("the server ended an answer without its counts; expected them at its end")
    return Timing(
        first_token=first or whole,
        whole=whole,
        tokens=usage["completion_tokens"],
        positions=usage["decoder_positions"],
        context_tokens=usage["context_tokens"],
        cached=usage["prompt_tokens_details"]["cached_tokens"],
    )


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream; the lines of HTTP's own framing are none."""
    while line := await reader.readline():
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])


# --- rows ---------------------------------------------------------------------------------------------


def questions(index: IndexLocation) -> list[str]:
    """The first words of passages that are spread evenly over the index."""
    reader = IndexReader(index)
    shards = [(number, shard.passages) for number, shard in enumerate(reader.manifest.shards)]
    places = [PassageRef(number, row) for number, passages in shards for row in range(passages)]
    chosen = places[:: max(1, len(places) // _QUESTIONS)][:_QUESTIONS]
    return [" ".join(reader.describe(ref).text.split()[:_QUESTION_WORDS]) for ref in chosen]


def bodies(
    questions: Iterator[str], turns: int, options: ServeBenchOptions, setting: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One client's requests without end: conversations of so many turns, one after another."""
    fields = {"max_tokens": options.new_tokens, "top_k": options.top_k, **setting}
    while True:
        messages: list[dict[str, str]] = []
        for _ in range(turns):
            messages.append({"role": "user", "content": next(questions)})
            yield {"messages": list(messages), **fields}
            messages.append({"role": "assistant", "content": _REPLY})


async def load_server(
    url: str, clients: Sequence[Iterator[dict[str, Any]]], requests: int
) -> tuple[list[Timing], float]:
    """So many requests of these clients, each one's next after its last; timings and seconds."""
    timings: list[Timing] = []
    left = iter(range(requests))

    async def client(own: Iterator[dict[str, Any]]) -> None:
        for _ in left:
            timing = await ask(url, next(own))
            assert timing is not None
            timings.append(timing)

    started = time.perf_counter()
    await asyncio.gather(*map(client, clients))
    return timings, time.perf_counter() - started


def measure_rows(options: ServeBenchOptions) -> list[dict[str, Any]]:
    """A row for each number of clients, compressed and full by turns."""
    settings: dict[str, dict[str, Any]] = {
        "compressed": {"policy": options.policy, "expansion_fraction": options.expansion_fraction},
        "full": {"policy": "all"},
    }
    asked, rows = questions(options.index), []
    if options.turns == 1:  # rows have the same questions: none is to find the prompts of the row before
        options = replace(options, server_options=(*options.server_options, "--no-reuse"))
    with running_server(options) as (url, process_id):
        for setting in settings.values():  # what is loaded at the first request is not counted
            asyncio.run(load_server(url, [bodies(cycle(asked), 1, options, setting)], 2))
        for clients in options.clients:
            for name, setting in settings.items():
                wanted = options.requests or max(16, 4 * clients)
                left = cycle(asked)  # the clients' own take turns with it
                own = [bodies(left, options.turns, options, setting) for _ in range(clients)]
                before = load()
                timings, seconds = asyncio.run(load_server(url, own, wanted))
                rows.append(_row(name, clients, timings, seconds) | {"load_average": before})
                rows[-1]["server_megabytes"] = memory_megabytes(process_id)
                say(f"{name}, {clients} clients: {rows[-1]['requests_a_second']} requests/s")
    return rows


def _row(name: str, clients: int, timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    return {
        "context": name,
        "clients": clients,
        "requests": len(timings),
        "seconds": round(seconds, 3),
        "requests_a_second": round(len(timings) / seconds, 3),
        "tokens_a_second": round(sum(timing.tokens for timing in timings) / seconds, 2),
        "ttft_ms": _percentiles([timing.first_token for timing in timings]),
        "ttit_ms": _percentiles([timing.between_tokens for timing in timings]),
        "decoder_positions": round(float(np.mean([timing.positions for timing in timings])), 1),
        "context_tokens": round(float(np.mean([timing.context_tokens for timing in timings])), 1),
        "cached_positions": round(float(np.mean([timing.cached for timing in timings])), 1),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99 in milliseconds; None where nothing was measured."""
    values = np.asarray(seconds)[~np.isnan(seconds)] * 1000
    return {f"p{p}": round(float(np.percentile(values, p)), 2) if len(values) else None for p in (50, 95, 99)}


# --- soak ---------------------------------------------------------------------------------------------


async def soak(url: str, process_id: int, asked: Sequence[str], options: ServeBenchOptions) -> dict[str, Any]:
    """Load for the wanted time, some clients leaving early; what the server's memory did."""
    over = time.perf_counter() + options.soak_seconds
    words, numbers = cycle(asked), count(1)
    policies = cycle(["none", "all", "learned"])
    answered: list[Timing] = []
    left = 0

    async def client() -> None:
        nonlocal left
        own = bodies(words, _SOAK_TURNS, options, {"history_positions": _SOAK_HISTORY})
        while time.perf_counter() < over:
            leave = next(numbers) % _LEAVES == 0
            timing = await ask(url, {**next(own), "policy": next(policies)}, leave=leave)
            if timing is None:
                left += 1
            else:
                answered.append(timing)

    working = [asyncio.ensure_future(client()) for _ in range(max(options.clients))]
    samples = [memory_megabytes(process_id)]
    while not all(task.done() for task in working):
        await asyncio.wait(working, timeout=max(0.2, options.soak_seconds / _SAMPLES))
        samples.append(memory_megabytes(process_id))
    await asyncio.gather(*working)
    third = max(1, len(samples) // 3)
    middle, last = float(np.mean(samples[third : 2 * third] or samples)), float(np.mean(samples[-third:]))
    return {
        "seconds": options.soak_seconds,
        "clients": max(options.clients),
        "answered": len(answered),
        "left_early": left,
        "turns": _SOAK_TURNS,
        "with_cached_positions": sum(timing.cached > 0 for timing in answered),
        "megabytes": samples,
        "growth": round(last / middle - 1, 4),
        "flat": last / middle - 1 <= _FLAT,
    }


# --- all together -------------------------------------------------------------------------------------


def measure(options: ServeBenchOptions) -> dict[str, Any]:
    """The report: rows, or a soak."""
    manifest = IndexReader(options.index).manifest
    report = {
        "benchmark": "serve",
        "environment": environment(),
        "arguments": {**asdict(options), "index": str(options.index)},
        "index": {
            "decoder": manifest.components.tokenizer.reference,
            "passages": manifest.counts.passages,
            "chunk_size": manifest.parameters.chunk_size,
            "trained": manifest.checkpoint.trained,
        },
        "rows": [],
    }
    if not options.soak_seconds:
        return report | {"rows": measure_rows(options), "load_average_after": load()}
    asked = questions(options.index)
    with running_server(options) as (url, process_id):
        found = asyncio.run(soak(url, process_id, asked, options))
    return report | {"soak": found, "load_average_after": load()}


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    if "soak" in report:
        found = report["soak"]
        memory = f"{found['megabytes'][0]:,.0f} MB at first, {found['megabytes'][-1]:,.0f} MB at last"
        return (
            f"{found['answered']:,} answers, {found['left_early']:,} clients left early, in {found['seconds']:,.0f} s; "
            f"{memory}; growth over the last third {100 * found['growth']:.1f}%: "
            f"{'flat' if found['flat'] else 'NOT flat'}"
        )
    lines = [
        f"{'context':<11}{'clients':>8}{'requests/s':>12}{'tokens/s':>10}{'positions':>11}"
        f"{'TTFT p50':>11}{'p95':>9}{'p99':>9}{'TTIT p50':>11}{'p95':>9}{'p99':>9}  (ms)"
    ]
    for row in report["rows"]:
        times = zip([*row["ttft_ms"].values(), *row["ttit_ms"].values()], (11, 9, 9) * 2, strict=True)
        lines.append(
            f"{row['context']:<11}{row['clients']:>8}{row['requests_a_second']:>12.2f}{row['tokens_a_second']:>10.1f}"
            f"{row['decoder_positions']:>11.0f}" + "".join(f"{value or 0:>{width}.1f}" for value, width in times)
        )
    return "\n".join(lines)
