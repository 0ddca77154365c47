"""The learned policy beside chance and the last chunks: the same masks' size, the same tokens, paired by window."""

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from refrag_core.policy import PointerPolicy, select
from refrag_core.training.evaluate import bootstrap, expansion_masks
from refrag_core.training.policy_answers import AnsweredQuestions
from refrag_core.training.policy_config import PolicyTrainingConfig
from refrag_core.training.policy_data import (
    EmbedQueries,
    EncodedContexts,
    ExpansionScorer,
    MakeQueries,
    PolicyExample,
    picks_to_masks,
    shuffled_contexts,
)
from refrag_core.training.token_shards import TokenSplit, fixed_windows

Layout = Literal["next_paragraph", "shuffled"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

Losses = npt.NDArray[np.float64]

_POLICIES = ("learned", "random", "last")
_BATCH_ROWS = 32


def evaluate_policy(
    policy: PointerPolicy,
    scorer: ExpansionScorer,
    split: TokenSplit,
    config: PolicyTrainingConfig,
    *,
    make_queries: MakeQueries | None,
    windows: int,
) -> dict[str, Any]:
    """Mean losses in nats a token and what `learned` gains, for each layout and chunk size, as JSON.

    `gains` are another policy's loss less the learned one's, with a 95% bootstrap interval over documents.
    Raises ConfigError when the split has no long enough document, or too few for the shuffled layout.
    """
    length = config.context_tokens + config.output_tokens
    tokens, documents = fixed_windows(split, length=length, limit=windows)
    context, output = tokens[:, : config.context_tokens], tokens[:, config.context_tokens :]
    queries = None if make_queries is None else make_queries(output[:, : config.query_tokens])
    result: dict[str, Any] = {
        "windows": len(tokens),
        "documents": len(np.unique(documents)),
        "expansion_fraction": config.evaluation_fraction,
        "scored_tokens": config.output_tokens - config.first_scored,
    }
    for layout in LAYOUTS if config.shuffled_share else LAYOUTS[:1]:
        if layout == "shuffled":
            random = np.random.default_rng([config.seed, 1])
            context = shuffled_contexts(context, documents, passages=config.passages, random=random)
        result[layout] = {}
        for size in config.chunk_sizes:
            example = PolicyExample(context, output, size, config.evaluation_fraction, queries)
            losses = policy_losses(policy, scorer, example, seed=config.seed)
            result[layout][f"chunk_size_{size}"] = _compare(losses, documents, config.seed)
    return result


def policy_losses(
    policy: PointerPolicy, scorer: ExpansionScorer, example: PolicyExample, *, seed: int
) -> dict[str, Losses]:
    """Nats a token float64 `[n]` of every window with the chunks expanded that each policy chooses."""
    count = len(example.context)
    drawn = torch.from_numpy(expansion_masks("random", count, example.num_chunks, example.count, seed))
    last = torch.from_numpy(expansion_masks("last", count, example.num_chunks, example.count, seed))
    found = []
    for start in range(0, count, _BATCH_ROWS):
        rows = slice(start, start + _BATCH_ROWS)
        contexts = scorer.encode(_part(example, rows))
        learned = learned_masks(policy, contexts, example.count)
        masks = torch.stack([learned, drawn[rows].to(learned.device), last[rows].to(learned.device)], dim=1)
        found.append(-scorer.rewards(contexts, masks, example.count))
    losses = torch.cat(found).double().cpu().numpy()
    return {name: losses[:, index] for index, name in enumerate(_POLICIES)}


@torch.no_grad()
def evaluate_answers(
    policy: PointerPolicy,
    scorer: ExpansionScorer,
    questions: AnsweredQuestions,
    config: PolicyTrainingConfig,
    *,
    embed_queries: EmbedQueries,
) -> dict[str, Any]:
    """Of how many questions the policy chooses a chunk that holds the answer, for each chunk size, as JSON.

    As many chunks are chosen as a host does at the evaluation's p. `random` is what equally many drawn at random would
    find on average.
    """
    count, fraction = len(questions.examples), config.evaluation_fraction
    result: dict[str, Any] = {"questions": count, "expansion_fraction": fraction}
    for size in config.chunk_sizes:
        found, chances = [], []
        for start in range(0, count, _BATCH_ROWS):
            contexts = questions.contexts(range(start, min(start + _BATCH_ROWS, count)), chunk_size=size)
            embeddings, present, queries, _ = scorer.encode_questions(contexts, embed_queries(contexts.questions))
            logits = policy(embeddings, present, queries).cpu().numpy()
            for row, length in enumerate(contexts.present.sum(axis=1).tolist()):
                holds, own = contexts.holds_answer[row, :length], logits[row, :length]
                chosen = select("learned", num_chunks=length, expansion_fraction=fraction, logits=own)
                found.append(bool((holds & chosen).any()))
                chances.append(chance_of_a_hit(length, int(holds.sum()), int(chosen.sum())))
        result[f"chunk_size_{size}"] = {"learned": float(np.mean(found)), "random": float(np.mean(chances))}
    return result


def chance_of_a_hit(num_chunks: int, wanted: int, picks: int) -> float:
    """That `picks` of `num_chunks` chunks, drawn without replacement, have one of `wanted` among them."""
    return 1.0 - math.comb(num_chunks - wanted, picks) / math.comb(num_chunks, picks)


@torch.no_grad()
def learned_masks(policy: PointerPolicy, contexts: EncodedContexts, count: int) -> Tensor:
    """Bool `[b, L]`, the `count` highest logits of each row, ties to the earlier chunk as in `policy.select`."""
    logits = policy(contexts.embeddings, contexts.present, contexts.queries)
    return picks_to_masks(logits.argsort(dim=-1, descending=True, stable=True)[:, :count], logits.shape[1])


def _part(example: PolicyExample, rows: slice) -> PolicyExample:
    queries = None if example.queries is None else example.queries[rows]
    return replace(example, context=example.context[rows], output=example.output[rows], queries=queries)


def _compare(losses: dict[str, Losses], documents: npt.NDArray[np.int64], seed: int) -> dict[str, Any]:
    return {
        "losses": {name: float(values.mean()) for name, values in losses.items()},
        "gains": {
            f"over_{name}": {
                "nats": float((losses[name] - losses["learned"]).mean()),
                "interval": _interval(losses[name] - losses["learned"], documents, seed),
            }
            for name in _POLICIES[1:]
        },
    }


def _interval(differences: Losses, documents: npt.NDArray[np.int64], seed: int) -> list[float]:
    return bootstrap(documents, lambda weights: float(np.average(differences, weights=weights)), seed=seed)
