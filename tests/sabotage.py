"""Stages that go wrong on purpose, once or always, on whatever worker an engine runs them.

`Sabotaged` wraps an engine, so that the driver and the engine itself stay as they are. What has happened already is
kept as files in a folder that all workers see, since a fault that strikes once must not strike the retry.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
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


class Trouble(Protocol):
    """What a stage is run within."""

    @property
    def stage(self) -> Literal["tokenize", "device"]:
        """The stage that it is for."""

    def around(self) -> AbstractContextManager[Any]:
        """Go wrong, or see to it that the stage does."""


@dataclass(frozen=True, slots=True)
class Sabotage:
    """A fault that strikes so often: the first shards that come are hit."""

    folder: str
    """Remembers how often it struck."""
    stage: Literal["tokenize", "device"]
    fault: Fault
    times: int = 1

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """See Trouble."""
        if any(_is_first(Path(self.folder), f"struck-{number}") for number in range(self.times)):
            strike(self.fault)
        yield


def _is_first(folder: Path, name: str) -> bool:
    """Whether nobody has asked for this name in this folder before."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class LoseNode:
    """Holds up the first shard that comes to another node than the head, and names the node, which is to be lost."""

    folder: str
    head: str
    stage: Literal["tokenize", "device"] = "device"

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """See Trouble."""
        import ray

        node = str(ray.get_runtime_context().get_node_id())
        if node != self.head and _is_first(Path(self.folder), "struck"):
            Path(self.folder, "node").write_text(node)
            time.sleep(3600)
        yield


_tokenize_documents = pipeline_stages.tokenize_documents


@dataclass(frozen=True, slots=True)
class RefusePoison:
    """A tokenizer that raises on a poisoned text."""

    stage: Literal["tokenize", "device"] = "tokenize"
    poison: str = POISON
    """What such a text has in it."""

    def around(self) -> AbstractContextManager[Any]:
        """See Trouble."""
        return mock.patch.object(pipeline_stages, "tokenize_documents", self._tokenize)

    def _tokenize(self, texts: Sequence[str], tokenizer: Any) -> list[TokenizedText]:
        if any(self.poison in text for text in texts):
            raise ValueError("a poisoned record")
        return _tokenize_documents(texts, tokenizer)


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
class RefuseToken:
    """An encoder that raises on chunks with a token."""

    token: int
    stage: Literal["tokenize", "device"] = "device"

    def around(self) -> AbstractContextManager[Any]:
        """See Trouble."""
        load, token = EncodeStage.load, self.token
        return mock.patch.object(EncodeStage, "load", lambda stage: _RefusingEncoder(load(stage), token))


@dataclass(frozen=True, slots=True)
class Troubled:
    """A stage, run within its trouble."""

    real: Any
    trouble: Trouble

    @property
    def table(self) -> str:
        return str(self.real.table)

    @property
    def fingerprint(self) -> str:
        return str(self.real.fingerprint)

    def __call__(self, store: Store, what: ShardSpec | TokenizedShard) -> Receipt:
        with self.trouble.around():
            return self.real(store, what)  # type: ignore[no-any-return]


Change = Callable[[Stages], Stages]


@dataclass(frozen=True, slots=True)
class Sabotaged:
    """An engine whose stages are changed, and that may run every shard several times at once."""

    engine: Engine
    change: Change = lambda stages: stages
    copies: int = 1

    @property
    def spans_machines(self) -> bool:
        return self.engine.spans_machines

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


def faulty(trouble: Trouble) -> Change:
    """Put the trouble around its stage; of the device stages, around the first."""

    def change(stages: Stages) -> Stages:
        if trouble.stage == "tokenize":
            return replace(stages, tokenize=Troubled(stages.tokenize, trouble))  # type: ignore[arg-type]
        first, *rest = stages.device
        return replace(stages, device=(Troubled(first, trouble), *rest))

    return change
