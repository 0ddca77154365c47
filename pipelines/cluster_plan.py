"""What a build would take on a cluster: hours, bytes and what is paid for, from rates that were measured.

Rates of this machine come from the plan's own sample; those of a GPU that it does not have from
`measured_rates`. Phases follow one another; within one, work divides among the workers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from refrag.pipelines.components import Models
from refrag.pipelines.indexing import SEGMENT_ROWS
from refrag.pipelines.measured_rates import AROUND, GpuRates, chunk_rate, gpu_rates, index_cost, relative_size

PUTS_A_SHARD = 9
"""Objects that a shard writes: its list of documents, five tables, and three receipts."""

GETS_A_SHARD = 12
"""Requests of a shard's workers and of the driver for them; its documents' own come on top."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """A cluster to plan for."""

    engine: str
    workers: int
    """Machines, each with one GPU where `gpu` names one."""
    gpu: str | None = None
    """A card of `measured_rates.GPUS`; None takes this machine's own rates for the device stages."""
    cores: int = 16
    """CPU cores of a worker."""


@dataclass(frozen=True, slots=True)
class Rate:
    """One rate that the plan rests on."""

    value: float
    unit: str
    source: str
    """`measured here` on the sample, or the table's entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """Hours, bytes and price inputs of a build on a cluster."""

    engine: str
    workers: int
    gpu: str | None
    hours: float
    phases: Mapping[str, float]
    """Hours of each phase, one after another; `stages` is the slower of its two sides."""
    bottleneck: str
    cpu_hours: float
    """Core hours of work; what idle cores cost is `workers` × `cores` × `hours` less it."""
    gpu_hours: float
    """Card hours that are rented: cards × hours of the stages."""
    storage_gb: float
    """Of the finished index, 10^9 bytes."""
    work_gb: float
    """Intermediate files while it is built."""
    requests: Mapping[str, int]
    """Of an object store: PUT, GET and LIST."""
    rates: Mapping[str, Rate]
    left_out: tuple[str, ...]
    """What the build would do and no figure above counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """How much there is to do, and what a core of this machine takes for it.

    Args:
        documents: scanned records.
        core_seconds: of one core of this machine, by stage; device stages as this machine's device takes them.
        device: where those were measured.
        device_cores: cores that they kept busy there.
    """

    documents: int
    shards: int
    text_bytes: int
    chunks: int
    passages: int
    disk_bytes: int
    core_seconds: Mapping[str, float]
    device: str
    device_cores: int


def plan_cluster(options: ClusterOptions, work: Work, models: Models) -> ClusterPlan:
    """What the build would take on this cluster. Raises ConfigError for a GPU without measured rates."""
    card = None if options.gpu is None else gpu_rates(options.gpu)
    rates = _rates(work, models, card)
    cores, shards = options.workers * options.cores, max(1, work.shards)
    device = _device_seconds(work, rates, card)
    tokenize = work.core_seconds.get("tokenize", 0.0)
    # A shard is one worker's at a time: what there are no shards for stands idle.
    stages = {
        "tokenize": tokenize / min(cores, shards),
        "device": device / min(options.workers if card else cores, shards),
    }
    plan_seconds = work.documents * AROUND.record
    index = index_cost(work.passages, models.parameters.vector_dim)
    segments = max(1, -(-work.passages // SEGMENT_ROWS))
    driver = work.documents * AROUND.document + work.shards * AROUND.shard
    phases = {
        "scan": work.core_seconds.get("scan", 0.0) / cores,
        "plan": plan_seconds / cores,
        "stages": max(stages.values()),
        "index": index.train / options.cores + index.segments / (options.cores * min(options.workers, segments)),
        "commit": driver,
    }
    slowest = max(phases, key=lambda name: phases[name])
    total = sum(phases.values())
    busy = work.core_seconds.get("scan", 0.0) + plan_seconds + tokenize + index.train + index.segments + driver
    return ClusterPlan(
        engine=options.engine,
        workers=options.workers,
        gpu=options.gpu,
        hours=_hours(total),
        phases={name: _hours(seconds) for name, seconds in phases.items()},
        bottleneck=max(stages, key=lambda name: stages[name]) if slowest == "stages" else slowest,
        cpu_hours=_hours(busy + (0.0 if card else device)),
        gpu_hours=_hours(options.workers * phases["stages"]) if card else 0.0,
        storage_gb=round(work.disk_bytes / 1e9, 3),
        work_gb=round(_work_bytes(work) / 1e9, 3),
        requests={
            "PUT": work.shards * PUTS_A_SHARD,
            "GET": work.shards * GETS_A_SHARD,
            "LIST": 1 + work.shards * PUTS_A_SHARD // 1000,
        },
        rates=rates,
        left_out=_left_out(work, card),
    )


def _left_out(work: Work, card: GpuRates | None) -> tuple[str, ...]:
    start = "starting machines, workers and models"
    if card is not None and work.core_seconds.get("scores"):
        return (start, "scoring (--score), which no card was measured at: leave --gpu out for this machine's own rate")
    return (start,)


def _hours(seconds: float) -> float:
    return round(seconds / 3600, 4)


def _work_bytes(work: Work) -> float:
    """Sorted runs, parts and lists hold a record each (some 120 bytes compressed); spools, at most the text."""
    return 3 * 120 * work.documents + 0.5 * work.text_bytes


def _device_seconds(work: Work, rates: Mapping[str, Rate], card: GpuRates | None) -> float:
    """Of one card, or of one core where there is none."""
    if card is None:
        seconds = sum(v for stage, v in work.core_seconds.items() if stage in ("embeddings", "vectors", "scores"))
        return seconds * work.device_cores
    return work.chunks / rates["encode"].value + work.passages / rates["embed"].value


def _rates(work: Work, models: Models, card: GpuRates | None) -> dict[str, Rate]:
    here = f"measured here, on a sample ({work.device})"
    stages = {
        "tokenize": ("tokenize", work.chunks, "chunks", 1),
        "encode": ("embeddings", work.chunks, "chunks", work.device_cores),
        "embed": ("vectors", work.passages, "passages", work.device_cores),
    }
    found: dict[str, Rate] = {}
    for name, (stage, amount, unit, cores) in stages.items():
        if seconds := work.core_seconds.get(stage, 0.0):
            found[name] = Rate(round(amount / seconds / cores, 1), f"{unit}/s a core", here)
    for name, seconds, unit in (
        ("plan", AROUND.record, "records/s a core"),
        ("gate", AROUND.gate, "passages/s a core"),
        ("commit", AROUND.document, "documents/s on the driver"),
    ):
        found[name] = Rate(round(1 / seconds), unit, AROUND.source)
    if card is not None:
        chunk_size = models.parameters.chunk_size
        encoder, retriever = relative_size(models.checkpoint.encoder_folder()), relative_size(models.retriever)
        found["encode"] = _of_card(chunk_rate(card, chunk_size) / encoder, "chunks/s a card", card, encoder)
        found["embed"] = _of_card(card.passages_a_second / retriever, "passages/s a card", card, retriever)
    return found


def _of_card(value: float, unit: str, card: GpuRates, size: float) -> Rate:
    scaled = "" if abs(size - 1) < 0.01 else f"; divided by {size:.2f}, this body's size against MiniLM's"
    return Rate(round(value, 1), unit, card.source + scaled)
