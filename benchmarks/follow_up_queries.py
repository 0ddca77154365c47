"""What to search for in a conversation: the question alone, or the turn before it as well, and how much of it.

    python -m benchmarks.follow_up_queries INDEX --corpus LEADS.jsonl [--output FILE]

Each question of `questions/evaluation-leads.jsonl` that names its document comes twice, as the second turn of a
conversation: as a follow-up, with "it" in the place of the name, behind a turn about the document ("Tell me about
X." and the beginning of its text); and as it is, behind a turn about another document. The first shows how well
follow-ups find their passages, the second what that costs questions that stand for themselves.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from benchmarks.conversations import QUESTIONS
from benchmarks.measurement import add_output, finish, say
from refrag_core.errors import RefragError
from refrag_core.evaluation.questions import read_questions
from refrag_core.history import query_vector
from refrag_core.retrieval import Searcher, open_searcher

SEED = 0
ANSWER_WORDS = 30
DEPTHS = (1, 3, 5)
WEIGHTS = (0.3, 0.4, 0.5, 0.6, 0.7, 1.0)

Vector = npt.NDArray[np.float32]
Vectors = Mapping[str, Vector]


@dataclass(frozen=True, slots=True)
class Case:
    """A question with the turn before it."""

    before: str
    """The question of that turn."""
    said: str
    """Its answer."""
    question: str
    gold: str
    """The document that the question is about."""

    @property
    def turn(self) -> str:
        """The turn before, as a conversation embeds it."""
        return f"{self.before}\n{self.said}"

    @property
    def joined(self) -> str:
        """The whole as one text."""
        return f"{self.turn}\n{self.question}"

    @property
    def asked(self) -> str:
        """Both questions as one text."""
        return f"{self.before}\n{self.question}"


def make_cases(texts: Mapping[str, str], limit: int) -> tuple[list[Case], list[Case]]:
    """Follow-ups, and the same questions after a turn about something else. `texts` are the documents' by id."""
    named = [(one.question, one.gold[0]) for one in read_questions(QUESTIONS) if one.gold[0] in one.question]
    chosen = [pair for pair in named if pair[1] in texts]
    Random(SEED).shuffle(chosen)
    chosen = chosen[:limit]
    begun = {gold: " ".join(texts[gold].split()[:ANSWER_WORDS]) for _, gold in chosen}
    follow_ups = [
        Case(f"Tell me about {gold}.", begun[gold], asked.replace(gold, "it"), gold) for asked, gold in chosen
    ]
    others = [*chosen[1:], *chosen[:1]]
    changes = [Case(b, begun[g], asked, gold) for (asked, gold), (b, g) in zip(chosen, others, strict=True)]
    return follow_ups, changes


def ways() -> dict[str, Callable[[Case, Vectors], Vector]]:
    """What may be searched for, by name."""

    def mixed(weight: float) -> Callable[[Case, Vectors], Vector]:
        return lambda case, vectors: query_vector(vectors[case.question], vectors[case.turn], weight)

    return {
        "question alone": lambda case, vectors: vectors[case.question],
        "both questions as one text": lambda case, vectors: vectors[case.asked],
        "turn and question as one text": lambda case, vectors: vectors[case.joined],
        **{f"question + {weight:g} x turn": mixed(weight) for weight in WEIGHTS},
    }


def recall(searcher: Searcher, queries: Sequence[Vector], gold: Sequence[str]) -> dict[str, float]:
    """Share of queries whose document is among the first passages, by depth."""
    found = []
    for query in queries:
        refs = searcher.reader.search(query, max(DEPTHS))
        found.append([searcher.reader.describe(ref).document_id for ref, _ in refs])
    pairs = list(zip(gold, found, strict=True))
    return {f"recall@{depth}": round(sum(g in ids[:depth] for g, ids in pairs) / len(pairs), 3) for depth in DEPTHS}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("index", type=Path)
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines that the index was built from")
    parser.add_argument("--questions", type=int, default=200)
    add_output(parser)
    options = parser.parse_args(arguments)
    records = map(json.loads, options.corpus.read_text(encoding="utf-8").splitlines())
    cases = make_cases({record["id"]: record["text"] for record in records}, options.questions)
    searcher = open_searcher(options.index, device="cpu")
    texts = sorted({t for own in cases for c in own for t in (c.question, c.turn, c.asked, c.joined)})
    say(f"{len(cases[0])} questions, {len(texts)} texts to embed")
    vectors = dict(zip(texts, searcher.retriever.embed_queries(texts), strict=True))
    results = {}
    for name, way in ways().items():
        follow_up, change = (
            recall(searcher, [way(case, vectors) for case in own], [case.gold for case in own]) for own in cases
        )
        results[name] = {"follow_up": follow_up, "new_subject": change}
        say(f"{name}: {results[name]}")
    counts = searcher.reader.manifest.counts
    described = {"index": {"documents": counts.documents, "passages": counts.passages}, "pairs": len(cases[0])}
    finish("follow_up_queries", {"questions": options.questions}, described | {"ways": results}, options.output)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RefragError as error:
        sys.exit(f"error: {error}")
