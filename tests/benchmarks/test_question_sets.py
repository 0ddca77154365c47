import gzip
import json
from pathlib import Path

import pytest

from benchmarks import question_sets
from benchmarks.question_facts import (
    Document,
    Fact,
    abbreviates,
    country_name,
    country_subject,
    dictionary_entries,
    factbook_documents,
    factbook_facts,
    foldoc_facts,
    lead_document,
    lead_facts,
    sentences,
    wordnet_facts,
)
from benchmarks.question_sets import Collection, Passages, answerable, check_disjoint, check_examples, main, split
from benchmarks.question_templates import EVALUATION, NOUN_PHRASES, QUESTIONS, fill, instruction_templates
from refrag_core.errors import CorpusError
from refrag_core.evaluation.questions import check_gold, read_questions

QUESTIONS_FOLDER = Path(__file__).parents[2] / "benchmarks" / "questions"
SETS = ("factbook", "definitions", "leads")


def entry(name: str, number: int) -> str:
    return "\n".join(
        (
            f"Introduction - Background: {name} was settled in {1500 + number} by fishermen from the mainland. "
            f"It was ruled by its neighbours for the next {number + 40} years.",
            f"Geography - Area - total: {number},951 sq km",
            f"Geography - Elevation extremes - highest point: Mount {name}berg (Old {name} Top) {number},439 m",
            "Geography - Coastline: 0 km (landlocked)",
            f"People and Society - Population: {number},664,939 (July 2015 est.)",
            "People and Society - Population growth rate: NA%",
            f"Government - Country name - conventional short form: {name}",
            f"Government - Capital - name: Port Saint{name}",
            "Government - Suffrage: 18 years of age; universal",
            f"Economy - Exchange rates: {name}ese crowns (X{name[:2].upper()}) per US dollar - ++ 69.2 (2014 est.)",
        )
    )


SYNSETS = (
    "abacus\n    n 1: a calculator that performs sums by sliding counters on\n"
    "         rods [syn: {abacus}, {counting frame}]\n",
    "bank\n    n 1: sloping land beside a body of water that is wet\n    2: a financial institution with money in it\n",
    "Marie Curie\n    n 1: French chemist who studied rays (1867-1934) [syn: {Curie}, {Marie\n         Curie}]\n",
)
FOLDOC = (
    "Internet Service Provider\nISP\n\n   <company, networking> (ISP) A {company} which provides other companies with\n"
    "   access to the network.  Many do.\n\n   (1997-07-11)\n"
)


def test_values_of_one_meaning_become_facts_and_others_do_not():
    documents, facts = factbook_facts("Ruritania", "europe/rr", entry("Ruritania", 7))
    assert {fact.relation: fact.answers for fact in facts} == {
        "capital": ("Port SaintRuritania",),
        "population": ("7,664,939",),
        "area": ("7,951 sq km", "7,951"),
        "highest-point": ("Mount Ruritaniaberg", "Old Ruritania Top"),
        "highest-elevation": ("7,439 m", "7,439"),
        "voting-age": ("18 years", "18"),
        "currency": ("Ruritaniaese crowns", "XRU"),
        "currency-code": ("XRU",),
    }
    assert {document.id for document in documents} == {
        f"factbook/rr/{section}-1"
        for section in ("introduction", "geography", "people-and-society", "government", "economy")
    }
    assert all(document.text.startswith("Ruritania, ") for document in documents)


def test_long_fields_are_cut_into_documents_that_all_name_the_country():
    text = "Introduction - Background: " + " ".join(f"Sentence {number} says little." for number in range(60))
    documents = factbook_documents("Ruritania", "europe/rr", text)
    assert len(documents) == 3
    assert all(len(d.text) <= 570 and d.text.startswith("Ruritania, Introduction.\n") for d in documents)
    assert all(d.text.endswith(".") for d in documents)
    assert sum(d.text.count("says little") for d in documents) == 60


@pytest.mark.parametrize(
    ("short", "long", "name"),
    [
        ("Kyrgyzstan", "Kyrgyz Republic", "Kyrgyzstan"),
        ("none", "United Arab Emirates", "United Arab Emirates"),
        ("Cocos (Keeling) Islands", "none", "Cocos Islands"),
        ("Baker Island; Wake Island", "none", None),
    ],
)
def test_countries_are_named_by_their_short_form(short: str, long: str, name: str | None):
    forms = {"short": short, "long": long}
    text = "\n".join(f"Government - Country name - conventional {form} form: {value}" for form, value in forms.items())
    assert country_name(text) == name


def test_some_countries_take_an_article():
    names = ["Chad", "The Gambia", "Netherlands", "Cook Islands", "Czech Republic"]
    assert [country_subject(name) for name in names] == [
        "Chad", "the Gambia", "the Netherlands", "the Cook Islands", "the Czech Republic",
    ]  # fmt: skip


def test_words_of_one_sense_give_word_synonym_genus_and_lives():
    documents, facts = wordnet_facts(SYNSETS)
    assert [document.text for document in documents] == [
        "abacus (noun): a calculator that performs sums by sliding counters on rods. Also called counting frame.",
        "Marie Curie (noun): French chemist who studied rays (1867-1934). Also called Curie.",
    ]
    assert [(fact.relation, fact.subject, fact.answers) for fact in facts] == [
        (
            "word-for-gloss",
            "a calculator that performs sums by sliding counters on rods",
            ("abacus", "counting frame"),
        ),
        ("synonym", "abacus", ("counting frame",)),
        ("genus", "abacus", ("calculator",)),
        ("birth-year", "Marie Curie", ("1867",)),
        ("death-year", "Marie Curie", ("1934",)),
    ]


def test_abbreviations_are_kept_where_the_initials_agree():
    documents, facts = foldoc_facts([FOLDOC])
    assert documents[0].text == (
        "Internet Service Provider (ISP): A company which provides other companies with access to the network. Many do."
    )
    assert [(fact.relation, fact.answers) for fact in facts] == [
        ("stands-for", ("Internet Service Provider",)),
        ("abbreviation", ("ISP",)),
    ]
    assert abbreviates("CAE", "Common Applications Environment")
    assert abbreviates("LOTR", "Lord of the Rings")
    assert not abbreviates("LOR", "Lord of the Rings")
    assert abbreviates("LR", "Lord of the Rings")


def facts_of(title: str, text: str) -> dict[str, tuple[str, ...]]:
    document = lead_document({"id": title, "title": title, "text": text})
    return {fact.relation: fact.answers for fact in lead_facts(document)}


@pytest.mark.parametrize(
    ("title", "text", "facts"),
    [
        (
            "Ada Byron",
            "Ada Byron was an English mathematician and writer, known for her work. She was born in London.",
            {
                "nationality": ("English",),
                "profession": ("mathematician and writer", "mathematician", "writer"),
                "born-in": ("London",),
            },
        ),
        ("BBC", "The BBC is a British public service broadcaster.", {}),
        ("Bamako", "Bamako is the capital and largest city of Mali, with many people.", {"capital-of": ("Mali",)}),
        (
            "Candide",
            "Candide is a satire published by Voltaire. The play was first published in 1759.",
            {"year-published": ("1759",)},
        ),
        (
            "Radium",
            "Radium is a chemical element; it has symbol Ra and atomic number 88.",
            {"element-symbol": ("Ra",), "atomic-number": ("88",)},
        ),
        (
            "Ismail I",
            "Ismail I was the founder and first shah of Iran, ruling from 1501 until his death in 1524.",
            {"reign-start": ("1501",), "reign-end": ("1524",)},
        ),
        ("Iris (plant)", "Other things were published in 1759.", {}),
    ],
)
def test_leads_state_facts_about_their_title(title: str, text: str, facts: dict[str, tuple[str, ...]]):
    assert facts_of(title, text) == facts


def test_the_subject_is_written_as_the_lead_writes_it():
    document = lead_document({"id": "x", "title": "Nile", "text": "The Nile is a major river in Africa."})
    assert [(fact.subject, fact.answers) for fact in lead_facts(document)] == [("the Nile", ("Africa",))]


def test_initials_end_no_sentence():
    assert sentences("It was J. R. Smith who did it. He left. Then St. Paul came.") == [
        "It was J. R. Smith who did it.",
        "He left.",
        "Then St. Paul came.",
    ]


def test_every_relation_of_the_instruction_data_has_six_phrasings_that_evaluation_does_not_use():
    evaluation = {template for templates in EVALUATION.values() for template in templates}
    for relation in NOUN_PHRASES.keys() | QUESTIONS.keys():
        templates = set(instruction_templates(relation))
        assert len(templates) >= 6, relation
        assert templates.isdisjoint(evaluation), relation
    assert all("{x}" in template for template in evaluation)


def test_questions_begin_with_a_capital_unless_with_a_quoted_name():
    assert fill("{x}: what is it?", "the Nile") == "The Nile: what is it?"
    assert fill("{x}: what is it?", "iPod") == "iPod: what is it?"
    assert fill("“{x}” is what?", "the word") == "“the word” is what?"


def document(name: str, text: str, source: str = "leads") -> Document:
    return Document(name, source, name, "group", text)


def test_an_unanswerable_question_has_no_passage_that_answers_it():
    gold = document("gold", "Ada was born in London.")
    others = [document(f"d{n}", f"Text {n} about {'London' if n % 2 else 'Rome'}.") for n in range(40)]
    passages = Passages([gold, *others])
    chance = question_sets.Random(1)
    for answered in (True, False):
        for _ in range(20):
            texts, places = passages.around(gold, others, lambda text: "London" in text, chance, answered)
            assert [texts[place] for place in places] == [gold.text] * answered
            assert sum("London" in text for text in texts) == answered
            assert 4 <= len(texts) <= 8
            assert len(set(texts)) == len(texts)


def test_answers_that_the_question_gives_away_are_not_asked_for():
    text = document("Singapore", "Capital: Singapore. Area: 697 sq km")
    assert not answerable(Fact("capital", "Singapore", "Singapore", ("Singapore",), text))
    assert not answerable(Fact("area", "Singapore", "Singapore", ("698 sq km",), text))
    assert answerable(Fact("area", "Singapore", "Singapore", ("697 sq km",), text))


def test_a_shared_entity_and_an_answer_outside_its_passage_are_errors():
    text = document("Nile", "A river.")
    fact = Fact("located-in", "The Nile", "Nile", ("Africa",), text)
    other = Fact("located-in", "Nile", "Nile", ("Africa",), document("other", "A river."))
    with pytest.raises(CorpusError, match=r"share \['nile'\]"):
        check_disjoint(Collection([text], [fact]), Collection([], [other]))
    example = question_sets.Example("i", "Where?", "Africa", ("Africa",), ("A river.",) * 4, (0,), "leads")
    with pytest.raises(CorpusError, match=r"^i \(leads\): 'Africa' is not what its gold passages hold$"):
        check_examples([example])


def test_an_entity_of_evaluation_is_in_no_other_corpus_of_the_instruction_data(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(question_sets, "DEMO_LEADS", 1)
    leads = [document("Nile", "A river."), document("Oder", "A river.")]
    shown = next(iter(question_sets.demo_leads(leads)))
    monkeypatch.setattr(question_sets, "DICTIONARY_SHARE", 0)
    words = [Document("w", "wordnet", "Big River", "g", "x", (shown,)), document("v", "y", "wordnet")]
    evaluation, instruction = split(Collection([*leads, *words], []))
    assert [d.id for d in evaluation.documents] == [shown]
    assert [d.id for d in instruction.documents] == [*({"Nile", "Oder"} - {shown}), "v"]


def write_dictionary(folder: Path, name: str, entries: tuple[str, ...]) -> None:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    data, lines = b"", []
    for text in entries:
        start, length = len(data), len(text.encode())
        numbers = ("".join(digits[n >> shift & 63] for shift in (12, 6, 0)) for n in (start, length))
        lines.append("\t".join((text.split("\n")[0], *numbers)))
        data += text.encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.index").write_text("\n".join([*lines, *lines]) + "\n", encoding="utf-8")
    (folder / f"{name}.dict.dz").write_bytes(gzip.compress(data))


def test_dictionaries_are_read_by_their_index(tmp_path: Path):
    write_dictionary(tmp_path, "wn", SYNSETS)
    assert dictionary_entries(tmp_path, "wn") == list(SYNSETS)
    with pytest.raises(CorpusError, match=r"expected a dictionary of the Debian package dict-foldoc"):
        dictionary_entries(tmp_path, "foldoc")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small corpora, and the arguments that name them."""
    monkeypatch.setattr(question_sets, "DEMO_LEADS", 10)
    monkeypatch.setattr(question_sets, "EXAMPLES", dict.fromkeys(question_sets.EXAMPLES, 30))
    monkeypatch.setattr(question_sets, "HELD_OUT_SHARE", 0.2)
    names = [
        f"{first}{last}" for first in ("Al", "Bor", "Cym", "Dan") for last in ("ania", "istan", "land", "mark", "ova")
    ]
    records = [{"id": f"europe/{n:02d}", "text": entry(name, n + 1)} for n, name in enumerate(names)]
    leads = [
        {
            "id": f"Person {n}",
            "title": f"Person {name}",
            "text": f"Person {name} was a German painter and poet. "
            f"He lived for {n + 30} years in Old{name} and liked it there.",
        }
        for n, name in enumerate(names)
    ]
    for name, lines in {"world-factbook": records, "leads": leads}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    words = [SYNSETS[0].replace("abacus", name).replace("sums", f"sums {name}x") for name in names]
    write_dictionary(tmp_path, "wn", tuple(words))
    write_dictionary(tmp_path, "foldoc", (FOLDOC, FOLDOC.replace("Internet", "Intranet")))
    return ["--corpora", str(tmp_path), "--leads", str(tmp_path / "leads.jsonl"), "--dictionaries", str(tmp_path)]


def test_sets_are_written_twice_alike_and_keep_apart(
    tmp_path: Path, sources: list[str], capsys: pytest.CaptureFixture[str]
):
    for folder in ("a", "b"):
        assert main([*sources, "--output", str(tmp_path / folder)]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "evaluation-corpus.jsonl",
        *sorted(f"evaluation-{name}.jsonl" for name in SETS if name != "corpus"),
        "instruction-held-out.jsonl",
        "instruction-train.jsonl",
    ]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    assert "unanswerable" in capsys.readouterr().out
    corpus = {record["id"]: record["text"] for record in read_lines(tmp_path / "a" / "evaluation-corpus.jsonl")}
    for name in ("factbook", "leads"):
        questions = read_questions(tmp_path / "a" / f"evaluation-{name}.jsonl")
        check_gold(questions, corpus)
        assert all(question.answers[0] in corpus[question.gold[0]] for question in questions)
    examples = read_lines(tmp_path / "a" / "instruction-train.jsonl") + read_lines(
        tmp_path / "a" / "instruction-held-out.jsonl"
    )
    assert len({example["id"] for example in examples}) == len(examples)
    for example in examples:
        assert set(example["passages"]).isdisjoint(corpus.values())
        assert any(example["answer"] in example["passages"][place] for place in example["gold"]) == bool(
            example["answer"]
        )


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_a_missing_corpus_is_one_clear_error(tmp_path: Path, sources: list[str], capsys: pytest.CaptureFixture[str]):
    (tmp_path / "world-factbook.jsonl").unlink()
    assert main([*sources, "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith("expected JSON lines of a corpus: extract it\n")
    assert not (tmp_path / "out").exists()


def test_the_committed_sets_have_more_than_a_thousand_answerable_questions():
    questions = {name: read_questions(QUESTIONS_FOLDER / f"evaluation-{name}.jsonl") for name in SETS}
    assert sum(map(len, questions.values())) >= 1000
    asked = [question for found in questions.values() for question in found]
    assert len({question.id for question in asked}) == len(asked)
    assert all(question.answers and question.gold for question in asked)
    assert all(len(answer.split()) <= 8 for question in asked for answer in question.answers[:1])
