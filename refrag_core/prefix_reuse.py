"""Prompts one after another that begin alike: what a prompt has in common with the one before is not read again."""

from collections.abc import Iterator

import torch
from torch import Tensor

from refrag_core.decoder import Decoder, Sampler, check_sampling, lowest
from refrag_core.runtime import AskOptions
from refrag_core.slot_decoder import SlotDecoder

SMALLEST_ROOM = 1024
"""Positions that keys and values are kept for, at least; more in powers of two."""


class PrefixReuse:
    """Generates in one slot of a static key-value cache, which keeps the last prompt.

    What a prompt begins with is compared by its input embeddings, bit by bit, so that a chunk's vector counts as a
    token does. The last position is always read again, since the first token comes from it.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.reused = 0
        """Positions that the last prompt took over."""
        self._slot: SlotDecoder | None = None
        self._prompt: Tensor | None = None

    def generate(self, inputs_embeds: Tensor, options: AskOptions) -> Iterator[list[int]]:
        """The tokens of one answer, as `Decoder.generate` gives them, for a prompt `[s, d_dec]`."""
        check_sampling(max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p)
        return self._steps(inputs_embeds, options)

    def _steps(self, inputs_embeds: Tensor, options: AskOptions) -> Iterator[list[int]]:
        slot = self._room(len(inputs_embeds) + options.max_new_tokens)
        self.reused = self._common(inputs_embeds)
        self._prompt = None  # what an error leaves in the slot is unknown
        logits = slot.prefill([0], [inputs_embeds[self.reused :]], start=[self.reused])
        self._prompt = inputs_embeds
        sampler = Sampler(options.temperature, options.top_p, options.seed, self.decoder.device)
        for number in range(1, options.max_new_tokens + 1):
            token = sampler.choose(logits)
            chosen = int(token)
            yield [chosen]
            if chosen in self.decoder.eos_ids or number == options.max_new_tokens:
                return
            logits = slot.step([0], token)

    def _room(self, positions: int) -> SlotDecoder:
        """The slot, made anew where it is too short."""
        if self._slot is None or self._slot.max_positions < positions:
            room = max(SMALLEST_ROOM, 1 << (positions - 1).bit_length())
            self._slot, self._prompt = None, None  # before the new one takes memory
            self._slot = SlotDecoder(self.decoder, slots=1, max_positions=lowest(room, self.decoder.max_positions))
        return self._slot

    def _common(self, inputs_embeds: Tensor) -> int:
        if self._prompt is None:
            return 0
        length = min(len(self._prompt), len(inputs_embeds))
        equal = (self._prompt[:length] == inputs_embeds[:length]).all(dim=1)
        return min(int(torch.cumprod(equal.long(), dim=0).sum()), len(inputs_embeds) - 1)
