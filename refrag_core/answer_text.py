"""An answer's text while its tokens arrive: never half a character, never part of a stop sequence."""

from collections.abc import Sequence
from typing import Literal

from tokenizers import Tokenizer

from refrag_core.decoder import TextStream

FinishReason = Literal["stop", "length"]


class AnswerText:
    """Token ids in, certain text out, up to an end-of-sequence id or the first of the `stop` texts.

    Text that could be the beginning of a stop text is held back until it is known not to be.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: frozenset[int], stop: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self._eos_ids = eos_ids
        self._stop = tuple(stop)
        self._held = ""
        self._stopped = False
        self._pieces: list[str] = []
        self.ended = False
        """Whether nothing more can come."""
        self.new_tokens = 0
        """Tokens pushed, an end-of-sequence id among them."""

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self._pieces)

    @property
    def finish_reason(self) -> FinishReason:
        """Why the answer is over, once it is."""
        return "stop" if self.ended or not self.new_tokens else "length"

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before."""
        self.new_tokens += 1
        if token_id in self._eos_ids:
            self.ended = True
            return ""
        return self._release(self._stream.push(token_id), last=False)

    def finish(self) -> str:
        """What was still held back when the last token had come."""
        return "" if self._stopped else self._release(self._stream.finish(), last=True)

    def _release(self, piece: str, *, last: bool) -> str:
        text = self._held + piece
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.ended = self._stopped = True
            certain, self._held = text[: min(places)], ""
        else:
            held = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
            certain, self._held = text[: len(text) - held], text[len(text) - held :]
        if certain:
            self._pieces.append(certain)
        return certain


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
