"""Which chunks `refrag eval perplexity` expands: every policy as one score a chunk, the highest of which are expanded.

Notation: n windows, L chunks of a context, k = chunk_size, d_enc embedding width.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from torch import nn

from refrag_core.errors import ConfigError
from refrag_core.evaluation.perplexity_windows import EvaluationWindows
from refrag_core.policy import PointerPolicy, policy_logits
from refrag_core.retriever import Retriever
from refrag_core.scoring import ChunkScorer

Selection = Literal["random", "last", "similarity", "perplexity", "learned"]
SELECTIONS: tuple[Selection, ...] = get_args(Selection)

Scores = npt.NDArray[np.floating]
Mask = npt.NDArray[np.bool_]
Embeddings = npt.NDArray[np.floating]


def top_masks(scores: Scores, count: int) -> Mask:
    """Bool `[n, L]`, True for the `count` highest scores of each row of `[n, L]`; ties go to the earlier chunk."""
    mask = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(mask, np.argsort(-scores, axis=1, kind="stable")[:, :count], True, axis=1)
    return mask


def policy_is_trained(policy: PointerPolicy) -> bool:
    """Whether any bias has moved from the zeros that `initialise_policy` leaves."""
    linear = [module for module in policy.modules() if isinstance(module, nn.Linear)]
    return any(bool((layer.bias != 0).any()) for layer in linear if layer.bias is not None)


def refuse_untrained_policy(policy: PointerPolicy) -> None:
    """Raise ConfigError for a policy as it was initialised."""
    if not policy_is_trained(policy):
        raise ConfigError(
            "the checkpoint's policy was never trained, so that 'learned' would choose by chance; expected one after "
            "`refrag train policy`: give one, or leave learned out of --policies"
        )


class ChunkRanker:
    """Makes the scores by which each policy chooses.

    Args:
        tokenizer: the decoder's, which turns tokens into text for the retriever.
        policy: for `learned`; must be trained.
        chunk_scorer: loads what `perplexity` asks, at its first use.
        retriever: loads what `similarity` and a `policy` with a `query_dim` ask, at its first use.
        query_tokens: tokens at the beginning of the output that are the query.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        policy: PointerPolicy,
        *,
        chunk_scorer: Callable[[], ChunkScorer],
        retriever: Callable[[], Retriever],
        query_tokens: int,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._policy = policy
        self._chunk_scorer = chunk_scorer
        self._retriever = retriever
        self._query_tokens = query_tokens
        self._seed = seed

    def scores(self, selection: Selection, windows: EvaluationWindows, embeddings: Embeddings) -> Scores:
        """Scores float `[n, L]` of the contexts' chunks with `embeddings` `[n, L, d_enc]`."""
        shape = embeddings.shape[:2]
        if selection == "random":
            return -np.random.default_rng(self._seed).random(shape)
        if selection == "last":
            return np.broadcast_to(np.arange(shape[1], dtype=np.float64), shape)
        if selection == "perplexity":
            return self._perplexities(windows, windows.context.shape[1] // shape[1])
        if selection == "similarity":
            return self._similarities(windows, shape[1])
        return self._logits(windows, embeddings)

    def _perplexities(self, windows: EvaluationWindows, chunk_size: int) -> Scores:
        """Nats a token of each chunk, given what stands before it in its passage, as an index stores them."""
        passages = windows.context.reshape(len(windows) * windows.passages, -1).astype(np.int32)
        scores = self._chunk_scorer().score(list(passages), chunk_size)
        return np.stack(scores).reshape(len(windows), -1)

    def _similarities(self, windows: EvaluationWindows, num_chunks: int) -> Scores:
        """Inner products of the query's vector and each chunk's, both from the retriever."""
        chunks = windows.context.reshape(len(windows) * num_chunks, -1)
        vectors, _ = self._retriever().embed(_texts(self._tokenizer, chunks))
        by_window = vectors.astype(np.float32).reshape(len(windows), num_chunks, -1)
        similarities: Scores = np.einsum("nld,nd->nl", by_window, self._queries(windows))
        return similarities

    def _queries(self, windows: EvaluationWindows) -> npt.NDArray[np.float32]:
        return self._retriever().embed_queries(_texts(self._tokenizer, windows.output[:, : self._query_tokens]))

    def _logits(self, windows: EvaluationWindows, embeddings: Embeddings) -> Scores:
        refuse_untrained_policy(self._policy)
        if not self._policy.query_dim:
            return np.stack([policy_logits(self._policy, row.astype(np.float16)) for row in embeddings])
        queries = self._queries(windows)
        if queries.shape[1] != self._policy.query_dim:
            raise ConfigError(
                f"the policy reads query vectors of width {self._policy.query_dim} and the retriever makes "
                f"{queries.shape[1]}; expected the retriever that it was trained with: give it with --retriever"
            )
        return np.stack(
            [
                policy_logits(self._policy, row.astype(np.float16), query)
                for row, query in zip(embeddings, queries, strict=True)
            ]
        )


def _texts(tokenizer: Tokenizer, token_ids: npt.NDArray[np.int64]) -> list[str]:
    return [str(text) for text in tokenizer.decode_batch(token_ids.tolist(), skip_special_tokens=False)]
