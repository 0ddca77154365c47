"""Token shards: a corpus tokenised once for training, split by document, mapped into memory.

    token_shards.json     format, tokenizer fingerprint, corpora, counts and digests; written last
    SPLIT.tokens.npy      uint16 (vocabulary ≤ 65,536) or int32 `[t]`, the split's documents one after another
    SPLIT.offsets.npy     int64 `[n + 1]`, where each document starts, and the end
    SPLIT.corpora.npy     int16 `[n]`, each document's corpus, an index into the JSON's "corpora"

Splits are `train`, `held_out` (a fixed share of the documents, by hash) and `reported` (corpora that are
never trained on). A document that shares most of its token 13-grams with documents before it is left out
before the split, so that no near-duplicate of a training document is held out.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from refrag_core.digests import digest_bytes, digest_file, digest_json
from refrag_core.errors import ConfigError, CorpusError, FingerprintMismatchError
from refrag_core.models import fingerprint_tokenizer, load_tokenizer

FORMAT = "refrag-token-shards"
FORMAT_VERSION = 1
INDEX_FILE = "token_shards.json"

Split = Literal["train", "held_out", "reported"]
SPLITS: tuple[Split, ...] = get_args(Split)

TokenIds = npt.NDArray[np.integer[Any]]
Hashes = npt.NDArray[np.uint64]

_BATCH_DOCUMENTS = 64
_UNFINISHED = ".tmp"
_MULTIPLIER = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class TextDocument:
    """One document of a corpus."""

    corpus: str
    document_id: str
    text: str


@dataclass(frozen=True, slots=True)
class PrepareOptions:
    """How documents become token shards."""

    held_out_fraction: float = 0.04
    """Share of the documents that goes to `held_out`."""
    reported: tuple[str, ...] = ()
    """Corpora that go to `reported` whole."""
    train_only: tuple[str, ...] = ()
    """Corpora that nothing is held out from."""
    shingle_tokens: int = 13
    """n of the n-grams that near-duplicates are found by."""
    sample_every: int = 8
    """One n-gram in so many is remembered, chosen by its hash."""
    max_overlap: float = 0.5
    """A document with a larger share of known n-grams is a near-duplicate."""


def read_text_documents(path: Path) -> Iterator[TextDocument]:
    """Documents of a JSONL file with fields `id` and `text`; the file's stem names the corpus.

    Raises CorpusError for a missing file or a line of another form.
    """
    if not path.is_file():
        raise CorpusError(f"no corpus at {path}; expected JSON lines with id and text")
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                record = json.loads(line)
                yield TextDocument(path.stem, str(record["id"]), str(record["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise CorpusError(f"{path} line {number} is no object with id and text ({error}); fix it") from error


def shingle_hashes(token_ids: TokenIds, *, shingle_tokens: int, sample_every: int) -> Hashes:
    """Distinct sampled hashes uint64 of a document's n-grams; the same n-gram is sampled in every document.

    A document shorter than one n-gram is hashed whole.
    """
    ids = token_ids.astype(np.uint64) + np.uint64(1)
    width = min(shingle_tokens, len(ids))
    hashes = np.zeros(len(ids) - width + 1, dtype=np.uint64)
    for offset in range(width):
        hashes = hashes * np.uint64(_MULTIPLIER) + ids[offset : len(ids) - width + offset + 1]
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    hashes ^= hashes >> np.uint64(32)
    sampled: Hashes = np.unique(hashes[hashes % np.uint64(sample_every) == 0])
    return sampled


class NearDuplicates:
    """Remembers the sampled n-grams of the documents kept so far."""

    def __init__(self, options: PrepareOptions) -> None:
        self._options = options
        self._seen: set[int] = set()

    def admit(self, token_ids: TokenIds) -> bool:
        """True, and remembered, unless most of the document's sampled n-grams are known already."""
        hashes = shingle_hashes(
            token_ids, shingle_tokens=self._options.shingle_tokens, sample_every=self._options.sample_every
        ).tolist()
        known = sum(value in self._seen for value in hashes)
        if hashes and known > self._options.max_overlap * len(hashes):
            return False
        self._seen.update(hashes)
        return True


def split_of(document: TextDocument, options: PrepareOptions) -> Split:
    """The split of a document: by its corpus, else by the hash of corpus and id."""
    if document.corpus in options.reported:
        return "reported"
    if document.corpus in options.train_only:
        return "train"
    digest = digest_bytes(f"{document.corpus}\0{document.document_id}".encode())
    return "held_out" if int(digest[:12], 16) < options.held_out_fraction * 16**12 else "train"


@dataclass(slots=True)
class _Growing:
    """A split while it is written."""

    tokens: list[TokenIds] = field(default_factory=list)
    corpora: list[int] = field(default_factory=list)


def prepare_token_shards(
    documents: Iterable[TextDocument], decoder: Path, output: Path, options: PrepareOptions | None = None
) -> dict[str, Any]:
    """Tokenise `documents` with the tokenizer in folder `decoder` into `output`, and return what was written.

    Equal documents in equal order give equal bytes. Raises CorpusError when no document is left.
    """
    options = options or PrepareOptions()
    tokenizer = load_tokenizer(decoder)
    dtype: type[np.integer[Any]] = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.int32
    splits: dict[Split, _Growing] = {name: _Growing() for name in SPLITS}
    counts: dict[str, dict[str, int]] = {}
    near = NearDuplicates(options)
    for batch in _batches(documents):
        encoded = tokenizer.encode_batch([document.text for document in batch], add_special_tokens=False)
        for document, encoding in zip(batch, encoded, strict=True):
            ids: TokenIds = np.asarray(encoding.ids, dtype=dtype)
            count = counts.setdefault(document.corpus, {"documents": 0, "tokens": 0, "near_duplicates": 0})
            if len(ids) == 0 or not near.admit(ids):
                count["near_duplicates"] += 1
                continue
            count["documents"] += 1
            count["tokens"] += len(ids)
            split = splits[split_of(document, options)]
            split.tokens.append(ids)
            split.corpora.append(list(counts).index(document.corpus))
    if not splits["train"].tokens:
        raise CorpusError("no document is left to train on; expected at least one: check the corpora's files")
    return _write(output, splits, counts, fingerprint_tokenizer(decoder), tokenizer.get_vocab_size(), dtype)


def _batches(documents: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    batch: list[TextDocument] = []
    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _write(
    output: Path,
    splits: dict[Split, _Growing],
    counts: dict[str, dict[str, int]],
    tokenizer_fingerprint: str,
    vocabulary: int,
    dtype: type[np.generic],
) -> dict[str, Any]:
    output.mkdir(parents=True, exist_ok=True)
    for left in output.glob(f"*{_UNFINISHED}"):
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(suffix=_UNFINISHED, dir=output) as folder:
        temporary = Path(folder)
        index = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "vocabulary": vocabulary,
            "corpora": [{"name": name, **count} for name, count in counts.items()],
            "splits": {name: _write_split(temporary, name, split, dtype) for name, split in splits.items()},
        }
        (temporary / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _publish(temporary, output)
    return index


def _write_split(folder: Path, name: Split, split: _Growing, dtype: type[np.generic]) -> dict[str, Any]:
    lengths = [len(ids) for ids in split.tokens]
    np.save(folder / f"{name}.tokens.npy", np.concatenate([*split.tokens, np.empty(0, dtype)]).astype(dtype))
    np.save(folder / f"{name}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / f"{name}.corpora.npy", np.asarray(split.corpora, dtype=np.int16))
    digest = digest_file(folder / f"{name}.tokens.npy")
    return {"documents": len(lengths), "tokens": sum(lengths), "digest": digest}


def _publish(temporary: Path, output: Path) -> None:
    """Move the files, the index last: shards that a kill left between the old and the new have none."""
    (output / INDEX_FILE).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == INDEX_FILE):
        path.replace(output / path.name)


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """One split, mapped into memory."""

    tokens: TokenIds
    """`[t]`."""
    offsets: npt.NDArray[np.int64]
    """`[n + 1]`."""
    corpora: npt.NDArray[np.int16]
    """`[n]`."""

    def document(self, number: int) -> TokenIds:
        """Tokens of one document, a view of the map."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]


@dataclass(frozen=True, slots=True)
class TokenShards:
    """Prepared token data."""

    folder: Path
    index: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hash of all tokens and of the tokenizer that made them."""
        return digest_json(self.index)

    @property
    def corpora(self) -> list[str]:
        """Names of the corpora, by index."""
        return [str(corpus["name"]) for corpus in self.index["corpora"]]

    @classmethod
    def open(cls, folder: Path, *, tokenizer_fingerprint: str | None = None) -> "TokenShards":
        """The shards in `folder`.

        Raises CorpusError when there are none, ConfigError for another format, and FingerprintMismatchError
        when they were made with another tokenizer than `tokenizer_fingerprint`.
        """
        path = folder / INDEX_FILE
        if not path.is_file():
            raise CorpusError(
                f"no token shards in {folder}: {INDEX_FILE} is missing; expected what `refrag train prepare CORPUS "
                f"-o {folder}` writes: run that first"
            )
        index = _read_index(path)
        if tokenizer_fingerprint is not None and index["tokenizer_fingerprint"] != tokenizer_fingerprint:
            raise FingerprintMismatchError(
                f"token shards in {folder} were made with tokenizer {index['tokenizer_fingerprint'][:12]} and the "
                f"decoder has {tokenizer_fingerprint[:12]}; expected the same: prepare them with `refrag train prepare "
                f"--decoder` and this decoder"
            )
        return cls(folder, index)

    def split(self, name: Split) -> TokenSplit:
        """A split's arrays, tokens mapped into memory. Raises CorpusError when a file is missing or cut short."""
        try:
            return TokenSplit(
                np.load(self.folder / f"{name}.tokens.npy", mmap_mode="r"),
                np.load(self.folder / f"{name}.offsets.npy"),
                np.load(self.folder / f"{name}.corpora.npy"),
            )
        except (OSError, ValueError) as error:
            raise CorpusError(f"split {name} of {self.folder} cannot be read ({error}); prepare it again") from error


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"{path} is not JSON ({error}); expected token shards: prepare them again") from error
    if not isinstance(index, dict) or (index.get("format"), index.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise ConfigError(
            f"{path} is no {FORMAT} of version {FORMAT_VERSION}; expected one that this refrag wrote: prepare the "
            f"shards again"
        )
    return index


class Windows:
    """Windows of `length` tokens within documents, in an order that depends on the seed alone.

    An epoch cuts every document into windows that do not overlap, from an offset of its own, and shuffles
    them all. Documents shorter than a window are left out (`usable_tokens` says what is left). The position
    is one number, how many windows were taken, so that any point can be returned to.
    """

    def __init__(self, split: TokenSplit, *, length: int, seed: int) -> None:
        self._split = split
        self._length = length
        self._seed = seed
        sizes = np.diff(split.offsets)
        self._documents = np.flatnonzero(sizes >= length)
        self._sizes = sizes[self._documents]
        self.usable_tokens = int(self._sizes.sum())
        self._epochs: dict[int, npt.NDArray[np.int64]] = {}
        self._bounds = [0]
        if len(self._documents) == 0:
            raise ConfigError(f"no document has {length} tokens; expected some: take a smaller context and output")

    def _epoch(self, number: int) -> npt.NDArray[np.int64]:
        """Starts of all windows of an epoch, in order; the last two epochs are kept."""
        if number not in self._epochs:
            random = np.random.default_rng([self._seed, number])
            slack = np.minimum(self._sizes - self._length, self._length - 1)
            shifts = random.integers(0, slack + 1)
            counts = (self._sizes - shifts) // self._length
            firsts = self._split.offsets[self._documents] + shifts
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            self._epochs = {key: value for key, value in self._epochs.items() if key == number - 1}
            self._epochs[number] = random.permutation(np.repeat(firsts, counts) + within * self._length)
        return self._epochs[number]

    def epoch_of(self, position: int) -> int:
        """The epoch that window number `position` is in."""
        while self._bounds[-1] <= position:
            self._bounds.append(self._bounds[-1] + len(self._epoch(len(self._bounds) - 1)))
        return int(np.searchsorted(self._bounds, position, side="right")) - 1

    def starts(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """Where windows number `position` to `position + count` start in the split's tokens, int64 `[count]`."""
        found = []
        for number in range(position, position + count):
            epoch = self.epoch_of(number)
            found.append(self._epoch(epoch)[number - self._bounds[epoch]])
        return np.asarray(found, dtype=np.int64)

    def take(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """Windows number `position` to `position + count`, int64 `[count, length]`."""
        index = self.starts(position, count)[:, None] + np.arange(self._length)
        tokens: npt.NDArray[np.int64] = self._split.tokens[index].astype(np.int64)
        return tokens

    def documents(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """The documents that those windows are of, int64 `[count]`."""
        after = np.searchsorted(self._split.offsets, self.starts(position, count), side="right")
        return np.asarray(after - 1, dtype=np.int64)


def fixed_windows(split: TokenSplit, *, length: int, limit: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Up to `limit` windows for evaluation, always the same: round after round, one of each long enough document.

    Returns int64 `[n, length]` and the document of each, int64 `[n]`.
    """
    sizes = np.diff(split.offsets)
    chosen: list[tuple[int, int]] = []
    for round_number in range(int(sizes.max(initial=0)) // length):
        documents = np.flatnonzero(sizes >= (round_number + 1) * length)
        chosen += [(int(document), round_number) for document in documents[: limit - len(chosen)]]
        if len(chosen) == limit:
            break
    if not chosen:
        raise ConfigError(f"no document has {length} tokens; expected some: take a smaller context and output")
    starts = np.asarray([split.offsets[document] + number * length for document, number in chosen])
    windows = split.tokens[starts[:, None] + np.arange(length)].astype(np.int64)
    return windows, np.asarray([document for document, _ in chosen], dtype=np.int64)
