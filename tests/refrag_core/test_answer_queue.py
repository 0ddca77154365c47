"""The queue alone, with an engine that only writes down what it gets."""

import threading
from dataclasses import dataclass, field

import pytest

from refrag_core.answer_queue import AnswerQueue
from refrag_core.decoder_engine import TokenStream
from refrag_core.errors import EngineError


@dataclass
class Prompt:
    name: str
    stream: TokenStream = field(default_factory=TokenStream)


def filled(*names: str) -> tuple[AnswerQueue[Prompt], list[Prompt]]:
    queue, prompts = AnswerQueue[Prompt](), [Prompt(name) for name in names]
    for prompt in prompts:
        queue.put(prompt)
    return queue, prompts


def test_first_come_first_served() -> None:
    queue, (a, b) = filled("a", "b")
    assert queue.first() is queue.first() is queue.take() is a
    assert queue.take() is b
    assert queue.first() is None


def test_cancelled_ones_end_when_their_turn_comes() -> None:
    queue, (a, b, c, d) = filled("a", "b", "c", "d")
    for prompt in (a, b, d):
        prompt.stream.cancel()
    assert queue.first() is c
    assert [list(prompt.stream) for prompt in (a, b)] == [[], []]
    assert queue.take() is c
    assert queue.first() is None
    assert list(d.stream) == []


def test_there_is_work_while_the_engine_is_busy_or_something_waits() -> None:
    queue, _ = filled("a")
    assert queue.wait(busy=False)
    queue.take()
    assert queue.wait(busy=True)
    queue.close()
    assert queue.wait(busy=True)
    assert not queue.wait(busy=False)


def test_a_thread_without_work_sleeps_until_there_is_some() -> None:
    queue, got, threads = AnswerQueue[Prompt](), list[str](), list[str]()
    arrived = threading.Event()

    def run() -> None:
        threads.append(threading.current_thread().name)
        while queue.wait(busy=False):
            got.append(queue.take().name)
            arrived.set()

    queue.start("engine", run)
    queue.put(Prompt("a"))
    assert arrived.wait(30)
    queue.put(Prompt("b"))
    queue.close()  # what is there is done first
    assert (got, threads) == (["a", "b"], ["engine"])


def test_a_closed_queue_takes_nothing() -> None:
    queue, (a,) = filled("a")
    assert not queue.closed
    queue.close()
    queue.close()
    assert queue.closed
    with pytest.raises(EngineError, match=r"^the decoder takes no more prompts, since it is being closed: ask again$"):
        queue.put(Prompt("b"))
    assert queue.take() is a


def test_a_failure_hands_back_what_waits_and_is_told_to_all_who_come() -> None:
    queue, prompts = filled("a", "b")
    failure = EngineError("the engine is gone: start it again")
    assert queue.fail(failure) == prompts
    queue.close()
    assert queue.first() is None
    with pytest.raises(EngineError, match=r"^the engine is gone: start it again$") as refused:
        queue.put(Prompt("c"))
    assert refused.value is not failure
