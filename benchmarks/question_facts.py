"""Facts that questions can be made of, read out of a factbook, two dictionaries and encyclopedia leads.

A `Fact` names an entity, a relation and a short answer that stands word for word in one `Document`. Readers
are regular expressions over regular text: what does not match exactly is left out, so that a fact that is
kept can be trusted. No fact is read from a document that states it ambiguously (two populations, "note - …").
"""

import gzip
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refrag_core.errors import CorpusError

MAX_DOCUMENT_CHARACTERS = 560
"""About 150 decoder tokens: one passage of an index, and short enough for several in one training example."""

MAX_LEAD_CHARACTERS = 1000
"""Of a lead that is one long sentence."""

MAX_ANSWER_WORDS = 6


@dataclass(frozen=True, slots=True)
class Document:
    """A passage-sized text of one entity; `group` is shared by documents that are easily confused."""

    id: str
    source: str
    entity: str
    group: str
    text: str
    other_names: tuple[str, ...] = ()
    """Of the same entity."""


@dataclass(frozen=True, slots=True)
class Fact:
    """`answers[0]` stands in the document's text; the others are accepted forms of it.

    `subject` is how a question names what it asks about: the entity, or a definition for which the word is sought.
    """

    relation: str
    entity: str
    subject: str
    answers: tuple[str, ...]
    document: Document


def words_in(needle: str, text: str) -> bool:
    """Whether `needle` stands in `text` as whole words, case aside."""
    return re.search(rf"(?<!\w){re.escape(needle.casefold())}(?!\w)", text.casefold()) is not None


def sentences(text: str) -> list[str]:
    """Sentences by punctuation before a capital; initials and common abbreviations end none."""
    pieces = re.split(
        r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:St|Mt|Dr|Mr|cf|Jr|Sr|ca|vs)\.)(?<!\bMrs\.)\s+(?=[A-Z\"“])", text
    )
    return [piece.strip() for piece in pieces if piece.strip()]


# ------------------------------------------------------------------------------------------------ factbook


_NOT_STATED = re.compile(
    r"\b(?:NA|none|note|unnamed|varies|unknown|vacant|not available|no official)\b|%?NA\b", re.IGNORECASE
)


def factbook_documents(country: str, identifier: str, text: str) -> list[Document]:
    """A country's entry in passage-sized documents, each naming the country and the section.

    Values of more than a document are cut at a sentence or a clause.
    """
    documents: list[Document] = []
    region = identifier.partition("/")[0]
    for section, lines in _sections(text).items():
        for number, body in enumerate(_packed(lines, MAX_DOCUMENT_CHARACTERS - len(country) - len(section) - 4)):
            name = f"factbook/{identifier.rpartition('/')[2]}/{section.lower().replace(' ', '-')}-{number + 1}"
            group = f"factbook {region} {section}"
            documents.append(Document(name, "factbook", country, group, f"{country}, {section}.\n{body}"))
    return documents


def _sections(text: str) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = defaultdict(list)
    for line in text.split("\n"):
        key, separator, value = line.partition(": ")
        section, _, field = key.partition(" - ")
        if separator and field and value.strip():
            sections[section].append(f"{field.replace(' - ', ', ')}: {_plain_value(value)}")
    return sections


def _plain_value(value: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\s*\+\+\s*", "; ", value)).strip("; ")


def _packed(lines: Iterable[str], limit: int) -> Iterator[str]:
    """Lines joined up to `limit` characters; a longer line is cut and begins its own."""
    held = ""
    for line in (piece for whole in lines for piece in _cut(whole, limit)):
        if held and len(held) + len(line) + 1 > limit:
            yield held
            held = ""
        held = f"{held}\n{line}" if held else line
    if held:
        yield held


def _cut(line: str, limit: int) -> Iterator[str]:
    while len(line) > limit:
        place = max(line.rfind(mark, 0, limit) for mark in (". ", "; ", ", "))
        place = place if place > limit // 3 else line.rfind(" ", 0, limit)
        yield line[: place + 1].rstrip()
        line = line[place + 1 :].lstrip()
    yield line


def country_name(text: str) -> str | None:
    """The conventional short form (the long one where there is none); None for what is no single country."""
    fields = _fields(text)
    for form in ("short", "long"):
        name = fields.get(f"Government - Country name - conventional {form} form", "none")
        name = " ".join(re.sub(r"\([^)]*\)|;.*", "", name).split())
        if name and name != "none" and ";" not in fields.get("Government - Country name - conventional short form", ""):
            return _RENAMED.get(name, name)
    return None


_RENAMED = {
    "The Dominican": "Dominican Republic",
    "DRC": "Democratic Republic of the Congo",
    "Congo": "Republic of the Congo",
}
_WITH_ARTICLE = re.compile(
    r"\b(?:Islands|Republic|Republic of the Congo|Kingdom|States|Emirates|States of Micronesia|Territory)$"
)


def country_subject(country: str) -> str:
    """The country as running text names it: with the article that some names have."""
    if country.startswith("The "):
        return f"the {country[4:]}"
    plural = country in ("Philippines", "Netherlands", "Maldives", "Comoros", "Seychelles")
    return f"the {country}" if plural or _WITH_ARTICLE.search(country) else country


def _fields(text: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in text.split("\n") if ": " in line)


_QUANTITY = r"(?P<a>-?\$?[\d,.]+(?: (?:million|billion|trillion))?)"
FACTBOOK_FIELDS: Mapping[str, tuple[str, str]] = {
    "capital": ("Government - Capital - name", r"(?P<a>[^\d(;]+?)(?: \((?P<b>[^\d;)]+)\))?$"),
    "population": ("People and Society - Population", r"(?P<a>[\d,]{4,})(?: \(|$)"),
    "area": ("Geography - Area - total", r"(?P<a>(?P<b>[\d,.]+) sq km)"),
    "land-area": ("Geography - Area - land", r"(?P<a>(?P<b>[\d,.]+) sq km)"),
    "highest-point": (
        "Geography - Elevation extremes - highest point",
        r"(?P<a>[^\d(;,]+?)(?: \((?P<b>[^)\d]+)\))? [\d,]+ m",
    ),
    "highest-elevation": (
        "Geography - Elevation extremes - highest point",
        r"[^\d(;,]+?(?: \([^)\d]+\))? (?P<a>(?P<b>[\d,]+) m)$",
    ),
    "lowest-point": (
        "Geography - Elevation extremes - lowest point",
        r"(?P<a>[^\d(;,]+?)(?: \((?P<b>[^)\d]+)\))? -?[\d,]+ m",
    ),
    "coastline": ("Geography - Coastline", r"(?P<a>(?P<b>[1-9][\d,.]*) km)$"),
    "land-boundaries": ("Geography - Land boundaries - total", r"(?P<a>(?P<b>[1-9][\d,.]*) km)$"),
    "irrigated-land": ("Geography - Irrigated land", r"(?P<a>(?P<b>[1-9][\d,.]*) sq km)"),
    "forest": ("Geography - Land use - forest", r"(?P<a>[\d.]+%)"),
    "comparable-area": (
        "Geography - Area - comparative",
        (r"(?:slightly |about )?(?:smaller|larger) than (?:the )?(?P<a>[A-Z][\w .]+)$"),
    ),
    "adjective": ("People and Society - Nationality - adjective", r"(?P<a>(?!.* or )[A-Z][\w -]+)$"),
    "life-expectancy": (
        "People and Society - Life expectancy at birth - total population",
        r"(?P<a>(?P<b>[\d.]+) years)",
    ),
    "median-age": ("People and Society - Median age - total", r"(?P<a>(?P<b>[\d.]+) years)"),
    "birth-rate": ("People and Society - Birth rate", r"(?P<a>(?P<b>[\d.]+) births/1,000 population)"),
    "death-rate": ("People and Society - Death rate", r"(?P<a>(?P<b>[\d.]+) deaths/1,000 population)"),
    "fertility": ("People and Society - Total fertility rate", r"(?P<a>[\d.]+) children born/woman"),
    "population-growth": ("People and Society - Population growth rate", r"(?P<a>-?[\d.]+%)"),
    "urban-population": ("People and Society - Urbanization - urban population", r"(?P<a>[\d.]+%) of total population"),
    "literacy": ("People and Society - Literacy - total population", r"(?P<a>[\d.]+%)"),
    "infant-mortality": (
        "People and Society - Infant mortality rate - total",
        r"(?P<a>(?P<b>[\d.]+) deaths/1,000 live births)",
    ),
    "obesity": ("People and Society - Obesity - adult prevalence rate", r"(?P<a>[\d.]+%)"),
    "physicians": ("People and Society - Physicians density", r"(?P<a>[\d.]+) physicians/1,000 population"),
    "long-name": ("Government - Country name - conventional long form", r"(?P<a>[A-Z][^;()]+)$"),
    "government": ("Government - Government type", r"(?P<a>[a-z][a-z -]+?)(?:;.*| \(.*)?$"),
    "time-zone": ("Government - Capital - time difference", r"(?P<a>UTC[+-]\d{1,2}(?::\d\d)?)(?= )"),
    "independence-date": ("Government - Independence", r"(?P<a>\d{1,2} [A-Z][a-z]+ \d{4}) \("),
    "independence-from": ("Government - Independence", r"[^;]*?\d{4} \(from (?:the )?(?P<a>[A-Z][A-Za-z ]+)\)$"),
    "holiday": ("Government - National holiday", r"(?P<a>[A-Z][^,;()]+?)(?: \([^)]*\))?, \d{1,2} [A-Z][a-z]+"),
    "holiday-date": (
        "Government - National holiday",
        (
            r"[^,;]+, (?P<a>\d{1,2} (?:January|February|March|April|May|June|July|August"
            r"|September|October|November|December))\b"
        ),
    ),
    "voting-age": ("Government - Suffrage", r"(?P<a>(?P<b>\d\d) years) of age; universal"),
    "head-of-state": (
        "Government - Executive branch - chief of state",
        (
            r"(?:President|King|Queen|Emir|Sultan|Prince|Grand Duke|Emperor) "
            r"(?P<a>[A-Z][\w'-]+(?: (?:[a-z]{2} )?[A-Z][\w'-]*)*) \(since"
        ),
    ),
    "head-of-government": (
        "Government - Executive branch - head of government",
        (
            r"(?:Prime Minister|Premier|Chancellor) (?P<a>[A-Z][\w'-]+(?: (?:[a-z]{2}"
            r" )?[A-Z][\w'-]*)*) \(since"
        ),
    ),
    "anthem": ("Government - National anthem - name", r"\"?(?P<a>[^\"();]+?)\"?(?: \(\"?(?P<b>[^\"()]+?)\"?\))?$"),
    "national-symbol": ("Government - National symbol(s)", r"(?P<a>[a-z][a-z -]+?)(?: \([^)]*\))?; national colors"),
    "currency": ("Economy - Exchange rates", r"(?P<a>[A-Z][A-Za-z ]+?) \((?P<b>[A-Z]{3})\) per US dollar"),
    "currency-code": ("Economy - Exchange rates", r"[A-Z][A-Za-z ]+? \((?P<a>[A-Z]{3})\) per US dollar"),
    "gdp": ("Economy - GDP (purchasing power parity)", rf"{_QUANTITY} \("),
    "gdp-per-head": ("Economy - GDP - per capita (PPP)", rf"{_QUANTITY} \("),
    "exports": ("Economy - Exports", rf"{_QUANTITY} \("),
    "imports": ("Economy - Imports", rf"{_QUANTITY} \("),
    "labor-force": ("Economy - Labor force", r"(?P<a>[\d,.]+(?: million)?) \("),
    "unemployment": ("Economy - Unemployment rate", r"(?P<a>[\d.]+%) \("),
    "inflation": ("Economy - Inflation rate (consumer prices)", r"(?P<a>-?[\d.]+%) \("),
    "poverty": ("Economy - Population below poverty line", r"(?P<a>[\d.]+%)"),
    "electricity": ("Energy - Electricity - production", r"(?P<a>[\d,.]+ (?:million |billion |trillion )?kWh)"),
    "internet-code": ("Communications - Internet country code", r"(?P<a>\.[a-z]{2})$"),
    "calling-code": ("Communications - Telephone system - international", r"country code - (?P<a>\d{1,4})(?=;)"),
    "internet-users": ("Communications - Internet users - percent of population", r"(?P<a>[\d.]+%)"),
    "mobile-phones": (
        "Communications - Telephones - mobile cellular - total",
        r"(?P<a>[\d,.]+(?: million| billion)?)$",
    ),
    "airports": ("Transportation - Airports", r"(?P<a>[\d,]+)(?= \()"),
    "roadways": ("Transportation - Roadways - total", r"(?P<a>(?P<b>[\d,]+) km)"),
    "railways": ("Transportation - Railways - total", r"(?P<a>(?P<b>[\d,.]+) km)"),
}
"""Relation → (field of the flattened entry, form of a value that can be asked for)."""


def factbook_facts(country: str, identifier: str, text: str) -> tuple[list[Document], list[Fact]]:
    """A country's documents and what they state in one of the forms of `FACTBOOK_FIELDS`."""
    documents, fields, facts = factbook_documents(country, identifier, text), _fields(text), []
    for relation, (field, pattern) in FACTBOOK_FIELDS.items():
        value = _plain_value(fields.get(field, ""))
        found = re.match(pattern, value)
        if found is None or _NOT_STATED.search(found["a"]):
            continue
        label = f"{field.partition(' - ')[2].replace(' - ', ', ')}: {value}"[:60]
        holding = [document for document in documents if label in document.text]
        answers = _distinct(found["a"].strip(), (found.groupdict().get("b") or "").strip())
        if len(holding) == 1 and words_in_any(answers[:1], holding[0].text) and _short(answers[0]):
            answers = _distinct(*answers, *_OTHER_FORMS.get(answers[0], ()))
            facts.append(Fact(relation, country, country_subject(country), answers, holding[0]))
    return documents, facts


_OTHER_FORMS = {
    "UK": ("United Kingdom", "Great Britain", "Britain"),
    "US": ("United States",),
    "Soviet Union": ("USSR",),
}


def _distinct(*answers: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(answer for answer in answers if answer))


def words_in_any(needles: Sequence[str], text: str) -> bool:
    """Whether one of the needles stands in the text, symbols of currencies and signs included."""
    return any(needle in text for needle in needles)


def _short(answer: str) -> bool:
    return 0 < len(answer.split()) <= MAX_ANSWER_WORDS and len(answer) <= 48


# --------------------------------------------------------------------------------------------- dictionaries


_BASE64 = {c: i for i, c in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}


def dictionary_entries(folder: Path, name: str) -> list[str]:
    """The entries of a dictd dictionary (`NAME.index`, `NAME.dict.dz`) in the order of the file, each once.

    Raises CorpusError where the two files are not there.
    """
    index, data = folder / f"{name}.index", folder / f"{name}.dict.dz"
    if not index.is_file() or not data.is_file():
        raise CorpusError(
            f"{folder} holds no {name}.index and {name}.dict.dz; expected a dictionary of the Debian package "
            f"dict-{name}: run `apt-get download dict-{name}` and `dpkg-deb -x` it into {_package_folder(folder)}"
        )
    text = gzip.decompress(data.read_bytes())
    spans = {
        (_number(offset), _number(length))
        for line in index.read_text(encoding="utf-8").splitlines()
        if not line.startswith("00") and line.count("\t") >= 2
        for _, offset, length in [line.split("\t")[:3]]
    }
    return [text[offset : offset + length].decode("utf-8", "replace") for offset, length in sorted(spans)]


def _package_folder(folder: Path) -> Path:
    return folder.parents[2] if folder.parts[-3:] == ("usr", "share", "dictd") else folder


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _BASE64[digit]
    return value


_SYNSET = re.compile(
    r"^(?P<head>[^\n]+)\n\s+(?P<part>n|v|adj|adv) 1: (?P<gloss>[^\[\"]+?)(?:;"
    r" \"[^\[]*)?(?: ?\[(?P<more>.*)\])?$",
    re.DOTALL,
)
_PARTS = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}


def wordnet_facts(entries: Iterable[str]) -> tuple[list[Document], list[Fact]]:
    """One document a synset of words with a single sense; facts: the word for a gloss, a synonym, the genus."""
    documents: dict[str, Document] = {}
    facts: list[Fact] = []
    for entry in entries:
        found = _SYNSET.match(entry.strip())
        if found is None or re.search(r"^\s+(?:n |v |adj |adv )?2:", entry, re.MULTILINE):
            continue
        gloss = _unbroken(found["gloss"]).rstrip(" ;")
        names = _names(found["head"].strip(), found["more"] or "")
        if _LIFE.search(gloss):  # the full name of a person, not the family name
            names.sort(key=len, reverse=True)
        head = names[0]
        key = f"{gloss} {sorted(names)}"
        if key in documents or not _usable(head, gloss):
            continue
        identifier = f"wordnet/{head.replace(' ', '_')}"
        text = f"{head} ({_PARTS[found['part']]}): {gloss}."
        text += f" Also called {', '.join(names[1:])}." if names[1:] else ""
        group = f"wordnet {_genus(gloss) or found['part']}"
        documents[key] = Document(identifier, "wordnet", head, group, text, tuple(names[1:]))
        facts.extend(_synset_facts(head, names, gloss, documents[key]))
    return list(documents.values()), facts


_LIFE = re.compile(r" \((?:born in )?(?P<born>1\d{3})(?:-(?P<died>[12]\d{3}))?\)$")


def _unbroken(text: str) -> str:
    """On one line; a hyphen at the end of a line belongs to the word."""
    return re.sub(r"(?<=\w)- (?=\w)", "-", " ".join(text.split()))


def _names(head: str, more: str) -> list[str]:
    group = re.search(r"syn: (.*?)(?:\]|$)", _unbroken(more))
    return list(dict.fromkeys([head, *re.findall(r"\{([^}]+)\}", group[1] if group else "")]))


def _usable(head: str, gloss: str) -> bool:
    own = set(re.findall(r"[a-z]{4,}", head.casefold()))
    shares = any(word[:5] in gloss.casefold() for word in own)
    return (
        head.isascii()
        and 5 <= len(gloss.split()) <= 32
        and len(head.split()) <= 3
        and not shares
        and "genus" not in head
    )


def _genus(gloss: str) -> str | None:
    found = re.match(
        r"(?:\([^)]*\) )?(?:an?|any|the|one|genus of) ((?:[a-z-]+ ){1,4}?)(?:of|that|which"
        r"|who|with|used|in|from|for|having|made|by|on|to|containing)\b",
        gloss,
    )
    return found[1].strip() if found else None


def _synset_facts(head: str, names: Sequence[str], gloss: str, document: Document) -> Iterator[Fact]:
    life = _LIFE.search(gloss)
    if life is not None and " " in head:
        years = {"birth-year": life["born"], "death-year": life["died"]}
        yield from (Fact(name, head, head, (year,), document) for name, year in years.items() if year)
        return
    yield Fact("word-for-gloss", head, gloss, tuple(names), document)
    if names[1:] and not any(words_in(other, head) or words_in(head, other) for other in names[1:]):
        yield Fact("synonym", head, head, tuple(names[1:]), document)
    if (genus := _genus(gloss)) and document.text.split("(")[1].startswith("noun"):
        yield Fact("genus", head, head, (genus,), document)


_FOLDOC = re.compile(
    r"^(?P<heads>(?:\S[^\n]*\n)+)\n\s+(?:<(?P<area>[^>]+)> )?(?:\((?P<names>[^)]+)\) )?(?P<text>.+)$", re.DOTALL
)


def foldoc_facts(entries: Iterable[str]) -> tuple[list[Document], list[Fact]]:
    """One document an entry with one sense; facts: what an abbreviation stands for, the abbreviation, the area."""
    documents, facts = [], []
    for entry in entries:
        found = _FOLDOC.match(entry.strip("\n") + "\n")
        if found is None or re.search(r"^\s+2\. ", entry, re.MULTILINE) or len(found["text"].split()) < 8:
            continue
        head = found["heads"].split("\n")[0].strip()
        body = _foldoc_text(found["text"])
        if not head.isascii() or len(head.split()) > 5 or len(body) < 60:
            continue
        short = next((name for name in (found["names"] or "").split(", ") if abbreviates(name, head)), None)
        area = found["area"] if found["area"] and "," not in found["area"] else None
        text = f"{head}{f' ({short})' if short else ''}{f', {area}' if area else ''}: {body}"
        document = Document(f"foldoc/{head.replace(' ', '_')}", "foldoc", head, f"foldoc {area}", text)
        documents.append(document)
        if short and head.casefold() not in ("", short.casefold()):
            facts.append(Fact("stands-for", short, short, (head,), document))
            facts.append(Fact("abbreviation", head, head, (short,), document))
        if area and not words_in(area, head):
            facts.append(Fact("area-of-computing", head, head, (area,), document))
    return documents, facts


def _foldoc_text(text: str) -> str:
    first = " ".join(re.split(r"\n\s*\n", text)[0].split())
    first = re.sub(r"\{([^}]*)\}", r"\1", re.sub(r"\s*\{?\(?(?:https?|ftp)://[^\s)}]*\)?\}?\.?", "", first))
    kept = ""
    for sentence in sentences(first):
        if kept and len(kept) + len(sentence) > MAX_DOCUMENT_CHARACTERS - 120:
            break
        kept = f"{kept} {sentence}".strip()
    return kept[:MAX_DOCUMENT_CHARACTERS]


def abbreviates(short: str, name: str) -> bool:
    """Whether `short` is made of the initials of `name`'s words, in order (small words may be left out)."""
    if not re.fullmatch(r"[A-Z][A-Z0-9]{1,7}", short):
        return False
    words = re.findall(r"[A-Za-z0-9]+", name)
    initials = "".join(word[0] for word in words).upper()
    content = "".join(word[0] for word in words if word.lower() not in ("of", "the", "and", "for", "to", "in")).upper()
    return len(words) > 1 and short in (initials, content)


# ---------------------------------------------------------------------------------------------------- leads


_CAPITALISED = r"(?:(?:St|Mt)\.|(?:[A-Z]\.)+|[A-Z][\w'’-]+)"
_SMALL_WORDS = r"(?:(?:de|van|von|der|da|di|del|la|le|of|ibn|al|the|and) ){0,2}"
_NAME = rf"{_CAPITALISED}(?: {_SMALL_WORDS}{_CAPITALISED})*"
_PERSON = (
    r"(?:[A-Z][\w'’-]+|[A-Z]\.)(?: (?:(?:de|van|von|der|da|di|del|la|le|ibn|al) ){0,2}(?:[A-Z][\w'’-]+|[A-Z]\.)){1,3}"
)
_NATIONS = (
    "American|English|British|Scottish|Welsh|Irish|French|German|Italian|Spanish"
    "|Portuguese|Dutch|Flemish|Belgian|Swiss|"
    "Austrian|Hungarian|Polish|Czech|Slovak|Russian|Soviet|Ukrainian|Swedish|Norwegian|Danish|Finnish|Icelandic|Greek|"
    "Roman|Byzantine|Turkish|Ottoman|Persian|Iranian|Arab|Egyptian|Indian|Pakistani"
    "|Bangladeshi|Chinese|Japanese|Korean|"
    "South Korean|Vietnamese|Thai|Indonesian|Filipino|Mongolian|Israeli|Canadian"
    "|Mexican|Cuban|Brazilian|Argentine|Chilean|"
    "Peruvian|Colombian|Venezuelan|Australian|New Zealand|South African|Nigerian|Kenyan|Ethiopian|Ghanaian|Senegalese|"
    "Moroccan|Algerian|Tunisian|Romanian|Bulgarian|Serbian|Croatian|Slovene|Prussian"
    "|Venetian|Florentine|Bohemian|Jamaican|"
    "Bengali|Catalan|Lithuanian|Latvian|Estonian|Georgian|Armenian|Athenian|Puerto Rican"
)
_NATIONALITY = rf"(?:{_NATIONS})(?:[- ](?:born )?(?:{_NATIONS}))?"
_ROLES = (
    r"(?:(?!and |the |of |in |was |is |who )[a-z-]+ ){0,2}[a-z-]*(?:ist|er|or|ian|ect"
    r"|ess|poet|king|queen|saint|monk|general|chef|architect|mathematician|"
    r"physicist|chemist|politician|statesman|singer|actor|athlete|player|pilot|nurse|critic|cleric|man|woman|friar)"
)
_WORK = (
    r"(?:novel|novella|play|tragedy|comedy|poem|epic poem|book|opera|ballet|film"
    r"|musical|painting|fresco|sculpture|song|album|symphony|short story|treatise"
    r"|essay|comic book series|television series|video game)"
)
_YEAR = r"(?P<a>1\d{3}|20[0-2]\d)"
_PLACE_KIND = (
    r"(?:city|town|village|municipality|port|river|lake|mountain|volcano|island"
    r"|peninsula|desert|national park|province|region|county|district|state|university"
    r"|museum|temple|cathedral|mosque|castle|palace|bridge|airport|stadium"
    r"|archaeological site|commune|borough)"
)

LEAD_PATTERNS: Mapping[str, str] = {
    "nationality": rf"\b(?:was|is) an? (?P<a>{_NATIONALITY}) (?:[a-z-]+ )*?{_ROLES}\b",
    "profession": (
        rf"\b(?:was|is) an? (?:{_NATIONALITY}) (?:former )?(?P<a>{_ROLES}(?:,? (?:and"
        rf" )?{_ROLES})*)(?=[,.;]| (?:who|whose|and|known|best|from|of|active|in|during"
        rf"|noted)\b)"
    ),
    "capital-of": (
        rf"^[^.,]* is the (?:[a-z-]+ )?capital(?: city)?(?: and (?:the )?(?:largest|most"
        rf" populous|second-largest)[a-z ]*)? of (?:the )?(?:[A-Z][a-z]+ (?:province|state"
        rf"|region) of )?(?P<a>{_NAME})(?=[.,;]| and | with | since )"
    ),
    "located-in": (
        rf"^[^.]*? is an? (?:[\w-]+ ){{0,4}}?{_PLACE_KIND} (?:and (?:[a-z-]+ ){{1,4}})?"
        rf"(?:located |situated )?in (?:the )?(?:[a-z-]+ )*(?P<a>{_NAME}(?:, {_NAME})?)"
        rf"(?=[.;]|, (?:it|and|on|the|with|known|at|near|about|located|situated|which)\b|"
        rf" and | on | with | near | at | that | which )"
    ),
    "capital-city": (
        rf"\b(?:Its|The|the|its) (?:[a-z]+ )?capital(?: and (?:largest|most populous)"
        rf" city)? is (?P<a>{_NAME})(?=[.,;]| and | with | on | which )"
    ),
    "largest-city": (
        rf"\b(?:Its|The|the|its) (?:largest|most populous) city is (?P<a>{_NAME})(?=[.,;]|"
        rf" and | with | on )"
    ),
    "population-of-place": (
        r"\bpopulation (?:of|was|is) (?:about |around |over |approximately |nearly |almost"
        r" |more than |roughly |estimated at )?(?P<a>\d[\d,.]*\d(?: (?:million|billion))?)"
        r"(?![\d%])"
    ),
    "element-symbol": r"it has symbol (?P<a>[A-Z][a-z]?) and atomic number",
    "atomic-number": r"atomic number (?P<a>\d{1,3})\b",
    "author": (
        rf"^[^.]* (?:is|was) (?:an?|the) [^.]*?\b{_WORK}\b[^.,]*? by (?:the )?"
        rf"(?:{_NATIONALITY} )?(?:[a-z-]+ ){{0,3}}(?P<a>{_PERSON})(?=[.,;]| and | in | that"
        rf" | which | from | for | about | \()"
    ),
    "director": (
        rf"\b(?:directed|composed|designed|painted|sculpted) by (?:the )?(?:{_NATIONALITY}"
        rf" )?(?:[a-z-]+ ){{0,3}}(?P<a>{_PERSON})(?=[.;]|, | and (?!{_PERSON})| in | from |"
        rf" for )"
    ),
    "founder": (
        rf"\b(?:founded|invented|discovered|created|developed|introduced|established"
        rf"|proposed|coined)(?: in \d{{4}})? by (?:the )?(?:{_NATIONALITY} )?(?:[a-z-]+"
        rf" ){{0,3}}(?P<a>{_PERSON})(?=[.;]|, (?!{_PERSON})| in | from | for | at )"
    ),
    "year-published": rf"\b(?:first )?published in (?:[A-Z][a-z]+ )?{_YEAR}\b",
    "year-released": rf"\b(?:released|premiered) (?:in|on) (?:[A-Z][a-z]+ )?{_YEAR}\b",
    "year-founded": rf"\b(?:founded|established|created|formed) in (?:[A-Z][a-z]+ )?{_YEAR}\b",
    "year-discovered": rf"\b(?:discovered|first isolated|invented) in {_YEAR}\b",
    "year-built": rf"\b(?:built|completed|constructed|opened) in {_YEAR}\b",
    "year-signed": (
        rf"\b(?:signed|adopted|fought|ratified) (?:in|on) (?:\d{{1,2}} )?(?:[A-Z][a-z]+ )?"
        rf"(?:\d{{1,2}}, )?{_YEAR}\b"
    ),
    "reign-start": (
        r"\b(?:was|as|ruled|reigned|reigning|ruling) [^.]*?\bfrom (?:[A-Z][a-z]+ )?"
        r"(?P<a>\d{2,4}(?: BCE?| AD)?) (?:to|until) (?:his death in |her death in "
        r"|[A-Z][a-z]+ )?\d{2,4}\b(?! BC)"
    ),
    "reign-end": (
        r"\b(?:was|as|ruled|reigned|reigning|ruling) [^.]*?\bfrom (?:[A-Z][a-z]+ )?\d{2,4}"
        r"(?: BCE?| AD)? (?:to|until) (?:his death in |her death in |[A-Z][a-z]+ )?"
        r"(?P<a>\d{2,4}(?: BCE?| AD)?)\b"
    ),
    "other-name": (
        r"^[^.,;()]*, (?:also|commonly|better|formerly|or|sometimes|popularly) (?:known as"
        r"|called|named|spelled) (?:the |simply )?(?P<a>[^,.;()]{3,40}?)(?:,| is | was |"
        r" are )"
    ),
    "official-name": r"^[^.,;()]*, officially (?:known as )?(?:the )?(?P<a>[A-Z][^,.;()]{5,44}?), (?:is|was)",
    "taxon-family": r"\b(?:in|of) the (?:[a-z-]+ )?(?:family|subfamily) (?P<a>[A-Z][a-z]+(?:idae|aceae|inae|oideae))\b",
    "taxon-order": r"\b(?:in|of) the (?:[a-z-]+ )?order (?P<a>[A-Z][a-z]+)\b",
    "taxon-genus": r"\b(?:in|of) the genus (?P<a>[A-Z][a-z]+)\b",
    "field-of-study": (
        r"^In (?:the field of )?(?P<a>(?:[a-z]+ ){0,2}[a-z]*(?:ics|ogy|stry|omy|aphy|cine"
        r"|law|music|theory|sciences?|arts|algebra|analysis|calculus|computing|grammar"
        r"|religion|philosophy|architecture|engineering|finance)), (?=an? |the |[A-Z])"
    ),
    "branch-of": (
        r"^[^.,;]*? is (?:an?|the) (?:major |main |sub)?(?:branch|field|subfield|area"
        r"|discipline) of (?P<a>[a-z]+(?: [a-z]+){0,2}?)(?=[.,;]| that | which | concerned"
        r" | and | dealing | in | used )"
    ),
    "born-in": (
        rf"\b[Bb]orn (?:and raised )?in (?P<a>(?:{_NAME})(?:, {_NAME})?)(?=[.;]|, (?:he|she"
        rf"|his|her|in|to|on|and|[A-Z]\w+ (?:was|moved|began|grew|studied))\b| in | to |"
        rf" and )"
    ),
    "named-after": (
        rf"\bnamed (?:after|for|in honou?r of) (?:the )?(?:{_NATIONALITY} )?(?:[a-z-]+"
        rf" ){{0,3}}(?P<a>{_NAME})(?=[.,;]| who | and | in | because )"
    ),
    "word-origin": (
        r"\b(?:word|name|term)(?: [\"“]?\w+[\"”]?)? (?:comes|derives|is derived|originates"
        r"|is|was taken|was derived) from (?:the )?(?P<a>(?:Old |Middle |Ancient "
        r"|Classical |Medieval )?(?:Greek|Latin|French|Arabic|Sanskrit|German|Italian"
        r"|Spanish|Persian|Portuguese|Dutch|English|Norse|Japanese|Chinese|Hebrew"
        r"|Turkish))\b"
    ),
    "nobel-year": rf"\b(?:won|awarded|received|recipient of|shared) the {_YEAR} Nobel\b",
    "creator-of": (
        r"\b(?:best|widely|chiefly|primarily|most|mainly) known (?:for|as the author of) "
        r"(?:his|her|the|their) (?:[a-z-]+ ){0,5}(?P<a>[A-Z][\w'’-]+(?: (?:(?:of|the|and"
        r"|in|a) ){0,2}[A-Z][\w'’-]+){0,5})(?=[.,;]| and | \()"
    ),
}
"""Relation → how a lead states it. A relation is asked for only where its pattern matches once in the lead."""

_FIRST_SENTENCE = {"author", "nationality", "taxon-family", "taxon-order", "taxon-genus"}
"""Relations that a later sentence may state of something else."""
_PEOPLE = {"nationality", "profession", "born-in", "nobel-year", "creator-of", "reign-start", "reign-end"}


def lead_document(record: Mapping[str, str]) -> Document:
    """A lead's whole sentences up to `MAX_DOCUMENT_CHARACTERS`."""
    text = " ".join(record["text"].split())
    kept = ""
    for sentence in sentences(text):
        if kept and len(kept) + 1 + len(sentence) > MAX_DOCUMENT_CHARACTERS:
            break
        kept = f"{kept} {sentence}".strip()
    title = re.sub(r" \([^)]*\)$", "", record["title"])
    return Document(record["id"], "leads", title, f"leads {_lead_group(kept)}", kept[:MAX_LEAD_CHARACTERS])


def _lead_group(text: str) -> str:
    found = re.search(r" (?:is|was|are|were) (?:an?|the|one of the) (?:[\w-]+ ){0,3}?([a-z]{4,})(?=[,. ])", text)
    return found[1] if found else "other"


def lead_facts(document: Document) -> Iterator[Fact]:
    """What the lead states about its title in one of the forms of `LEAD_PATTERNS`."""
    found_sentences = sentences(document.text)
    if not found_sentences or not _names_subject(document.entity, found_sentences[0]):
        return
    person = _OF_PERSON.search(document.text) is not None
    for relation, pattern in LEAD_PATTERNS.items():
        matches = list(re.finditer(pattern, document.text))
        if len(matches) != 1 or (relation in _PEOPLE and not person):
            continue
        answer = matches[0]["a"].strip(" ,.")
        if not _about_title(relation, matches[0].start(), document) or not _short(answer):
            continue
        if words_in(answer, document.entity) or words_in(document.entity, answer):
            continue
        if relation.startswith("reign") and not _one_reign(document.text):
            continue
        answers = _lead_answers(relation, answer)
        if answers and _short(answers[0]):
            yield Fact(relation, document.entity, _subject(document), answers, document)


_OF_PERSON = re.compile(r"\b(?:[Hh]e|[Hh]is|[Hh]im|[Ss]he|[Hh]er) ")
_OFFICE = re.compile(
    r"\b(?:king|queen|emperor|empress|president|prime minister|pope|sultan|shah"
    r"|ts?z?ar|ruler|ruled|chancellor|caliph|reign\w*|"
    r"monarch|khan|pharaoh|duke|governor|minister|secretary|leader|consul|shogun|regent|dictator|mayor)\b",
    re.IGNORECASE,
)


def _one_reign(text: str) -> bool:
    """Whether the text speaks of an office, and of one time in it."""
    return _OFFICE.search(text) is not None and len(re.findall(r"\bfrom (?:[A-Z][a-z]+ )?\d{2,4}\b", text)) == 1


def _subject(document: Document) -> str:
    """The title as the lead's first sentence writes it: common nouns in lower case, "the" before a river."""
    found = re.search(rf"(?:\b(the) | )({re.escape(document.entity)})\b", document.text[:120], re.IGNORECASE)
    if found is None:
        return document.entity
    return f"the {found[2]}" if found[1] else found[2]


def _names_subject(title: str, sentence: str) -> bool:
    words = [word for word in re.findall(r"\w+", title.casefold()) if len(word) > 2]
    return bool(words) and all(word in sentence[:160].casefold() for word in words)


_PRONOUN = re.compile(
    r"(?:It|He|She|They|The (?:novel|book|film|play|city|town|opera|song|album|poem|university|company)) "
)


def _about_title(relation: str, place: int, document: Document) -> bool:
    """Whether the sentence that holds `place` speaks of the title, as far as its beginning tells."""
    start = 0
    for number, sentence in enumerate(sentences(document.text)):
        end = document.text.index(sentence, start) + len(sentence)
        if place < end:
            return number == 0 or (relation not in _FIRST_SENTENCE and _begins(sentence, document.entity))
        start = end
    return False


def _begins(sentence: str, title: str) -> bool:
    own = sentence.casefold().startswith((title.casefold(), f"the {title.casefold()}"))
    return (
        own
        or _PRONOUN.match(sentence) is not None
        or sentence.startswith(("Its ", "Born ", "Named ", "The word ", "The name ", "The term ", "In 2"))
    )


def _lead_answers(relation: str, answer: str) -> tuple[str, ...]:
    if relation in ("profession", "located-in", "born-in"):
        return _distinct(answer, *re.split(r", and |, | and ", answer))
    if relation == "other-name":
        names = [re.sub(r"^(?:an?|the|simply|just) ", "", name) for name in re.split(r" or | and ", answer)]
        return () if len(names) > 2 else _distinct(*names, answer)
    return (answer,)
