"""The models of one build: resolved, fingerprinted, and turned into stages."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag.pipelines.stages import CHECKPOINTS, EmbedStage, EncodeStage, ScoreStage, Stages, TokenizeStage
from refrag_core.checkpoint import Checkpoint, load_checkpoint
from refrag_core.devices import resolve_device
from refrag_core.embedding_storage import INDEX_DTYPES, EmbeddingDtype
from refrag_core.errors import ConfigError
from refrag_core.manifest import CheckpointInfo, Component, Components, Parameters
from refrag_core.models import DEFAULT_RETRIEVER, fingerprint_model, resolve_model
from refrag_core.storage import FileRecord, Store, absolute


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which models to use, and how chunks and passages are cut for them."""

    checkpoint: str | None = None
    """Folder of a trained checkpoint; None is `refrag_core.checkpoint.default_checkpoint`."""
    encoder: str | None = None
    """Encoder body of an untrained checkpoint, which is then what is used."""
    decoder: str | None = None
    """Decoder of the default checkpoint."""
    retriever: str = DEFAULT_RETRIEVER
    chunk_size: int | None = None
    """Tokens a chunk; None is the checkpoint's default."""
    chunk_size_field: str | None = None
    max_passage_tokens: int = 256
    embedding_dtype: EmbeddingDtype = "float16"
    """How chunk embeddings are stored."""
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Models:
    """Every model of a build by folder and fingerprint; weights are loaded by the stages."""

    checkpoint: Checkpoint
    checkpoint_folder: str
    """Name of the checkpoint's folder below the index."""
    checkpoint_files: Sequence[FileRecord]
    decoder: Path
    retriever_reference: str
    retriever: Path
    retriever_fingerprint: str
    parameters: Parameters
    device: str
    """Where the stages run; `auto` where each worker is to say."""
    checkpoint_path: Path
    """Local copy of that folder."""
    index: str
    """Path or URI of the index, independent of the working folder."""

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Chunk sizes that documents may have, ascending."""
        if self.parameters.chunk_size_field is None:
            return (self.parameters.chunk_size,)
        return self.checkpoint.config.chunk_sizes

    def stages(self, *, score: bool) -> Stages:
        """The stages of this build."""
        last = (self.score_stage(),) if score else ()
        return Stages(self.tokenize_stage(), (self.encode_stage(), self.embed_stage(), *last))

    def tokenize_stage(self) -> TokenizeStage:
        """The stage that needs no device."""
        decoder = self.checkpoint.config.decoder
        passage_tokens = self.parameters.max_passage_tokens
        return TokenizeStage(str(self.decoder), decoder.tokenizer_fingerprint, passage_tokens, decoder.reference)

    def encode_stage(self) -> EncodeStage:
        """The stage that makes chunk embeddings."""
        checkpoint, dtype = str(self.checkpoint_path), self.parameters.embedding_dtype
        return EncodeStage(checkpoint, self.checkpoint.encode_fingerprint, self.device, dtype, index=self.index)

    def embed_stage(self) -> EmbedStage:
        """The stage that makes passage embeddings."""
        folder, reference = str(self.retriever), self.retriever_reference
        return EmbedStage(folder, self.retriever_fingerprint, self.device, reference=reference)

    def score_stage(self) -> ScoreStage:
        """The stage that adds the perplexity column."""
        folder, reference = str(self.decoder), self.checkpoint.config.decoder.reference
        return ScoreStage(folder, fingerprint_model(self.decoder), self.device, reference=reference)

    def components(self, *, scorer: bool) -> Components:
        """What the manifest says of the models."""
        config = self.checkpoint.config
        return Components(
            tokenizer=Component(config.decoder.reference, config.decoder.tokenizer_fingerprint),
            encoder=Component(config.encoder.reference, self.checkpoint.encode_fingerprint),
            retriever=Component(self.retriever_reference, self.retriever_fingerprint),
            scorer=Component(config.decoder.reference, fingerprint_model(self.decoder)) if scorer else None,
        )

    def checkpoint_info(self) -> CheckpointInfo:
        """What the manifest says of the checkpoint."""
        fingerprint = self.checkpoint.fingerprint
        return CheckpointInfo(self.checkpoint_folder, fingerprint, self.checkpoint.config.trained)


def resolve_models(store: Store, options: ModelOptions, *, elsewhere: bool = False) -> Models:
    """Find and fingerprint the models, and put the checkpoint into the index's folder for workers and hosts.

    Args:
        elsewhere: the stages run on other machines, whose devices this one cannot know.

    Raises ModelNotFoundError, FingerprintMismatchError, or ConfigError for a chunk size that the checkpoint
    was not trained for.
    """
    from refrag_core.retriever import retriever_fingerprint

    device = options.device if elsewhere else resolve_device(options.device)
    checkpoint = load_checkpoint(options.checkpoint, encoder=options.encoder, decoder=options.decoder)
    retriever = resolve_model(options.retriever)
    parameters = _parameters(checkpoint, retriever, options)  # before anything is written
    folder = f"{CHECKPOINTS}/{checkpoint.fingerprint[:32]}"
    files = _publish_checkpoint(store, checkpoint, folder)
    return Models(
        checkpoint=checkpoint,
        checkpoint_folder=folder,
        checkpoint_files=files,
        decoder=checkpoint.decoder_folder(),
        retriever_reference=options.retriever,
        retriever=retriever,
        retriever_fingerprint=retriever_fingerprint(retriever),
        parameters=parameters,
        device=device,
        checkpoint_path=store.folder(folder).resolve(),
        index=absolute(store.location),
    )


def _publish_checkpoint(store: Store, checkpoint: Checkpoint, folder: str) -> list[FileRecord]:
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint.save(Path(temporary))
        names = sorted(os.listdir(temporary))
        return [store.publish(f"{folder}/{name}", _copy_of(Path(temporary, name))) for name in names]


def _copy_of(source: Path) -> Any:
    return lambda path: path.write_bytes(source.read_bytes())


def _parameters(checkpoint: Checkpoint, retriever: Path, options: ModelOptions) -> Parameters:
    config = checkpoint.config
    chunk_size = options.chunk_size or config.chunk_size
    if chunk_size not in config.chunk_sizes:
        raise ConfigError(
            f"chunk size {chunk_size} was asked for, the checkpoint was made for {list(config.chunk_sizes)}: "
            "take one of these with --chunk-size, or another checkpoint"
        )
    if options.embedding_dtype not in INDEX_DTYPES:
        raise ConfigError(
            f"chunk embeddings were asked for as {options.embedding_dtype}, expected {' or '.join(INDEX_DTYPES)}: "
            "take one of these with --embedding-dtype"
        )
    return Parameters(
        max_passage_tokens=options.max_passage_tokens,
        chunk_size=chunk_size,
        chunk_size_field=options.chunk_size_field,
        embedding_dim=config.d_enc,
        embedding_dtype=options.embedding_dtype,
        vector_dim=int(json.loads((retriever / "config.json").read_text())["hidden_size"]),
    )
