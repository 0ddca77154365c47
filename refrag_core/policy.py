"""The policy: which chunks the decoder reads as raw tokens (expanded) and which as one vector.

Notation: L chunks in the whole prompt, T′ = `num_expanded(L, expansion_fraction)` of them expanded.
Source: REFRAG, arXiv:2509.01092, section 3 (selective compression).
"""

import math
from decimal import ROUND_HALF_UP, Decimal
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from refrag_core.devices import upload_rows
from refrag_core.embedding_storage import StoredRows
from refrag_core.errors import ConfigError, MissingScoresError

PolicyName = Literal["learned", "perplexity", "random", "all", "none"]
POLICIES: tuple[PolicyName, ...] = get_args(PolicyName)

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.floating]

_LONGEST_PERIOD = 10_000.0


class PointerPolicy(nn.Module):
    """Transformer over a prompt's chunk embeddings, one logit a chunk.

    Args:
        d_enc: width of a chunk embedding.
        query_dim: width of the retriever's query vector, an extra input to every chunk; 0 for none.
        match_dim: m, width in which the query is compared with every chunk embedding, which adds to its logit; 0 for
            no such term. Only with a `query_dim`.
        width, num_heads, num_layers: of the transformer; `width` is even and divisible by `num_heads`.
    """

    def __init__(
        self,
        d_enc: int,
        *,
        query_dim: int = 0,
        match_dim: int = 0,
        width: int = 256,
        num_heads: int = 4,
        num_layers: int = 2,
    ) -> None:
        super().__init__()
        if width % 2 or width % num_heads:
            raise ConfigError(f"policy width {width} must be even and divisible by its {num_heads} heads")
        if match_dim and not query_dim:
            raise ConfigError(f"policy has match_dim {match_dim} and no query to compare with; expected a query_dim")
        self.query_dim = query_dim
        self.match_dim = match_dim
        self.chunk_input = nn.Linear(d_enc, width)
        self.query_input = nn.Linear(query_dim, width, bias=False) if query_dim else None
        self.blocks = nn.ModuleList(_Block(width, num_heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.logit = nn.Linear(width, 1)
        self.match = _Match(d_enc, query_dim, match_dim) if match_dim else None

    def forward(self, chunk_embeddings: Tensor, present: Tensor, query: Tensor | None = None) -> Tensor:
        """Logits `[b, L]`, -inf where no chunk is.

        Args:
            chunk_embeddings: `[b, L, d_enc]` of any float dtype, zero-padded behind each row's chunks.
            present: bool `[b, L]`, True where a chunk is.
            query: `[b, query_dim]` exactly when the policy was made with a `query_dim`.

        Raises ConfigError when a query is missing, or given and not asked for.
        """
        chunks = chunk_embeddings.to(self.logit.weight.dtype)
        hidden = self._inputs(chunks, query)
        for block in self.blocks:
            hidden = block(hidden, present)
        logits: Tensor = self.logit(self.norm(hidden)).squeeze(-1)
        if self.match is not None and query is not None:
            logits = logits + self.match(chunks, query.to(chunks.dtype))
        return logits.masked_fill(~present, -math.inf)

    def _inputs(self, chunk_embeddings: Tensor, query: Tensor | None) -> Tensor:
        if (query is None) != (self.query_input is None):
            raise ConfigError(
                f"the policy has query_dim {self.query_dim} and was given {'no' if query is None else 'a'} query "
                f"vector; expected a query vector exactly when query_dim is not 0"
            )
        inputs: Tensor = self.chunk_input(chunk_embeddings)
        if self.query_input is not None and query is not None:
            inputs = inputs + self.query_input(query.to(inputs.dtype))[:, None]
        return inputs + _positions(inputs.shape[1], inputs.shape[2], inputs.device).to(inputs.dtype)


class _Match(nn.Module):
    """The bilinear term of the logits, chunk · query / √m, both normed and projected; none for a query of zeros.

    Blocks that read the sum of both would have to learn such a product. Without the norms the term learns slowly: a
    query has length 1, whatever its width.
    """

    def __init__(self, d_enc: int, query_dim: int, match_dim: int) -> None:
        super().__init__()
        self.chunk = nn.Linear(d_enc, match_dim, bias=False)
        self.query = nn.Linear(query_dim, match_dim, bias=False)

    def forward(self, chunk_embeddings: Tensor, query: Tensor) -> Tensor:
        """`[b, L]` of chunk embeddings `[b, L, d_enc]` and queries `[b, query_dim]`."""
        asked = self.query(_normed(query)) / math.sqrt(self.query.out_features)
        # Through the chunks' matrix goes the query, which is one, and not the chunks, which are L.
        wanted = asked @ self.chunk.weight
        term: Tensor = (_normed(chunk_embeddings) @ wanted[:, :, None]).squeeze(-1)
        return term


def _normed(vectors: Tensor) -> Tensor:
    return nn.functional.layer_norm(vectors, vectors.shape[-1:])


class _Block(nn.Module):
    """Pre-norm transformer layer in which absent chunks are attended to by nobody."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_input = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_input = nn.Linear(width, 4 * width)
        self.feed_forward_output = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, present: Tensor) -> Tensor:
        hidden = hidden + self._attend(self.attention_norm(hidden), present)
        inner = nn.functional.gelu(self.feed_forward_input(self.feed_forward_norm(hidden)))
        out: Tensor = hidden + self.feed_forward_output(inner)
        return out

    def _attend(self, hidden: Tensor, present: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.attention_input(hidden).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        # A row with no chunk at all would softmax over nothing: it attends to its padding, and is -inf later.
        visible = (present | ~present.any(dim=1, keepdim=True))[:, None, None, :]
        mixed = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=visible)
        out: Tensor = self.attention_output(mixed.transpose(1, 2).reshape(batch, length, width))
        return out


def _positions(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids float32 `[length, width]`: chunk order without a largest number of chunks."""
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(_LONGEST_PERIOD) / width))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def initialise_policy(d_enc: int, *, seed: int, match_dim: int = 0, **shape: int) -> PointerPolicy:
    """An untrained policy of this shape (see `PointerPolicy`), equal for equal seeds; its match term begins at 0."""
    policy = PointerPolicy(d_enc, **shape)
    _initialise(policy, torch.Generator().manual_seed(seed))
    return with_match(policy.eval(), match_dim, seed=seed) if match_dim else policy.eval()


def with_match(policy: PointerPolicy, match_dim: int, *, seed: int) -> PointerPolicy:
    """The policy, changed in place, with a match term that has yet to learn: its logits are what they were.

    Args:
        policy: with a query and without such a term.
        seed: of the term's weights.

    Raises ConfigError for any other policy.
    """
    if policy.match is not None or not policy.query_dim:
        raise ConfigError(
            f"policy has query_dim {policy.query_dim} and match_dim {policy.match_dim}; expected one with a query and "
            f"without a match term to give it one"
        )
    match = _Match(policy.chunk_input.in_features, policy.query_dim, match_dim)
    _initialise(match, torch.Generator().manual_seed(seed))
    # One factor of a product of zeros still has a gradient; with both at 0 neither had.
    nn.init.zeros_(match.chunk.weight)
    policy.match, policy.match_dim = match.to(policy.logit.weight).train(policy.training), match_dim
    return policy


@torch.no_grad()
def _initialise(module: nn.Module, generator: torch.Generator) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(0.0, 1.0 / math.sqrt(part.in_features), generator=generator)
            if part.bias is not None:
                part.bias.zero_()


@torch.inference_mode()
def policy_logits(
    policy: PointerPolicy, chunk_embeddings: StoredRows, query: npt.NDArray[np.floating] | None = None
) -> npt.NDArray[np.float32]:
    """Logits float32 `[L]` of one prompt's chunks, stored embeddings `[L, d_enc]`, query `[query_dim]`."""
    device = policy.logit.weight.device
    chunks = upload_rows(chunk_embeddings, device)[None]
    vector = None if query is None else torch.from_numpy(np.ascontiguousarray(query)).to(device)[None]
    present = torch.ones(chunks.shape[:2], dtype=torch.bool, device=device)
    logits: npt.NDArray[np.float32] = policy(chunks, present, vector)[0].float().cpu().numpy()
    return logits


def num_expanded(num_chunks: int, expansion_fraction: float) -> int:
    """T′: `expansion_fraction` of the prompt's chunks, half rounded up, at least 1 when there is any of both.

    Raises ConfigError when the fraction is not between 0 and 1.
    """
    if not 0.0 <= expansion_fraction <= 1.0:
        raise ConfigError(f"expansion_fraction must be 0 to 1, found {expansion_fraction}")
    if expansion_fraction == 0.0 or num_chunks == 0:
        return 0
    # In decimals, since .29 of 50 chunks is 14.5, and as a binary fraction less than that.
    exact = Decimal(repr(float(expansion_fraction))) * num_chunks
    return max(1, int(exact.to_integral_value(ROUND_HALF_UP)))


def select(
    policy: PolicyName,
    *,
    num_chunks: int,
    expansion_fraction: float,
    logits: Scores | None = None,
    nll: Scores | None = None,
    seed: int = 0,
) -> Mask:
    """The expansion_mask bool `[L]` of a prompt, True for the T′ chunks to expand; ties go to the earlier chunk.

    Args:
        policy: `learned` takes the top `logits`, `perplexity` the highest `nll` (the paper's perplexity-desc),
            `random` draws by `seed`; `all` and `none` ignore the fraction.
        logits: float `[L]` from `policy_logits`, for `learned`.
        nll: float `[L]`, nats a token, for `perplexity`.

    Raises MissingScoresError for `perplexity` without `nll`, and ConfigError for anything else that is missing,
    unknown or of the wrong length.
    """
    count = num_expanded(num_chunks, expansion_fraction)
    if policy == "all":
        return np.ones(num_chunks, dtype=np.bool_)
    if policy == "none":
        return np.zeros(num_chunks, dtype=np.bool_)
    if policy == "random":
        return _random_mask(num_chunks, count, seed)
    if policy == "learned":
        return top_mask(_scores(logits, num_chunks, "learned policy's logits"), count)
    if policy == "perplexity":
        if nll is None:
            raise MissingScoresError(
                "the perplexity policy needs a score for every chunk and this index has none; expected an index "
                "built with scores: refrag index build CORPUS -o INDEX --score, or choose another --policy"
            )
        return top_mask(_scores(nll, num_chunks, "scores"), count)
    raise ConfigError(f"unknown policy {policy!r}; expected one of {', '.join(POLICIES)}")


def _scores(scores: Scores | None, num_chunks: int, name: str) -> Scores:
    if scores is None or scores.shape != (num_chunks,):
        found = "none" if scores is None else f"shape {scores.shape}"
        raise ConfigError(f"the {name} must be one number a chunk, shape ({num_chunks},); found {found}")
    return scores


def _random_mask(num_chunks: int, count: int, seed: int) -> Mask:
    mask = np.zeros(num_chunks, dtype=np.bool_)
    mask[np.random.default_rng(seed).permutation(num_chunks)[:count]] = True
    return mask


def top_mask(scores: Scores, count: int) -> Mask:
    """Bool `[L]`, True for the `count` highest scores; NaN ranks last, ties go to the earlier chunk."""
    mask = np.zeros(len(scores), dtype=np.bool_)
    mask[np.argsort(-scores, kind="stable")[:count]] = True
    return mask


def sample_without_replacement(
    logits: Tensor, count: int, generator: torch.Generator, *, num_samples: int = 1
) -> tuple[Tensor, Tensor]:
    """Draw `num_samples` sequences of `count` chunks, one chunk after another, none twice.

    Each pick is from the softmax over the chunks not yet picked, with the logits as they were (section 3).
    Drawn at once: the order of logits + Gumbel noise has exactly that distribution.

    Args:
        logits: float `[L]`, -inf for chunks that must not be picked.
        count: T′, at most the number of finite logits.

    Returns:
        picks int64 `[num_samples, count]` in picking order, and their `pick_log_probs`, same shape.
    """
    pickable = int(torch.isfinite(logits).sum())
    if count > pickable:
        raise ConfigError(f"cannot pick {count} chunks without replacement out of {pickable}")
    picks = draw_picks(logits, count, generator, num_samples=num_samples)
    return picks, pick_log_probs(logits, picks)


@torch.no_grad()
def draw_picks(logits: Tensor, count: int, generator: torch.Generator, *, num_samples: int) -> Tensor:
    """The picks int64 `[…, num_samples, count]` of `sample_without_replacement`, for logits `[…, L]`.

    Nothing waits for the device; `count` must not exceed any row's number of finite logits.
    """
    shape = (*logits.shape[:-1], num_samples, logits.shape[-1])
    uniform = torch.rand(shape, generator=generator, device=logits.device, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))
    return (logits.detach().double().unsqueeze(-2) + gumbel).topk(count, dim=-1).indices


def pick_log_probs(logits: Tensor, picks: Tensor) -> Tensor:
    """Log-probability of every pick given the picks before it; differentiable in `logits`.

    Args:
        logits: float `[…, L]`, -inf for chunks that are never picked.
        picks: int64 `[…, g, T′]`, g sequences without repeats.

    Returns:
        float `[…, g, T′]`; a sequence's sum is its log-probability.
    """
    chosen = nn.functional.one_hot(picks, logits.shape[-1]).bool()
    taken_before = (chosen.cumsum(dim=-2) - chosen.long()).bool()
    every_pick = logits[..., None, None, :].expand_as(taken_before)
    remaining = every_pick.masked_fill(taken_before, -math.inf).logsumexp(dim=-1)
    return every_pick.gather(-1, picks.unsqueeze(-1)).squeeze(-1) - remaining
