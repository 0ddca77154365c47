"""`refrag eval perplexity`: what compression costs a decoder on text that it was not trained on.

Log-perplexity (mean nats a token) of each window's output, the same tokens in every condition:

    none      nothing before the output
    full      the whole context as text
    last      the context's last tokens as text, as many as refrag has decoder positions
    wrong     another document's chunks, all compressed: a decoder that reads its context does worse than with none
    refrag    the context's chunks as vectors, a share p of them (chosen by a policy) as text

Gap closed G = (none − refrag) / (none − full). Since a damaged decoder's full context raises G, `--reference`
gives the full context of a decoder that was adapted to the same text without chunks.

Every condition reads the first `query_tokens` of the output (at least 1) as text and scores none of them: without
a context nothing predicts the first, and they are the query of a policy that reads one. So no policy sees what is
scored. Intervals are of 95%, over documents drawn again with replacement, the same draws for both sides of a
difference. Source: REFRAG, arXiv:2509.01092, section 4; the table is that of its tables 1 and 2.

`python -m refrag_core.evaluation.perplexity` is the same command where refrag's command line is not installed.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from refrag_core.checkpoint import Checkpoint, load_checkpoint
from refrag_core.decoder import Decoder
from refrag_core.devices import resolve_device
from refrag_core.embedding_storage import EMBEDDING_DTYPES, EmbeddingDtype, bytes_per_row, stored_and_read
from refrag_core.encoder import EncoderModule, load_encoder_module
from refrag_core.errors import ConfigError, FingerprintMismatchError, RefragError, UntrainedProjectionError, UsageError
from refrag_core.evaluation.perplexity_scoring import Losses, MixedInputScorer
from refrag_core.evaluation.perplexity_selection import (
    SELECTIONS,
    ChunkRanker,
    Selection,
    policy_is_trained,
    refuse_untrained_policy,
    top_masks,
)
from refrag_core.evaluation.perplexity_table import table_lines
from refrag_core.evaluation.perplexity_windows import (
    SHUFFLED_PASSAGES,
    EvaluationWindows,
    cut_windows,
    read_tokens,
    shuffle_passages,
)
from refrag_core.models import DEFAULT_RETRIEVER, resolve_model
from refrag_core.policy import num_expanded
from refrag_core.retriever import Retriever, load_retriever
from refrag_core.scoring import ChunkScorer
from refrag_core.training.evaluate import bootstrap, gap_closed

Ids = npt.NDArray[np.int64]
Embeddings = npt.NDArray[np.floating]

QUERY_TOKENS = 32
"""Query of the policies that read one, where nobody says."""

Name = TypeVar("Name", bound=str)

_NOT_OPTIONS = ("checkpoint", "text", "split", "reference", "save", "json")
_BASELINE_DTYPE: EmbeddingDtype = "float16"
_EXACT_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityOptions:
    """What is measured. Several contexts, outputs or chunk sizes give several tables."""

    context_tokens: tuple[int, ...] = (512,)
    """s; multiples of the chunk size."""
    output_tokens: tuple[int, ...] = (256,)
    """o."""
    chunk_sizes: tuple[int, ...] = ()
    """k; empty for the checkpoint's own."""
    expansion_fractions: tuple[float, ...] = (0.0, 0.1, 0.25)
    policies: tuple[Selection, ...] = ()
    """Empty for random, last, perplexity and, where the checkpoint's policy is trained, learned."""
    windows: int = 256
    """At most so many: one of each document that is long enough, then a second of each, and so on."""
    query_tokens: int | None = None
    """First tokens of the output that are read and not scored; None for 32 where a policy reads a query, else 1."""
    shuffled: bool = False
    """Contexts of four passages of different documents, of which one precedes the output, at a random place."""
    embedding_dtype: EmbeddingDtype = "float16"
    """How chunk embeddings are stored before they are read; other than float16, the change to float16 is measured."""
    retriever: str = DEFAULT_RETRIEVER
    """Whose vectors queries and chunks have, for `similarity` and a query-conditioned policy."""
    allow_untrained: bool = False
    batch_rows: int | None = None
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)


def _check(options: PerplexityOptions) -> None:
    counts = (*options.context_tokens, *options.output_tokens, *options.chunk_sizes, options.windows)
    if not options.context_tokens or not options.output_tokens or min(counts) < 1:
        raise ConfigError("context, output, chunk size and windows must be positive numbers; expected 512, 256, 8, …")
    if not all(0.0 <= fraction <= 1.0 for fraction in options.expansion_fractions) or not options.expansion_fractions:
        raise ConfigError(f"expansion fractions {options.expansion_fractions}; expected numbers from 0 to 1")
    unknown = sorted(set(options.policies) - set(SELECTIONS))
    if unknown:
        raise ConfigError(f"policies {', '.join(unknown)} unknown; expected some of {', '.join(SELECTIONS)}")
    if options.embedding_dtype not in EMBEDDING_DTYPES:
        raise ConfigError(f"embedding dtype {options.embedding_dtype!r}; expected one of {', '.join(EMBEDDING_DTYPES)}")
    if options.query_tokens is not None and not 1 <= options.query_tokens < min(options.output_tokens):
        raise ConfigError(
            f"query_tokens is {options.query_tokens}; expected at least 1, the output's first token, and fewer than "
            f"the {min(options.output_tokens)} output tokens"
        )


@dataclass(frozen=True, slots=True)
class _Models:
    """The loaded parts of a checkpoint, with its decoder and projection on the device."""

    checkpoint: Checkpoint
    scorer: MixedInputScorer
    ranker: ChunkRanker
    encode: Callable[[Ids, int, EmbeddingDtype], Embeddings]
    """Contexts int64 `[n, s]`, chunk_size, storage form → what is read of their embeddings, float `[n, L, d_enc]`."""


@dataclass(slots=True)
class _Known:
    """Losses `[n]` of the conditions without vectors."""

    none: Losses
    full: Losses
    reference_none: Losses | None = None
    reference_full: Losses | None = None
    last: dict[int, Losses] = field(default_factory=dict)
    """By decoder positions."""


Say = Callable[[str], object]


def evaluate_perplexity(
    checkpoint: Checkpoint,
    text: Path,
    options: PerplexityOptions | None = None,
    *,
    split: str | None = None,
    reference: Checkpoint | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Losses, gaps closed and intervals as JSON.

    Args:
        text: JSON lines of `{"id", "text"}`, or a folder of token shards.
        split: of the shards; `held_out` by default.
        reference: whose decoder's full context is the fixed one.
        say: gets a line after every condition.

    Returns the keys `settings`, `corpus`, and those of one table: `none`, `full`, `last`, `wrong`, `refrag`,
    `gap_closed`, `intervals`, …; where there are several tables, a list of them under `tables` instead.

    Raises UntrainedProjectionError for an untrained checkpoint without `allow_untrained`, ConfigError for settings
    that do not fit it or the text, and FingerprintMismatchError for shards or a reference of another tokenizer.
    """
    options = _with_policies(options or PerplexityOptions(), checkpoint)
    say = say or (lambda _: None)
    sizes = _chunk_sizes(checkpoint, options)
    query_tokens = _query_tokens(checkpoint, options)
    _check_checkpoint(checkpoint, options, reference)
    device = resolve_device(options.device)
    decoder = checkpoint.load_decoder(device=device)
    longest = max(options.context_tokens), max(options.output_tokens)
    _check_positions(decoder.max_positions, sum(longest))
    tokens = read_tokens(
        text,
        split=split,
        tokenizer=decoder.tokenizer,
        tokenizer_fingerprint=checkpoint.config.decoder.tokenizer_fingerprint,
        length=sum(longest),
        limit=options.windows,
    )
    models = _load(checkpoint, decoder, options, query_tokens)
    made: dict[tuple[int, int], EvaluationWindows] = {}
    for context in options.context_tokens:
        for output in options.output_tokens:
            windows = cut_windows(
                tokens,
                context_tokens=context,
                output_tokens=output,
                longest_context=longest[0],
                longest_output=longest[1],
                limit=options.windows,
            )
            made[context, output] = shuffle_passages(windows, seed=options.seed) if options.shuffled else windows
    known = {key: _known(models.scorer, windows, key, say) for key, windows in made.items()}
    if reference is not None:
        _add_reference(reference, made, known, options, query_tokens, device)
    tables = [_table(models, made[key], known[key], size, options, say) for key in made for size in sizes]
    first = next(iter(made.values()))
    report: dict[str, Any] = {
        "settings": _settings(checkpoint, reference, options, query_tokens, device, str(decoder.dtype)),
        "corpus": {
            "source": str(text),
            "split": (split or "held_out") if text.is_dir() else None,
            "windows": len(first),
            "documents": len(np.unique(first.documents)),
        },
    }
    return report | (tables[0] if len(tables) == 1 else {"tables": tables})


# --- checks and loading -------------------------------------------------------------------------------


def _with_policies(options: PerplexityOptions, checkpoint: Checkpoint) -> PerplexityOptions:
    if options.policies:
        return options
    learned: tuple[Selection, ...] = ("learned",) if policy_is_trained(checkpoint.policy) else ()
    return replace(options, policies=("random", "last", "perplexity", *learned))


def _chunk_sizes(checkpoint: Checkpoint, options: PerplexityOptions) -> tuple[int, ...]:
    sizes = options.chunk_sizes or (checkpoint.config.chunk_size,)
    served = checkpoint.config.chunk_sizes
    for size in sizes:
        if size not in served:
            raise ConfigError(
                f"chunk size {size} is none that the checkpoint serves; expected one of {', '.join(map(str, served))}"
            )
        for context in options.context_tokens:
            unit = size * (SHUFFLED_PASSAGES if options.shuffled else 1)
            if context % unit:
                raise ConfigError(
                    f"a context of {context} tokens is no multiple of {unit}; expected whole chunks of {size} tokens"
                    + (f" in each of {SHUFFLED_PASSAGES} passages" if options.shuffled else "")
                )
    return sizes


def _query_tokens(checkpoint: Checkpoint, options: PerplexityOptions) -> int:
    """Tokens that are read and not scored."""
    reads_query = "similarity" in options.policies or (
        "learned" in options.policies and checkpoint.policy.query_dim > 0
    )
    found = options.query_tokens or (QUERY_TOKENS if reads_query else 1)
    if found >= min(options.output_tokens):
        raise ConfigError(
            f"the query takes {found} of the {min(options.output_tokens)} output tokens and leaves none to score; "
            f"expected fewer --query-tokens or a longer --output"
        )
    return found


def _check_checkpoint(checkpoint: Checkpoint, options: PerplexityOptions, reference: Checkpoint | None) -> None:
    if not checkpoint.config.trained and not options.allow_untrained:
        raise UntrainedProjectionError(
            "the checkpoint's projection was never trained, so that its chunk vectors are noise; expected a trained "
            "checkpoint: give one with --checkpoint, or pass --allow-untrained to measure the noise"
        )
    if "learned" in options.policies:
        refuse_untrained_policy(checkpoint.policy)
    if reference is None:
        return
    own, other = checkpoint.config.decoder.tokenizer_fingerprint, reference.config.decoder.tokenizer_fingerprint
    if own != other:
        raise FingerprintMismatchError(
            f"the reference's decoder has a tokenizer with fingerprint {other[:12]} and the checkpoint's {own[:12]}; "
            "expected the same decoder: give a reference that was adapted from it"
        )


def _check_positions(limit: int | None, needed: int) -> None:
    if limit is not None and needed > limit:
        raise ConfigError(
            f"context and output take {needed} positions and the decoder has {limit}; expected them to fit: take "
            "a shorter context or output"
        )


def _load(checkpoint: Checkpoint, decoder: Decoder, options: PerplexityOptions, query_tokens: int) -> _Models:
    device = str(decoder.device)

    @cache
    def chunk_scorer() -> ChunkScorer:
        # Builds score the chunks of an index with the decoder as it is, before any adapter.
        return ChunkScorer(Decoder.load(checkpoint.decoder_folder(), device=device))

    @cache
    def retriever() -> Retriever:
        return load_retriever(resolve_model(options.retriever), device)

    projection = checkpoint.load_projection(device=device)
    ranker = ChunkRanker(
        decoder.tokenizer,
        checkpoint.load_policy(device=device),
        chunk_scorer=chunk_scorer,
        retriever=retriever,
        query_tokens=query_tokens,
        seed=options.seed,
    )
    scorer = MixedInputScorer(decoder, projection, first=query_tokens, batch_rows=options.batch_rows)
    return _Models(checkpoint, scorer, ranker, _encoder(checkpoint, device))


def _encoder(checkpoint: Checkpoint, device: str) -> Callable[[Ids, int, EmbeddingDtype], Embeddings]:
    """Encodes with the encoder that fills indexes (float16), or, for float32, without rounding."""

    @cache
    def stored() -> Any:
        return checkpoint.load_encoder(device=device)

    @cache
    def exact() -> EncoderModule:
        module = load_encoder_module(
            checkpoint.verified_encoder_folder(), checkpoint.decoder_folder(), trained=checkpoint.load_trained_layers()
        )
        return module.fold().to(device).eval().requires_grad_(False)

    def encode(context: Ids, chunk_size: int, dtype: EmbeddingDtype) -> Embeddings:
        chunks = context.reshape(-1, chunk_size)
        if dtype == "float32":
            made: Embeddings = _encode_exactly(exact(), chunks, device)
        else:
            made = stored().encode(chunks.astype(np.int32), np.full(len(chunks), chunk_size))
        return stored_and_read(made, dtype).reshape(len(context), -1, made.shape[1])

    return encode


@torch.inference_mode()
def _encode_exactly(module: EncoderModule, chunks: Ids, device: str) -> Embeddings:
    ids = torch.from_numpy(np.ascontiguousarray(chunks)).to(device)
    made: Embeddings = torch.cat([module(part).cpu() for part in torch.split(ids, _EXACT_BATCH_ROWS)]).numpy()
    return made


# --- conditions ---------------------------------------------------------------------------------------


def _known(scorer: MixedInputScorer, windows: EvaluationWindows, key: tuple[int, int], say: Say) -> _Known:
    started = time.perf_counter()
    none = scorer.from_text(windows.context[:, :0], windows.output)
    full = scorer.from_text(windows.context, windows.output)
    seconds = time.perf_counter() - started
    say(f"context {key[0]} output {key[1]}: none {none.mean():.4f}, full {full.mean():.4f} ({seconds:.1f} s)")
    return _Known(none, full)


def _add_reference(
    reference: Checkpoint,
    made: Mapping[tuple[int, int], EvaluationWindows],
    known: Mapping[tuple[int, int], _Known],
    options: PerplexityOptions,
    query_tokens: int,
    device: str,
) -> None:
    decoder = reference.load_decoder(device=device)
    scorer = MixedInputScorer(decoder, None, first=query_tokens, batch_rows=options.batch_rows)
    for key, windows in made.items():
        known[key].reference_none = scorer.from_text(windows.context[:, :0], windows.output)
        known[key].reference_full = scorer.from_text(windows.context, windows.output)


def _table(
    models: _Models, windows: EvaluationWindows, known: _Known, size: int, options: PerplexityOptions, say: Say
) -> dict[str, Any]:
    """All of one (context, output, chunk size)."""
    dtype = options.embedding_dtype
    refrag = _compressed(models, windows, size, dtype, options, say)
    num_chunks = windows.context.shape[1] // size
    counts = {f"{p:g}": num_expanded(num_chunks, p) for p in options.expansion_fractions}
    positions = {p: num_chunks - count + count * size for p, count in counts.items()}
    for budget in {num_chunks, *positions.values()} - known.last.keys():
        known.last[budget] = models.scorer.from_text(windows.context[:, -budget:], windows.output)
    wrong = _wrong(models, windows, size, dtype)
    say(f"  k={size} wrong context {wrong.mean():.4f}, last {num_chunks} tokens {known.last[num_chunks].mean():.4f}")
    result: dict[str, Any] = {
        "context_tokens": windows.context.shape[1],
        "output_tokens": windows.output.shape[1],
        "chunk_size": size,
        "none": _mean(known.none),
        "full": _mean(known.full),
        "last": _mean(known.last[num_chunks]),
        "wrong": _mean(wrong),
        "refrag": {p: {policy: _mean(losses) for policy, losses in row.items()} for p, row in refrag.items()},
        "gap_closed": _gaps(refrag, known, known.full),
        "compression": {
            p: {
                "expanded_chunks": counts[p],
                "positions": positions[p],
                "effective": windows.context.shape[1] / positions[p],
            }
            for p in counts
        },
        "last_at_equal_positions": {
            p: {
                "tokens": positions[p],
                "loss": _mean(known.last[positions[p]]),
                "gap_closed": gap_closed(known.none, known.last[positions[p]], known.full),
            }
            for p in counts
        },
        "intervals": _intervals(windows.documents, refrag, known, positions, options.seed),
    }
    if known.reference_full is not None and known.reference_none is not None:
        result["reference"] = {"none": _mean(known.reference_none), "full": _mean(known.reference_full)}
        result["gap_closed_reference"] = _gaps(refrag, known, known.reference_full)
    result["embedding_storage"] = _storage(models, windows, refrag, known, size, options, say)
    return result


def _compressed(
    models: _Models,
    windows: EvaluationWindows,
    size: int,
    dtype: EmbeddingDtype,
    options: PerplexityOptions,
    say: Say,
) -> dict[str, dict[str, Losses]]:
    """Losses `[n]` by expansion fraction and policy; without an expanded chunk all policies are one."""
    embeddings = models.encode(windows.context, size, dtype)
    num_chunks = embeddings.shape[1]
    scores = {policy: models.ranker.scores(policy, windows, embeddings) for policy in options.policies}
    found: dict[str, dict[str, Losses]] = {}
    for fraction in options.expansion_fractions:
        count = num_expanded(num_chunks, fraction)
        row = found.setdefault(f"{fraction:g}", {})
        for policy in options.policies:
            started = time.perf_counter()
            if count in (0, num_chunks) and row:
                row[policy] = next(iter(row.values()))
                continue
            mask = top_masks(scores[policy], count)
            row[policy] = models.scorer.from_chunks(windows.context, windows.output, embeddings, mask)
            name = f"p={fraction:g} {policy if count else 'nothing expanded'}"
            say(f"  k={size} {dtype} {name}: {row[policy].mean():.4f} ({time.perf_counter() - started:.1f} s)")
    return found


def _wrong(models: _Models, windows: EvaluationWindows, size: int, dtype: EmbeddingDtype) -> Losses:
    embeddings = models.encode(windows.wrong, size, dtype)
    nothing = np.zeros(embeddings.shape[:2], dtype=np.bool_)
    return models.scorer.from_chunks(windows.wrong, windows.output, embeddings, nothing)


def _storage(
    models: _Models,
    windows: EvaluationWindows,
    refrag: Mapping[str, Mapping[str, Losses]],
    known: _Known,
    size: int,
    options: PerplexityOptions,
    say: Say,
) -> dict[str, Any]:
    """Bytes a source token, and what the storage form changes in G beside float16."""
    dtype = options.embedding_dtype
    dim = models.checkpoint.config.d_enc
    found: dict[str, Any] = {"dtype": dtype, "bytes_per_source_token": bytes_per_row(dtype, dim) / size}
    if dtype == _BASELINE_DTYPE:
        return found
    before = _compressed(models, windows, size, _BASELINE_DTYPE, options, say)
    base = _gaps(before, known, known.full)
    now = _gaps(refrag, known, known.full)
    return found | {
        "compared_with": _BASELINE_DTYPE,
        "its_bytes_per_source_token": bytes_per_row(_BASELINE_DTYPE, dim) / size,
        "gap_closed_change": {p: {name: now[p][name] - base[p][name] for name in now[p]} for p in now},
    }


# --- statistics ---------------------------------------------------------------------------------------


def _mean(losses: Losses) -> float:
    return float(losses.mean())


def _gaps(refrag: Mapping[str, Mapping[str, Losses]], known: _Known, full: Losses) -> dict[str, dict[str, float]]:
    return {p: {policy: gap_closed(known.none, x, full) for policy, x in row.items()} for p, row in refrag.items()}


def _gap_interval(documents: Ids, none: Losses, found: Losses, full: Losses, seed: int) -> list[float]:
    return bootstrap(documents, lambda weights: gap_closed(none, found, full, weights), seed=seed)


def _difference(documents: Ids, worse: Losses, better: Losses, seed: int) -> dict[str, Any]:
    """Nats a token by which `better` is below `worse`; positive with an interval above 0 where it is."""
    saved = worse - better
    interval = bootstrap(documents, lambda weights: float(np.average(saved, weights=weights)), seed=seed)
    return {"nats": _mean(saved), "interval": interval}


def _intervals(
    documents: Ids,
    refrag: Mapping[str, Mapping[str, Losses]],
    known: _Known,
    positions: Mapping[str, int],
    seed: int,
) -> dict[str, Any]:
    """95% intervals over documents.

    `gap_closed` of G; `better_than_last_tokens`: last tokens at equal positions − refrag;
    `learned_better_than`: another policy − learned, at the same p.
    """

    def each(value: Callable[[str, Losses], Any]) -> dict[str, dict[str, Any]]:
        return {p: {policy: value(p, losses) for policy, losses in row.items()} for p, row in refrag.items()}

    full, none = known.full, known.none
    found: dict[str, Any] = {
        "gap_closed": each(lambda _, x: _gap_interval(documents, none, x, full, seed)),
        "better_than_last_tokens": each(lambda p, x: _difference(documents, known.last[positions[p]], x, seed)),
    }
    reference = known.reference_full
    if reference is not None:
        found["gap_closed_reference"] = each(lambda _, x: _gap_interval(documents, none, x, reference, seed))
    learned = {p: row["learned"] for p, row in refrag.items() if "learned" in row}
    if learned:
        found["learned_better_than"] = {
            p: {name: _difference(documents, x, learned[p], seed) for name, x in row.items() if name != "learned"}
            for p, row in refrag.items()
        }
    return found


def _settings(
    checkpoint: Checkpoint,
    reference: Checkpoint | None,
    options: PerplexityOptions,
    query_tokens: int,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    return {
        "checkpoint": None if checkpoint.folder is None else str(checkpoint.folder),
        "checkpoint_fingerprint": checkpoint.fingerprint,
        "trained": checkpoint.config.trained,
        "reference": None if reference is None else str(reference.folder),
        **{key: list(value) if isinstance(value, tuple) else value for key, value in asdict(options).items()},
        "chunk_sizes": list(options.chunk_sizes or (checkpoint.config.chunk_size,)),
        "query_tokens": query_tokens,
        "first_scored_output_token": query_tokens + 1,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "decoder_dtype": dtype.removeprefix("torch."),
    }


# --- command line -------------------------------------------------------------------------------------


def numbers(text: str, kind: type[int] | type[float], option: str) -> tuple[Any, ...]:
    """The comma-separated numbers in `text`. Raises UsageError."""
    try:
        return tuple(kind(part) for part in _parts(text))
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: {error}; expected numbers separated by commas") from error


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _one_of(name: str, known: Sequence[Name], option: str) -> Name:
    for choice in known:
        if choice == name:
            return choice
    raise UsageError(f"{option} {name!r} is unknown; expected one of {', '.join(known)}")


def parse_options(
    *,
    context: str,
    output: str,
    chunk_size: str,
    expansion_fraction: str,
    policies: str,
    embedding_dtype: str,
    retriever: str | None,
    **rest: Any,
) -> PerplexityOptions:
    """The options of a command line, lists as text. Raises UsageError."""
    return PerplexityOptions(
        context_tokens=numbers(context, int, "--context"),
        output_tokens=numbers(output, int, "--output"),
        chunk_sizes=numbers(chunk_size, int, "--chunk-size"),
        expansion_fractions=numbers(expansion_fraction, float, "--expansion-fraction"),
        policies=tuple(_one_of(name, SELECTIONS, "--policies") for name in _parts(policies)),
        embedding_dtype=_one_of(embedding_dtype, EMBEDDING_DTYPES, "--embedding-dtype"),
        retriever=retriever or DEFAULT_RETRIEVER,
        **rest,
    )


def save_report(report: Mapping[str, Any], output: Path) -> None:
    """Write the report as JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m refrag_core.evaluation.perplexity", description="Log-perplexity at several compressions."
    )
    parser.add_argument("--checkpoint", help="folder of a trained checkpoint")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines of id and text, or token shards")
    parser.add_argument("--split", help="of token shards: held_out (default), reported, train")
    parser.add_argument("--reference", help="checkpoint whose decoder's full context is the fixed one")
    parser.add_argument(
        "--context", default="512", help="context tokens (s); several, separated by commas, give several tables"
    )
    parser.add_argument("--output", default="256", help="output tokens (o)")
    parser.add_argument("--chunk-size", default="")
    parser.add_argument("--expansion-fraction", default="0,.1,.25")
    parser.add_argument("--policies", default="", help="separated by commas; default: all that need no query")
    parser.add_argument("--windows", "--documents", type=int, default=256)
    parser.add_argument("--query-tokens", type=int)
    parser.add_argument("--shuffled", action="store_true")
    parser.add_argument("--embedding-dtype", choices=EMBEDDING_DTYPES, default="float16")
    parser.add_argument("--retriever")
    parser.add_argument("--allow-untrained", action="store_true")
    parser.add_argument("--batch-rows", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON there as well")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 failed, 2 wrong usage."""
    given = _parser().parse_args(arguments)
    try:
        options = parse_options(
            **{name: value for name, value in vars(given).items() if name not in _NOT_OPTIONS},
        )
        report = evaluate_perplexity(
            load_checkpoint(given.checkpoint),
            given.text,
            options,
            split=given.split,
            reference=load_checkpoint(given.reference) if given.reference else None,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except RefragError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    if given.save is not None:
        save_report(report, given.save)
    print(json.dumps(report, indent=2) if given.json else "\n".join(table_lines(report)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
