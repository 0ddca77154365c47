"""The chunk encoder: decoder token ids in, one vector a chunk out.

Its body (BERT, RoBERTa, MiniLM, MPNet) keeps its pretrained layers and reads the *decoder's* tokens: each
decoder token's input embedding is the mean of the body's own sub-token embeddings for that token's text,
recomputed at load and stored nowhere. A chunk embedding is thus a pure function of the chunk's token ids.
Notation: n chunks, k = chunk_size, t tokens of one chunk (t ≤ k), d_enc body width, V decoder vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from refrag_core.batching import SafeBatchSize, cache_dir, equal_runs, map_spans
from refrag_core.digests import digest_json
from refrag_core.errors import ConfigError, ModelNotFoundError
from refrag_core.models import fingerprint_model, fingerprint_tokenizer, load_tokenizer, without_progress_bars

EMBEDDING_FORM = "subtoken-mean-1"
POOLING = "mean"
STORED_DTYPE = "float16"

BODY_TYPES = ("bert", "roberta", "xlm-roberta", "mpnet")

CPU_BATCH_ROWS = 128
CUDA_BATCH_ROWS = 8192
CPU_MIN_TOKENS = 64
"""Fewer tokens in a CPU batch than this and matrix kernels for thin inputs round differently."""

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

    All rows have t tokens: no padding, hence no attention mask and no special tokens (mean pooling).
    """

    def __init__(self, body: nn.Module, table: Tensor) -> None:
        super().__init__()
        self.body = body
        self.embedding = nn.Embedding(table.shape[0], table.shape[1], _weight=table, _freeze=True)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Float32 `[b, d_enc]`: mean over the tokens of the body's last layer."""
        hidden: Tensor = self.body(inputs_embeds=self.embedding(token_ids)).last_hidden_state
        return hidden.mean(dim=1, dtype=torch.float32)


def load_encoder_module(body: Path, decoder: Path) -> EncoderModule:
    """The body in folder `body` with input embeddings for the tokens of the decoder in folder `decoder`, float32."""
    module = load_body(body)
    table: Tensor = module.get_input_embeddings().weight  # type: ignore[operator]
    texts = token_texts(load_tokenizer(decoder))
    return EncoderModule(module, transplant_vocabulary(texts, load_tokenizer(body), table))


def trained_layers(body: nn.Module) -> dict[str, Tensor]:
    """The body's weights without its own vocabulary's embeddings, which `transplant_vocabulary` reads as they were."""
    table = body.get_input_embeddings().weight  # type: ignore[operator]
    return {name: weight.detach() for name, weight in sorted(body.named_parameters()) if weight is not table}


def load_trained_layers(body: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put `weights` into the body in place. Raises ConfigError unless they are `trained_layers` of such a body."""
    own = trained_layers(body)
    odd = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name].shape != weights[name].shape]
    if odd:
        raise ConfigError(
            f"trained encoder weights do not fit the body: {len(odd)} differ in name or shape ({odd[0]}, …); "
            f"expected those of the body that the checkpoint names: get the checkpoint again"
        )
    for name, weight in own.items():
        weight.copy_(weights[name])


class ChunkEncoder:
    """Encodes chunks in batches of equal length that shrink when the device runs out of memory.

    On a CPU (float32) an embedding has the same bits in any batch, order or company. On CUDA (float16) it is
    within rounding of that.

    Args:
        module: body and embedding table.
        fingerprint: the encode fingerprint.
        batch_rows: rows of a first batch; None takes the device's default.
        dtype: of the computation; None takes float32 on a CPU, float16 on CUDA.
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
        remember: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.fingerprint = fingerprint
        self._on_cuda = self.device.type == "cuda"
        self._dtype = dtype or (torch.float16 if self._on_cuda else torch.float32)
        self._module = module.to(self.device, self._dtype).eval().requires_grad_(False)
        self._batch_rows = batch_rows or (CUDA_BATCH_ROWS if self._on_cuda else CPU_BATCH_ROWS)
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
        body_fingerprint: str | None = None,
    ) -> "ChunkEncoder":
        """The encoder with the body in folder `body`, for the tokens of the decoder in folder `decoder`.

        Args:
            trained: weights in place of the body's own (`load_trained_layers`).
            body_fingerprint: of the body with these; None takes that of the folder.
        """
        module = load_encoder_module(body, decoder)
        if trained is not None:
            load_trained_layers(module.body, trained)
        return cls(
            module,
            fingerprint=encode_fingerprint(body_fingerprint or fingerprint_model(body), fingerprint_tokenizer(decoder)),
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
        order = np.argsort(num_tokens, kind="stable")
        staged = torch.empty((len(order), self.dim), dtype=torch.float16, pin_memory=self._on_cuda)
        ids = self._upload(np.ascontiguousarray(token_ids[order]))
        size = self._batch_size(token_ids.shape[1])
        self._encode_sorted(ids, num_tokens[order], staged, size)
        if self._on_cuda:
            torch.cuda.synchronize(self.device)
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

    def _upload(self, token_ids: Ids) -> Tensor:
        ids = torch.from_numpy(token_ids)
        return ids.pin_memory().to(self.device, non_blocking=True) if self._on_cuda else ids

    def _batch_size(self, chunk_size: int) -> SafeBatchSize:
        name = torch.cuda.get_device_name(self.device) if self._on_cuda else "cpu"
        key = f"encode/{name}/{self.fingerprint}/{self._dtype}/{chunk_size}"
        return SafeBatchSize(key, self._batch_rows, self._memory)

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
