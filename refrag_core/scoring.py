"""Per-chunk scores: how surprised the decoder is by each chunk, given the passage so far.

The perplexity policy expands the chunks with the highest score. A score is a pure function of its passage:
passages run together only with passages that are padded to the same length, behind their tokens, where a
causal decoder does not look.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from refrag_core.batching import SafeBatchSize, cache_dir, map_batches
from refrag_core.decoder import Decoder, lowest
from refrag_core.devices import device_turn
from refrag_core.errors import ConfigError
from refrag_core.parts import part

BUCKET_TOKENS = 32
"""Passages are padded to the next multiple of this."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
LOGIT_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""float32 logits held at one time."""

Ids = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]


class ChunkScorer:
    """Mean negative log-likelihood, nats a token, of each chunk under the decoder.

    The decoder reads its BOS and then the passage. A decoder without a BOS predicts nothing about a passage's
    first token, which is then left out of its chunk's mean (0 for a chunk of that token alone).

    Args:
        fingerprint: of the decoder, for the memory of the batch size that fitted; None keeps no memory.
        batch_tokens: padded tokens of a first batch; None takes the device's default.
    """

    def __init__(self, decoder: Decoder, *, fingerprint: str | None = None, batch_tokens: int | None = None) -> None:
        self._decoder = decoder
        self._kind = "cuda" if decoder.device.type == "cuda" else "cpu"
        self._batch_tokens = batch_tokens or BATCH_TOKENS[self._kind]
        self._fingerprint = fingerprint
        self._bos = [] if decoder.bos_id is None else [decoder.bos_id]
        self._head_is_linear = self._head_is_applied_alone()

    def score(self, passages: Sequence[Ids], chunk_size: int) -> list[Scores]:
        """Scores float32 `[ceil(t / chunk_size)]` of each passage's token ids int32 `[t]`, in order.

        Raises ConfigError for a passage that is empty or longer than the decoder's positions.
        """
        self._check(passages, chunk_size)
        padded = np.array([self._padded_length(len(ids)) for ids in passages], dtype=np.int64)
        scores: list[Scores] = [np.empty(0, dtype=np.float32)] * len(passages)
        with device_turn(self._decoder.device), part("model"):
            for length in np.unique(padded):
                self._score_bucket(passages, np.flatnonzero(padded == length), int(length), chunk_size, scores)
        return scores

    def _score_bucket(
        self, passages: Sequence[Ids], rows: npt.NDArray[np.int64], length: int, chunk_size: int, scores: list[Scores]
    ) -> None:
        """Fill in `scores` of the passages `rows`, all padded to `length`."""

        def run(start: int, stop: int) -> Scores:
            return self._token_nll([passages[row] for row in rows[start:stop]], length)

        for start, stop, nll in map_batches(run, len(rows), self._batch_size(length), self._release):
            for row, values in zip(rows[start:stop], nll, strict=True):
                known = len(passages[row]) - 1 + len(self._bos)
                scores[row] = chunk_means(values[:known], len(passages[row]), chunk_size)

    @torch.inference_mode()
    def _token_nll(self, passages: Sequence[Ids], length: int) -> Scores:
        """float32 `[b, length − 1]`: nll of every input but the first, given those before it."""
        inputs = np.zeros((len(passages), length), dtype=np.int64)
        for row, ids in enumerate(passages):
            inputs[row, : len(self._bos)] = self._bos
            inputs[row, len(self._bos) : len(self._bos) + len(ids)] = ids
        given = torch.from_numpy(inputs).to(self._decoder.device)
        states, head = self._states(given)
        step = self._positions_at_once(len(passages))
        parts = [
            _cross_entropy(head(states[:, start : start + step]), given[:, start + 1 : start + 1 + step])
            for start in range(0, length - 1, step)
        ]
        nll: Scores = torch.cat(parts, dim=1).cpu().numpy()
        return nll

    def _positions_at_once(self, rows: int) -> int:
        vocabulary = int(self._decoder.model.get_input_embeddings().weight.shape[0])
        return max(1, LOGIT_BYTES[self._kind] // (4 * vocabulary * rows))

    def _states(self, given: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """States `[b, s, …]` for the ids `[b, s]`, and what makes logits of a slice of them."""
        model = self._decoder.model
        if self._head_is_linear:
            return model.base_model(input_ids=given, use_cache=False).last_hidden_state, model.get_output_embeddings()
        return model(input_ids=given, use_cache=False).logits, nn.Identity()

    @torch.inference_mode()
    def _head_is_applied_alone(self) -> bool:
        """True when logits are the output layer of the last states, without scaling or capping after it.

        Only then may logits be made for a few positions at a time outside the model's own forward.
        """
        model, ids = self._decoder.model, torch.zeros((1, 4), dtype=torch.int64, device=self._decoder.device)
        head = model.get_output_embeddings()
        if head is None:
            return False
        alone = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        return torch.allclose(alone, model(input_ids=ids, use_cache=False).logits, rtol=1e-3, atol=1e-3)

    def _check(self, passages: Sequence[Ids], chunk_size: int) -> None:
        if chunk_size < 1:
            raise ConfigError(f"chunk_size must be at least 1, found {chunk_size}")
        limit = self._decoder.max_positions
        for ids in passages:
            if len(ids) == 0 or (limit is not None and len(ids) + len(self._bos) > limit):
                raise ConfigError(
                    f"cannot score a passage of {len(ids)} tokens; expected 1 to the decoder's {limit} positions "
                    f"(with BOS): make passages shorter"
                )

    def _padded_length(self, num_tokens: int) -> int:
        needed = num_tokens + len(self._bos)
        padded = -(-needed // BUCKET_TOKENS) * BUCKET_TOKENS
        return lowest(padded, self._decoder.max_positions)

    def _batch_size(self, length: int) -> SafeBatchSize:
        name = torch.cuda.get_device_name(self._decoder.device) if self._kind == "cuda" else "cpu"
        key = f"score/{name}/{self._fingerprint}/{self._decoder.dtype}/{length}"
        memory = cache_dir() / "batch_sizes.json" if self._fingerprint else None
        return SafeBatchSize(key, max(1, self._batch_tokens // length), memory)

    def _release(self) -> None:
        if self._kind == "cuda":
            torch.cuda.empty_cache()


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """float32 `[b, s]` of logits `[b, s or more, V]` and ids `[b, s]`."""
    logits = logits[:, : targets.shape[1]].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def chunk_means(token_nll: Scores, num_tokens: int, chunk_size: int) -> Scores:
    """Mean nll of each chunk, float32 `[ceil(num_tokens / chunk_size)]`.

    `token_nll` holds the passage's last tokens: all of them, or all but the first, which nothing predicted.
    """
    unknown = num_tokens - len(token_nll)
    starts = np.arange(0, num_tokens, chunk_size)
    sums = np.add.reduceat(np.concatenate([np.zeros(unknown), token_nll.astype(np.float64)]), starts)
    counts = np.minimum(chunk_size, num_tokens - starts)
    counts[0] -= unknown
    return (sums / np.maximum(counts, 1)).astype(np.float32)
