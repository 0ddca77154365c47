"""What a filter may say, and that nothing else gets through: no statement, no function, no text of the user."""

import subprocess
import sys

import pytest

from refrag_core.errors import FilterError, MissingExtraError
from refrag_core.predicate import DOCUMENT_ID, MAX_CHARACTERS, Predicate, _sqlglot, parse_predicate, to_sql

ALL = frozenset(("text", "number", "flag", "list"))


def sql(text: str) -> tuple[str, list[object]]:
    predicate = parse_predicate(text)
    return to_sql(predicate, dict.fromkeys(predicate.fields, ALL))


@pytest.mark.parametrize(
    ("text", "expected", "parameters"),
    [
        ("lang = 'en' and year > 2020", "((text_0 = $1) AND (number_1 > $2))", ["en", 2020]),
        ("'en' <> lang or not draft", "(($1 <> text_0) OR (NOT flag_1))", ["en"]),
        ("(a < -1.5) OR a >= 1e3", "(((number_0 < $1)) OR (number_0 >= $2))", [-1.5, 1000.0]),
        ("a is null and b is not null", "((NOT present_0) AND (NOT (NOT present_1)))", []),
        ("a is true", "(flag_0 IS TRUE)", []),
        ("a = true", "(flag_0 = $1)", [True]),
        ("a in ('x', 'y') and a not in (1)", "((text_0 IN ($1, $2)) AND (NOT (number_0 IN ($3))))", ["x", "y", 1]),
        ("a between 'b' and 'c'", "(text_0 BETWEEN $1 AND $2)", ["b", "c"]),
        ("a like 'x%'", "(text_0 LIKE $1)", ["x%"]),
        ("a not ilike '!%' escape '!'", "(text_0 NOT ILIKE $2 ESCAPE $1)", ["!", "!%"]),
        ("'x' in tags", "(json_contains(list_0, $1))", ['"x"']),
        ("contains(tags, 2)", "(json_contains(list_0, $1) OR json_contains(list_0, $2))", ["2", "2.0"]),
        (
            "lower(a) = 'x' and length(upper(a)) > 2",
            "((lower(text_0) = $1) AND (length(upper(text_0)) > $2))",
            ["x", 2],
        ),
        ("9223372036854775808 > a", "($1 > number_0)", [9223372036854775808.0]),
        ("document_id = 'x'", "(text_0 = $1)", ["x"]),
    ],
)
def test_the_sql_holds_our_names_and_numbered_values_alone(text: str, expected: str, parameters: list[object]) -> None:
    assert sql(text) == (expected, parameters)


def test_two_fields_are_compared_type_by_type() -> None:
    assert sql("a = b")[0] == "COALESCE((text_0 = text_1), (number_0 = number_1), (flag_0 = flag_1))"
    predicate = parse_predicate("a = b")
    kinds = {("a",): frozenset({"number"}), ("b",): frozenset({"number", "text"})}
    assert to_sql(predicate, kinds)[0] == "COALESCE((number_0 = number_1))"
    with pytest.raises(FilterError, match="the two fields never hold values of one type"):
        to_sql(predicate, {("a",): frozenset({"number"}), ("b",): frozenset({"text"})})


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("year > 2020 and lang = 'en' and year < 2030", (("year",), ("lang",))),
        ('"my field" = 1 and "a.b" = 2', (("my field",), ("a.b",))),
        ("author.name = 'x' and a.b.c = 1", (("author", "name"), ("a", "b", "c"))),
        (
            "date = 'x' and type = 'y' and user = 'z' and language = 'l'",
            (("date",), ("type",), ("user",), ("language",)),
        ),
        ("Year = 1 and year = 2", (("Year",), ("year",))),
        ("document_id like 'a/%'", (DOCUMENT_ID,)),
    ],
)
def test_fields_are_named_as_they_are(text: str, fields: tuple[tuple[str, ...], ...]) -> None:
    assert parse_predicate(text).fields == fields


REFUSED = [
    "",
    "-- nothing",
    "lang = 'en'; drop table documents",
    "lang = 'en' union select 1",
    "select 1",
    "(select 1)",
    "a = (select max(a) from documents)",
    "a in (select 1)",
    "exists (select 1)",
    "a = read_text('/etc/passwd')",
    "a = read_csv('http://example.org/x.csv')",
    "read_parquet('x') = 1",
    "getenv('HOME') = 'x'",
    "a = current_date",
    "a = now()",
    "sleep(1) = 1",
    "regexp_matches(a, '(x+x+)+y')",
    "a ~ '(x+x+)+y'",
    "a similar to 'x'",
    "a = ?",
    "a = $1",
    "a = $name",
    "a = @x",
    "a::int = 1",
    "cast(a as int) = 1",
    "case when a then b end",
    "a = 1 foo",
    "a + 1 = 2",
    "a = -b",
    "a = [1, 2]",
    "a = {'x': 1}",
    "a[1] = 1",
    "a = date '2020-01-01'",
    "a = interval 1 day",
    "a = null",
    "null = a",
    "a in (1, null)",
    "a in (1, 'x')",
    "a in ()",
    "a between b and c",
    "lower(a) = 1",
    "lower(lower) ilike a",
    "'x' = 1",
    "length(1) = 1",
    "a is distinct from 1",
    "a like b",
    "a like 'x' escape 'long'",
    "a like any ('x', 'y')",
    "a in b",
    "1 in (a)",
    "contains('x', 'y')",
    "*",
    "* = 1",
    "documents.* = 1",
    "a.b.c.d.e = 1",
    "copy documents to 'x'",
    "attach 'x' as y",
    "install httpfs",
    "pragma version",
    "set threads = 1",
    "a = 'open",
    "a = 1 and",
    "a = = 1",
    "(((a = 1)",
    "a = 1 order by a",
    "a = 1 limit 1",
    "count(*) = 1",
    "sum(a) over () = 1",
    "a = x'00'",
    "a = all (select 1)",
    "lambda x: x = 1",
]


@pytest.mark.parametrize("text", REFUSED)
def test_anything_else_is_refused_before_any_index_is_read(text: str) -> None:
    with pytest.raises(FilterError, match="expected"):
        parse_predicate(text)


@pytest.mark.parametrize("text", ["(" * 3000 + "a = 1" + ")" * 3000, "not " * 2400 + "a"])
def test_nesting_has_an_end(text: str) -> None:
    with pytest.raises(FilterError, match="expected"):
        parse_predicate(text)


def test_length_has_an_end() -> None:
    with pytest.raises(FilterError, match=rf"^the filter has 20,004 characters; expected at most {MAX_CHARACTERS:,}$"):
        parse_predicate("a = '" + "x" * 19_998 + "'")


def test_many_terms_are_no_nesting() -> None:
    assert sql(" or ".join(["a = 1"] * 1000))[0].count("number_0") == 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a = read_text('/etc/passwd')",
            "the filter \"a = read_text('/etc/passwd')\" has \"READ_TEXT('/etc/passwd')\" in it, which is no field: "
            "expected fields compared with literals, like \"lang = 'en' and year > 2020\" (= <> < <= > >=, BETWEEN, "
            "IN, LIKE, ILIKE, IS NULL, 'x' IN list, AND, OR, NOT, lower, upper, length; unusual field names in double "
            "quotes)",
        ),
        ("a = 1; b = 2", 'the filter "a = 1; b = 2" holds 2 statements; expected one condition: expected'),
        ("a = null", "(nothing equals NULL; write IS NULL or IS NOT NULL)"),
        ("lower(a) = 1", '"LOWER(a) = 1" in it, which is not allowed (text beside numbers)'),
    ],
)
def test_a_refusal_says_what_was_found_and_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(FilterError) as caught:
        parse_predicate(text)
    assert message in str(caught.value)


def test_a_field_of_another_type_is_an_error_and_no_empty_result() -> None:
    predicate = parse_predicate("year = '2020'")
    with pytest.raises(FilterError) as caught:
        to_sql(predicate, {("year",): frozenset({"number", "flag"})})
    assert str(caught.value) == (
        "the filter \"year = '2020'\" takes field 'year' for text, but it holds true or false and numbers in this "
        "index: compare it with such a value (text stands in single quotes, numbers in none)"
    )


def test_a_predicate_is_its_text_and_its_fields() -> None:
    predicate = parse_predicate("a = 1")
    assert isinstance(predicate, Predicate)
    assert (predicate.text, predicate.shown, predicate.fields) == ("a = 1", '"a = 1"', (("a",),))


def test_the_parser_says_nothing_by_itself() -> None:
    code = (
        "from refrag_core.predicate import parse_predicate\n"
        "from refrag_core.errors import FilterError\n"
        "try: parse_predicate('pragma foo bar baz')\nexcept FilterError: pass"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_without_sqlglot_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _sqlglot.cache_clear()
    monkeypatch.setitem(sys.modules, "sqlglot", None)
    with pytest.raises(MissingExtraError, match=r"^sqlglot is not installed .* run `pip install sqlglot`"):
        parse_predicate("a = 1")
    _sqlglot.cache_clear()
