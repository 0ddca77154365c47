"""What a server tells Prometheus: counts, sizes and times, and nothing of what was asked."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from refrag_core.runtime import STEPS, Answer
from refrag_core.serving.generations import Generations

_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 60)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_STEP = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60)
_SHARE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 0.99)


class Metrics:
    """The server's figures.

    Args:
        generations: whose generation, engine and chunk cache are told.
        waiting: how many requests have been let in and not answered.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, generations: Generations, in_flight: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "refrag_requests", "Requests by route and status.", ["route", "status"], registry=registry
        )
        self.first_token = Histogram(
            "refrag_ttft_seconds", "Request in to first token out.", buckets=_FIRST_TOKEN, registry=registry
        )
        self.between_tokens = Histogram(
            "refrag_ttit_seconds", "Mean between an answer's tokens.", buckets=_BETWEEN_TOKENS, registry=registry
        )
        self.steps = Histogram(
            "refrag_step_seconds", "Each step before the first token.", ["step"], buckets=_STEP, registry=registry
        )
        self.expanded_share = Histogram(
            "refrag_expanded_share", "Expanded chunks of a prompt's.", buckets=_SHARE, registry=registry
        )
        self.chunks = Counter("refrag_chunks", "Chunks in prompts.", ["form"], registry=registry)
        self.context_tokens = Counter("refrag_context_tokens", "Tokens of the passages used.", registry=registry)
        self.positions = Counter("refrag_decoder_positions", "Slots of all prompts.", registry=registry)
        self.reused = Counter(
            "refrag_reused_positions", "Of them, those not read again: a prompt before began alike.", registry=registry
        )
        self.turns = Counter("refrag_history_turns", "Earlier turns of conversations.", ["form"], registry=registry)
        self.new_tokens = Counter("refrag_new_tokens", "Tokens generated.", registry=registry)
        self.cancelled = Counter("refrag_cancelled", "Answers whose client left.", registry=registry)
        self.in_flight = Gauge("refrag_requests_in_flight", "Let in and not answered yet.", registry=registry)
        self.in_flight.set_function(in_flight)
        ProcessCollector(registry=registry)
        registry.register(_GenerationCollector(generations))

    def answered(self, answer: Answer) -> None:
        """Count one whole answer."""
        stats = answer.stats
        for step in STEPS:
            self.steps.labels(step).observe(getattr(stats, f"{step}_ms") / 1000)
        self.chunks.labels("expanded").inc(stats.num_expanded)
        self.chunks.labels("compressed").inc(stats.num_chunks - stats.num_expanded)
        self.context_tokens.inc(stats.context_tokens)
        self.positions.inc(stats.decoder_positions)
        self.reused.inc(stats.reused_positions)
        self.new_tokens.inc(stats.new_tokens)
        if answer.history is not None:
            for form in ("raw", "passages", "dropped"):
                self.turns.labels(form).inc(getattr(answer.history, form))
        if stats.num_chunks:
            self.expanded_share.observe(stats.num_expanded / stats.num_chunks)
        if stats.new_tokens:
            self.first_token.observe(stats.ttft_ms / 1000)
        if stats.new_tokens > 1:
            self.between_tokens.observe(stats.ttit_ms / 1000)

    def page(self) -> bytes:
        """All figures, in Prometheus' text format."""
        return generate_latest(self._registry)


class _GenerationCollector(Collector):
    """Figures that are read when they are asked for."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        served = self._generations.current
        manifest, chunks = served.runtime.reader.manifest, served.runtime.chunk_encoder
        yield InfoMetricFamily(
            "refrag_generation",
            "The generation that new requests are answered from.",
            {"version": str(manifest.version), "build_id": manifest.build_id, "content_id": manifest.content_id},
        )
        yield GaugeMetricFamily("refrag_generation_version", "Its number.", manifest.version)
        yield CounterMetricFamily("refrag_reloads", "Generations taken up.", self._generations.reloads)
        yield CounterMetricFamily("refrag_chunk_cache_hits", "Chunks of given text found encoded.", chunks.hits)
        yield CounterMetricFamily("refrag_chunk_cache_misses", "Chunks of given text encoded.", chunks.misses)
        yield GaugeMetricFamily("refrag_slots", "Answers decoded at the same time, at most.", served.engine.slots)
        yield GaugeMetricFamily("refrag_slots_active", "Answers being decoded.", served.engine.active)
