"""Log-perplexity of output tokens under a decoder, from text or from chunk vectors and tokens mixed.

Notation: n windows, s context tokens, o output tokens, L chunks of a context, d_enc embedding width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from refrag_core.batching import SafeBatchSize, map_batches
from refrag_core.decoder import Decoder
from refrag_core.training.batches import TrainingBatch, next_paragraph_batch, text_batch
from refrag_core.training.losses import token_nll
from refrag_core.training.model import refuse_other_heads

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Embeddings = npt.NDArray[np.floating]
Losses = npt.NDArray[np.float64]

BATCH_ROWS = {"cpu": 4, "cuda": 64}
_LOGIT_ROWS = {"cpu": 1024, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class _Mixed:
    """Rows for the decoder, and the vectors `[b, n, d_enc]` of their compressed chunks."""

    batch: TrainingBatch
    vectors: Embeddings | None


class MixedInputScorer:
    """Scores the end of windows: mean nats a token of the output's tokens from number `first` on.

    Every condition scores the same tokens. The tokens before number `first` (at least 1) are read as text by every
    condition: without a context there is nothing to predict the output's first token from.

    Args:
        decoder: its logits are its output layer over its last hidden state; UnsupportedDecoderError for others.
        projection: φ, on the decoder's device; None for a decoder that reads text alone.
        batch_rows: windows of a first batch; None takes the device's default.
    """

    def __init__(
        self, decoder: Decoder, projection: nn.Module | None, *, first: int = 1, batch_rows: int | None = None
    ) -> None:
        refuse_other_heads(decoder.model)
        self._decoder = decoder
        self._projection = projection
        self._first = first
        self._kind = "cuda" if decoder.device.type == "cuda" else "cpu"
        self._size = SafeBatchSize("perplexity", batch_rows or BATCH_ROWS[self._kind])

    def from_text(self, context: Ids, output: Ids) -> Losses:
        """Losses float64 `[n]` with `context` int64 `[n, s]`, s ≥ 0, as text before `output` int64 `[n, o]`."""
        text = np.concatenate([context, output], axis=1)
        first = context.shape[1] + self._first
        return self._losses(lambda rows: _Mixed(text_batch(text[rows], first=first), None), len(text))

    def from_chunks(self, context: Ids, output: Ids, embeddings: Embeddings, expansion_mask: Mask) -> Losses:
        """Losses float64 `[n]` with the context's chunks as their vectors, or as text where the mask is True.

        Args:
            context: int64 `[n, s]`, s a multiple of L.
            output: int64 `[n, o]`.
            embeddings: float `[n, L, d_enc]` of all chunks.
            expansion_mask: bool `[n, L]` with equally many True in every row.
        """
        chunk_size = context.shape[1] // embeddings.shape[1]

        def make(rows: slice) -> _Mixed:
            mask = expansion_mask[rows]
            batch = next_paragraph_batch(context[rows], output[rows], chunk_size=chunk_size, expansion_mask=mask)
            vectors = embeddings[rows][~mask].reshape(len(mask), -1, embeddings.shape[2])
            return _Mixed(_from_number(batch, self._first), vectors)

        return self._losses(make, len(context))

    def _losses(self, make: Callable[[slice], _Mixed], count: int) -> Losses:
        found: Sequence[Losses] = [
            made for _, _, made in map_batches(lambda a, b: self._score(make(slice(a, b))), count, self._size, _release)
        ]
        return np.concatenate(found)

    @torch.inference_mode()
    def _score(self, mixed: _Mixed) -> Losses:
        batch, device = mixed.batch, self._decoder.device
        embeds = self._embed(batch, mixed.vectors)
        hidden = self._decoder.model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        index = torch.from_numpy(batch.predict_at).to(device)[:, :, None].expand(-1, -1, hidden.shape[2])
        targets = torch.from_numpy(batch.targets.reshape(-1)).to(device)
        head: Tensor = self._decoder.model.get_output_embeddings().weight
        nll = token_nll(hidden.gather(1, index).flatten(0, 1), head, targets, slice_rows=_LOGIT_ROWS[self._kind])
        losses: Losses = nll.view(batch.targets.shape).double().mean(dim=1).cpu().numpy()
        return losses

    def _embed(self, batch: TrainingBatch, vectors: Embeddings | None) -> Tensor:
        device = self._decoder.device
        embeds = self._decoder.embed(torch.from_numpy(batch.ids).to(device).clamp_min(0))
        if vectors is None or self._projection is None or vectors.shape[1] == 0:
            return embeds
        projected: Tensor = self._projection(torch.from_numpy(np.ascontiguousarray(vectors)).to(device))
        index = torch.from_numpy(batch.places).to(device)[:, :, None].expand(-1, -1, embeds.shape[2])
        return embeds.scatter(1, index, projected.to(embeds.dtype))


def _from_number(batch: TrainingBatch, first: int) -> TrainingBatch:
    """The batch without its first `first` predictions."""
    return TrainingBatch(
        batch.ids, batch.chunk_ids, batch.places, batch.predict_at[:, first:], batch.targets[:, first:]
    )


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
