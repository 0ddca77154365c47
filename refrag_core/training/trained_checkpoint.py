"""From a checkpoint to a trainable model, and back to a checkpoint that builds and hosts read."""

import json
import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from refrag_core.checkpoint import AdapterConfig, Checkpoint
from refrag_core.decoder import Decoder
from refrag_core.encoder import (
    EMBEDDING_FORM,
    ENTRYWISE,
    POOLING,
    extend_encoder,
    load_encoder_module,
    random_gates,
    trained_layers,
)
from refrag_core.errors import ConfigError
from refrag_core.stored_weights import write_weights
from refrag_core.training.config import TrainingConfig
from refrag_core.training.model import (
    ChunkReadout,
    TrainingModel,
    adapter_layers,
    adapter_state,
    add_adapter,
    start_adapter,
    unfreeze,
)
from refrag_core.training.run_state import TRAINING_FILE


def load_training_model(checkpoint: Checkpoint, config: TrainingConfig) -> TrainingModel:
    """The checkpoint's parts, ready to train: encoder body and projection float32, decoder in the run's precision.

    A checkpoint's adapter is trained on, or, with a frozen decoder, merged into it. One of a higher rank than the
    config's is cut to the closest, one of a lower grows. Raises ConfigError when it has other layers than the config
    asks for, and FingerprintMismatchError
    when the models on this machine are not those that the checkpoint was made with.
    """
    decoder_folder = checkpoint.verified_decoder_folder()
    encoder = load_encoder_module(
        checkpoint.verified_encoder_folder(), decoder_folder, trained=checkpoint.load_trained_layers()
    )
    if not checkpoint.config.encoder_files:
        gates = random_gates(max(config.chunk_sizes), checkpoint.config.d_enc, seed=config.seed + 3)
        encoder = extend_encoder(
            encoder,
            decoder_folder,
            embedding=config.encoder_embedding,
            gates=None if config.encoder_pooling == POOLING else gates,
        )
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    frozen = config.decoder_training == "frozen"
    adapter = checkpoint.load_adapter()
    decoder = Decoder.load(decoder_folder, dtype=dtype, adapter=adapter if frozen else None).model
    if adapter is not None and adapter.has_signs and config.decoder_training == "full" and not config.adapter_signs:
        raise ConfigError(
            f"checkpoint {checkpoint.folder} holds signs beside its low rank, and adapter_signs is false with "
            f"decoder_training 'full', which would lose them; expected adapter_signs = true, or lora beside them"
        )
    width = checkpoint.config.decoder.dim
    readout = ChunkReadout(max(config.chunk_sizes), width, config.seed + 4) if config.readout else None
    model = TrainingModel(encoder, deepcopy(checkpoint.projection).requires_grad_(True), decoder, readout)
    scale = adapter.scale if adapter else config.adapter_scale
    if config.decoder_training == "lora":
        add_adapter(
            decoder, rank=config.adapter_rank, scale=scale, targets=config.adapter_targets, seed=config.seed + 2
        )
    elif config.decoder_training == "full":
        unfreeze(decoder, scale=scale, targets=config.adapter_targets)
    if adapter is not None and not frozen:
        start_adapter(decoder, adapter)
    if config.gradient_checkpointing:
        _checkpoint_gradients(decoder)
    return model


def _checkpoint_gradients(decoder: Any) -> None:
    """Let the decoder's layers be computed again in the backward pass; transformers renamed the call in version 5."""
    options = {"use_reentrant": False}
    if hasattr(decoder, "activation_checkpointing_enable"):
        decoder.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    decoder.train()


def save_trained_checkpoint(
    folder: Path,
    base: Checkpoint,
    model: TrainingModel,
    config: TrainingConfig,
    record: Mapping[str, Any],
    moments: Mapping[str, torch.Tensor] | None = None,
) -> Checkpoint:
    """Write the model as a checkpoint, with `record` as its training.json, and return it as loaded from `folder`.

    Projection and body are trained; the policy is still the base's. With `moments` of what the decoder's layers read,
    a full update is cut to its rank by what it does to them.
    """
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    layers = trained_layers(model.encoder)
    encoder_files = write_weights(temporary, "encoder", layers, dtype=config.encoder_dtype, exact=ENTRYWISE)
    adapter = base.config.adapter
    adapted = list(adapter_layers(model.decoder).values())
    if adapted:
        state = adapter_state(model.decoder, config.adapter_rank, moments, signs=config.adapter_signs)
        files = write_weights(temporary, "adapter", state, dtype=config.adapter_dtype)
        adapter = AdapterConfig(adapted[0].scale, files)
    elif adapter is not None:
        for file in adapter.files:
            shutil.copyfile(Path(base.folder or ".", file.name), temporary / file.name)
    made = Checkpoint(
        config=replace(
            base.config,
            chunk_size=config.chunk_sizes[-1],
            chunk_sizes=tuple(sorted(set(config.chunk_sizes))),
            trained=True,
            seed=config.seed,
            encoder=replace(
                base.config.encoder,
                embedding=EMBEDDING_FORM if model.encoder.token_map is None else "subtoken-mean-decoder-map-1",
                pooling=POOLING if model.encoder.gates is None else "gated-mean-1",
            ),
            encoder_files=encoder_files,
            adapter=adapter,
            projection_dtype="float32",
        ),
        projection=deepcopy(model.projection).to("cpu", torch.float32).requires_grad_(False).eval(),  # type: ignore[arg-type]
        policy=base.policy,
        folder=temporary,
    )
    made.save(temporary)
    write_record(temporary, record)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return Checkpoint.load(folder)


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Put `record` into the checkpoint's training.json, whole or not at all."""
    temporary = folder / f"{TRAINING_FILE}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / TRAINING_FILE)
