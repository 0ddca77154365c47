"""One index with a bit of everything, for the tests of all that reads an index."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from refrag.pipelines import indexing, stages
from refrag_core.captured import CapturedCalls
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


@pytest.fixture
def left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding as a captured call finds it: whatever an earlier one has left there, in place of zeros."""

    def padded(_: CapturedCalls, tensors: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        made = []
        for tensor, shape in zip(tensors, shapes, strict=True):
            there = torch.full(shape, 7, dtype=tensor.dtype)
            there[tuple(slice(size) for size in tensor.shape)] = tensor
            made.append(there)
        return made

    monkeypatch.setattr(CapturedCalls, "_padded", padded)
