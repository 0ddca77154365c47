"""Rates that a plan takes over from machines other than its own, each with the run that measured it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refrag_core.errors import ConfigError


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
class DriverRates:
    """What the driver itself, and workers outside of the stages, take on one core.

    Args:
        plan_records_a_second: merging, joining and cutting scanned records.
        index_passages_a_second: adding vectors of width 384 to a segment of 2,048 lists, and searching it for the gate.
        content_documents_a_second: the one pass over all documents for the content id.
        shard_seconds: booking a shard's receipts, its part of the manifest, and writing that down.
        source: where the figures are from.
    """

    plan_records_a_second: float
    index_passages_a_second: float
    content_documents_a_second: float
    shard_seconds: float
    source: str


DRIVER = DriverRates(
    plan_records_a_second=35_000,
    index_passages_a_second=15_000,
    content_documents_a_second=250_000,
    shard_seconds=0.002,
    source="benchmarks/results/scaling-costs.json: AMD EPYC, one core",
)


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
