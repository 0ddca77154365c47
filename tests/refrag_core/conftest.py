"""One index with a bit of everything, for the tests of all that reads an index."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from refrag.pipelines import indexing, stages
from refrag_core.captured import CapturedCalls, Shape
from refrag_core.runtime import Runtime
from tests.small_index import SmallIndex, documents

LIBRARY = [
    "{broken",
    *documents(40)[:5],
    {"id": "doc-0005", "text": "Edited: the capital of the island is a harbour.", "year": 2001},
    *documents(40)[7:],
    {"id": "guide#1", "text": "A guide to the copper orbit of the northern king.", "year": 1999},
]
"""The corpus of `library`'s second generation: doc-0005 edited, doc-0006 removed, guide#1 new."""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    """Two generations, scores, several segments and row groups, tombstones, quarantine. Not to be written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(indexing, "SEGMENT_ROWS", 40)
        patch.setattr(stages, "PASSAGE_ROWS_A_GROUP", 3)
        small = SmallIndex(tmp_path_factory.mktemp("library"), ["{broken", *documents(40)], score=True)
        small.build()
        small.write(LIBRARY)
        small.build(delete_missing=True)
    return small


@pytest.fixture(scope="session")
def runtime(library: SmallIndex, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """The library opened once, for questions alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Runtime.open(library.path, device="cpu")


class _Replayed:
    """Stands for a graph: computes again from inputs that stay, into an output that stays."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self.output = run().clone()

    def replay(self) -> None:
        self.output.copy_(self._run())


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured calls as CUDA has them, without CUDA: what an earlier call left in their inputs stays there."""

    def call(
        calls: CapturedCalls, tensors: Sequence[Tensor], *constants: Any, shapes: Sequence[Shape] | None = None
    ) -> Tensor:
        with torch.inference_mode():
            return calls._replay(tensors, shapes or [tensor.shape for tensor in tensors], constants)

    def capture(calls: CapturedCalls, tensors: Sequence[Tensor], constants: Sequence[Any]) -> Any:
        inputs = tuple(tensor.clone() for tensor in tensors)
        graph = _Replayed(lambda: calls._function(*inputs, *constants))
        return SimpleNamespace(graph=graph, inputs=inputs, output=graph.output)

    monkeypatch.setattr(CapturedCalls, "__call__", call)
    monkeypatch.setattr(CapturedCalls, "_capture", capture)
