"""Engines: what maps stages over shards. An engine decides where and when, never what."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from refrag.pipelines.plan import ShardSpec
from refrag.pipelines.stages import ShardResult, Stages
from refrag_core.storage import Store

Item = TypeVar("Item")
Made = TypeVar("Made")


class Engine(Protocol):
    """Maps pure functions over work items; equal results whatever the engine."""

    @property
    def spans_machines(self) -> bool:
        """Whether workers may run on other machines than the driver.

        Then a run's intermediate files go where all of them reach, and each machine finds models and device itself.
        """

    def map(self, function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """Results of a picklable function, in the order of the items."""

    def run(self, store: Store, stages: Stages, specs: Iterable[ShardSpec]) -> Iterator[ShardResult]:
        """Every shard through every stage, in any order of completion."""
