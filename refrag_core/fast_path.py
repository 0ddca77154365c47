"""What a runtime keeps on its device to be quick to the first token.

Every step between the search and the token is a captured graph of a padded shape, and chunk embeddings of passages
that were asked for before are there already. On a CPU the same code runs as it stands, which is how it is tested.
Notation: c chunks, d_enc encoder width, d_dec decoder width, s slots of a prompt, V vocabulary.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from refrag_core.captured import CapturedCalls, bucket
from refrag_core.composition import pad_batch
from refrag_core.decoder import Decoder, Sampler, check_sampling, lowest
from refrag_core.devices import upload_rows
from refrag_core.embedding_storage import StoredRows, concatenate_rows
from refrag_core.policy import PointerPolicy
from refrag_core.projection import Projection
from refrag_core.slot_decoder import SlotDecoder

HOT_BYTES = 1 << 30
MAX_POSITIONS = 8_192
"""Slots and new tokens that have static rows, where the decoder takes so many; longer prompts take the plain way."""

CHUNK_STEP = 64
"""Chunks are padded to multiples of this many."""

Floats = npt.NDArray[np.floating[Any]]


class HotPassages:
    """Chunk embeddings of the passages that were asked for last, on the device, in at most `max_bytes`.

    Keys name a passage for as long as the object lives: one of these belongs to one generation. Safe for threads.
    """

    def __init__(self, device: torch.device, *, max_bytes: int = HOT_BYTES) -> None:
        self._device = device
        self._max_bytes = max_bytes
        self._rows: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def held_bytes(self) -> int:
        """Of all embeddings that are kept."""
        return self._bytes

    def rows(self, keys: Sequence[Hashable], stored: Sequence[StoredRows]) -> Tensor:
        """Embeddings `[c, d_enc]` of all passages, in order; those that are not here travel now, in one copy."""
        with self._lock:
            missing = {key: rows for key, rows in zip(keys, stored, strict=True) if key not in self._rows}
            if missing:
                self._send(missing)
            found = torch.cat([self._rows[key] for key in keys])
            for key in keys:
                self._rows.move_to_end(key)
            while self._bytes > self._max_bytes and len(self._rows) > 1:
                self._bytes -= _bytes(self._rows.popitem(last=False)[1])
            return found

    def _send(self, missing: Mapping[Hashable, StoredRows]) -> None:
        sent = upload_rows(concatenate_rows(list(missing.values())), self._device)
        # In memory of their own: a view would keep all of them for one.
        parts = torch.ops.aten.split_with_sizes_copy(sent, [len(rows) for rows in missing.values()])
        self._rows.update(zip(missing, parts, strict=True))
        self._bytes += _bytes(sent)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class FastPath:
    """Projection, policy and decoder as captured calls. Threads may share it: one generates, others are told so.

    Args:
        max_positions: slots and new tokens of a prompt that takes this path.
        padded: pad shapes so that they repeat; None pads on CUDA alone.
    """

    def __init__(
        self,
        decoder: Decoder,
        projection: Projection,
        policy: PointerPolicy,
        *,
        max_positions: int = MAX_POSITIONS,
        padded: bool | None = None,
    ) -> None:
        self.max_positions = lowest(max_positions, decoder.max_positions)
        self.decoder = SlotDecoder(decoder, slots=1, max_positions=self.max_positions, padded=padded)
        self._generating = threading.Lock()
        self._projected = CapturedCalls(projection, decoder.device)
        self._logits = CapturedCalls(policy, decoder.device)

    def project(self, rows: Tensor) -> Tensor:
        """φ of chunk embeddings `[c, d_enc]`, `[c, d_dec]`."""
        return self._projected((rows,), shapes=((_padded(len(rows)), rows.shape[1]),))[: len(rows)]

    def policy_logits(self, rows: Tensor, query: Floats | None = None) -> npt.NDArray[np.float32]:
        """The policy's logits float32 `[c]` of a prompt's chunk embeddings `[c, d_enc]`, as `policy.policy_logits`."""
        length = _padded(len(rows))
        present = np.arange(length)[None] < len(rows)
        given, shapes = [rows[None], torch.from_numpy(present)], [(1, length, rows.shape[1]), present.shape]
        if query is not None:
            given.append(torch.from_numpy(np.ascontiguousarray(query))[None])
            shapes.append(given[-1].shape)
        logits: npt.NDArray[np.float32] = self._logits(given, shapes=shapes)[0, : len(rows)].cpu().float().numpy()
        return logits

    def warm(self, positions: Sequence[int]) -> None:
        """Capture what prompts of these many slots need, so that no request waits for it."""
        with self._generating:
            self.decoder.warm(positions)

    def generate(
        self,
        inputs_embeds: Tensor,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[list[int]]:
        """`Decoder.generate` of one prompt `[s, d_dec]`: the same steps, the same errors.

        A prompt that is too long for the static rows, or that comes while another is generated, takes the plain way.
        """
        check_sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)
        sampler = Sampler(temperature, top_p, seed, self.decoder.decoder.device)
        return self._steps(inputs_embeds, max_new_tokens, sampler)

    def _steps(self, inputs_embeds: Tensor, max_new_tokens: int, sampler: Sampler) -> Iterator[list[int]]:
        fits = len(inputs_embeds) + max_new_tokens <= self.max_positions
        if not fits or not self._generating.acquire(blocking=False):
            yield from self.decoder.decoder.steps(pad_batch([inputs_embeds]), max_new_tokens, sampler)
            return
        try:
            yield from self._slot_steps(inputs_embeds, max_new_tokens, sampler)
        finally:
            self.decoder.release(0)
            self._generating.release()

    def _slot_steps(self, inputs_embeds: Tensor, max_new_tokens: int, sampler: Sampler) -> Iterator[list[int]]:
        """The first token is out before anything else is begun; from then on the device is a step ahead."""
        eos_ids = self.decoder.decoder.eos_ids
        chosen = sampler.choose(self.decoder.prefill([0], [inputs_embeds]))
        for number in range(1, max_new_tokens + 1):
            token = _Travelling(chosen)
            if 1 < number < max_new_tokens:
                chosen = sampler.choose(self.decoder.step([0], chosen))
            found = token.arrive()
            yield found
            if found[0] in eos_ids or number == max_new_tokens:
                return
            if number == 1:
                chosen = sampler.choose(self.decoder.step([0], chosen))


class _Travelling:
    """Tokens int64 `[b]` on their way to the host, behind which the device may go on."""

    def __init__(self, tokens: Tensor) -> None:
        self._host, self._event = tokens, None
        if tokens.device.type == "cuda":
            self._host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._event = torch.cuda.current_stream(tokens.device).record_event()

    def arrive(self) -> list[int]:
        """Wait for them alone."""
        if self._event is not None:
            self._event.synchronize()
        return [int(token) for token in self._host.tolist()]


def _padded(chunks: int) -> int:
    """For how many chunks there is a graph, so that shapes repeat."""
    return bucket(chunks, smallest=CHUNK_STEP)
