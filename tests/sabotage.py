"""Stages that go wrong on purpose, once or always, on whatever worker an engine runs them.

`Sabotaged` wraps an engine, so that the driver and the engine itself stay as they are. What has happened already is
kept as files in a folder that all workers see, since a fault that strikes once must not strike the retry.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest import mock

import numpy as np

from refrag.pipelines import stages as pipeline_stages
from refrag.pipelines.engines import Engine
from refrag.pipelines.plan import ShardSpec
from refrag.pipelines.receipts import Receipt
from refrag.pipelines.stages import EncodeStage, ShardResult, Stages, TokenizedShard
from refrag_core.chunking import TokenizedText
from refrag_core.storage import Store

Item = TypeVar("Item")
Made = TypeVar("Made")

Fault = Literal["kill", "hang", "memory", "error"]
POISON = "poison"
"""A text with this word makes the poisoned stage raise."""


def strike(fault: Fault) -> None:
    """Let this process, or this call, go wrong."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "hang":
        time.sleep(3600)
    if fault == "memory":
        np.ones(1 << 48, np.uint8)  # more than any machine has: NumPy's own MemoryError
    raise ValueError("a fault that nobody expects")


@dataclass(frozen=True, slots=True)
class Sabotage:
    """What goes wrong, in the stage before which step, and how often."""

    folder: str
    """Remembers how often it struck, and which shards were begun."""
    stage: Literal["tokenize", "device"]
    fault: Fault
    times: int = 1

    def maybe(self, shard: str) -> None:
        """Strike while it has not struck as often as it should; the first shard that comes is the one that is hit."""
        root = Path(self.folder)
        root.mkdir(parents=True, exist_ok=True)
        (root / f"began-{shard}-{os.getpid()}-{time.monotonic_ns()}").touch()
        for number in range(self.times):
            try:
                handle = os.open(root / f"struck-{number}", os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                continue
            os.close(handle)
            strike(self.fault)


@dataclass(frozen=True, slots=True)
class FaultyTokenize:
    """The tokenize stage, sabotaged."""

    real: Any
    sabotage: Sabotage

    def __call__(self, store: Store, spec: ShardSpec) -> Receipt:
        self.sabotage.maybe(spec.name)
        return self.real(store, spec)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class FaultyDevice:
    """A device stage, sabotaged."""

    real: Any
    sabotage: Any

    @property
    def table(self) -> str:
        return str(self.real.table)

    @property
    def fingerprint(self) -> str:
        return str(self.real.fingerprint)

    def __call__(self, store: Store, shard: TokenizedShard) -> Receipt:
        self.sabotage.maybe(shard.name)
        return self.real(store, shard)  # type: ignore[no-any-return]


def _refuse_poison(texts: Sequence[str], tokenizer: Any) -> list[TokenizedText]:
    if any(POISON in text for text in texts):
        raise ValueError("a poisoned record")
    return _tokenize_documents(texts, tokenizer)


_tokenize_documents = pipeline_stages.tokenize_documents


@dataclass(frozen=True, slots=True)
class PoisonedTokenize:
    """The tokenize stage with a tokenizer that raises on a poisoned text."""

    real: Any

    def __call__(self, store: Store, spec: ShardSpec) -> Receipt:
        with mock.patch.object(pipeline_stages, "tokenize_documents", _refuse_poison):
            return self.real(store, spec)  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _RefusingEncoder:
    real: Any
    token: int

    @property
    def dim(self) -> int:
        return int(self.real.dim)

    def encode(self, tokens: Any, num_tokens: Any) -> Any:
        if (tokens == self.token).any():
            raise ValueError("a poisoned chunk")
        return self.real.encode(tokens, num_tokens)


@dataclass(frozen=True, slots=True)
class PoisonedEncode:
    """The encode stage with an encoder that raises on a token."""

    real: Any
    token: int

    @property
    def table(self) -> str:
        return str(self.real.table)

    @property
    def fingerprint(self) -> str:
        return str(self.real.fingerprint)

    def __call__(self, store: Store, shard: TokenizedShard) -> Receipt:
        load, token = EncodeStage.load, self.token
        with mock.patch.object(EncodeStage, "load", lambda stage: _RefusingEncoder(load(stage), token)):
            return self.real(store, shard)  # type: ignore[no-any-return]


Change = Callable[[Stages], Stages]


@dataclass(frozen=True, slots=True)
class Sabotaged:
    """An engine whose stages are changed, and that may run every shard several times at once."""

    engine: Engine
    change: Change = lambda stages: stages
    copies: int = 1

    def map(self, function: Callable[[Item], Made], items: Iterable[Item]) -> Iterator[Made]:
        """See Engine."""
        return self.engine.map(function, items)

    def run(self, store: Store, stages: Stages, specs: Iterable[ShardSpec]) -> Iterator[ShardResult]:
        """See Engine; of several executions of a shard the first that ends counts."""
        seen: set[str] = set()
        repeated = (spec for spec in specs for _ in range(self.copies))
        for result in self.engine.run(store, self.change(stages), repeated):
            if result.spec.name not in seen:
                seen.add(result.spec.name)
                yield result


def faulty(sabotage: Sabotage) -> Change:
    """Put the fault into its stage."""

    def change(stages: Stages) -> Stages:
        if sabotage.stage == "tokenize":
            return replace(stages, tokenize=FaultyTokenize(stages.tokenize, sabotage))  # type: ignore[arg-type]
        first, *rest = stages.device
        return replace(stages, device=(FaultyDevice(first, sabotage), *rest))

    return change


def poisoned_tokenizer(stages: Stages) -> Stages:
    """Let the tokenizer raise on poisoned texts."""
    return replace(stages, tokenize=PoisonedTokenize(stages.tokenize))  # type: ignore[arg-type]


def poisoned_encoder(token: int) -> Change:
    """Let the encoder raise on chunks with this token."""

    def change(stages: Stages) -> Stages:
        first, *rest = stages.device
        return replace(stages, device=(PoisonedEncode(first, token), *rest))

    return change


@dataclass(frozen=True, slots=True)
class LoseNode:
    """Holds up the first shard that comes to another node than the head, and names the node."""

    folder: str
    head: str

    def maybe(self, shard: str) -> None:
        """Write the node's id to `node`, and wait to be lost with it."""
        import ray

        node = str(ray.get_runtime_context().get_node_id())
        root = Path(self.folder)
        root.mkdir(parents=True, exist_ok=True)
        if node == self.head:
            return
        try:
            os.close(os.open(root / "struck", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        (root / "node").write_text(node)
        time.sleep(3600)


def wait_on_nodes(lose: LoseNode) -> Change:
    """Let a device stage be held up where the node is to be lost."""

    def change(stages: Stages) -> Stages:
        first, *rest = stages.device
        return replace(stages, device=(FaultyDevice(first, lose), *rest))

    return change
