"""What compression keeps: losses on documents that were not trained on, beside no, full and truncated context.

Every condition predicts the same tokens, the output's second to last (without a context there is nothing to
predict its first from), with the same weights. Gap closed G = (none − refrag) / (none − full).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from refrag_core.errors import ConfigError
from refrag_core.policy import num_expanded
from refrag_core.training.batches import (
    Mask,
    TrainingBatch,
    next_paragraph_batch,
    random_masks,
    recall_batch,
    reconstruction_batch,
    text_batch,
)
from refrag_core.training.losses import IGNORED, token_nll
from refrag_core.training.model import TrainingModel, without_adapter
from refrag_core.training.token_shards import Split, TokenShards, TokenSplit, fixed_windows

Selection = Literal["random", "last"]
Losses = npt.NDArray[np.float64]

RECONSTRUCTED_CHUNKS = 16
RECALLED_TOKENS = 32
"""Of a piece of the context that is to be continued from its first `RECALL_GIVEN`."""
RECALL_GIVEN = 4
_BOOTSTRAPS = 1000
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is evaluated."""

    context_tokens: int = 512
    output_tokens: int = 256
    chunk_sizes: tuple[int, ...] = (8, 16)
    expansion_fractions: tuple[float, ...] = (0.0, 0.1, 0.25)
    selections: tuple[Selection, ...] = ("random",)
    windows: int = 256
    batch_rows: int = 32
    seed: int = 0


class Scorer:
    """Runs batches through a model without gradients, in eager mode.

    Args:
        autocast: makes the context that the model computes in.
    """

    def __init__(self, model: TrainingModel, autocast: Callable[[], AbstractContextManager[Any]], rows: int) -> None:
        self._model = model
        self._autocast = autocast
        self._rows = rows
        self._device = model.head.device

    def losses(self, make: Callable[[slice], TrainingBatch], count: int) -> Losses:
        """Mean nats a token `[count]` of windows 0 to `count`, in batches that `make` makes of a range of them."""
        found = []
        for start in range(0, count, self._rows):
            batch = make(slice(start, min(start + self._rows, count)))
            counted = batch.targets != IGNORED
            found.append(self._batch(batch).sum(axis=1) / counted.sum(axis=1))
        return np.concatenate(found)

    @torch.no_grad()
    def _batch(self, batch: TrainingBatch) -> Losses:
        *arrays, _ = batch.arrays
        with torch.compiler.set_stance("force_eager"), self._autocast():
            hidden = self._model(*(torch.from_numpy(array).to(self._device) for array in arrays))
            targets = torch.from_numpy(batch.targets.reshape(-1)).to(self._device)
            nll = token_nll(hidden, self._model.head, targets)
        losses: Losses = nll.view(batch.targets.shape).double().cpu().numpy()
        return losses


def without_first_prediction(batch: TrainingBatch) -> TrainingBatch:
    """The batch without the first of its predictions."""
    return replace(batch, predict_at=batch.predict_at[:, 1:], targets=batch.targets[:, 1:])


def expansion_masks(selection: Selection, rows: int, num_chunks: int, count: int, seed: int) -> Mask:
    """Bool `[rows, num_chunks]` with `count` True a row: drawn by the seed, or the last ones."""
    if selection == "random":
        return random_masks(rows, num_chunks, count, np.random.default_rng(seed))
    return np.broadcast_to(np.arange(num_chunks) >= num_chunks - count, (rows, num_chunks)).copy()


def evaluate_splits(
    shards: TokenShards,
    names: Sequence[Split],
    evaluate_split: Callable[[TokenSplit], dict[str, Any]],
    *,
    summary: Callable[[dict[str, Any]], str],
    say: Callable[[str], None],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and evaluations of the splits that have tokens; why there is none, where their documents do not do.

    Args:
        summary: of an evaluation, in one line.
        say: where that line goes.
    """
    for name in names:
        if int(shards.index["splits"][name]["tokens"]) == 0:
            continue
        try:
            found = evaluate_split(shards.split(name))
            say(f"{name}: {summary(found)}")
        except ConfigError as error:
            found = {"skipped": str(error)}
            say(f"no evaluation on {name}: {error}")
        yield name, found


def evaluate(
    model: TrainingModel,
    split: TokenSplit,
    options: EvaluationOptions,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    reference: TrainingModel | None = None,
) -> dict[str, Any]:
    """All losses in nats a token, gap closed with bootstrap intervals over documents, as JSON.

    `full` and `none` are of the model's own decoder, `base` of the decoder without its adapter. `gap_closed`
    takes the own decoder's full context, `gap_closed_reference` that of `reference`, a decoder adapted to the
    same text without chunks, where one is given.
    """
    length = options.context_tokens + options.output_tokens
    windows, documents = fixed_windows(split, length=length, limit=options.windows)
    scorer = Scorer(model, autocast, options.batch_rows)
    context, output = windows[:, : options.context_tokens], windows[:, options.context_tokens :]
    none, full = _text_losses(scorer, output, output), _text_losses(scorer, windows, output)
    with without_adapter(model.decoder):
        base = {
            "none": _mean(_text_losses(scorer, output, output)),
            "full": _mean(_text_losses(scorer, windows, output)),
        }
    result: dict[str, Any] = {
        "windows": len(windows),
        "documents": len(np.unique(documents)),
        "context_tokens": options.context_tokens,
        "output_tokens": options.output_tokens,
        "none": _mean(none),
        "full": _mean(full),
        "base": base,
    }
    reference_full = None
    if reference is not None:
        reference_full = _text_losses(Scorer(reference, autocast, options.batch_rows), windows, output)
        result["reference"] = {"full": _mean(reference_full)}
    for size in options.chunk_sizes:
        rows = _compressed(scorer, context, output, documents, (none, full, reference_full), size, options)
        result[f"chunk_size_{size}"] = rows
    return result


def _mean(losses: Losses) -> float:
    return float(losses.mean())


def _text_losses(scorer: Scorer, text: npt.NDArray[np.int64], output: npt.NDArray[np.int64]) -> Losses:
    """Losses of the output's second to last tokens at the end of `text`, read as plain text."""
    first = text.shape[1] - output.shape[1] + 1
    return scorer.losses(lambda part: text_batch(text[part], first=first), len(text))


def _compressed(
    scorer: Scorer,
    context: npt.NDArray[np.int64],
    output: npt.NDArray[np.int64],
    documents: npt.NDArray[np.int64],
    known: tuple[Losses, Losses, Losses | None],
    chunk_size: int,
    options: EvaluationOptions,
) -> dict[str, Any]:
    none, full, reference_full = known
    num_chunks = context.shape[1] // chunk_size

    def refrag(given: npt.NDArray[np.int64], masks: Mask) -> Losses:
        def make(part: slice) -> TrainingBatch:
            return without_first_prediction(
                next_paragraph_batch(given[part], output[part], chunk_size=chunk_size, expansion_mask=masks[part])
            )

        return scorer.losses(make, len(given))

    result: dict[str, Any] = {"refrag": {}, "last": {}, "gap_closed": {}, "intervals": {}, "better_than_last": {}}
    if reference_full is not None:
        result["gap_closed_reference"] = {}
    for fraction in options.expansion_fractions:
        count = num_expanded(num_chunks, fraction)
        budget = num_chunks - count + count * chunk_size
        last = _text_losses(scorer, np.concatenate([context[:, -budget:], output], axis=1), output)
        key = f"{fraction:g}"
        result["last"][key] = {"positions": budget, "loss": _mean(last), "gap_closed": gap_closed(none, last, full)}
        for selection in options.selections:
            masks = expansion_masks(selection, len(context), num_chunks, count, options.seed)
            losses = refrag(context, masks)
            _put(result["refrag"], key, selection, _mean(losses))
            _put(result["gap_closed"], key, selection, gap_closed(none, losses, full))
            interval = bootstrap(documents, _gap_of(none, losses, full), seed=options.seed)
            _put(result["intervals"], key, selection, interval)
            better = bootstrap(documents, _mean_of(last - losses), seed=options.seed)
            _put(result["better_than_last"], key, selection, {"nats": _mean(last) - _mean(losses), "interval": better})
            if reference_full is not None:
                _put(result["gap_closed_reference"], key, selection, gap_closed(none, losses, reference_full))
    nothing = np.zeros((len(context), num_chunks), dtype=np.bool_)
    result["wrong"] = _mean(refrag(np.roll(context, 1, axis=0), nothing))
    result["reconstruction"] = _reconstruction(scorer, context, chunk_size)
    result["recall"] = _recall(scorer, context, chunk_size, options.seed)
    return result


def _gap_of(none: Losses, found: Losses, full: Losses) -> Callable[[Losses], float]:
    return lambda weights: gap_closed(none, found, full, weights)


def _mean_of(values: Losses) -> Callable[[Losses], float]:
    return lambda weights: float(np.average(values, weights=weights))


def _put(target: dict[str, Any], key: str, selection: str, value: Any) -> None:
    target.setdefault(key, {})[selection] = value


def _reconstruction(scorer: Scorer, context: npt.NDArray[np.int64], chunk_size: int) -> dict[str, float]:
    """Nats a token of the tokens behind their vectors, for 16 chunks and for the whole context, with tokens given."""
    counts = sorted({min(RECONSTRUCTED_CHUNKS, context.shape[1] // chunk_size), context.shape[1] // chunk_size})

    def make(part: slice, count: int) -> TrainingBatch:
        return reconstruction_batch(context[part, : count * chunk_size], chunk_size=chunk_size, num_chunks=count)

    return {
        str(count): _mean(scorer.losses(lambda part, n=count: make(part, n), len(context)))  # type: ignore[misc]
        for count in counts
    }


def _recall(scorer: Scorer, context: npt.NDArray[np.int64], chunk_size: int, seed: int) -> float:
    """Nats a token of one piece of each context, continued from its first tokens, with all chunks compressed."""
    rows, size = context.shape
    span = min(RECALLED_TOKENS, size // 2)
    starts = np.random.default_rng(seed).integers(0, size - span + 1, (rows, 1))
    nothing = np.zeros((rows, size // chunk_size), dtype=np.bool_)

    def make(part: slice) -> TrainingBatch:
        return recall_batch(
            context[part],
            starts[part],
            span_tokens=span,
            given_tokens=min(RECALL_GIVEN, span - 1),
            chunk_size=chunk_size,
            expansion_mask=nothing[part],
        )

    return _mean(scorer.losses(make, rows))


def gap_closed(none: Losses, found: Losses, full: Losses, weights: Losses | None = None) -> float:
    """(none − found) / (none − full) of mean losses; raises ConfigError when the context tells the decoder nothing."""
    gap = float(np.average(none - full, weights=weights))
    if gap == 0.0:
        raise ConfigError("losses with and without context are equal; expected a decoder that reads its context")
    return float(np.average(none - found, weights=weights)) / gap


def bootstrap(
    documents: npt.NDArray[np.int64], statistic: Callable[[Losses], float], *, seed: int, draws: int = _BOOTSTRAPS
) -> list[float]:
    """95% interval of a statistic of weighted windows, with whole documents drawn again with replacement."""
    random = np.random.default_rng(seed)
    _, index = np.unique(documents, return_inverse=True)
    size = int(index.max()) + 1
    found: Sequence[float] = [
        statistic(np.bincount(random.integers(0, size, size), minlength=size)[index].astype(np.float64))
        for _ in range(draws)
    ]
    return [float(value) for value in np.quantile(np.asarray(found), _QUANTILES)]
