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
    POOLING,
    extend_encoder,
    load_encoder_module,
    random_gates,
    trained_layers,
)
from refrag_core.errors import ConfigError
from refrag_core.stored_weights import write_weights
from refrag_core.training.config import TrainingConfig
from refrag_core.training.model import ChunkReadout, TrainingModel, adapter_layers, adapter_state, add_adapter, unfreeze
from refrag_core.training.run_state import TRAINING_FILE


def load_training_model(checkpoint: Checkpoint, config: TrainingConfig) -> TrainingModel:
    """The checkpoint's parts, ready to train: encoder body and projection float32, decoder in the run's precision.

    A checkpoint's adapter is trained on, or, with a frozen decoder, merged into it. Raises ConfigError when it
    has another shape than the config asks for; a full update goes on from any. Raises FingerprintMismatchError
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
        _load_adapter(decoder, adapter.state)
    if config.gradient_checkpointing:
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        decoder.train()
    return model


@torch.no_grad()
def _load_adapter(decoder: Any, state: Mapping[str, torch.Tensor]) -> None:
    layers = adapter_layers(decoder)
    names = {key.rpartition(".")[0] for key in state}
    odd = sorted(layers.keys() ^ names) or [
        name for name, layer in layers.items() if not layer.takes(state[f"{name}.down"], state[f"{name}.up"])
    ]
    if odd:
        raise ConfigError(
            f"the checkpoint's adapter differs from the config's in {len(odd)} layers ({odd[0]}, …); expected the "
            f"same adapter_rank and adapter_targets to go on training it"
        )
    for name, layer in layers.items():
        layer.start_from(state[f"{name}.down"], state[f"{name}.up"])


def save_trained_checkpoint(
    folder: Path, base: Checkpoint, model: TrainingModel, config: TrainingConfig, record: Mapping[str, Any]
) -> Checkpoint:
    """Write the model as a checkpoint, with `record` as its training.json, and return it as loaded from `folder`.

    Projection and body are trained; the policy is still the base's.
    """
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    encoder_files = write_weights(temporary, "encoder", trained_layers(model.encoder), dtype=config.encoder_dtype)
    adapter = base.config.adapter
    layers = list(adapter_layers(model.decoder).values())
    if layers:
        files = write_weights(
            temporary, "adapter", adapter_state(model.decoder, config.adapter_rank), dtype=config.adapter_dtype
        )
        adapter = AdapterConfig(layers[0].scale, files)
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
        ),
        projection=deepcopy(model.projection).to("cpu", torch.float32).requires_grad_(False).eval(),  # type: ignore[arg-type]
        policy=base.policy,
        folder=temporary,
    )
    made.save(temporary)
    (temporary / TRAINING_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return Checkpoint.load(folder)
