"""Rates that a plan takes over from machines other than its own, each with the run that measured it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_core.errors import ConfigError
from refrag_core.vector_index import TRAINING_ROWS_PER_LIST, choose_index


@dataclass(frozen=True, slots=True)
class GpuRates:
    """What one GPU does of the stages, with the MiniLM body (6 layers, width 384), host to host.

    Args:
        chunks_a_second: by chunk size, full chunks.
        passages_a_second: of about 100 tokens.
        source: where the figures are from.
    """

    chunks_a_second: Mapping[int, float]
    passages_a_second: float
    source: str


GPUS: Mapping[str, GpuRates] = {
    "h100": GpuRates(
        chunks_a_second={8: 476_446, 16: 355_116, 32: 235_976},
        passages_a_second=10_108 / 4.557,
        source=(
            "benchmarks/results/gpu_check-h100.json: one NVIDIA H100 80GB HBM3; passages from a whole build, model "
            "loading included, so that the card does more"
        ),
    )
}

MINILM_TOKEN_FLOPS = 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)
"""Multiplications and additions of the MiniLM body's weights for one token."""


@dataclass(frozen=True, slots=True)
class AroundRates:
    """What lies around the stages, in seconds of one core.

    Args:
        record: merging, joining and cutting a scanned record.
        train: FAISS training, for a row of the sample and a list.
        add: adding a vector of width 384 to a segment, for each list that it is compared with.
        gate: searching a vector exactly and through the index, for the 200 queries of the recall gate.
        document: the one pass over all documents that makes the content id.
        shard: a shard's part of writing and reading the manifest.
        source: where the figures are from.
    """

    record: float
    train: float
    add: float
    gate: float
    document: float
    shard: float
    source: str


AROUND = AroundRates(
    record=2.01e-5,
    train=1.54e-7,
    add=1.59e-8,
    gate=8.76e-6,
    document=4.99e-7,
    shard=1.13e-3,
    source="benchmarks/results/scaling-costs.json: AMD EPYC, one core, CPU seconds beside other work",
)


@dataclass(frozen=True, slots=True)
class IndexCost:
    """Core seconds of the vector index: `train` is one worker's, `segments` divides among all."""

    train: float
    segments: float


def index_cost(passages: int, dim: int) -> IndexCost:
    """What the vector index over so many passages takes."""
    lists = choose_index(passages, dim).nlist
    sample = min(passages, TRAINING_ROWS_PER_LIST * lists)
    width = dim / 384
    segments = passages * width * (AROUND.add * max(1, lists) + AROUND.gate)
    return IndexCost(train=sample * lists * AROUND.train * width, segments=segments)


def gpu_rates(name: str) -> GpuRates:
    """The rates of a GPU. Raises ConfigError for one that was never measured."""
    if name not in GPUS:
        raise ConfigError(
            f"--gpu {name} has no measured rates; expected {' or '.join(sorted(GPUS))}: leave --gpu out to plan with "
            "this machine's own rates, or measure the card with `python -m benchmarks.gpu_check`"
        )
    return GPUS[name]


def chunk_rate(rates: GpuRates, chunk_size: int) -> float:
    """Chunks a second for any chunk size: that of the nearest measured size by as many tokens a second."""
    nearest = min(rates.chunks_a_second, key=lambda size: (abs(size - chunk_size), size))
    return rates.chunks_a_second[nearest] * nearest / chunk_size


def relative_size(model: Path) -> float:
    """How many times the MiniLM body's work a model's layers are for each token, from its `config.json`."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
    return 2 * int(config["num_hidden_layers"]) * (4 * width * width + 2 * width * inner) / MINILM_TOKEN_FLOPS
