"""Filters over metadata, judged by the same conditions worked out in plain Python."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refrag_core import metadata_columns
from refrag_core.errors import FilterError
from refrag_core.metadata_columns import MetadataColumns
from refrag_core.predicate import parse_predicate

Metadata = dict[str, Any]
Truth = bool | None


def columns_of(documents: Sequence[Metadata], shards: int = 1) -> MetadataColumns:
    """The documents' metadata in so many shards; their ids are `doc-0`, `doc-1`, …"""
    parts = np.array_split(np.arange(len(documents)), shards)

    def read(column: str) -> list[pa.ChunkedArray]:
        values = {"metadata": lambda n: json.dumps(documents[n], ensure_ascii=False), "document_id": "doc-{}".format}
        return [pa.chunked_array([[values[column](int(n)) for n in part]], pa.string()) for part in parts]

    return MetadataColumns(read)


def chosen(documents: Sequence[Metadata], text: str) -> list[int]:
    return np.flatnonzero(columns_of(documents).select(parse_predicate(text))).tolist()


LIBRARY: list[Metadata] = [
    {"lang": "en", "year": 2021, "draft": False, "tags": ["a", "b"], "author": {"name": "Ann"}},
    {"lang": "de", "year": 2019, "draft": True, "tags": []},
    {"lang": "en", "year": "2021", "my field": 1.5, "a/b~c": 1},
    {"lang": None, "year": 2022.5, "tags": [1, 2.0, "1"]},
    {},
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lang = 'en' and year > 2020", [0]),
        ("lang = 'en' or year > 2020", [0, 2, 3]),
        ("year = 2021", [0]),
        ("year = '2021'", [2]),
        ("year <> 2021", [1, 3]),
        ("not year = 2021", [1, 3]),
        ("lang is null", [3, 4]),
        ("lang is not null", [0, 1, 2]),
        ("draft", [1]),
        ("not draft", [0]),
        ("draft is false", [0]),
        ("'a' in tags", [0]),
        ("not 'a' in tags", [1, 3]),
        ("1 in tags", [3]),
        ("contains(tags, 2)", [3]),
        ("'1' in tags", [3]),
        ("author.name like 'A%'", [0]),
        ('"my field" between 1 and 2', [2]),
        ('"a/b~c" = 1', [2]),
        ("document_id in ('doc-1', 'doc-4')", [1, 4]),
        ("document_id = 'doc-9'", []),
        ("upper(lang) = 'EN' and length(lang) = 2", [0, 2]),
    ],
)
def test_what_a_filter_means(text: str, expected: list[int]) -> None:
    assert chosen(LIBRARY, text) == expected


def test_shards_and_blocks_follow_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [{"year": number} for number in range(100)]
    monkeypatch.setattr(metadata_columns, "BLOCK_ROWS", 30)
    found = columns_of(documents, shards=7).select(parse_predicate("year in (0, 29, 30, 64, 99)"))
    assert np.flatnonzero(found).tolist() == [0, 29, 30, 64, 99]


def test_rows_stay_in_place_whatever_the_threads_do() -> None:
    """Without an order of its own, one query in some forty mixed the rows of many shards up."""
    documents = [{"year": number} for number in range(3000)]
    wanted = parse_predicate("year in (0, 29, 30, 64, 99, 2500)")
    for _ in range(40):
        found = columns_of(documents, shards=60).select(wanted)
        assert np.flatnonzero(found).tolist() == [0, 29, 30, 64, 99, 2500]


def test_whole_numbers_are_exact_to_64_bits() -> None:
    documents = [{"id": number} for number in (2**53, 2**53 + 1, 2**63 - 1, -(2**63))]
    assert chosen(documents, f"id = {2**53 + 1}") == [1]
    assert chosen(documents, f"id > {2**63 - 2}") == [2]
    assert chosen(documents, "id < 0") == [3]
    assert chosen([*documents, {"id": 0.5}, {"id": 2**64}], "id < 1") == [3, 4]


def test_an_unknown_field_names_those_that_there_are() -> None:
    with pytest.raises(FilterError) as caught:
        chosen(LIBRARY, "langg = 'en'")
    assert str(caught.value) == (
        "the filter \"langg = 'en'\" names the field 'langg', which no document has; expected one of: "
        "document_id, a/b~c, author, draft, lang, my field, tags, year"
    )


def test_a_list_of_fields_is_not_endless() -> None:
    with pytest.raises(FilterError, match=r"document_id, field-000, .*, field-038 and 61 more$"):
        chosen([{f"field-{number:03d}": 1 for number in range(100)}], "x = 1")


def test_a_field_that_is_null_everywhere_exists() -> None:
    assert chosen([{"a": None}, {}], "a is null") == [0, 1]
    with pytest.raises(FilterError, match="field 'a' for numbers, but it holds nothing but null in this index"):
        chosen([{"a": None}], "a = 1")


@pytest.mark.parametrize("text", ["1 = 1", "true", "'a' = 'a'"])
def test_a_filter_without_a_field(text: str) -> None:
    with pytest.raises(FilterError, match="names no field; expected a condition over at least one"):
        chosen(LIBRARY, text)


def test_decoding_happens_once_a_field_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [{"a": number, "b": str(number)} for number in range(1000)]
    decoded: list[Any] = []
    run = metadata_columns._run

    def counted(sql: str, table: pa.Table, parameters: list[Any]) -> pa.Table:
        decoded.extend(parameters if sql == metadata_columns._DECODE else [])
        return run(sql, table, parameters)

    monkeypatch.setattr(metadata_columns, "_run", counted)
    columns = columns_of(documents)
    for text in ("a = 1", "a > 1", "b = '2'", "a < 5 and b > '3'"):
        columns.select(parse_predicate(text))
    assert decoded == ["/a", "/b"]
    monkeypatch.setattr(metadata_columns, "CACHED_BYTES", 1)
    columns.select(parse_predicate("a = 1"))  # now only the last one used is kept
    columns.select(parse_predicate("a = 2"))
    columns.select(parse_predicate("b = '2'"))
    assert decoded == ["/a", "/b", "/b"]


def test_the_database_can_reach_nothing() -> None:
    """Were text of a user's ever to get there all the same."""
    connection = metadata_columns._database().cursor()
    for sql in (
        "SELECT * FROM read_text('/etc/hostname')",
        "INSTALL httpfs",
        "SET threads = 1",
        "SELECT * FROM LIBRARY",
    ):
        with pytest.raises(metadata_columns._duckdb().Error):
            connection.execute(sql)


# --- any condition over any metadata -----------------------------------------------------------------

FIELDS = ("a", "b", "my field")
TEXTS = st.text("aBc%_é'\"\\ -;", max_size=4)
NUMBERS = st.integers(-(2**53), 2**53) | st.floats(-1e6, 1e6) | st.sampled_from([0, 1, 2, 0.5, -0.0])
VALUES = st.none() | TEXTS | NUMBERS | st.booleans() | st.lists(TEXTS | st.integers(0, 3), max_size=3)
DOCUMENTS = st.lists(st.dictionaries(st.sampled_from(FIELDS), VALUES), max_size=12)
EVERY_TYPE: list[Metadata] = [dict.fromkeys(FIELDS, value) for value in ("a", 1.5, True, ["a"])]


def typed(value: Any, kind: str) -> Any:
    """The value where it is of the type, else None: what SQL's NULL stands for."""
    types: dict[str, tuple[type, ...]] = {"text": (str,), "number": (int, float), "flag": (bool,), "list": (list,)}
    fits = isinstance(value, types[kind]) and (kind == "flag") == isinstance(value, bool)
    return value if fits else None


def known(function: Callable[..., bool], *operands: Any) -> Truth:
    return None if any(operand is None for operand in operands) else function(*operands)


COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": lambda a, b: a == b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def literal(value: Any) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def quoted(name: str) -> str:
    return f'"{name}"' if " " in name else name


def like(value: str, pattern: str, *, fold: bool) -> bool:
    parts = {"%": ".*", "_": "."}
    expression = "".join(parts.get(character, re.escape(character)) for character in pattern)
    return re.fullmatch(expression, value, re.DOTALL | (re.IGNORECASE if fold else 0)) is not None


Condition = tuple[str, Callable[[Metadata], Truth]]


@st.composite
def leaves(draw: st.DrawFn) -> Condition:
    """One comparison, as SQL and as a function."""
    name = draw(st.sampled_from(FIELDS))
    kind = draw(st.sampled_from(("text", "number", "flag")))
    values = {"text": TEXTS, "number": NUMBERS, "flag": st.booleans()}[kind]
    one, two = draw(values), draw(values)
    sign = draw(st.sampled_from(sorted(COMPARISONS)))
    field, compare = quoted(name), COMPARISONS[sign]

    def of(document: Metadata) -> Any:
        return typed(document.get(name), kind)

    forms: list[Condition] = [
        (f"{field} {sign} {literal(one)}", lambda d: known(compare, of(d), one)),
        (f"{literal(one)} {sign} {field}", lambda d: known(compare, one, of(d))),
        (
            f"{field} between {literal(one)} and {literal(two)}",
            lambda d: known(lambda v: one <= v <= two, of(d)),
        ),
        (f"{field} in ({literal(one)}, {literal(two)})", lambda d: known(lambda v: v in (one, two), of(d))),
        (f"{field} not in ({literal(one)})", lambda d: known(lambda v: v != one, of(d))),
        (f"{field} is null", lambda d: d.get(name) is None),
        (f"{field} is not null", lambda d: d.get(name) is not None),
    ]
    if kind == "text":
        forms += [
            (f"{field} like {literal(one)}", lambda d: known(lambda v: like(v, one, fold=False), of(d))),
            (f"{field} ilike {literal(one)}", lambda d: known(lambda v: like(v, one, fold=True), of(d))),
            (f"{field} not like {literal(one)}", lambda d: known(lambda v: not like(v, one, fold=False), of(d))),
            (f"lower({field}) = {literal(one)}", lambda d: known(lambda v: v.lower() == one, of(d))),
            (f"length({field}) = {len(one)}", lambda d: known(lambda v: len(v) == len(one), of(d))),
            (f"{literal(one)} in {field}", lambda d: known(lambda v: one in v, typed(d.get(name), "list"))),
        ]
    if kind == "flag":
        forms += [
            (field, of),
            (f"{field} is {literal(one)}", lambda d: of(d) is one),
        ]
    return draw(st.sampled_from(forms))


def negated(condition: Condition) -> Condition:
    text, holds = condition
    return f"not ({text})", lambda d: None if holds(d) is None else not holds(d)


def joined(pair: tuple[Condition, Condition], word: str) -> Condition:
    (one, first), (two, second) = pair
    decisive = word == "or"

    def holds(document: Metadata) -> Truth:
        truths = (first(document), second(document))
        if decisive in truths:
            return decisive
        return None if None in truths else not decisive

    return f"({one}) {word} ({two})", holds


CONDITIONS = st.recursive(
    leaves(),
    lambda inner: st.one_of(
        inner.map(negated),
        st.tuples(inner, inner).map(lambda pair: joined(pair, "and")),
        st.tuples(inner, inner).map(lambda pair: joined(pair, "or")),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, CONDITIONS)
def test_any_condition_selects_what_python_says(documents: list[Metadata], condition: Condition) -> None:
    text, holds = condition
    everything = [*documents, *EVERY_TYPE]
    assert chosen(everything, text) == [n for n, document in enumerate(everything) if holds(document) is True]
