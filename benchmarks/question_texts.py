"""Tasks that any text gives: a gap to fill, a sentence to quote or go on with, and questions that a sentence answers.

A task takes a document and a generator and returns a question and its answer, which stands word for word in the
document, or None where the document gives none. Facts of known relations are made in `benchmarks.question_facts`.
"""

import re
from random import Random

from benchmarks.question_facts import Document, sentences, words_in
from benchmarks.question_templates import (
    ASKED,
    CLOZE,
    CONTINUE,
    FIELD_COPY,
    QUOTE_ABOUT,
    QUOTE_WORD,
    fill,
)

MAX_WORDS = 32
"""Of a sentence."""
MIN_WORDS = 7

Task = tuple[str, str]
"""Question and answer."""

_SPANS = re.compile(
    r"\b(?:\d[\d,.]*\d|\d)(?: (?:million|billion))?%?(?![\w.-])|(?<=[a-z,]"
    r" )[A-Z][\w'’-]+(?: [A-Z][\w'’-]+){0,3}(?![\w-]| [A-Z])"
)


def cloze(document: Document, chance: Random) -> Task | None:
    """A sentence of prose with a number or a name left out of it."""
    if not (choices := _gaps(document)):
        return None
    sentence, found = chance.choice(choices)
    gapped = f"{sentence[: found.start()]}____{sentence[found.end() :]}"
    return fill(chance.choice(CLOZE), gapped), found[0]


def _gaps(document: Document) -> list[tuple[str, re.Match[str]]]:
    """Sentences with a number or a name that stands once in the document, and where it stands."""
    return [
        (sentence, found)
        for sentence in _prose(document)
        for found in _SPANS.finditer(sentence)
        if sentence.count(found[0]) == 1 and document.text.count(found[0]) == 1 and found.start() > 12
    ]


def _prose(document: Document) -> list[str]:
    if document.source == "factbook" and ", Introduction." not in document.text[:80]:
        return []
    body = document.text.partition("\n")[2].partition(": ")[2] if document.source == "factbook" else document.text
    return [
        s for s in sentences(body) if MIN_WORDS <= len(s.split()) <= MAX_WORDS and s[0].isupper() and s[-1] in ".!?"
    ]


def quote_about(document: Document, chance: Random) -> Task | None:
    """The first sentence of a document about the entity."""
    first = next(iter(sentences(document.text)), "")
    if document.source == "factbook" or first not in _prose(document) or not words_in(document.entity, first):
        return None
    return fill(chance.choice(QUOTE_ABOUT), document.entity), first


def quote_word(document: Document, chance: Random) -> Task | None:
    """The sentence that has a name or a number which occurs once."""
    found = cloze(document, chance)
    sentence = next((s for s in _prose(document) if found and found[1] in s), None)
    if found is None or sentence is None or len(found[1]) < 4:
        return None
    return fill(chance.choice(QUOTE_WORD), found[1]), sentence


def continue_sentence(document: Document, chance: Random) -> Task | None:
    """What follows the first words of a sentence, to its end."""
    if not (prose := _prose(document)):
        return None
    words = chance.choice(prose).split()
    cut = chance.randint(4, max(4, len(words) - 3))
    if cut >= len(words) - 1:
        return None
    return fill(chance.choice(CONTINUE), " ".join(words[:cut])), " ".join(words[cut:])


def field_copy(document: Document, chance: Random) -> Task | None:
    """The text of one field of a factbook entry."""
    lines = [line.partition(": ") for line in document.text.split("\n")[1:] if ": " in line]
    fields = [(name, value) for name, _, value in lines if 2 <= len(value.split()) <= 24 and len(name) < 60]
    if document.source != "factbook" or not fields:
        return None
    name, value = chance.choice(fields)
    return fill(chance.choice(FIELD_COPY), document.entity, y=name), value


# -- questions


_CLAUSE_ENDS = re.compile(r", |; | – | (?:which|who|that|and|but|while|when|where) ")
_CUT_SHARE = 0.5
_YEAR = re.compile(r"1\d{3}|20\d{2}")
_YEAR_BEFORE = re.compile(r"\b(?:in|since|until|by|from|of|to|around|about|after|before)$", re.IGNORECASE)
_PLACE_BEFORE = re.compile(r"\b(?:in|at|near)$", re.IGNORECASE)
_BY_BEFORE = re.compile(r"\bby$", re.IGNORECASE)
_PRONOUN = re.compile(r"^(?:He|She|It|They)(?= )")
_POSSESSIVE = re.compile(r"^(?:His|Her|Its|Their)(?= )")
_PERSON = re.compile(
    r"\b(?:born|writer|author|poet|novelist|playwright|politician|king|queen|emperor|empress|president|statesman|ruler|"
    r"actor|actress|director|painter|sculptor|architect|composer|singer|musician|philosopher|scientist|physicist|"
    r"chemist|mathematician|astronomer|biologist|physician|economist|historian|explorer|inventor|engineer|general|"
    r"footballer|player|boxer|athlete|leader|activist|saint|theologian|pope|monk|businessman|businesswoman)\b"
)


def asked_in_place(document: Document, chance: Random) -> Task | None:
    """A clause of prose in which a number or a name is asked for where it stood: "It fell in which year?"."""
    choices = [gap for gap in _gaps(document) if _can_be_asked(*gap)] if document.source == "leads" else []
    if not choices:
        return None
    sentence, found = chance.choice(choices)
    clause = f"{sentence[: found.start()]}{_asking(sentence, found, chance)}{_to_clause_end(sentence[found.end() :])}"
    question = _named(clause, _title(document))
    if len(question.split()) < MIN_WORDS or words_in(found[0], question):
        return None
    return fill(chance.choice(ASKED), question), found[0]


def _can_be_asked(sentence: str, found: re.Match[str]) -> bool:
    """Whether the words around leave a sentence: not for half a name, "an English lawyer", and lists in brackets."""
    before, after = sentence[: found.start()].rstrip(), sentence[found.end() :]
    is_name = not found[0][0].isdigit()
    describes = bool(re.match(r" [a-z]", after)) and bool(re.search(r"\b(?:a|an)$", before))
    return not (
        re.search(r"[\"“”:()\[\]]", sentence) or re.search(r"\b[A-Z][\w'’-]*$", before) or (is_name and describes)
    )


def _asking(sentence: str, found: re.Match[str], chance: Random) -> str:
    """What asks for a number or a name, by the words beside it."""
    before, after, span = sentence[: found.start()].rstrip(), sentence[found.end() :], found[0]
    if _YEAR.fullmatch(span) and _YEAR_BEFORE.search(before):
        return chance.choice(("which year", "what year"))
    if span[0].isdigit():
        if span.endswith("%"):
            return "what percentage"
        return "how many" if re.match(r" [a-z]{2,}", after) else "what number"
    if _PLACE_BEFORE.search(before):
        return chance.choice(("which place", "what", "which"))
    if _BY_BEFORE.search(before):
        return chance.choice(("whom", "who", "what"))
    if re.match(r" [a-z]", after):
        return "which"
    return "what" if before.endswith(" the") else chance.choice(("what", "who or what"))


def _to_clause_end(text: str) -> str:
    """The text up to where its clause ends, without the last stop."""
    end = _CLAUSE_ENDS.search(text)
    return (text[: end.start()] if end else text).rstrip(" .!?,;")


def _title(document: Document) -> str:
    return re.sub(r" \([^)]*\)$", "", document.entity)


def _named(clause: str, title: str) -> str:
    """The clause with the document's entity in the place of a pronoun that it begins with."""
    return _POSSESSIVE.sub(f"{title}’s", _PRONOUN.sub(title, clause))


def asked_subject(document: Document, chance: Random) -> Task | None:
    """The first sentence with its subject asked for: "Who was a Czech painter?"."""
    if document.source != "leads":
        return None
    title, first = _title(document), next(iter(sentences(document.text)), "")
    rest = first.removeprefix(title)
    if first not in _prose(document) or rest == first or not re.match(r" (?:is|was|are|were) ", rest):
        return None
    if len(rest.split()) < MIN_WORDS or words_in(title, rest):
        return None
    asking = "Who" if _PERSON.search(rest) else "What"
    cut = _to_clause_end(rest)
    told = cut if len(cut.split()) >= MIN_WORDS and chance.random() < _CUT_SHARE else rest.rstrip(" .!?")
    return fill(chance.choice(ASKED), f"{asking}{told}"), title
