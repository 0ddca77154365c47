"""A decoder with a static key-value cache: every slot holds one sequence, with a length of its own.

Prompts go into slots whenever there is a free one, sequences at different lengths take steps together, and a prompt
that begins as its slot's sequence does takes over what is there. Tokens are those of `Decoder.generate`.
Notation: b prompts of a call, d_dec width of the input embeddings, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from refrag_core.captured import CapturedCalls, bucket, collector_off
from refrag_core.decoder import Decoder
from refrag_core.errors import ConfigError
from refrag_core.key_value_rows import KeyValueRows, Places
from refrag_core.llama_forward import LlamaForward, is_llama_like, is_on_one_device

STATIC_TYPES = ("gpt2", "opt", "gpt_neox")
"""Types whose transformers forward takes a cache and a mask of ours; all their layers see the whole sequence."""

PREFILL_STEP = 64
"""Prompts are padded to multiples of this many positions."""
SMALLEST_WINDOW = 256
"""Cached positions are looked at in powers of two from here on, where the host has to say how many."""


class _Forward(Protocol):
    """A decoder's forward over static rows."""

    @property
    def bounded_by_device(self) -> bool:
        """Whether lengths on the device bound what is read, however wide the window."""
        ...

    def __call__(self, embeds: Tensor, places: Places, last: Tensor) -> Tensor:
        """Logits float32 `[b, V]` of each prompt's input `last` int64 `[b]`, from inputs `[b, t, d_dec]`."""
        ...


class _Rows(Protocol):
    """What computes: rows by number, their lengths known to the caller."""

    def run(self, rows: Sequence[int], inputs: Sequence[Tensor], start: Sequence[int]) -> Tensor:
        """Logits float32 `[b, V]` after inputs `[n_i, d_dec]` from position `start_i` of each row."""
        ...

    def step(self, rows: Sequence[int], inputs: Tensor, start: Sequence[int]) -> Tensor:
        """The same after one input each, `[b, d_dec]`."""
        ...

    def forget(self, row: int) -> None:
        """Let go of what was made for the row alone."""
        ...


class SlotDecoder:
    """A decoder with a static key-value cache of `slots` rows, each with a length of its own.

    Llama-family decoders run in a forward of our own over their merged weights, GPT-2, OPT and GPT-NeoX in
    transformers' forward over the same static rows; on CUDA both are captured as graphs, one a padded shape. Any other
    decoder (sliding windows, recurrent layers) keeps one cache of its own kind a slot, and its slots run one by one.
    Not for two threads at once.

    Args:
        slots: sequences side by side.
        max_positions: of one sequence, prompt and answer.
        padded: pad shapes so that they repeat, as graphs need it; None pads on CUDA alone.

    Raises ConfigError for sizes out of range, and when the decoder has fewer positions.
    """

    def __init__(self, decoder: Decoder, *, slots: int, max_positions: int, padded: bool | None = None) -> None:
        if slots < 1 or max_positions < 1:
            raise ConfigError(f"slots and max_positions must be at least 1, found {slots} and {max_positions}")
        limit = decoder.max_positions
        if limit is not None and max_positions > limit:
            raise ConfigError(f"max_positions is {max_positions}, and the decoder has {limit}; expected at most those")
        self.decoder = decoder
        self.slots = slots
        self.max_positions = max_positions
        self._lengths = [0] * slots
        on_cuda = decoder.device.type == "cuda"
        self._rows = _rows(decoder, slots, max_positions, on_cuda if padded is None else padded)

    @property
    def captures(self) -> bool:
        """Whether calls are graphs of padded shapes, which `warm` prepares."""
        return isinstance(self._rows, _StaticRows) and self.decoder.device.type == "cuda"

    @property
    def keeps_prefixes(self) -> bool:
        """Whether a prompt that starts behind what its slot holds is spared that part; else it is read again."""
        return isinstance(self._rows, _StaticRows)

    @property
    def allocated_bytes(self) -> int:
        """Of all rows' keys and values; 0 before the first call, and where caches grow with their sequences."""
        return self._rows.cache.allocated_bytes if isinstance(self._rows, _StaticRows) else 0

    @property
    def position_bytes(self) -> int:
        """Bytes of keys and values that one position takes; 0 before the first call."""
        return self._rows.cache.position_bytes if isinstance(self._rows, _StaticRows) else 0

    def prefill(
        self, slots: Sequence[int], inputs_embeds: Sequence[Tensor], *, start: Sequence[int] | None = None
    ) -> Tensor:
        """Read prompts into their slots; float32 logits `[b, V]` of each prompt's last position.

        Args:
            inputs_embeds: `[n_i, d_dec]` each.
            start: the position at which each prompt begins; what its slot holds before that stays, what it holds
                from there on is forgotten. None begins all at 0.

        Raises ConfigError for slots, starts or lengths out of range; nothing has changed then.
        """
        begins = [0] * len(slots) if start is None else list(start)
        self._check_prefill(slots, inputs_embeds, begins)
        logits = self._rows.run(slots, inputs_embeds, begins)
        for slot, embeds, begin in zip(slots, inputs_embeds, begins, strict=True):
            self._lengths[slot] = begin + len(embeds)
        return logits

    def step(self, slots: Sequence[int], token_ids: Tensor) -> Tensor:
        """Append one token int64 `[b]` to each slot's sequence; float32 logits `[b, V]` of what follows it.

        The tokens are not waited for, so that they may come from a sampling that is still under way.
        Raises ConfigError for slots out of range, empty or full.
        """
        self._check_slots(slots, len(token_ids))
        starts = [self._lengths[slot] for slot in slots]
        for slot, length in zip(slots, starts, strict=True):
            if not 0 < length < self.max_positions:
                raise ConfigError(
                    f"slot {slot} holds {length} of {self.max_positions} positions; expected a sequence with room for "
                    f"one more: prefill it first, or end it"
                )
        logits = self._rows.step(slots, self.decoder.embed(token_ids.to(self.decoder.device)), starts)
        for slot in slots:
            self._lengths[slot] += 1
        return logits

    def warm(self, lengths: Sequence[int], *, batch: int = 1) -> None:
        """Capture what prompts of these lengths and the steps after them need, so that no request waits for it."""
        taken = list(range(min(batch, self.slots)))
        if any(self._lengths[slot] for slot in taken):
            raise ConfigError("warming needs empty slots; expected it before the first prompt, or after their release")
        with collector_off():
            for length in sorted({min(length, self.max_positions - 1) for length in lengths}, reverse=True):
                embeds = self.decoder.embed(torch.zeros(length, dtype=torch.int64, device=self.decoder.device))
                logits = self.prefill(taken, [embeds] * len(taken))
                self.step(taken, logits.argmax(dim=-1))
        for slot in taken:
            self.release(slot)

    def length(self, slot: int) -> int:
        """Positions that the slot's sequence has."""
        self._check_slots([slot], 1)
        return self._lengths[slot]

    def release(self, slot: int) -> None:
        """Forget the slot's sequence."""
        self._check_slots([slot], 1)
        self._lengths[slot] = 0
        self._rows.forget(slot)

    def _check_slots(self, slots: Sequence[int], expected: int) -> None:
        if not slots or len(set(slots)) != len(slots) or not all(0 <= slot < self.slots for slot in slots):
            raise ConfigError(f"slots are {list(slots)}; expected different ones, 0 to {self.slots - 1}")
        if len(slots) != expected:
            raise ConfigError(f"{len(slots)} slots and {expected} inputs; expected one each")

    def _check_prefill(self, slots: Sequence[int], inputs: Sequence[Tensor], start: Sequence[int]) -> None:
        self._check_slots(slots, len(inputs))
        self._check_slots(slots, len(start))
        for slot, embeds, begin in zip(slots, inputs, start, strict=True):
            if not 0 <= begin <= self._lengths[slot]:
                raise ConfigError(f"a prompt starts at {begin}, and slot {slot} holds {self._lengths[slot]} positions")
            if not 1 <= len(embeds) <= self.max_positions - begin:
                raise ConfigError(
                    f"a prompt of {len(embeds)} positions from {begin} on; expected 1 to {self.max_positions - begin}"
                )


def _rows(decoder: Decoder, slots: int, max_positions: int, padded: bool) -> _Rows:
    model = decoder.model
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    cache = KeyValueRows(rows=slots, max_positions=max_positions, num_layers=num_layers)
    if is_static_llama(model, max_positions):
        return _StaticRows(LlamaForward(model, cache, max_positions=max_positions), cache, decoder.device, padded)
    static = model.config.model_type in STATIC_TYPES and model.config._attn_implementation == "sdpa"
    if static and is_on_one_device(model):
        return _StaticRows(_TransformersForward(model, cache), cache, decoder.device, padded)
    return _SeparateRows(decoder, slots)


def is_static_llama(model: Any, max_positions: int) -> bool:
    """Whether the model is of the Llama family, and no layer loses sight of a position before `max_positions`."""
    if not is_llama_like(model):
        return False
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return window is None or window >= max_positions


class _StaticRows:
    """Rows of one preallocated cache; all prompts of a call run together."""

    def __init__(self, forward: _Forward, cache: KeyValueRows, device: torch.device, padded: bool) -> None:
        self.cache = cache
        self._forward = forward
        self._padded = padded
        self._device = device
        self._calls = CapturedCalls(self._call, device)

    def run(self, rows: Sequence[int], inputs: Sequence[Tensor], start: Sequence[int]) -> Tensor:
        """See _Rows. Padding ends where a row does: what reads rows in place counts their positions from the end."""
        longest, room = max(map(len, inputs)), self.cache.capacity - max(start)
        if longest > room:  # together they would not fit: one starts late, another is long
            parts = zip(rows, inputs, start, strict=True)
            return torch.cat([self.run([row], [embeds], [begin]) for row, embeds, begin in parts])
        length = min(bucket(longest, smallest=PREFILL_STEP), room) if self._padded else longest
        batch = inputs[0][None] if len(inputs) == 1 else nn.utils.rnn.pad_sequence(list(inputs), batch_first=True)
        last = [len(embeds) - 1 for embeds in inputs]
        window = self._window(max(a + b + 1 for a, b in zip(start, last, strict=True))) if any(start) else 0
        return self._logits(batch, length, rows, start, last, window)

    def step(self, rows: Sequence[int], inputs: Tensor, start: Sequence[int]) -> Tensor:
        """See _Rows."""
        return self._logits(inputs[:, None], 1, rows, start, [0] * len(rows), self._window(max(start) + 1))

    def forget(self, row: int) -> None:
        """See _Rows. Rows are there for good."""

    def _window(self, needed: int) -> int:
        if self._forward.bounded_by_device:
            return self.cache.capacity
        padded = max(SMALLEST_WINDOW, 1 << (needed - 1).bit_length()) if self._padded else needed
        return min(padded, self.cache.capacity)

    def _logits(
        self, inputs: Tensor, length: int, rows: Sequence[int], start: Sequence[int], last: Sequence[int], window: int
    ) -> Tensor:
        """Of inputs `[b, t, d_dec]`, padded to `length`."""
        missing = (1 << (len(rows) - 1).bit_length()) - len(rows) if self._padded else 0
        if missing:  # the last prompt again writes again what it has written
            inputs = torch.cat([inputs, inputs[-1:].expand(missing, -1, -1)])
        numbers = torch.tensor([[*values, *[values[-1]] * missing] for values in (rows, start, last)])
        shapes = (len(inputs), length, inputs.shape[2]), numbers.shape
        return self._calls((inputs, numbers), window, shapes=shapes)[: len(rows)]

    def _call(self, inputs: Tensor, numbers: Tensor, window: int) -> Tensor:
        rows, start, last = numbers
        return self._forward(inputs, self.cache.places(rows, start, inputs.shape[1], window), last)


class _TransformersForward:
    """A transformers model's own forward over static rows."""

    bounded_by_device = False

    def __init__(self, model: Any, rows: KeyValueRows) -> None:
        self._model = model
        self._rows = rows

    def __call__(self, embeds: Tensor, places: Places, last: Tensor) -> Tensor:
        """See _Forward."""
        output = self._model(
            inputs_embeds=embeds,
            attention_mask=places.mask() if places.window else None,
            position_ids=places.positions,
            past_key_values=_RowsCache(self._rows, places),
            use_cache=True,
            logits_to_keep=last,
        )
        prompts = torch.arange(len(last), device=last.device)
        logits: Tensor = output.logits[prompts, prompts].float()
        return logits


class _RowsCache:
    """The rows as transformers sees a cache during one forward."""

    is_compileable = False

    def __init__(self, rows: KeyValueRows, places: Places) -> None:
        self._rows = rows
        self._places = places

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a layer's keys and values `[b, h, t, d_head]`; returns those to look at."""
        self._rows.write(layer_idx, self._places, keys.transpose(1, 2), values.transpose(1, 2))
        if not self._places.window:
            return keys, values
        kept_keys, kept_values = self._rows.read(layer_idx, self._places)
        return kept_keys.transpose(1, 2), kept_values.transpose(1, 2)

    def get_seq_length(self, *_: Any) -> int:
        """Positions come with the call: nothing is to be counted from here."""
        return 0

    def get_query_offset(self, *_: Any) -> int:
        """Of a call without a mask, which begins at 0."""
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        """Keys and offset of a call without a mask."""
        return query_length, 0


class _SeparateRows:
    """One cache of the model's own kind a slot. Inputs are kept: caches cannot be cut back, but filled anew."""

    def __init__(self, decoder: Decoder, slots: int) -> None:
        self._model = decoder.model
        self._device = decoder.device
        self._caches: list[Any] = [None] * slots
        self._inputs: list[Tensor | None] = [None] * slots

    def run(self, rows: Sequence[int], inputs: Sequence[Tensor], start: Sequence[int]) -> Tensor:
        """See _Rows. A kept beginning is read again: such caches cannot be cut back in general."""
        logits = []
        for row, embeds, begin in zip(rows, inputs, start, strict=True):
            kept = self._inputs[row]
            whole = embeds if kept is None or not begin else torch.cat([kept[:begin], embeds])
            self._caches[row], self._inputs[row] = None, None
            logits.append(self._forward(row, whole, 0))
        return torch.cat(logits)

    def step(self, rows: Sequence[int], inputs: Tensor, start: Sequence[int]) -> Tensor:
        """See _Rows."""
        made = [
            self._forward(row, inputs[i : i + 1], begin) for i, (row, begin) in enumerate(zip(rows, start, strict=True))
        ]
        return torch.cat(made)

    def forget(self, row: int) -> None:
        """See _Rows."""
        self._caches[row], self._inputs[row] = None, None

    @torch.inference_mode()
    def _forward(self, row: int, embeds: Tensor, begin: int) -> Tensor:
        output = self._model(
            inputs_embeds=embeds[None],
            position_ids=torch.arange(begin, begin + len(embeds), device=self._device)[None],
            past_key_values=self._caches[row],
            use_cache=True,
            logits_to_keep=1,
        )
        kept = self._inputs[row]
        self._caches[row] = output.past_key_values
        self._inputs[row] = embeds if kept is None else torch.cat([kept, embeds])
        logits: Tensor = output.logits[:, -1].float()
        return logits
