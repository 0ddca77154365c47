"""A checkpoint: the trained REFRAG model as a folder of JSON and safetensors.

    config.json               components, shapes and prompt template; written last
    projection.safetensors    φ
    policy.safetensors        the pointer policy
    encoder-*.safetensors     trained layers of the encoder body, where there are any
    adapter-*.safetensors     trained update of the decoder, where there is one

Encoder body and decoder are references (`refrag_core.models`) with fingerprints; their weights are read only
by whoever runs them. Serving hosts load projection and policy and never need the encoder. A reference that
starts with "./" is a folder inside the checkpoint (a trained encoder, say). schemas/CHECKPOINT.md is the spec.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from refrag import checkpoints
from refrag_core.adapter import Adapter
from refrag_core.decoder import Decoder, input_embedding_size
from refrag_core.digests import JSON, digest_bytes, digest_json
from refrag_core.encoder import EMBEDDING_FORM, POOLING, ChunkEncoder, EmbeddingForm, Pooling, encode_fingerprint
from refrag_core.errors import ConfigError, FingerprintMismatchError, ModelNotFoundError
from refrag_core.models import (
    DEFAULT_DECODER,
    DEFAULT_ENCODER,
    fingerprint_model,
    fingerprint_tokenizer,
    resolve_model,
)
from refrag_core.policy import PointerPolicy, initialise_policy
from refrag_core.projection import Projection, initialise_projection
from refrag_core.stored_weights import StoredDtype, WeightFile, read_weights, verified_paths, weights_file
from refrag_core.template import PromptTemplate, make_template

FORMAT = "refrag-checkpoint"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
PROJECTION_FILE = "projection.safetensors"
POLICY_FILE = "policy.safetensors"

DEFAULT_CHUNK_SIZE = 16
DEFAULT_CHUNK_SIZES = (8, 16, 32)

_INSIDE = "./"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """The encoder whose embeddings the projection was made for."""

    reference: str
    fingerprint: str
    """Of the body's config, weights and tokenizer."""
    dim: int
    """d_enc."""
    embedding: str
    """How the decoder's tokens get the body's input embeddings."""
    pooling: str


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The decoder that the projection maps into."""

    reference: str
    fingerprint: str
    """Of its config, weights and tokenizer."""
    tokenizer_fingerprint: str
    dim: int
    """d_dec, the width of its input embeddings."""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Shape of the pointer policy."""

    query_dim: int = 0
    """Width of the retriever's query vector that it reads; 0 for a policy that reads none."""
    width: int = 256
    num_heads: int = 4
    num_layers: int = 2
    trained: bool = False
    """False: its weights are random, and it chooses by chance."""
    dtype: StoredDtype | None = None
    """How its weights are stored; None for float16 where it is trained, else float32."""
    match_dim: int = 0
    """Width in which queries and chunks are compared; 0 for a policy without that term, and where none is stored."""

    @property
    def stored_dtype(self) -> StoredDtype:
        """What `dtype` comes to."""
        return self.dtype or ("float16" if self.trained else "float32")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A trained update of the decoder (`refrag_core.adapter`)."""

    scale: float
    """A layer's weight becomes weight + scale · up @ down (+ its signs)."""
    files: tuple[WeightFile, ...]


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """All of `config.json`."""

    encoder: EncoderConfig
    decoder: DecoderConfig
    policy: PolicyConfig
    template: PromptTemplate
    chunk_size: int
    """Tokens a chunk, unless a build asks for another of `chunk_sizes`."""
    chunk_sizes: tuple[int, ...]
    """Chunk sizes that the checkpoint serves."""
    trained: bool
    """False: the projection is random, and compressed chunks mean nothing to the decoder."""
    seed: int
    encoder_files: tuple[WeightFile, ...] = ()
    """Trained layers of the encoder body; none for the body as it is."""
    adapter: AdapterConfig | None = None
    """None for the decoder as it is."""
    projection_dtype: StoredDtype = "float32"
    """How the projection's weights are stored."""

    @property
    def d_enc(self) -> int:
        """Width of a chunk embedding."""
        return self.encoder.dim

    @property
    def d_dec(self) -> int:
        """Width of the decoder's input embeddings."""
        return self.decoder.dim

    @property
    def encode_fingerprint(self) -> str:
        """What an index's chunk embeddings must have been made with."""
        return encode_fingerprint(
            self.body_fingerprint,
            self.decoder.tokenizer_fingerprint,
            embedding=self.encoder.embedding,
            pooling=self.encoder.pooling,
        )

    @property
    def body_fingerprint(self) -> str:
        """Of the encoder body with its trained layers and, where it reads them, the decoder's embeddings."""
        if not self.encoder_files:
            return self.encoder.fingerprint
        decoder = () if self.encoder.embedding == EMBEDDING_FORM else (self.decoder.fingerprint,)
        return digest_json([self.encoder.fingerprint, *decoder, *(file.digest for file in self.encoder_files)])

    @property
    def carries_models(self) -> bool:
        """Whether encoder or decoder is a folder inside the checkpoint's."""
        return any(model.reference.startswith(_INSIDE) for model in (self.encoder, self.decoder))

    @property
    def weight_files(self) -> tuple[WeightFile, ...]:
        """All files of trained weights besides projection and policy."""
        return self.encoder_files + (self.adapter.files if self.adapter else ())

    def to_json(self) -> dict[str, JSON]:
        """The content of `config.json`."""
        values = asdict(self) | {"template": self.template.to_json(), "chunk_sizes": list(self.chunk_sizes)}
        for name in ("encoder_files", "adapter"):
            if not values[name]:
                del values[name]
        if self.projection_dtype == "float32":
            del values["projection_dtype"]
        if not self.policy.trained:
            del values["policy"]["trained"]
        if self.policy.stored_dtype == replace(self.policy, dtype=None).stored_dtype:
            del values["policy"]["dtype"]
        if not self.policy.match_dim:
            del values["policy"]["match_dim"]
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "CheckpointConfig":
        """The config that `to_json` wrote. Raises ConfigError for anything else."""
        _check_format(value)
        fields = {key: item for key, item in value.items() if key not in ("format", "format_version")}
        try:
            config = cls(
                **fields
                | {
                    "encoder": EncoderConfig(**fields["encoder"]),
                    "decoder": DecoderConfig(**fields["decoder"]),
                    "policy": PolicyConfig(**fields["policy"]),
                    "template": PromptTemplate.from_json(fields["template"]),
                    "chunk_sizes": tuple(fields["chunk_sizes"]),
                    "encoder_files": _files(fields.get("encoder_files", ())),
                    "adapter": _adapter(fields.get("adapter")),
                }
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"checkpoint config does not have the fields of format version {FORMAT_VERSION} ({error}); "
                f"expected what this version of refrag writes: get the checkpoint again"
            ) from error
        _check_values(config)
        return config


def _files(values: Sequence[Mapping[str, Any]]) -> tuple[WeightFile, ...]:
    files = tuple(WeightFile(**value) for value in values)
    for file in files:
        if not _FILE_NAME.fullmatch(file.name):
            raise ConfigError(
                f"checkpoint config names the file {file.name!r}; expected a plain *.safetensors name beside it: get "
                f"the checkpoint again"
            )
    return files


def _adapter(value: Mapping[str, Any] | None) -> AdapterConfig | None:
    return None if value is None else AdapterConfig(**{**value, "files": _files(value["files"])})


def _check_format(value: Mapping[str, Any]) -> None:
    if value.get("format") != FORMAT:
        raise ConfigError(
            f"config has format {value.get('format')!r}; expected {FORMAT!r}: give a checkpoint's folder, not a model's"
        )
    if value.get("format_version") != FORMAT_VERSION:
        raise ConfigError(
            f"checkpoint has format version {value.get('format_version')!r} and this refrag reads {FORMAT_VERSION}: "
            f"use the refrag that wrote it, or a newer one"
        )


def _check_values(config: CheckpointConfig) -> None:
    sizes = config.chunk_sizes
    if not all(type(size) is int and size > 0 for size in sizes) or config.chunk_size not in sizes:
        raise ConfigError(
            f"checkpoint has chunk_size {config.chunk_size!r} and chunk_sizes {list(sizes)!r}; expected positive "
            f"numbers of tokens, the first among the second"
        )
    widths = (config.encoder.dim, config.decoder.dim, config.policy.width, config.policy.num_heads)
    if not all(type(width) is int and width > 0 for width in widths) or type(config.trained) is not bool:
        raise ConfigError("checkpoint config has a width that is no positive number, or a 'trained' that is no boolean")
    _check_queries(config.policy)
    if {config.projection_dtype, config.policy.stored_dtype} - set(get_args(StoredDtype)):
        raise ConfigError(
            f"checkpoint's projection is stored as {config.projection_dtype!r} and its policy as "
            f"{config.policy.stored_dtype!r}; expected {' or '.join(get_args(StoredDtype))}: get the checkpoint again"
        )
    if config.encoder.embedding not in get_args(EmbeddingForm) or config.encoder.pooling not in get_args(Pooling):
        raise ConfigError(
            f"checkpoint's encoder has embedding {config.encoder.embedding!r} and pooling {config.encoder.pooling!r}; "
            f"this refrag has {', '.join(get_args(EmbeddingForm))} and {', '.join(get_args(Pooling))}: use the refrag "
            f"that wrote it"
        )


def _check_queries(policy: PolicyConfig) -> None:
    widths = (policy.query_dim, policy.match_dim)
    if not all(type(width) is int and width >= 0 for width in widths) or (policy.match_dim and not policy.query_dim):
        raise ConfigError(
            f"checkpoint's policy has query_dim {policy.query_dim!r} and match_dim {policy.match_dim!r}; expected "
            f"whole numbers from 0, and the second only beside the first: get the checkpoint again"
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Config, projection and policy in memory (float32, on the CPU until moved)."""

    config: CheckpointConfig
    projection: Projection
    policy: PointerPolicy
    folder: Path | None = None
    """Where it was loaded from or saved to, None for one that is only in memory."""

    @property
    def encode_fingerprint(self) -> str:
        """What an index's chunk embeddings must have been made with."""
        return self.config.encode_fingerprint

    @property
    def fingerprint(self) -> str:
        """Hash of the config and all weights as they are stored, but not of where encoder and decoder are."""
        encoder = replace(self.config.encoder, reference="")
        decoder = replace(self.config.decoder, reference="")
        return digest_json(
            {
                "config": replace(self.config, encoder=encoder, decoder=decoder).to_json(),
                "projection": digest_bytes(self._projection_bytes()),
                "policy": digest_bytes(self._policy_bytes()),
            }
        )

    def encoder_folder(self) -> Path:
        """Folder of the encoder body on this machine. Raises ModelNotFoundError."""
        return self._resolve(self.config.encoder.reference)

    def decoder_folder(self) -> Path:
        """Folder of the decoder on this machine. Raises ModelNotFoundError."""
        return self._resolve(self.config.decoder.reference)

    def verified_encoder_folder(self) -> Path:
        """Folder of the very body that the checkpoint was made with. Raises FingerprintMismatchError."""
        folder = self.encoder_folder()
        _verify("encoder", folder, fingerprint_model(folder), self.config.encoder.fingerprint)
        return folder

    def verified_decoder_folder(self) -> Path:
        """Folder of the very decoder that the checkpoint was made with. Raises FingerprintMismatchError."""
        folder = self.decoder_folder()
        self.verify_decoder(folder)
        return folder

    def verify_decoder(self, folder: Path) -> None:
        """Raise FingerprintMismatchError unless the decoder in `folder` has this checkpoint's weights and tokenizer.

        Weights are hashed once a file and machine (`refrag_core.models.remembered_digest`).
        """
        self._verify_tokenizer(folder)
        _verify("decoder", folder, fingerprint_model(folder), self.config.decoder.fingerprint)

    def _resolve(self, reference: str) -> Path:
        if reference.startswith(_INSIDE) and self.folder is not None:
            return resolve_model(str(self.folder / reference))
        return resolve_model(reference)

    def load_encoder(
        self, *, device: str = "cpu", batch_rows: int | None = None, dtype: torch.dtype | None = None
    ) -> ChunkEncoder:
        """The chunk encoder, verified. Raises FingerprintMismatchError when body or tokenizer are others, or the
        decoder where its embeddings are read."""
        body, decoder = self.verified_encoder_folder(), self.decoder_folder()
        if self.config.encoder.embedding == EMBEDDING_FORM:
            self._verify_tokenizer(decoder)
        else:
            self.verify_decoder(decoder)
        return ChunkEncoder.load(
            body,
            decoder,
            device=device,
            batch_rows=batch_rows,
            dtype=dtype,
            trained=self.load_trained_layers(),
            fingerprint=self.encode_fingerprint,
        )

    def load_trained_layers(self) -> dict[str, Tensor] | None:
        """Trained weights of the encoder, verified, float32; None for the body as it is."""
        return self._read(self.config.encoder_files) if self.config.encoder_files else None

    def load_adapter(self) -> Adapter | None:
        """The decoder's trained update, verified, float32; None for the decoder as it is."""
        adapter = self.config.adapter
        return None if adapter is None else Adapter(self._read(adapter.files), adapter.scale)

    def _read(self, files: Sequence[WeightFile]) -> dict[str, Tensor]:
        return read_weights(verified_paths(self._own_folder(), files))

    def _own_folder(self) -> Path:
        if self.folder is None:
            raise ConfigError("the checkpoint has trained weights in files and no folder; expected one that was saved")
        return self.folder

    def load_decoder(
        self, *, device: str = "cpu", dtype: torch.dtype | None = None, attn_implementation: str | None = None
    ) -> Decoder:
        """The decoder, verified. Raises FingerprintMismatchError when weights or tokenizer are others."""
        return Decoder.load(
            self.verified_decoder_folder(),
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            adapter=self.load_adapter(),
        )

    def load_projection(self, *, device: str = "cpu") -> Projection:
        """A copy of φ on `device`, float32."""
        return deepcopy(self.projection).to(device)

    def load_policy(self, *, device: str = "cpu") -> PointerPolicy:
        """A copy of the policy on `device`, float32."""
        return deepcopy(self.policy).to(device)

    def _verify_tokenizer(self, folder: Path) -> None:
        expected = self.config.decoder.tokenizer_fingerprint
        _verify("decoder tokenizer", folder, fingerprint_tokenizer(folder), expected)

    def save(self, folder: Path) -> "Checkpoint":
        """Write the checkpoint, its config last, and return it as loaded from `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.config.weight_files:
            if folder.resolve() != self._own_folder().resolve():
                _publish(folder / file.name, (self._own_folder() / file.name).read_bytes())
        _publish(folder / PROJECTION_FILE, self._projection_bytes())
        _publish(folder / POLICY_FILE, self._policy_bytes())
        text = json.dumps(self.config.to_json(), indent=2, sort_keys=True, ensure_ascii=False)
        _publish(folder / CONFIG_FILE, f"{text}\n".encode())
        return replace(self, folder=folder)

    def _projection_bytes(self) -> bytes:
        return weights_file(self.projection.state_dict(), self.config.projection_dtype)

    def _policy_bytes(self) -> bytes:
        return weights_file(self.policy.state_dict(), self.config.policy.stored_dtype)

    @classmethod
    def load(cls, folder: Path) -> "Checkpoint":
        """The checkpoint in `folder`; encoder and decoder are not touched.

        Raises ModelNotFoundError for a missing file and ConfigError for one that does not fit the config.
        """
        config = CheckpointConfig.from_json(_read_config(folder))
        shape = config.policy
        projection = Projection(config.encoder.dim, config.decoder.dim)
        policy = PointerPolicy(
            config.encoder.dim,
            query_dim=shape.query_dim,
            match_dim=shape.match_dim,
            width=shape.width,
            num_heads=shape.num_heads,
            num_layers=shape.num_layers,
        )
        _load_state(projection, folder / PROJECTION_FILE, config.projection_dtype)
        _load_state(policy, folder / POLICY_FILE, shape.stored_dtype)
        return cls(config, projection, policy, folder)


def _verify(component: str, folder: Path, found: str, expected: str) -> None:
    if found != expected:
        raise FingerprintMismatchError(
            f"the {component} in {folder} has fingerprint {found[:12]}, and the checkpoint was made with "
            f"{expected[:12]}; expected the same model: get the one that the checkpoint names"
        )


def _publish(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ModelNotFoundError(
            f"no checkpoint in {folder}: {CONFIG_FILE} is missing; expected a folder that refrag saved"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); expected a checkpoint's config") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object; expected a checkpoint's config")
    return value


def _load_state(module: nn.Module, path: Path, dtype: StoredDtype) -> None:
    if not path.is_file():
        raise ModelNotFoundError(f"the checkpoint lacks {path}; expected it beside {CONFIG_FILE}: get it complete")
    state = read_weights([path], dtype)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit the checkpoint's config: {error}; get the checkpoint again") from error
    module.eval()


def initialise_checkpoint(
    *,
    encoder_reference: str = DEFAULT_ENCODER,
    decoder_reference: str = DEFAULT_DECODER,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    chunk_sizes: tuple[int, ...] = DEFAULT_CHUNK_SIZES,
    query_dim: int = 0,
    question_first: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """An untrained checkpoint over two models, equal on every machine and run for equal arguments.

    Raises ModelNotFoundError, UnsupportedDecoderError, and ConfigError for a body that is no encoder.
    """
    body, decoder = resolve_model(encoder_reference), resolve_model(decoder_reference)
    d_enc = int(json.loads((body / CONFIG_FILE).read_text())["hidden_size"])
    d_dec, output_rms = input_embedding_size(decoder)
    config = CheckpointConfig(
        encoder=EncoderConfig(encoder_reference, fingerprint_model(body), d_enc, EMBEDDING_FORM, POOLING),
        decoder=DecoderConfig(decoder_reference, fingerprint_model(decoder), fingerprint_tokenizer(decoder), d_dec),
        policy=PolicyConfig(query_dim=query_dim),
        template=make_template(decoder, question_first=question_first),
        chunk_size=chunk_size,
        chunk_sizes=tuple(sorted({*chunk_sizes, chunk_size})),
        trained=False,
        seed=seed,
    )
    _check_values(config)
    projection = initialise_projection(d_enc, d_dec, output_rms=output_rms, seed=seed)
    return Checkpoint(config, projection, initialise_policy(d_enc, query_dim=query_dim, seed=seed + 1))


def shipped_checkpoint(decoder: str = DEFAULT_DECODER) -> Checkpoint | None:
    """The trained checkpoint that comes with refrag for the decoder that `decoder` means; None where none does.

    It is the decoder's weights and tokenizer that count, not the words of the reference. Raises ModelNotFoundError
    where a checkpoint is there and the decoder is not.
    """
    for folder in checkpoints.shipped():
        config = CheckpointConfig.from_json(_read_config(folder))
        if config.decoder.fingerprint == fingerprint_model(resolve_model(decoder)):
            found = Checkpoint.load(folder)
            return replace(found, config=replace(config, decoder=replace(config.decoder, reference=decoder)))
    return None


def default_checkpoint(encoder: str | None = None, decoder: str | None = None) -> Checkpoint:
    """What is used where no checkpoint is named: the one shipped for the decoder, else an untrained one.

    Args:
        encoder, decoder: model references, by default DEFAULT_ENCODER and DEFAULT_DECODER. An encoder that is named
            is that of an untrained checkpoint: a trained one has its own.

    Raises ModelNotFoundError.
    """
    chosen = decoder or DEFAULT_DECODER
    shipped = None if encoder else shipped_checkpoint(chosen)
    return shipped or initialise_checkpoint(encoder_reference=encoder or DEFAULT_ENCODER, decoder_reference=chosen)


def load_checkpoint(
    reference: str | None = None, *, encoder: str | None = None, decoder: str | None = None
) -> Checkpoint:
    """The checkpoint that `reference` means; None takes `default_checkpoint`.

    Args:
        reference: a folder, `package:<pip-name>` or hub id.
        encoder, decoder: of the default one.

    Raises ModelNotFoundError, and ConfigError when a checkpoint is given and other models are too.
    """
    if reference is None:
        return default_checkpoint(encoder, decoder)
    if encoder or decoder:
        raise ConfigError(
            f"checkpoint {reference!r} was given together with an encoder or a decoder, and it names its own; "
            f"expected one or the other: leave --encoder and --decoder out, or --checkpoint for the default one"
        )
    folder = Path(reference).expanduser()
    return Checkpoint.load(folder if folder.exists() else resolve_model(reference))
