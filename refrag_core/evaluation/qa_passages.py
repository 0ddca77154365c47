"""The passages that a question is answered from: as the index's retriever finds them, or worse, or with the gold.

strong  the retriever's best.
weak    the same, each replaced by a random passage of other documents with probability WEAK_REPLACED.
gold    the gold documents' passages and random distractors, shuffled: what the decoder makes of an answer that it
        was certainly shown.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from refrag_core.errors import UsageError
from refrag_core.evaluation.qa import contains_answer
from refrag_core.evaluation.questions import Question
from refrag_core.index_reader import PassageDescription, PassageRef
from refrag_core.manifest import live_documents
from refrag_core.retrieval import BY_VECTORS, RetrievalOptions
from refrag_core.runtime import Runtime

RetrieverMode = Literal["strong", "weak", "gold"]
RETRIEVER_MODES: tuple[RetrieverMode, ...] = get_args(RetrieverMode)

WEAK_REPLACED = 0.5


class PassageSource:
    """Chooses each question's passages; what is random depends on the seed and the question's number alone."""

    def __init__(
        self,
        runtime: Runtime,
        questions: Sequence[Question],
        *,
        mode: RetrieverMode,
        top_k: int,
        seed: int,
        retrieval: RetrievalOptions = BY_VECTORS,
    ) -> None:
        self._searcher = runtime.searcher
        self._reader = runtime.reader
        self._retrieval = retrieval
        self._questions = questions
        self._mode = mode
        self._top_k = top_k
        self._seed = seed
        self.describe = cache(runtime.reader.describe)
        self._queries = runtime.searcher.retriever.embed_queries([question.question for question in questions])
        self._rows = _rows(runtime, retrieval.where) if mode != "strong" else np.empty((0, 2), dtype=np.int64)
        self._documents = self._passages_of_gold() if mode == "gold" else {}

    def given(self, number: int) -> list[PassageRef]:
        """The passages of question `number`, in the order of the prompt; fewer than `top_k` in a small index."""
        random = np.random.default_rng([self._seed, number])
        question = self._questions[number]
        if self._mode == "gold":
            gold = self._gold_passages(question)[: self._top_k]
            made = [*gold, *self._distractors(question, self._top_k - len(gold), random)]
            return [made[at] for at in random.permutation(len(made))]
        nearest = self._searcher.nearest(question.question, self._queries[number], self._top_k, self._retrieval)
        found = [ref for ref, _ in nearest]
        if self._mode == "strong":
            return found
        replaced = random.random(len(found)) < WEAK_REPLACED
        others = iter(self._distractors(question, int(replaced.sum()), random))
        return [next(others, ref) if now else ref for ref, now in zip(found, replaced, strict=True)]

    def described(self, refs: Sequence[PassageRef]) -> list[PassageDescription]:
        """Texts and documents of passages."""
        return [self.describe(ref) for ref in refs]

    def _distractors(self, question: Question, count: int, random: np.random.Generator) -> list[PassageRef]:
        """`count` random passages of documents that are not gold."""
        drawn: list[PassageRef] = []
        for at in self._shuffled(random) if count > 0 else ():
            ref = PassageRef(*(int(value) for value in self._rows[at]))
            if self.describe(ref).document_id not in question.gold:
                drawn.append(ref)
            if len(drawn) == count:
                break
        return drawn

    def _shuffled(self, random: np.random.Generator) -> Iterator[int]:
        yield from random.permutation(len(self._rows)).tolist()

    def _passages_of_gold(self) -> dict[str, list[PassageRef]]:
        wanted = {document for question in self._questions for document in question.gold}
        if not wanted:
            raise UsageError("no question names gold documents; expected some for --retriever-mode gold")
        manifest = self._reader.manifest
        shards = {shard.name: number for number, shard in enumerate(manifest.shards)}
        return {
            live.document_id: [
                PassageRef(shards[live.shard], row)
                for row in range(live.first_passage, live.first_passage + live.num_passages)
            ]
            for live in live_documents(self._reader.store, manifest)
            if live.document_id in wanted
        }

    def _gold_passages(self, question: Question) -> list[PassageRef]:
        """Of each gold document the first passage that holds an answer, else its first."""
        chosen = []
        for document in question.gold:
            refs = self._documents.get(document, [])
            holding = (ref for ref in refs if contains_answer(self.describe(ref).text, question.answers))
            chosen += [found] if (found := next(holding, refs[0] if refs else None)) is not None else []
        return chosen


def _rows(runtime: Runtime, where: str | None) -> npt.NDArray[np.int64]:
    """Int64 `[passages, 2]`: shard and row of all live passages, or of those that pass the filter."""
    if where is None:
        return _live_rows(runtime)
    masks = runtime.reader.passing(where).masks
    refs = [runtime.reader.locate(n, int(row)) for n, mask in enumerate(masks) for row in np.flatnonzero(mask)]
    return np.array([(ref.shard, ref.row) for ref in refs], dtype=np.int64).reshape(-1, 2)


def _live_rows(runtime: Runtime) -> npt.NDArray[np.int64]:
    """Int64 `[passages, 2]`: shard and row of all live passages."""
    parts = []
    for number in range(len(runtime.reader.manifest.shards)):
        rows = np.flatnonzero(runtime.reader.live_rows(number))
        parts.append(np.stack([np.full_like(rows, number), rows], axis=1))
    return np.concatenate(parts)
