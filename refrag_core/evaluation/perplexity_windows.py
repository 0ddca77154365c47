"""Windows of held-out text for `refrag eval perplexity`: a context, and the output that follows it.

Notation: n windows, s context tokens, o output tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from refrag_core.errors import ConfigError, UsageError
from refrag_core.training.token_shards import (
    SPLITS,
    Split,
    TextDocument,
    TokenShards,
    TokenSplit,
    fixed_windows,
    read_text_documents,
)

Ids = npt.NDArray[np.int64]

SHUFFLED_PASSAGES = 4
"""Passages of a shuffled context."""

_BATCH_DOCUMENTS = 64


@dataclass(frozen=True, slots=True)
class EvaluationWindows:
    """What every condition of one table predicts, and from what."""

    context: Ids
    """int64 `[n, s]`."""
    output: Ids
    """int64 `[n, o]`, which follows the context in its document, or follows one of its passages."""
    wrong: Ids
    """int64 `[n, s]`: a context in which nothing is of the output's document."""
    documents: Ids
    """int64 `[n]`."""
    passages: int = 1
    """Passages of a context, all equally long."""

    def __len__(self) -> int:
        return len(self.output)


def read_tokens(
    text: Path, *, split: str | None, tokenizer: Tokenizer, tokenizer_fingerprint: str, length: int, limit: int
) -> TokenSplit:
    """The documents in `text`: JSON lines of `{"id", "text"}`, or a folder of token shards.

    Args:
        split: of the shards, `held_out` by default; for a folder alone.
        length, limit: of a JSON Lines file no more is read than its first `limit` documents of `length` tokens.

    Raises UsageError, CorpusError, and FingerprintMismatchError for shards of another tokenizer.
    """
    if text.is_dir():
        shards = TokenShards.open(text, tokenizer_fingerprint=tokenizer_fingerprint)
        return shards.split(_split_name(split or "held_out"))
    if split is not None:
        raise UsageError(f"{text} is a file and has no split {split!r}; expected --split with token shards alone")
    return _tokenised(text, tokenizer, length=length, limit=limit)


def _split_name(name: str) -> Split:
    for known in SPLITS:
        if name == known:
            return known
    raise UsageError(f"token shards have no split {name!r}; expected one of {', '.join(SPLITS)}")


def _tokenised(path: Path, tokenizer: Tokenizer, *, length: int, limit: int) -> TokenSplit:
    documents: list[Ids] = []
    batch: list[TextDocument] = []
    enough = 0

    def encode() -> int:
        encodings = tokenizer.encode_batch([document.text for document in batch], add_special_tokens=False)
        found = [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]
        documents.extend(found)
        batch.clear()
        return sum(len(ids) >= length for ids in found)

    for document in read_text_documents(path):
        batch.append(document)
        if len(batch) == _BATCH_DOCUMENTS:
            enough += encode()
        if enough >= limit:
            break
    encode()
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in documents])]).astype(np.int64)
    tokens = np.concatenate([*documents, np.empty(0, dtype=np.int64)])
    return TokenSplit(tokens, offsets, np.zeros(len(documents), dtype=np.int16))


def cut_windows(
    split: TokenSplit, *, context_tokens: int, output_tokens: int, longest_context: int, longest_output: int, limit: int
) -> EvaluationWindows:
    """Up to `limit` windows: one of each long enough document, then a second of each, and so on.

    All tables of one run predict from the same places: a window is cut for the longest context and output, and a
    shorter context is its end, a shorter output its beginning. Raises ConfigError where fewer than two documents
    are long enough.
    """
    windows, documents = fixed_windows(split, length=longest_context + longest_output, limit=limit)
    context = windows[:, longest_context - context_tokens : longest_context]
    output = windows[:, longest_context : longest_context + output_tokens]
    return EvaluationWindows(context, output, context[other_documents(documents)], documents)


def other_documents(documents: Ids) -> Ids:
    """For each window the number of the nearest one before it, cyclically, that is of another document."""
    if len(np.unique(documents)) < 2:
        raise ConfigError(
            "all windows are of one document; expected two or more, since the wrong context is another document's: "
            "give more text, or ask for shorter windows"
        )
    found = np.arange(len(documents)) - 1
    while (same := documents[found] == documents).any():
        found = np.where(same, found - 1, found)
    return found % len(documents)


def shuffle_passages(windows: EvaluationWindows, *, seed: int) -> EvaluationWindows:
    """Contexts of four passages of different documents, of which one, at a random place, precedes the output.

    The passage is the end of the window's own context; the others are ends of other documents' contexts. The wrong
    context has yet another document's passage in its place. Raises ConfigError for fewer than five documents.
    """
    own, index = np.unique(windows.documents, return_inverse=True)
    if len(own) <= SHUFFLED_PASSAGES:
        raise ConfigError(
            f"{len(own)} documents are long enough; expected more than {SHUFFLED_PASSAGES} to make contexts of "
            f"{SHUFFLED_PASSAGES} passages of different documents: give more text, or ask for shorter windows"
        )
    size = windows.context.shape[1] // SHUFFLED_PASSAGES
    ends = windows.context[:, -size:]
    _, first_of = np.unique(windows.documents, return_index=True)
    random = np.random.default_rng([seed, SHUFFLED_PASSAGES])
    places = random.integers(0, SHUFFLED_PASSAGES, len(windows))
    context, wrong = [], []
    for row, place in enumerate(places):
        others = random.permutation(np.delete(first_of, index[row]))[:SHUFFLED_PASSAGES]
        passages = list(ends[others[1:]])
        context.append(np.concatenate([*passages[:place], ends[row], *passages[place:]]))
        wrong.append(np.concatenate([*passages[:place], ends[others[0]], *passages[place:]]))
    return EvaluationWindows(
        np.stack(context), windows.output, np.stack(wrong), windows.documents, passages=SHUFFLED_PASSAGES
    )
