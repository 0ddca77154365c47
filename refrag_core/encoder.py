"""The chunk encoder: decoder token ids in, one vector a chunk out.

Its body (BERT, RoBERTa, MiniLM, MPNet) keeps its pretrained layers and reads the *decoder's* tokens: each
decoder token's input embedding is the mean of the body's own sub-token embeddings for that token's text,
recomputed at load and stored nowhere. That mean does not tell apart what the body's tokenizer does not (case,
spaces, line ends), so a trained encoder adds a linear map of the decoder's own embedding of the token.
A chunk embedding is a pure function of the chunk's token ids and the checkpoint.
Notation: n chunks, k = chunk_size, t tokens of one chunk (t ≤ k), d_enc body width, d_dec decoder width,
V decoder vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from refrag_core.batching import SafeBatchSize, cache_dir, equal_runs, map_spans
from refrag_core.captured import CapturedCalls, filled_rows
from refrag_core.decoder import input_embeddings
from refrag_core.devices import device_turn, upload
from refrag_core.digests import digest_json
from refrag_core.errors import ConfigError, ModelNotFoundError
from refrag_core.models import fingerprint_model, fingerprint_tokenizer, load_tokenizer, without_progress_bars
from refrag_core.packed_body import AttentionForm, PackedBody, is_packable
from refrag_core.parts import part

EmbeddingForm = Literal["subtoken-mean-1", "subtoken-mean-decoder-map-1"]
Pooling = Literal["mean", "gated-mean-1"]
EMBEDDING_FORM: EmbeddingForm = "subtoken-mean-1"
POOLING: Pooling = "mean"
STORED_DTYPE = "float16"

BODY_TYPES = ("bert", "roberta", "xlm-roberta", "mpnet")

CPU_BATCH_ROWS = 128
CUDA_BATCH_ROWS = 8192
PACKED_BATCH_TOKENS = 131_072
"""Tokens of a captured batch: enough to fill a large GPU, few enough that what passes between layers stays cached."""

PIECE_ROWS = 131_072
"""Rows that are sorted, encoded and sent back together, while the next ones are on their way."""

CPU_MIN_TOKENS = 64
"""Fewer tokens in a CPU batch than this and matrix kernels for thin inputs round differently."""

_TOKEN_MAP = "token_map.weight"
_GATES = "gates"
ENTRYWISE = (_GATES,)
"""Trained weights that multiply entry by entry, and few: never stored with one scale a row."""

_FOLD_ROWS = 8192
_GATE_SPREAD = 0.3
_SMALLEST_BATCH = 64

Ids = npt.NDArray[np.int32]
Embeddings = npt.NDArray[np.float16]


class Encoder(Protocol):
    """What turns chunks into chunk embeddings: `ChunkEncoder`, or a cache in front of one."""

    @property
    def dim(self) -> int:
        """d_enc."""
        ...

    @property
    def fingerprint(self) -> str:
        """The encode fingerprint: equal fingerprints mean comparable embeddings."""
        ...

    def encode(self, token_ids: Ids, num_tokens: npt.NDArray[np.integer[Any]]) -> Embeddings:
        """Chunk embeddings float16 `[n, d_enc]` of `token_ids` int32 `[n, k]`, in input order."""
        ...


def encode_fingerprint(
    body_fingerprint: str, tokenizer_fingerprint: str, *, embedding: str = EMBEDDING_FORM, pooling: str = POOLING
) -> str:
    """Hash of all that a stored chunk embedding depends on besides its token ids."""
    return digest_json(
        {
            "body": body_fingerprint,
            "tokenizer": tokenizer_fingerprint,
            "embedding": embedding,
            "pooling": pooling,
            "dtype": STORED_DTYPE,
        }
    )


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of every id in `[0, V)`; "" where an id has none of its own.

    None of its own have: ids that the vocabulary leaves out, special tokens, and tokens that hold only a
    part of a UTF-8 character. A leading space stays, since bodies that tell "the" from " the" need it.
    """
    size = max(tokenizer.get_vocab().values()) + 1
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    texts = tokenizer.decode_batch([[index] for index in range(size)], skip_special_tokens=False)
    return ["" if index in special or "\N{REPLACEMENT CHARACTER}" in text else text for index, text in enumerate(texts)]


def transplant_vocabulary(texts: list[str], body_tokenizer: Tokenizer, body_table: Tensor) -> Tensor:
    """Input embeddings for a foreign vocabulary: mean of the body's sub-token embeddings of each text.

    Args:
        texts: text of each of the V foreign tokens, "" for none.
        body_table: float `[V_body, d_enc]`, the body's own input embeddings.

    Returns:
        float32 `[V, d_enc]`. A text without sub-tokens gets the body's unknown token, or its table's mean
        where the body has none.
    """
    table = body_table.detach().to(torch.float32)
    encodings = body_tokenizer.encode_batch(texts, add_special_tokens=False)
    counts = torch.tensor([len(encoding.ids) for encoding in encodings])
    flat = torch.tensor([index for encoding in encodings for index in encoding.ids], dtype=torch.int64)
    offsets = torch.cumsum(counts, dim=0) - counts
    means = nn.functional.embedding_bag(flat, table, offsets, mode="mean")
    return torch.where((counts == 0)[:, None], _unknown_embedding(body_tokenizer, table), means)


def _unknown_embedding(body_tokenizer: Tokenizer, table: Tensor) -> Tensor:
    for token in ("[UNK]", "<unk>"):
        index = body_tokenizer.token_to_id(token)
        if index is not None:
            return table[index]
    return table.mean(dim=0)


def load_body(folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The encoder body in `folder`, from safetensors, without its pooler.

    Raises ConfigError for a model that is no such encoder and ModelNotFoundError for missing weights.
    """
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.model_type not in BODY_TYPES:
        raise ConfigError(
            f"{folder} is a {config.model_type!r} model; expected an encoder body, one of {', '.join(BODY_TYPES)}"
        )
    with without_progress_bars():
        body, loaded = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ModelNotFoundError(
            f"{folder} lacks {len(missing)} weights of its encoder ({missing[0]}, …); expected all of them: "
            f"get the complete model"
        )
    return strip_pooler(body)


def strip_pooler(body: Any) -> nn.Module:
    """Remove the layer over the first token, which chunks do not have."""
    body.pooler = None
    module: nn.Module = body.eval()
    return module


class EncoderModule(nn.Module):
    """Body and transplanted embedding table as one module: ids `[b, t]` → chunk embeddings `[b, d_enc]`.

    No special tokens; the vector is the mean over the chunk's tokens.

    Args:
        body: without its pooler.
        table: float `[V, d_enc]`, frozen.
        decoder_table: float `[V, d_dec]` to map with a trained, at first zero, matrix into `table`'s space; None
            for no map.
        gates: `[k, d_enc]`, what each position's vector is multiplied by before the mean, so that the mean keeps
            the order of the tokens; None for a plain mean. Chunks are then at most k tokens long.
    """

    def __init__(
        self, body: nn.Module, table: Tensor, *, decoder_table: Tensor | None = None, gates: Tensor | None = None
    ) -> None:
        super().__init__()
        self.body = body
        self.embedding = nn.Embedding(table.shape[0], table.shape[1], _weight=table, _freeze=True)
        self.decoder_table: Tensor | None
        self.token_map: nn.Linear | None = None
        if decoder_table is not None:
            self.token_map = nn.Linear(decoder_table.shape[1], table.shape[1], bias=False)
            nn.init.zeros_(self.token_map.weight)
        self.register_buffer("decoder_table", decoder_table, persistent=False)
        self.gates = None if gates is None else nn.Parameter(gates)

    def forward(self, token_ids: Tensor, present: Tensor | None = None) -> Tensor:
        """Float32 `[b, d_enc]`: mean over the tokens of the body's last layer.

        Args:
            token_ids: int64 `[b, t]`.
            present: bool `[b, t]`, False behind the end of short chunks; None where all are t tokens long, which
                needs no mask. A row without tokens gives zeros.
        """
        embeds = self.inputs(token_ids)
        if present is None:
            return self.pooled(self.body(inputs_embeds=embeds).last_hidden_state)
        first = torch.arange(token_ids.shape[1], device=token_ids.device) == 0
        hidden = self.body(inputs_embeds=embeds, attention_mask=(present | first).long()).last_hidden_state
        return self.pooled(hidden, present)

    def inputs(self, token_ids: Tensor) -> Tensor:
        """The body's input embeddings `[b, t, d_enc]` of ids `[b, t]`."""
        embeds: Tensor = self.embedding(token_ids)
        if self.token_map is not None and self.decoder_table is not None:
            embeds = embeds + self.token_map(self.decoder_table[token_ids].to(self.token_map.weight.dtype))
        return embeds

    def pooled(self, hidden: Tensor, present: Tensor | None = None) -> Tensor:
        """Chunk embeddings float32 `[b, d_enc]` of the vectors `[b, t, d_enc]` of tokens, `present` as in `forward`."""
        gated = self._gated(hidden)
        if present is None:
            return gated.mean(dim=1, dtype=torch.float32)
        total = gated.float().masked_fill(~present[:, :, None], 0.0).sum(dim=1)
        return total / present.sum(dim=1, keepdim=True).clamp_min(1)

    def _gated(self, hidden: Tensor) -> Tensor:
        return hidden if self.gates is None else hidden * self.gates[: hidden.shape[1]].to(hidden.dtype)

    @torch.no_grad()
    def fold(self) -> "EncoderModule":
        """Put the map's result into the table, which then is all that is looked up. Returns the module itself."""
        if self.token_map is not None and self.decoder_table is not None:
            for start in range(0, len(self.embedding.weight), _FOLD_ROWS):
                rows = slice(start, start + _FOLD_ROWS)
                self.embedding.weight[rows] += self.token_map(self.decoder_table[rows])
        self.token_map = self.decoder_table = None
        return self


def random_gates(size: int, dim: int, *, seed: int) -> Tensor:
    """Float32 `[size, dim]`, 0.7 or 1.3 by chance: nearly a plain mean, from which training parts the positions.

    In a small model learning to reconstruct, gates of ±1, which keep the positions' vectors apart from the start,
    were far slower than these: then every position has to be learnt to be read on its own.
    """
    draws = torch.randint(0, 2, (size, dim), generator=torch.Generator().manual_seed(seed))
    return 1.0 + _GATE_SPREAD * (draws.float() * 2.0 - 1.0)


def load_encoder_module(body: Path, decoder: Path, *, trained: Mapping[str, Tensor] | None = None) -> EncoderModule:
    """The body in folder `body` with input embeddings for the tokens of the decoder in folder `decoder`, float32.

    Args:
        trained: `trained_layers` of an encoder that was trained from these two; ConfigError where they do not fit.
    """
    weights = dict(trained or {})
    token_map, gates = weights.pop(_TOKEN_MAP, None), weights.pop(_GATES, None)
    found = load_body(body)
    own_table: Tensor = found.get_input_embeddings().weight  # type: ignore[operator]
    table = transplant_vocabulary(token_texts(load_tokenizer(decoder)), load_tokenizer(body), own_table)
    if weights:
        load_trained_layers(found, weights)
    decoder_table = None if token_map is None else _decoder_table(decoder, len(table))
    module = EncoderModule(found, table, decoder_table=decoder_table, gates=gates)
    if module.token_map is not None and token_map is not None:
        if token_map.shape != module.token_map.weight.shape:
            raise _other_encoder([_TOKEN_MAP])
        module.token_map.weight.data.copy_(token_map)
    return module


def extend_encoder(
    module: EncoderModule, decoder: Path, *, embedding: EmbeddingForm, gates: Tensor | None
) -> EncoderModule:
    """The module of an untrained encoder with what the embedding form and, where given, the gates add to it."""
    table = module.embedding.weight
    mapped = None if embedding == EMBEDDING_FORM else _decoder_table(decoder, len(table))
    return EncoderModule(module.body, table, decoder_table=mapped, gates=gates)


def _decoder_table(decoder: Path, rows: int) -> Tensor:
    """The decoder's input embeddings of the `rows` ids that its tokenizer has."""
    return input_embeddings(decoder)[:rows]


def trained_layers(module: EncoderModule) -> dict[str, Tensor]:
    """What training changes: the body without its own vocabulary, which `transplant_vocabulary` reads as it was,
    the map and the gates."""
    weights = _body_layers(module.body)
    if module.token_map is not None:
        weights[_TOKEN_MAP] = module.token_map.weight.detach()
    if module.gates is not None:
        weights[_GATES] = module.gates.detach()
    return weights


def _body_layers(body: nn.Module) -> dict[str, Tensor]:
    table = body.get_input_embeddings().weight  # type: ignore[operator]
    return {name: weight.detach() for name, weight in sorted(body.named_parameters()) if weight is not table}


def load_trained_layers(body: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `weights` into the body in place. Raises ConfigError unless they are those of such a body."""
    own = _body_layers(body)
    odd = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name].shape != weights[name].shape]
    if odd:
        raise _other_encoder(odd)
    for name, weight in own.items():
        weight.copy_(weights[name])


def _other_encoder(odd: list[str]) -> ConfigError:
    return ConfigError(
        f"trained encoder weights do not fit the body: {len(odd)} differ in name or shape ({odd[0]}, …); "
        f"expected those of the body that the checkpoint names: get the checkpoint again"
    )


class ChunkEncoder:
    """Encodes chunks in batches of equal length that shrink when the device runs out of memory.

    On a CPU (float32) an embedding has the same bits in any batch, order or company. On CUDA (float16) it is
    within rounding of that.

    Args:
        module: body and embedding table.
        fingerprint: the encode fingerprint.
        batch_rows: rows of a first batch; None takes the device's default.
        dtype: of the computation; None takes float32 on a CPU, float16 on CUDA.
        packed: run BERT and RoBERTa bodies as `PackedBody`, captured on CUDA; None does on CUDA alone. On a CPU the
            bits of an embedding would depend on its batch.
        form: of attention in a packed body; None takes what suits the device.
        remember: keep the batch size that fitted for the next process, in refrag's cache folder.
    """

    def __init__(
        self,
        module: EncoderModule,
        *,
        fingerprint: str,
        device: str = "cpu",
        batch_rows: int | None = None,
        dtype: torch.dtype | None = None,
        packed: bool | None = None,
        form: AttentionForm | None = None,
        remember: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.fingerprint = fingerprint
        self._on_cuda = self.device.type == "cuda"
        self._dtype = dtype or (torch.float16 if self._on_cuda else torch.float32)
        self._module = module.to(self.device, self._dtype).eval().requires_grad_(False)
        packed = self._on_cuda if packed is None else packed
        self._packed = PackedBody(module.body, form=form) if packed and is_packable(module.body) else None
        self._calls = CapturedCalls(self._embed_packed, self.device)
        self._batch_rows = batch_rows
        self._memory = cache_dir() / "batch_sizes.json" if remember else None
        self.dim = int(self._module.embedding.embedding_dim)

    @classmethod
    def load(
        cls,
        body: Path,
        decoder: Path,
        *,
        device: str = "cpu",
        batch_rows: int | None = None,
        dtype: torch.dtype | None = None,
        trained: Mapping[str, Tensor] | None = None,
        fingerprint: str | None = None,
    ) -> "ChunkEncoder":
        """The encoder with the body in folder `body`, for the tokens of the decoder in folder `decoder`.

        Args:
            trained: `trained_layers` in place of the body's own.
            fingerprint: the encode fingerprint with these; None is right without them.
        """
        return cls(
            load_encoder_module(body, decoder, trained=trained).fold(),
            fingerprint=fingerprint or encode_fingerprint(fingerprint_model(body), fingerprint_tokenizer(decoder)),
            device=device,
            batch_rows=batch_rows,
            dtype=dtype,
            remember=True,
        )

    def encode(self, token_ids: Ids, num_tokens: npt.NDArray[np.integer[Any]]) -> Embeddings:
        """Chunk embeddings, in input order.

        Args:
            token_ids: int32 `[n, k]`; what stands after a row's tokens is not encoded (zero, as in a shard).
            num_tokens: `[n]`, tokens of each row, 1 to k.

        Returns:
            float16 `[n, d_enc]`. Nothing is clamped: a row with NaN, or with values that float16 cannot hold,
            comes back with NaN or infinities for the caller to find.

        Raises ConfigError for rows, counts or ids out of range.
        """
        self._check(token_ids, num_tokens)
        with device_turn(self.device), part("model"):
            made = self._encode_packed if self._packed is not None else self._encode_plain
            return made(token_ids, num_tokens)

    def _encode_plain(self, token_ids: Ids, num_tokens: npt.NDArray[np.integer[Any]]) -> Embeddings:
        order = np.argsort(num_tokens, kind="stable")
        staged = torch.empty((len(order), self.dim), dtype=torch.float16, pin_memory=self._on_cuda)
        ids = upload(token_ids[order], self.device)
        size = self._batch_size(token_ids.shape[1])
        self._encode_sorted(ids, num_tokens[order], staged, size)
        if self._on_cuda:
            torch.cuda.current_stream(self.device).synchronize()
        embeddings = np.empty(staged.shape, dtype=np.float16)
        embeddings[order] = staged.numpy()
        return embeddings

    def _check(self, token_ids: Ids, num_tokens: npt.NDArray[np.integer[Any]]) -> None:
        if token_ids.ndim != 2 or num_tokens.shape != token_ids.shape[:1]:
            raise ConfigError(
                f"token_ids {token_ids.shape} and num_tokens {num_tokens.shape} do not fit; expected [n, k] and [n]"
            )
        if len(num_tokens) == 0:
            return
        if num_tokens.min() < 1 or num_tokens.max() > token_ids.shape[1]:
            raise ConfigError(f"num_tokens must be 1 to {token_ids.shape[1]} for every chunk")
        if token_ids.min() < 0 or token_ids.max() >= self._module.embedding.num_embeddings:
            raise ConfigError(
                f"token ids must be 0 to {self._module.embedding.num_embeddings - 1}; found "
                f"{token_ids.min()} to {token_ids.max()}: the chunks were made with another tokenizer"
            )

    def _batch_size(self, chunk_size: int) -> SafeBatchSize:
        name = torch.cuda.get_device_name(self.device) if self._on_cuda else "cpu"
        key = f"encode/{name}/{self.fingerprint}/{self._dtype}/{chunk_size}"
        default = CUDA_BATCH_ROWS if self._on_cuda else CPU_BATCH_ROWS
        if self._packed is not None:
            key, default = f"{key}/packed", max(1, PACKED_BATCH_TOKENS // chunk_size)
        return SafeBatchSize(key, self._batch_rows or default, self._memory, filled=self._packed is not None)

    def _encode_packed(self, token_ids: Ids, num_tokens: npt.NDArray[np.integer[Any]]) -> Embeddings:
        """Piece by piece: one is sent back on a stream of its own while the next is encoded."""
        staged = torch.empty((len(num_tokens), self.dim), dtype=torch.float16, pin_memory=self._on_cuda)
        size = self._batch_size(token_ids.shape[1])
        copies = torch.cuda.Stream(self.device) if self._on_cuda else None  # type: ignore[no-untyped-call]
        for start in range(0, len(num_tokens), PIECE_ROWS):
            rows = slice(start, start + PIECE_ROWS)
            self._send_back(self._piece(token_ids[rows], num_tokens[rows], size), staged[rows], copies)
        if copies is not None:
            copies.synchronize()
        return staged.numpy()

    def _send_back(self, made: Tensor, staged: Tensor, copies: torch.cuda.Stream | None) -> None:
        if copies is None:
            staged.copy_(made)
            return
        copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(copies):
            staged.copy_(made, non_blocking=True)
        made.record_stream(copies)

    @torch.inference_mode()
    def _piece(self, token_ids: Ids, num_tokens: npt.NDArray[np.integer[Any]], size: SafeBatchSize) -> Tensor:
        """Embeddings float16 `[n, d_enc]` on the device, in input order; on CUDA they are only queued.

        Short chunks come first, whatever their lengths: batches by length would be many and tiny.
        """
        full = num_tokens == token_ids.shape[1]
        order = np.argsort(full, kind="stable")
        num_short = len(full) - int(full.sum())
        ids, places = upload(token_ids[order], self.device), upload(order, self.device)
        lengths = upload(num_tokens[order[:num_short]].astype(np.int32), self.device)
        made = torch.empty((len(order), self.dim), dtype=torch.float16, device=self.device)

        def run(start: int, stop: int) -> Tensor:
            return self._packed_batch(ids[start:stop], lengths[start:stop] if start < num_short else None, size.rows)

        spans = ((start, stop, size) for start, stop in ((0, num_short), (num_short, len(order))) if start < stop)
        for start, stop, embeddings in map_spans(self.device.type, run, spans):
            made.index_copy_(0, places[start:stop], embeddings)
        return made

    def _packed_batch(self, ids: Tensor, lengths: Tensor | None, batch_rows: int) -> Tensor:
        """One captured batch of few sizes; `lengths` `[b]` of short chunks, None for full ones."""
        rows = filled_rows(len(ids), smallest=_SMALLEST_BATCH, largest=batch_rows)
        missing = max(0, rows - len(ids))
        tensors = [nn.functional.pad(ids, (0, 0, 0, missing))]
        if lengths is not None:
            tensors.append(nn.functional.pad(lengths, (0, missing), value=1))
        return self._calls(tensors)[: len(ids)]

    @torch.inference_mode()
    def _embed_packed(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        assert self._packed is not None
        present = None
        if lengths is not None:
            present = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return self._module.pooled(self._packed(self._module.inputs(ids), present), present).to(torch.float16)

    def _encode_sorted(
        self, ids: Tensor, lengths: npt.NDArray[np.integer[Any]], staged: Tensor, size: SafeBatchSize
    ) -> None:
        """Encode rows that are sorted by length; on CUDA the copies back are only queued when this returns."""

        @torch.inference_mode()
        def run(start: int, stop: int) -> Tensor:
            made: Tensor = self._module(self._widened(ids[start:stop, : int(lengths[start])]))
            return made[: stop - start].to(torch.float16)

        spans = ((start, stop, size) for start, stop in equal_runs(lengths))
        for start, stop, embeddings in map_spans(self.device.type, run, spans):
            staged[start:stop].copy_(embeddings, non_blocking=True)

    def _widened(self, ids: Tensor) -> Tensor:
        rows, length = ids.shape
        missing = -(-CPU_MIN_TOKENS // length) - rows
        if self._on_cuda or missing <= 0:
            return ids
        return torch.cat([ids, ids[-1:].expand(missing, length)])
