"""Decoder engines: composed input embeddings in, tokens out as they come, many answers at a time.

An engine has a thread (or a process, or a server) of its own. What it is given is the same for every kind: the
prompt as the runtime composed it, and how to choose tokens. What it gives back is a `TokenStream` that any other
thread reads, and may cancel at any moment.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from refrag_core.decoder import check_sampling
from refrag_core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from refrag_core.runtime import AskOptions, Generate


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer's tokens are chosen, and how many at most. Raises ConfigError for settings out of range."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_sampling(max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p)


class TokenStream:
    """The tokens of one answer on their way from an engine to a reader.

    The last token is an end-of-sequence id unless the answer was cut, cancelled or failed.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tokens: deque[int] = deque()
        self._ended = False
        self._error: Exception | None = None
        self._listener: Callable[[], object] = _nobody
        self._canceller: Callable[[], object] = _nobody
        self.cancelled = False
        """Whether the reader wants no more: the engine ends the answer at its next step."""
        self.began: float | None = None
        """When the engine took the prompt up, on the clock of `time.perf_counter`."""
        self.reused = 0
        """Positions of the prompt that an earlier one had left in the engine's cache; known once it has begun."""

    # --- the engine's side

    def begin(self) -> None:
        """The prompt's turn has come."""
        self.began = time.perf_counter()

    def put(self, token_id: int) -> None:
        """One more token."""
        with self._changed:
            self._tokens.append(token_id)
            self._changed.notify_all()
        self._listener()

    def end(self, error: Exception | None = None) -> None:
        """No more tokens: the answer is over, or `error` ended it."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()
        self._listener()

    def on_cancel(self, canceller: Callable[[], object]) -> None:
        """Have `canceller` called in the thread that cancels."""
        self._canceller = canceller

    # --- the reader's side

    def listen(self, listener: Callable[[], object]) -> None:
        """Have `listener` called, in the engine's thread, whenever `take` has something new to give."""
        self._listener = listener

    def take(self) -> tuple[list[int], bool]:
        """The tokens that came since the last call, and whether they are the last. Raises what ended the answer."""
        with self._changed:
            tokens, ended = list(self._tokens), self._ended
            self._tokens.clear()
        if ended and not tokens and self._error is not None:
            raise self._error
        return tokens, ended and self._error is None

    def cancel(self) -> None:
        """Want no more tokens; the stream ends soon after."""
        self.cancelled = True
        self._canceller()

    def __iter__(self) -> Iterator[int]:
        """The tokens, each as soon as it is there."""
        over = False
        while not over:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._tokens) or self._ended)
            tokens, over = self.take()
            yield from tokens


def _nobody() -> None:
    """Stands for a listener that is not there."""


class DecoderEngine(Protocol):
    """Decodes any number of prompts side by side."""

    @property
    def slots(self) -> int:
        """Answers that are decoded at the same time; more of them wait."""
        ...

    @property
    def active(self) -> int:
        """Answers that are being decoded now."""
        ...

    @property
    def max_positions(self) -> int | None:
        """Slots + new tokens of one answer at most; None where only the decoder's own limit counts."""
        ...

    def submit(self, inputs_embeds: Tensor, sampling: Sampling) -> TokenStream:
        """Queue a prompt `[s, d_dec]`. Raises EngineError once the engine is closed."""
        ...

    def close(self) -> None:
        """Take nothing more, finish what was submitted, and let go of the memory."""
        ...


def check_prompt(inputs_embeds: Tensor, sampling: Sampling, *, dim: int, max_positions: int | None) -> None:
    """Raise ConfigError for a prompt that an engine cannot hold.

    Args:
        inputs_embeds: `[s, d_dec]`.
        dim: d_dec of the engine's decoder.
        max_positions: s + new tokens at most.
    """
    if inputs_embeds.ndim != 2 or inputs_embeds.shape[1] != dim:
        raise ConfigError(
            f"the prompt has the shape {list(inputs_embeds.shape)}, and the engine's decoder takes [positions, {dim}]; "
            f"expected the same decoder on both sides"
        )
    if max_positions is not None and len(inputs_embeds) + sampling.max_new_tokens > max_positions:
        raise ConfigError(
            f"the prompt has {len(inputs_embeds)} positions and {sampling.max_new_tokens} new tokens may follow; "
            f"expected at most {max_positions} together: ask for fewer tokens or passages"
        )


def closed_error() -> EngineError:
    """What a prompt gets that comes after `close`."""
    return EngineError("the decoder takes no more prompts, since it is being closed: ask again")


def generate_by(engine: DecoderEngine) -> "Generate":
    """One answer at a time from an engine, for `Runtime.ask`; leaving the iteration early cancels the answer."""

    def generate(inputs_embeds: Tensor, options: "AskOptions") -> Iterator[list[int]]:
        sampling = Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        stream = engine.submit(inputs_embeds, sampling)
        try:
            for token in stream:
                yield [token]
        finally:
            stream.cancel()

    return generate
