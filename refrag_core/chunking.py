"""From text to passages and chunks of decoder tokens.

A document is tokenised once, with the decoder's tokenizer; passages are spans of its tokens and chunks are
`chunk_size` consecutive tokens of a passage, so that an expanded chunk is exactly what the decoder reads.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from refrag_core.digests import JSON, canonical_json
from refrag_core.errors import ConfigError

PIECE_CHARS = 64 << 10
"""Longer texts are tokenised in pieces of at most so many characters, so that memory stays bounded."""

BATCH_CHARS = 4 << 20
"""Characters tokenised in one call."""

MIN_PASSAGE_TOKENS = 8
"""A character is up to 4 byte tokens, so that every passage has room for whole characters."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

# A sentence ends after its last mark and whatever closes with it; CJK marks need no space behind them.
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’»›)\]}]*(?=\s)|[。！？]+["'”’」』）】]*|\n""")


@dataclass(frozen=True, slots=True)
class ChunkingOptions:
    """How documents are cut.

    Args:
        chunk_size: decoder tokens a chunk (k).
        max_passage_tokens: decoder tokens a passage, at most.

    Raises ConfigError for sizes out of range.
    """

    chunk_size: int
    max_passage_tokens: int = 256

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ConfigError(f"chunk_size {self.chunk_size}: expected at least 1. Choose 8, 16 or 32.")
        if self.max_passage_tokens < max(MIN_PASSAGE_TOKENS, self.chunk_size):
            raise ConfigError(
                f"max_passage_tokens {self.max_passage_tokens}: expected at least {MIN_PASSAGE_TOKENS} and one "
                f"chunk of {self.chunk_size}. Choose a larger passage."
            )


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A text's decoder tokens.

    Args:
        ids: int32 `[t]`.
        starts: int64 `[t]`, offset of each token's first character.
        ends: int64 `[t]`, offset past its last character. Tokens that share a character overlap.
    """

    ids: Int32
    starts: Int64
    ends: Int64


@dataclass(frozen=True, slots=True)
class Passage:
    """A span of a document's tokens.

    Args:
        ordinal: from 0 in the document.
        token_start: first token.
        token_end: past the last token.
        char_start: first character.
        char_end: past the last character.
        text: the characters between.
    """

    ordinal: int
    token_start: int
    token_end: int
    char_start: int
    char_end: int
    text: str


def chunk_size_for(importance: float | None, chunk_sizes: Sequence[int], default: int) -> int:
    """Chunk size of a document by its importance in [0, 1]: the higher, the smaller, in bands of equal width.

    Args:
        importance: None gives `default`.
        chunk_sizes: ascending; with three, importance from 2/3 on takes the first, from 1/3 on the second.
    """
    if importance is None:
        return default
    count = len(chunk_sizes)
    band = bisect_right([step / count for step in range(1, count)], importance)
    return chunk_sizes[count - 1 - band]


# --- tokens -----------------------------------------------------------------------------------------


def tokenize_documents(texts: Sequence[str], tokenizer: Tokenizer) -> list[TokenizedText]:
    """The decoder tokens of each text, without special tokens.

    Text that spells a control token ("<|im_end|>") becomes ordinary tokens. Texts over 64 Ki characters are
    tokenised in pieces that end after their last newline or before their last space.
    """
    prepared = _prepared(tokenizer)
    pieces = [_pieces(text) for text in texts]
    flat = [piece for parts in pieces for piece in parts]
    tokenized = iter([tokens for batch in _batches(flat) for tokens in prepared.tokenize(batch)])
    return [_joined([(next(tokenized), len(piece)) for piece in parts]) for parts in pieces]


class _PreparedTokenizer:
    """A copy of a tokenizer that reads control tokens as text, with the byte length of every token.

    Where tokens stand for bytes (byte-level BPE that changes nothing of its input), spans follow from those
    lengths in a few array operations; asking the tokenizer for offsets costs several times as much.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True
        self._lengths = _byte_lengths(self._tokenizer)

    def tokenize(self, texts: list[str]) -> list[TokenizedText]:
        if self._lengths is None:
            encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            return [_with_offsets(encoding) for encoding in encoded]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [self._by_bytes(text, encoding) for text, encoding in zip(texts, encoded, strict=True)]

    def _by_bytes(self, text: str, encoding: Encoding) -> TokenizedText:
        assert self._lengths is not None
        ids = np.array(encoding.ids, dtype=np.int32)
        data = np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8)
        byte_ends = np.cumsum(self._lengths[ids])
        if len(ids) and byte_ends[-1] != len(data):  # an added token that swallows spaces, say
            return _with_offsets(self._tokenizer.encode(text, add_special_tokens=False))
        return TokenizedText(ids, *_char_spans(byte_ends, data, is_ascii=text.isascii()))


@lru_cache(maxsize=4)
def _prepared(tokenizer: Tokenizer) -> _PreparedTokenizer:
    return _PreparedTokenizer(tokenizer)


def _byte_lengths(tokenizer: Tokenizer) -> Int64 | None:
    """Bytes of text that each id stands for, `[vocabulary]`; None where tokens do not stand for bytes."""
    content = json.loads(tokenizer.to_str())
    if content["normalizer"] is not None or content["model"]["type"] != "BPE" or not _is_byte_level(content):
        return None
    added = {token["id"]: token["content"] for token in content["added_tokens"]}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=np.int64)
    for token, number in vocabulary.items():  # byte-level spelling has one character a byte
        lengths[number] = len(added[number].encode()) if number in added else len(token)
    return lengths


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Whether the pre-tokenizers end in ByteLevel and none of them adds or drops anything."""
    steps = content["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    keeps = all(
        step.get("type") in ("Digits", "ByteLevel", "Split")
        and not step.get("add_prefix_space", False)
        and step.get("behavior") != "Removed"
        for step in steps
    )
    return keeps and steps[-1].get("type") == "ByteLevel" and not content["model"].get("byte_fallback")


def _char_spans(byte_ends: Int64, data: npt.NDArray[np.uint8], *, is_ascii: bool) -> tuple[Int64, Int64]:
    byte_starts = np.concatenate([np.zeros(1, dtype=np.int64), byte_ends[:-1]])[: len(byte_ends)]
    if is_ascii or not len(byte_ends):
        return byte_starts, byte_ends
    begins = (data & 0xC0) != 0x80  # all but continuation bytes begin a character
    char_of_byte = np.cumsum(begins, dtype=np.int64) - 1
    return char_of_byte[byte_starts], char_of_byte[byte_ends - 1] + 1


def _with_offsets(encoding: Encoding) -> TokenizedText:
    count = len(encoding.ids)
    spans = np.fromiter(chain.from_iterable(encoding.offsets), dtype=np.int64, count=2 * count).reshape(-1, 2)
    return TokenizedText(np.array(encoding.ids, dtype=np.int32), spans[:, 0].copy(), spans[:, 1].copy())


def _pieces(text: str) -> list[str]:
    pieces = []
    start = 0
    while len(text) - start > PIECE_CHARS:
        stop = _piece_end(text, start, start + PIECE_CHARS)
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def _piece_end(text: str, start: int, limit: int) -> int:
    """After the last newline, else before the last space (tokens begin with theirs), else at the limit."""
    half = start + PIECE_CHARS // 2
    newline = text.rfind("\n", half, limit)
    if newline >= 0:
        return newline + 1
    space = text.rfind(" ", half, limit)
    return space if space >= 0 else limit


def _batches(pieces: Sequence[str]) -> Iterable[list[str]]:
    batch: list[str] = []
    held = 0
    for piece in pieces:
        if batch and held + len(piece) > BATCH_CHARS:
            yield batch
            batch, held = [], 0
        batch.append(piece)
        held += len(piece)
    if batch:
        yield batch


def _joined(parts: Sequence[tuple[TokenizedText, int]]) -> TokenizedText:
    """The tokens of consecutive pieces, given with their lengths in characters."""
    if len(parts) == 1:
        return parts[0][0]
    shifts = np.cumsum([0, *(length for _, length in parts[:-1])])
    return TokenizedText(
        np.concatenate([tokens.ids for tokens, _ in parts]),
        np.concatenate([tokens.starts + shift for (tokens, _), shift in zip(parts, shifts, strict=True)]),
        np.concatenate([tokens.ends + shift for (tokens, _), shift in zip(parts, shifts, strict=True)]),
    )


# --- passages ---------------------------------------------------------------------------------------


def cut_passages(text: str, tokens: TokenizedText, options: ChunkingOptions) -> list[Passage]:
    """Spans of at most `max_passage_tokens` tokens that cover the document in order.

    A passage ends at the last sentence end in its final quarter, else at the last space there, else at the
    last whole character. Spans that hold nothing but whitespace are left out: there is nothing to find in
    them and nothing to say.
    """
    passages: list[Passage] = []
    whole = _whole_characters(tokens)
    start, count = 0, len(tokens.ids)
    while start < count:
        stop = count if count - start <= options.max_passage_tokens else _cut(text, tokens, whole, start, options)
        first, last = int(tokens.starts[start]), int(tokens.ends[start:stop].max())
        if not (span := text[first:last]).isspace() and span:
            passages.append(Passage(len(passages), start, stop, first, last, span))
        start = stop
    return passages


def _whole_characters(tokens: TokenizedText) -> npt.NDArray[np.bool_]:
    """bool `[t]`: whether the text can be cut before each token without splitting a character."""
    reached = np.maximum.accumulate(tokens.ends)
    return np.concatenate([np.ones(1, dtype=bool), tokens.starts[1:] >= reached[:-1]])[: len(tokens.ids)]


def _cut(text: str, tokens: TokenizedText, whole: npt.NDArray[np.bool_], start: int, options: ChunkingOptions) -> int:
    """The token that begins the next passage, in `(start, start + max_passage_tokens]`."""
    limit = start + options.max_passage_tokens
    lowest = limit - options.max_passage_tokens // 4
    cuts = lowest + np.flatnonzero(whole[lowest : limit + 1])
    sentence = _sentence_cut(text, tokens, cuts)
    if sentence is not None:
        return sentence
    for cut in cuts[::-1]:
        if _is_at_space(text, int(tokens.starts[cut])):
            return int(cut)
    return _last_whole(whole, start, limit)


def _sentence_cut(text: str, tokens: TokenizedText, cuts: Int64) -> int | None:
    """The last of `cuts` before which a sentence ends, whitespace between aside."""
    if not len(cuts):
        return None
    begins = tokens.starts[cuts]
    # One character back, so that a mark right before the first cut is seen; one on for the space behind.
    first, last = max(0, int(begins[0]) - 1), int(begins[-1]) + 1
    ends = [match.end() for match in _SENTENCE_END.finditer(text, first, last)]
    for end in reversed(ends):
        place = int(np.searchsorted(begins, end))
        if place < len(cuts) and not text[end : int(begins[place])].strip():
            return int(cuts[place])
    return None


def _is_at_space(text: str, char: int) -> bool:
    return text[char : char + 1].isspace() or text[char - 1 : char].isspace()


def _last_whole(whole: npt.NDArray[np.bool_], start: int, limit: int) -> int:
    """The last whole character, or `limit` where one character has more tokens than a passage may."""
    cuts = np.flatnonzero(whole[start + 1 : limit + 1])
    return start + 1 + int(cuts[-1]) if len(cuts) else limit


# --- chunks and ids ---------------------------------------------------------------------------------


def num_chunks(num_tokens: int, chunk_size: int) -> int:
    """Chunks of a passage: all full but the last."""
    return -(-num_tokens // chunk_size)


def chunk_rows(ids: Int32, chunk_size: int) -> tuple[Int32, npt.NDArray[np.int16]]:
    """`(tokens int32 [n, chunk_size] padded with zeros, num_tokens int16 [n])` of one passage's tokens `[t]`."""
    count = num_chunks(len(ids), chunk_size)
    tokens = np.zeros(count * chunk_size, dtype=np.int32)
    tokens[: len(ids)] = ids
    lengths = np.full(count, chunk_size, dtype=np.int16)
    if count:
        lengths[-1] = len(ids) - (count - 1) * chunk_size
    return tokens.reshape(count, chunk_size), lengths


def passage_id(document_id: str, text: str, occurrence: int) -> bytes:
    """16 bytes from content: equal for an unchanged passage however its document changes around it.

    Args:
        occurrence: number, from 0, among the passages of the document with this very text.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for part in (document_id.encode("utf-8"), text.encode("utf-8"), occurrence.to_bytes(8, "little")):
        hasher.update(_prefixed(part))
    return hasher.digest()


def content_digest(
    *,
    document_id: str,
    metadata: JSON,
    chunk_size: int,
    passages: Iterable[tuple[bytes, int, int, Int32]],
) -> bytes:
    """SHA-256 (32 bytes) of all that a document puts into an index, every part preceded by its length.

    Args:
        passages: `(passage id, char start, char end, token ids int32 [t])` in order.
    """
    hasher = hashlib.sha256()
    hasher.update(_prefixed(document_id.encode("utf-8")))
    hasher.update(_prefixed(canonical_json(metadata)))
    hasher.update(chunk_size.to_bytes(8, "little"))
    for identity, char_start, char_end, ids in passages:
        hasher.update(_prefixed(identity))
        hasher.update(char_start.to_bytes(8, "little") + char_end.to_bytes(8, "little"))
        hasher.update(_prefixed(np.ascontiguousarray(ids, dtype="<i4").tobytes()))
    return hasher.digest()


def _prefixed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part
