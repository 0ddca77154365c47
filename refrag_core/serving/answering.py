"""Answers to many requests at a time: admission, the runtime's steps in threads, tokens from the engine.

Everything here runs in the server's event loop, except what is handed to the pool of threads.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from refrag_core.answer_text import AnswerText
from refrag_core.conversation import PreparedTurn, prepare_turn
from refrag_core.decoder_engine import TokenStream
from refrag_core.errors import DrainingError, QueueFullError, RequestTimeoutError
from refrag_core.history import HistoryUse
from refrag_core.retrieval import Hit, RetrievalOptions
from refrag_core.runtime import Answer, Clock, Prepared, Runtime, UsedPassage
from refrag_core.serving.generations import Generations, Served
from refrag_core.serving.metrics import Metrics
from refrag_core.serving.question import Question
from refrag_core.serving.settings import ServeSettings

PREPARING_THREADS = 4
_FORGET = 0.9
"""Share of the old mean that stays when an answer's time is averaged in."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Started:
    """A prompt is ready, and its decoding is about to begin."""

    runtime: Runtime
    passages: tuple[UsedPassage, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is over."""

    answer: Answer
    text: str
    """All pieces, as they were."""


Event = Started | Piece | Finished


class Answering:
    """Who may ask, and what comes of it."""

    def __init__(self, generations: Generations, settings: ServeSettings) -> None:
        self.generations = generations
        self.settings = settings
        self.metrics = Metrics(generations, lambda: self.in_flight)
        self.in_flight = 0
        """Requests that were let in and have not been answered."""
        self.draining = False
        """Whether nobody is let in any more."""
        self._pool = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="prepare")
        self._mean_seconds = 1.0

    @property
    def retry_after(self) -> int:
        """Seconds after which there should be room again."""
        slots = self.generations.current.engine.slots
        return max(1, round(self._mean_seconds * self.settings.queue_limit / slots))

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[float]:
        """Let one request in and count it; its deadline on the loop's clock. Raises DrainingError, QueueFullError."""
        if self.draining:
            raise DrainingError("this server is stopping; expected another one to be asked: try again")
        limit = self.generations.current.engine.slots + self.settings.queue_limit
        if self.in_flight >= limit:
            raise QueueFullError(
                f"{self.in_flight} requests are being answered or wait; expected fewer than {limit}: try again later"
            )
        self.in_flight += 1
        try:
            yield asyncio.get_running_loop().time() + self.settings.request_seconds
        finally:
            self.in_flight -= 1

    async def _in_thread(self, deadline: float, work: Callable[[], Result]) -> Result:
        return await _until(deadline, asyncio.get_running_loop().run_in_executor(self._pool, work))

    async def retrieve(self, query: str, top_k: int, options: RetrievalOptions) -> tuple[Runtime, list[Hit]]:
        """The best passages, of one generation."""
        with self._admitted() as deadline, self.generations.hold() as served:
            search = partial(served.runtime.searcher.search, query, top_k, options)
            return served.runtime, await self._in_thread(deadline, search)

    async def events(self, question: Question) -> AsyncGenerator[Event, None]:
        """What happens on the way to an answer. Closing the generator frees the answer's slot."""
        with self._admitted() as deadline, self.generations.hold() as served:
            clock = Clock()
            try:
                prepare = partial(_prepare, served.runtime, question, clock)
                turn, passages = await self._in_thread(deadline, prepare)
                yield Started(served.runtime, passages)
                decoding = _Decoding(turn.prepared, served.runtime.answer_text(question.options), question)
                async with aclosing(_decoded(served, decoding, deadline)) as pieces:
                    async for piece in pieces:
                        yield Piece(piece)
                answer = await self._in_thread(deadline, partial(decoding.finish, served.runtime, turn.use))
            except (GeneratorExit, asyncio.CancelledError):
                self.metrics.cancelled.inc()
                raise
            self._count(answer, clock)
            yield Finished(answer, decoding.text.text)

    def _count(self, answer: Answer, clock: Clock) -> None:
        self.metrics.answered(answer)
        self._mean_seconds = _FORGET * self._mean_seconds + (1 - _FORGET) * clock.seconds

    def close(self) -> None:
        """Let go of the threads and the decoder, once what was let in is answered."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.generations.close()


def _prepare(runtime: Runtime, question: Question, clock: Clock) -> tuple[PreparedTurn, tuple[UsedPassage, ...]]:
    turn = prepare_turn(
        runtime,
        question.text,
        question.turns,
        question.options,
        question.history,
        instructions=question.instructions,
        clock=clock,
    )
    return turn, runtime.used(turn.prepared) if question.options.explain else ()


@dataclass(slots=True)
class _Decoding:
    """A prompt that becomes an answer."""

    prepared: Prepared
    text: AnswerText
    question: Question
    reused: int = 0
    """Positions that the engine had not to read."""

    def finish(self, runtime: Runtime, history: HistoryUse) -> Answer:
        """The answer, with what became of the turns before it."""
        answer = runtime.finish(self.prepared, self.text)
        return replace(answer, stats=replace(answer.stats, reused_positions=self.reused), history=history)


async def _decoded(served: Served, decoding: _Decoding, deadline: float) -> AsyncGenerator[str, None]:
    """The answer's text as it becomes certain."""
    prepared, text = decoding.prepared, decoding.text
    if prepared.composed is None:
        return
    stream = served.engine.submit(prepared.composed.inputs_embeds, decoding.question.sampling)
    try:
        async with aclosing(_batches(stream, deadline)) as batches:
            async for tokens in batches:
                if text.new_tokens == 0 and tokens:
                    decoding.reused = stream.reused
                    prepared.clock.lap("queue", stream.began)
                    prepared.clock.lap("prefill")
                if piece := "".join(map(text.push, _up_to_end(tokens, text))):
                    yield piece
                if text.ended:
                    break
    finally:
        stream.cancel()
    prepared.clock.lap("decode")
    if piece := text.finish():
        yield piece


def _up_to_end(tokens: list[int], text: AnswerText) -> Iterator[int]:
    """The tokens until the text is over."""
    for token in tokens:
        if text.ended:
            return
        yield token


async def _batches(stream: TokenStream, deadline: float) -> AsyncGenerator[list[int], None]:
    """The stream's tokens, all at once that are there. Raises RequestTimeoutError."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closed: nobody listens any more
            loop.call_soon_threadsafe(changed.set)

    stream.listen(tell)
    over = False
    while not over:
        changed.clear()
        tokens, over = stream.take()
        yield tokens
        if not over:
            await _until(deadline, changed.wait())


async def _until(deadline: float, work: Awaitable[Result]) -> Result:
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError as error:
        raise RequestTimeoutError(
            "the answer took longer than this server gives a request: ask for fewer tokens, or try again later"
        ) from error
