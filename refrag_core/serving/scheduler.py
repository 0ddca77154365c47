"""Continuous batching: answers join and leave the decoder's batch at every step.

One thread owns the decoder. Before each step it takes waiting prompts into free slots; a step then gives every
running answer one more token. A row's tokens do not depend on who else is in the batch.

A slot that has become free keeps its prompt's keys and values until another prompt gets it. A prompt goes to the free
slot whose last prompt begins as it does, and reads only what is new: so the next question of a conversation. Prompts
are compared by their input embeddings, bit by bit, so that nothing but an equal beginning is ever taken over.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from refrag_core.answer_queue import AnswerQueue
from refrag_core.decoder import Decoder, Sampler, lowest
from refrag_core.decoder_engine import Sampling, TokenStream, check_prompt
from refrag_core.errors import EngineError

PREFILL_POSITIONS = 4096
"""Slots that are prefilled between two steps, unless one prompt alone has more: running answers wait that long."""

SMALLEST_REUSE = 64
"""Positions from which on an equal beginning is worth a slot of one's own choice: all prompts share the template's."""

_log = logging.getLogger(__name__)


class Slots(Protocol):
    """What the scheduler asks of a decoder with a key-value cache of independent rows."""

    @property
    def keeps_prefixes(self) -> bool:
        """Whether rows that were not released spare a prompt the beginning that it has in common with them."""
        ...

    def prefill(
        self, slots: Sequence[int], inputs_embeds: Sequence[Tensor], *, start: Sequence[int] | None = None
    ) -> Tensor:
        """Put each prompt `[n_i, d_dec]` into its row; logits float32 `[len(slots), V]` of its last position.

        Args:
            start: where each begins in its row, which keeps what it holds before that; None for 0.
        """
        ...

    def step(self, slots: Sequence[int], token_ids: Tensor) -> Tensor:
        """One more token int64 `[len(slots)]` each; logits float32 `[len(slots), V]`."""
        ...

    def release(self, slot: int) -> None:
        """The row's content is not needed any more."""
        ...


@dataclass(slots=True)
class _Running:
    """An answer that waits or is being decoded."""

    inputs_embeds: Tensor | None
    """`[s, d_dec]` until it is prefilled."""
    sampling: Sampling
    sampler: Sampler
    stream: TokenStream
    last: int = -1
    count: int = 0
    reused: int = 0
    """Positions that its slot holds already."""


class EmbeddedEngine:
    """A `DecoderEngine` in this process.

    Args:
        decoder: the rows; nobody else may use them.
        slots: rows that it has.
        max_positions: positions of a row.
        eos_ids: ids that end an answer.
        device: where token ids go.
        reuse: leave a prompt in its row for one that begins like it, where rows can do that.
    """

    def __init__(
        self,
        decoder: Slots,
        *,
        slots: int,
        max_positions: int,
        eos_ids: frozenset[int],
        device: torch.device | str = "cpu",
        prefill_positions: int = PREFILL_POSITIONS,
        reuse: bool = True,
    ) -> None:
        self.slots = slots
        self.max_positions = max_positions
        self._decoder = decoder
        self._eos_ids = eos_ids
        self._device = torch.device(device)
        self._prefill_positions = prefill_positions
        self._reuse = reuse and decoder.keeps_prefixes
        self._kept: dict[int, Tensor] = {}
        """The prompt `[s, d_dec]` whose keys and values a slot holds."""
        self._free = list(range(slots))
        """The one that has been free for longest first."""
        self._running: dict[int, _Running] = {}
        self._queue: AnswerQueue[_Running] = AnswerQueue()
        self._queue.start("decoder", self._run)

    @property
    def active(self) -> int:
        """See DecoderEngine."""
        return len(self._running)

    def submit(self, inputs_embeds: Tensor, sampling: Sampling) -> TokenStream:
        """See DecoderEngine. Raises ConfigError for a prompt that no row can hold."""
        check_prompt(inputs_embeds, sampling, dim=inputs_embeds.shape[-1], max_positions=self.max_positions)
        sampler = Sampler(sampling.temperature, sampling.top_p, sampling.seed, self._device)
        running = _Running(inputs_embeds, sampling, sampler, TokenStream())
        self._queue.put(running)
        return running.stream

    def close(self) -> None:
        """See DecoderEngine."""
        self._queue.close()

    # --- the decoder's thread

    @torch.inference_mode()
    def _run(self) -> None:
        while self._queue.wait(busy=bool(self._running)):
            self._round()

    def _round(self) -> None:
        self._drop_cancelled()
        for entered in _apart(self._enter()):
            self._attempt(entered, self._prefill)
        if self._running:
            self._attempt(dict(self._running), self._step)

    def _drop_cancelled(self) -> None:
        for slot in [slot for slot, running in self._running.items() if running.stream.cancelled]:
            self._end(slot)

    def _enter(self) -> dict[int, _Running]:
        """Waiting answers that get a slot now, first come, first served; cancelled ones leave the queue."""
        entered: dict[int, _Running] = {}
        positions = 0
        while (first := self._queue.first()) is not None and self._free:
            assert first.inputs_embeds is not None
            slot, first.reused = self._place(first.inputs_embeds)
            positions += len(first.inputs_embeds) - first.reused
            if entered and positions > self._prefill_positions:
                break
            self._free.remove(slot)
            entered[slot] = self._queue.take()
        self._running |= entered
        return entered

    def _place(self, prompt: Tensor) -> tuple[int, int]:
        """The free slot for a prompt, and how many positions of it are there already."""
        try:
            shared = {slot: _common(self._kept[slot], prompt) for slot in self._free if slot in self._kept}
        except Exception:  # a device without memory, say: whoever waits is to be told of it by what is done for them
            _log.exception("prompts could not be compared")
            shared = {}
        best = max(shared, key=lambda slot: shared[slot], default=None)
        if best is not None and shared[best] >= SMALLEST_REUSE:
            return best, shared[best]
        return self._free[0], 0

    def _attempt(self, chosen: Mapping[int, _Running], work: "_Work") -> None:
        """Run `work`; an error ends the answers that it was done for, and no others."""
        try:
            work(chosen)
        except Exception as error:
            _log.exception("the decoder failed on %d answers", len(chosen))
            failure = EngineError(f"the decoder failed ({type(error).__name__}): ask again")
            for slot in chosen:
                self._end(slot, failure)

    def _prefill(self, entered: Mapping[int, _Running]) -> None:
        prompts, start = [], [running.reused for running in entered.values()]
        for slot, running in entered.items():
            assert running.inputs_embeds is not None
            prompts.append(running.inputs_embeds[running.reused :])
            self._kept.pop(slot, None)  # what an error leaves there is unknown
            running.stream.reused = running.reused
            running.stream.begin()
        logits = self._decoder.prefill(list(entered), prompts, start=start)
        for slot, running in entered.items():
            if self._reuse and running.inputs_embeds is not None:
                self._kept[slot] = running.inputs_embeds
            running.inputs_embeds = None
        self._choose(entered, logits)

    def _step(self, chosen: Mapping[int, _Running]) -> None:
        last = torch.tensor([running.last for running in chosen.values()], device=self._device)
        self._choose(chosen, self._decoder.step(list(chosen), last))

    def _choose(self, chosen: Mapping[int, _Running], logits: Tensor) -> None:
        """Give each answer its next token, and end those that it ends."""
        tokens = logits.argmax(dim=-1)
        for row, running in enumerate(chosen.values()):
            if running.sampling.temperature > 0:
                tokens[row] = running.sampler.choose(logits[row : row + 1])[0]
        for (slot, running), token in zip(list(chosen.items()), tokens.tolist(), strict=True):
            running.last, running.count = token, running.count + 1
            running.stream.put(token)
            if token in self._eos_ids or running.count >= running.sampling.max_new_tokens:
                self._end(slot)

    def _end(self, slot: int, error: Exception | None = None) -> None:
        running = self._running.pop(slot, None)
        if running is None:
            return
        if error is not None:
            self._kept.pop(slot, None)
        if slot not in self._kept:
            self._decoder.release(slot)
        self._free.append(slot)
        running.stream.end(error)


def _common(kept: Tensor, prompt: Tensor) -> int:
    """Positions that both begin with, fewer than the prompt has: the first token comes from its last; 0 for too few."""
    length = min(len(kept), len(prompt) - 1)
    if length < SMALLEST_REUSE or not torch.equal(kept[:SMALLEST_REUSE], prompt[:SMALLEST_REUSE]):
        return 0
    equal = (kept[:length] == prompt[:length]).all(dim=1)
    return int(torch.cumprod(equal.long(), dim=0).sum())


class _Work(Protocol):
    def __call__(self, chosen: Mapping[int, _Running], /) -> None: ...


def embedded_engine(decoder: Decoder, *, slots: int, max_positions: int, reuse: bool = True) -> EmbeddedEngine:
    """The engine over a decoder of this process, with as many positions as it has at most.

    Args:
        reuse: see EmbeddedEngine.
    """
    from refrag_core.slot_decoder import SlotDecoder

    positions = lowest(max_positions, decoder.max_positions)
    rows = SlotDecoder(decoder, slots=slots, max_positions=positions)
    return EmbeddedEngine(
        rows,
        slots=slots,
        max_positions=positions,
        eos_ids=decoder.eos_ids,
        device=decoder.device,
        reuse=reuse,
    )


def _apart(entered: Mapping[int, _Running]) -> list[dict[int, _Running]]:
    """Whole prompts and rests of prompts: all of a call are padded to its longest, and one kind's error is its own."""
    kinds = ({slot: each for slot, each in entered.items() if bool(each.reused) is reused} for reused in (False, True))
    return [kind for kind in kinds if kind]
