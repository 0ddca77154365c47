"""The retriever: text in, one unit vector a text out, as a MiniLM-type sentence encoder was trained to.

Unlike the chunk encoder it reads text through its own tokenizer, special tokens included. Mean pooling over
the tokens and L2 normalisation, as sentence-transformers does for these models (Reimers & Gurevych,
Sentence-BERT, arXiv:1908.10084). Notation: n texts, t tokens of a padded batch, d_ret width.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from refrag_core.batching import SafeBatchSize, Span, cache_dir, equal_runs, map_spans
from refrag_core.captured import CapturedCalls, filled_rows
from refrag_core.devices import device_turn, upload
from refrag_core.digests import digest_json
from refrag_core.encoder import load_body
from refrag_core.errors import ConfigError
from refrag_core.models import fingerprint_model, load_tokenizer
from refrag_core.packed_body import PackedBody, is_packable
from refrag_core.parts import part

MAX_POSITIONS = 512
"""Tokens of a text that are read, special tokens included, where the body has as many positions."""

PAD_MULTIPLE = 32
CPU_BATCH_TOKENS = 2_048
CUDA_BATCH_TOKENS = 262_144
CAPTURED_BATCH_TOKENS = 32_768
"""Padded tokens of a captured batch: enough to fill a large GPU, and few enough to bound what a graph holds."""

CPU_MIN_TOKENS = 64
"""Fewer tokens in a CPU batch than this and matrix kernels for thin inputs round differently."""

_RECIPE = "mean-l2-1"
_EMBEDDED_AT_ONCE = 4_096
_TOKENIZED_AT_ONCE = 256  # an Encoding takes some hundred bytes a token; its ids, which are kept, take four
_FEW_TEXTS = 4
_FEW_TOKENS = 512
_COARSE_MULTIPLE = 64
_SMALLEST_BATCH_TOKENS = 4_096  # what a large GPU embeds in the time that launching a batch takes
_MODULES = ("Transformer", "Pooling", "Normalize")
_POSITIONS_AFTER_PADDING = ("roberta", "xlm-roberta", "mpnet")


class Retriever:
    """Embeds passages and queries with one body. Build it with `load_retriever`.

    On a CPU (float32) each text is padded to the next multiple of 32 of its own length and batched with texts of
    that padded length alone: its embedding has the same bits in any batch, order or company. On CUDA (float16)
    batches have few shapes, which texts of several lengths share, and it is within rounding of that.

    Args:
        body: BERT-like Hugging Face encoder without pooler; moved to `device`.
        tokenizer: adds the special tokens that the body was trained with; neither pads nor truncates.
        max_length: tokens of a text that are read, special tokens included.
        pad_id: the body's padding token.
        fingerprint: see `retriever_fingerprint`.
        batch_tokens: padded tokens of a first batch; None takes the device's default.
        on_device: let texts travel once, packed, pad and pool them on the device; BERT and RoBERTa bodies run as
            `PackedBody`, by captured calls of few shapes, and in float16 on CUDA. None does on CUDA alone.
        remember: keep the batch sizes that fitted for the next process, in refrag's cache folder.
    """

    def __init__(
        self,
        body: Any,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        pad_id: int,
        fingerprint: str,
        device: str = "cpu",
        batch_tokens: int | None = None,
        on_device: bool | None = None,
        remember: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.fingerprint = fingerprint
        self.max_length = max_length
        self._on_cuda = self.device.type == "cuda"
        self._on_device = self._on_cuda if on_device is None else on_device
        dtype = torch.float16 if self._on_cuda and self._on_device else torch.float32
        self._body = body.to(self.device, dtype).eval().requires_grad_(False)
        self._packed = PackedBody(self._body, form="plain") if self._on_device and is_packable(body) else None
        self._calls = CapturedCalls(self._embed_gathered, self.device)
        self.dim = int(self._body.config.hidden_size)
        self._tokenizer = tokenizer
        self._tokenizer.enable_truncation(max_length)
        self._pad_id = pad_id
        self._batch_tokens = batch_tokens or self._default_batch_tokens()
        self._memory = cache_dir() / "batch_sizes.json" if remember else None

    def _default_batch_tokens(self) -> int:
        if self._packed is not None:
            return CAPTURED_BATCH_TOKENS
        return CUDA_BATCH_TOKENS if self._on_cuda else CPU_BATCH_TOKENS

    def embed(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        """Passage embeddings float16 `[n, d_ret]`, unit length, and bool `[n]`: which texts were truncated."""
        vectors, truncated = self._embed(texts)
        return vectors.astype(np.float16), truncated

    def embed_queries(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Query embeddings float32 `[n, d_ret]`, unit length. A query beyond `max_length` loses its end."""
        return self._embed(texts)[0]

    def _embed(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        truncated = np.zeros(len(texts), dtype=np.bool_)
        for start in range(0, len(texts), _EMBEDDED_AT_ONCE):
            rows = slice(start, start + _EMBEDDED_AT_ONCE)
            with part("tokenize"):
                ids, truncated[rows] = self._tokenize(texts[rows])
            vectors[rows] = self.embed_ids(ids)
        return vectors, truncated

    def embed_ids(self, ids: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float32]:
        """Float32 `[n, d_ret]`, unit length, of texts given as the retriever's own token ids, special ones included."""
        with device_turn(self.device), part("model"):
            if self._on_device and ids:
                return self._embed_one(ids[0]) if len(ids) == 1 else self._embed_on_device(ids)
            vectors = np.empty((len(ids), self.dim), dtype=np.float32)
            self._embed_ids(ids, vectors)
            return vectors

    def _tokenize(self, texts: Sequence[str]) -> tuple[list[npt.NDArray[np.int32]], list[bool]]:
        """Token ids of each text, special tokens included, and which texts were truncated."""
        ids, truncated = [], []
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            encodings = self._tokenizer.encode_batch_fast(list(texts[start : start + _TOKENIZED_AT_ONCE]))
            ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
            truncated += [bool(encoding.overflowing) for encoding in encodings]
        return ids, truncated

    def _embed_ids(self, ids: Sequence[npt.NDArray[np.int32]], vectors: npt.NDArray[np.float32]) -> None:
        """Fill `vectors` `[n, d_ret]`; texts of one padded length share batches, the longest first."""
        padded = self._padded_lengths(_lengths(ids))
        order = np.argsort(-padded, kind="stable")

        def run(start: int, stop: int) -> npt.NDArray[np.float32]:
            rows = [ids[i] for i in order[start:stop]]
            return self._forward(*self._padded(rows, int(padded[order[start]])))

        for start, stop, made in map_spans(self.device.type, run, self._spans(padded[order])):
            vectors[order[start:stop]] = made

    @torch.inference_mode()
    def _embed_one(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Float32 `[1, d_ret]` of a single text, most often a question: padded here, it takes two copies and a call."""
        lengths = _lengths([ids])
        tokens = np.full((1, int(self._padded_lengths(lengths)[0])), self._pad_id, dtype=np.int32)
        tokens[0, : len(ids)] = ids
        vectors: npt.NDArray[np.float32] = (
            self._embed_batch(torch.from_numpy(tokens), torch.from_numpy(lengths)).cpu().numpy()
        )
        return vectors

    @torch.inference_mode()
    def _embed_on_device(self, ids: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float32]:
        """All texts travel as one run of tokens; each batch is gathered, padded and pooled where it is embedded."""
        lengths = _lengths(ids)
        padded, few = self._device_lengths(lengths)
        order = np.argsort(-padded, kind="stable")
        padded, tokens = padded[order], upload(np.concatenate(ids), self.device)
        starts, counts = (upload(each[order], self.device) for each in (np.cumsum(lengths) - lengths, lengths))
        made = torch.empty((len(ids), self.dim), dtype=torch.float32, device=self.device)
        exactly = few or self._packed is None
        spans = list(self._spans(padded) if exactly else self._filled_spans(padded))
        firsts = [start for start, _, _ in spans]

        def run(start: int, stop: int) -> Tensor:
            first, _, size = spans[bisect_right(firsts, start) - 1]
            width, rows = int(padded[first]), stop - start
            filled = rows if exactly else _filled(rows, width, size.rows)
            return self._batch(tokens, starts[start:stop], counts[start:stop], width, filled)[:rows]

        for start, stop, embedded in map_spans(self.device.type, run, spans):
            made[start:stop] = embedded
        vectors = np.empty(made.shape, dtype=np.float32)
        vectors[order] = made.cpu().numpy()
        return vectors

    def _device_lengths(self, lengths: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], bool]:
        """Padded lengths `[n]` for the device, and whether these are so few that batches are just of their size.

        A question's time counts, and questions have few shapes; of the passages of many documents nearly every shape
        would come up once, where a replayed graph of a larger shape takes less than launching the right one.
        """
        padded = self._padded_lengths(lengths)
        if len(lengths) <= _FEW_TEXTS and padded.sum() <= _FEW_TOKENS:
            return padded, True
        coarse = np.minimum(-(-padded // _COARSE_MULTIPLE) * _COARSE_MULTIPLE, self.max_length)
        return np.where(padded <= PAD_MULTIPLE, padded, coarse), False

    def _filled_spans(self, padded: npt.NDArray[np.int64]) -> Iterator[Span]:
        """Runs of `padded` `[n]`, the longest first, whose last batch is filled up with texts that are shorter."""
        start = 0
        while start < len(padded):
            width = int(padded[start])
            size = self._batch_size(width, filled=True)
            rows = int((padded[start:] == width).sum())
            rest = rows % size.rows
            stop = min(len(padded), start + rows - rest + (_filled(rest, width, size.rows) if rest else 0))
            yield start, stop, size
            start = stop

    def _batch(self, tokens: Tensor, starts: Tensor, counts: Tensor, width: int, rows: int) -> Tensor:
        """Float32 `[rows, d_ret]` of the texts at `starts` in `tokens`, `counts` long, and of what fills them up.

        That has one token each: attention and the mean over none would be NaN.
        """
        missing = rows - len(starts)
        if missing > 0:
            starts, counts = nn.functional.pad(starts, (0, missing)), nn.functional.pad(counts, (0, missing), value=1)
        places = starts[:, None] + torch.arange(width, device=self.device)
        gathered = tokens[places.clamp_max_(len(tokens) - 1)]
        return self._embed_batch(gathered, counts)

    def _embed_batch(self, gathered: Tensor, counts: Tensor) -> Tensor:
        """`_embed_gathered`, as a captured call where the body is one of ours; the tensors may be on the host."""
        if self._packed is not None:
            return self._calls((gathered, counts))
        return self._embed_gathered(gathered.to(self.device), counts.to(self.device))

    def _embed_gathered(self, gathered: Tensor, counts: Tensor) -> Tensor:
        """Float32 `[b, d_ret]` of ids int32 `[b, t]`, of which the first `counts` int64 `[b]` are each text's own."""
        mask = torch.arange(gathered.shape[1], device=gathered.device) < counts[:, None]
        token_ids = gathered.masked_fill(~mask, self._pad_id).long()
        if self._packed is None:
            hidden = self._body(input_ids=token_ids, attention_mask=mask.long()).last_hidden_state
        else:
            hidden = self._packed(self._body.get_input_embeddings()(token_ids), mask)
        return nn.functional.normalize(mean_pool(hidden, mask), dim=1)

    def _padded_lengths(self, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.minimum(-(-lengths // PAD_MULTIPLE) * PAD_MULTIPLE, self.max_length)

    def _spans(self, padded: npt.NDArray[np.int64]) -> Iterator[Span]:
        """The runs of equal values in `padded`, with the batch size of each."""
        for start, stop in equal_runs(padded):
            yield start, stop, self._batch_size(int(padded[start]))

    def _padded(
        self, rows: Sequence[npt.NDArray[np.int32]], length: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Token ids and mask `[len(rows), length]`."""
        ids = np.full((len(rows), length), self._pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    @torch.inference_mode()
    def _forward(self, ids: npt.NDArray[np.int64], mask: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        repeats = np.ones(len(ids), dtype=np.int64)
        if not self._on_cuda:
            repeats[-1] += max(0, -(-CPU_MIN_TOKENS // ids.shape[1]) - len(ids))
        token_ids = torch.from_numpy(ids.repeat(repeats, axis=0)).to(self.device)
        attention = torch.from_numpy(mask.repeat(repeats, axis=0)).to(self.device)
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self._on_cuda):
            hidden: Tensor = self._body(input_ids=token_ids, attention_mask=attention).last_hidden_state
        pooled = mean_pool(hidden, attention)[: len(ids)]
        made: npt.NDArray[np.float32] = nn.functional.normalize(pooled, dim=1).cpu().numpy()
        return made

    def _batch_size(self, length: int, *, filled: bool = False) -> SafeBatchSize:
        name = torch.cuda.get_device_name(self.device) if self._on_cuda else "cpu"
        key, rows = f"embed/{name}/{self.fingerprint}/{length}", max(1, self._batch_tokens // length)
        if self._packed is not None:
            key, rows = f"{key}/packed", _power_of_two(rows)
        return SafeBatchSize(key, rows, self._memory, filled=filled)


def _lengths(ids: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
    return np.array([len(tokens) for tokens in ids], dtype=np.int64)


def _filled(rows: int, width: int, largest: int) -> int:
    """How many rows a captured batch of texts padded to `width` has."""
    return filled_rows(rows, smallest=_power_of_two(_SMALLEST_BATCH_TOKENS // width), largest=largest)


def _power_of_two(size: int) -> int:
    """The largest that is at most `size`, at least 1."""
    return 1 << (max(1, size).bit_length() - 1)


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of `hidden` `[b, t, d]` over the positions where `mask` `[b, t]` is 1, float32 `[b, d]`."""
    weights = mask[:, :, None].to(torch.float32)
    return (hidden.to(torch.float32) * weights).sum(dim=1) / weights.sum(dim=1)


def load_retriever(path: Path, device: str = "cpu") -> Retriever:
    """The retriever in folder `path` (see `models.resolve_model`); `device` "auto" takes a GPU if there is one.

    Raises ConfigError for a model that is to be used in another way than mean pooling of a BERT-like body
    without prompts, or whose tokenizer has no special tokens, and ModelNotFoundError for missing weights.
    """
    _refuse_other_recipes(path)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    body: Any = load_body(path)
    return Retriever(
        body,
        _tokenizer(path),
        max_length=min(MAX_POSITIONS, _num_positions(body.config)),
        pad_id=int(body.config.pad_token_id or 0),
        fingerprint=retriever_fingerprint(path),
        device=device,
        remember=True,
    )


def retriever_fingerprint(path: Path) -> str:
    """Hash of config, weights, tokenizer, special tokens, pooling and length: of all that a vector depends on."""
    post_processor = json.loads(_tokenizer(path).to_str())["post_processor"]
    return digest_json([_RECIPE, MAX_POSITIONS, PAD_MULTIPLE, post_processor, fingerprint_model(path)])


def _num_positions(config: Any) -> int:
    """RoBERTa and its kin count positions from behind the padding index."""
    reserved = max(config.pad_token_id or 0, 1) + 1 if config.model_type in _POSITIONS_AFTER_PADDING else 0
    return int(config.max_position_embeddings) - reserved


def _tokenizer(path: Path) -> Tokenizer:
    """The model's tokenizer with its special tokens around a text, written in it or named beside it."""
    tokenizer = load_tokenizer(path)
    if tokenizer.encode("").ids:
        return tokenizer
    settings = _json(path / "tokenizer_config.json")
    first, last = (_token_text(settings.get(name)) for name in ("cls_token", "sep_token"))
    ids = [None if token is None else tokenizer.token_to_id(token) for token in (first, last)]
    if None in ids:
        raise ConfigError(
            f"the tokenizer in {path} adds no special tokens and names no cls_token and sep_token; expected "
            "those of a sentence encoder: save the tokenizer with its post-processor"
        )
    tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=list(zip((first, last), ids, strict=True))
    )
    return tokenizer


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _refuse_other_recipes(path: Path) -> None:
    """A sentence-transformers folder says how its vectors are made; vectors made otherwise would be wrong."""
    modules = json.loads((path / "modules.json").read_text()) if (path / "modules.json").is_file() else []
    names = [str(module["type"]).rpartition(".")[2] for module in modules]
    pooling = _json(path / "1_Pooling" / "config.json")
    modes = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True]
    if isinstance(pooling.get("pooling_mode"), str):
        modes.append(f"pooling_mode_{pooling['pooling_mode']}_tokens")
    prompts = [text for text in _json(path / "config_sentence_transformers.json").get("prompts", {}).values() if text]
    found = [name for name in names if name not in _MODULES] + [mode for mode in modes if "mean_tokens" not in mode]
    found += [f"prompt {text!r}" for text in prompts]
    if found:
        raise ConfigError(
            f"the retriever in {path} asks for {', '.join(found)}; expected mean pooling and L2 normalisation "
            "alone: choose a MiniLM-type model"
        )
