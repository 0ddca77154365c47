"""Checkpoints that look trained in all their parts, with random weights: for what only trained ones can do."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from refrag_core.checkpoint import AdapterConfig, Checkpoint
from refrag_core.decoder import Decoder
from refrag_core.encoder import extend_encoder, load_encoder_module, random_gates, trained_layers
from refrag_core.stored_weights import StoredDtype, write_weights

EMBEDDING, POOLING = "subtoken-mean-decoder-map-1", "gated-mean-1"
RECORD = {"config": {"data": "/somewhere/tokens", "output": "runs/toy", "steps": 4}, "step": 4, "device": "a machine"}


def trained_looking(
    base: Checkpoint, folder: Path, *, dtype: StoredDtype = "float16", rank: int = 4, seed: int = 0
) -> Checkpoint:
    """`base` with all its weights moved a little, and a decoder update of few strong and many weak directions."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    sizes = base.config.chunk_sizes
    body, decoder = base.encoder_folder(), base.decoder_folder()
    gates = random_gates(max(sizes), base.config.d_enc, seed=seed)
    encoder = extend_encoder(load_encoder_module(body, decoder), decoder, embedding=EMBEDDING, gates=gates)
    layers = {name: _moved(weight, random) for name, weight in trained_layers(encoder).items()}
    encoder_files = write_weights(folder, "encoder", layers, dtype=dtype)
    files = write_weights(folder, "adapter", _factors(decoder, rank, random), dtype=dtype)
    policy = {name: _moved(weight, random) for name, weight in base.policy.state_dict().items()}
    base.policy.load_state_dict(policy)
    config = replace(
        base.config,
        trained=True,
        encoder=replace(base.config.encoder, embedding=EMBEDDING, pooling=POOLING),
        encoder_files=encoder_files,
        adapter=AdapterConfig(1.0, files),
        policy=replace(base.config.policy, trained=True),
    )
    replace(base, config=config, folder=folder).save(folder)
    (folder / "training.json").write_text(json.dumps(RECORD))
    return Checkpoint.load(folder)


def _moved(weight: Tensor, random: torch.Generator) -> Tensor:
    return weight + 0.01 * torch.randn(weight.shape, generator=random)


def _factors(decoder: Path, rank: int, random: torch.Generator) -> dict[str, Tensor]:
    linear = {
        name: module
        for name, module in Decoder.load(decoder).model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }
    strengths = 2.0 ** -torch.arange(rank)
    made = {}
    for name, layer in linear.items():
        made[f"{name}.down"] = torch.randn((rank, layer.in_features), generator=random) * strengths[:, None]
        made[f"{name}.up"] = 1e-3 * torch.randn((layer.out_features, rank), generator=random) * strengths
    return made
