"""A condition over documents' metadata, as it is typed after `--where`: parsed, checked, put into SQL.

The only file that imports sqlglot. What was typed is read into a tree, every node of which has to be one of those
named here; the SQL that is made from it holds our own column names, operators and numbered parameters, and nothing
of the text. There are no statements, subqueries, casts, variables, or functions but lower, upper and length.

A field has up to four typed columns: a document's value stands in the one of its own type and is NULL in the others
(so is a field that it lacks). The literal beside a field says which of them is meant.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any, Literal

from refrag_core.errors import FilterError, MissingExtraError

Kind = Literal["text", "number", "flag", "list"]
Field = tuple[str, ...]
"""A field's name, or the names on the way to one inside objects: `author.name` is ("author", "name")."""

DOCUMENT_ID: Field = ("document_id",)
"""The document's id, which every document has; a metadata field of that name is hidden by it."""

MAX_CHARACTERS = 10_000
_BEYOND = 1 << 63  # whole numbers from here up compare as floats: no column holds them exactly
_SCALARS: tuple[Kind, ...] = ("text", "number", "flag")
_NAMES: Mapping[Kind, str] = {"text": "text", "number": "numbers", "flag": "true or false", "list": "lists"}
_COMPARISONS = {"EQ": "=", "NEQ": "<>", "GT": ">", "GTE": ">=", "LT": "<", "LTE": "<="}
_LIKES = {"Like": "LIKE", "ILike": "ILIKE"}
_TEXT_FUNCTIONS = {"Lower": "lower", "Upper": "upper"}
_OWN_ARGUMENTS = {
    "Column": {"this", "table", "db", "catalog"},
    "Like": {"this", "expression", "negate"},
    "ILike": {"this", "expression", "negate"},
    "Between": {"this", "low", "high"},
    "In": {"this", "expressions", "field"},
    "Contains": {"this", "expression"},
    "ArrayContains": {"this", "expression"},
    "Literal": {"this", "is_string"},
}
_GRAMMAR = (
    "expected fields compared with literals, like \"lang = 'en' and year > 2020\" (= <> < <= > >=, BETWEEN, IN, LIKE, "
    "ILIKE, IS NULL, 'x' IN list, AND, OR, NOT, lower, upper, length; unusual field names in double quotes)"
)


@dataclass(frozen=True, slots=True)
class Predicate:
    """A checked condition: only nodes that `to_sql` knows are in its tree."""

    text: str
    tree: Any
    fields: tuple[Field, ...]
    """Fields that it reads, each once, in the order of their first use."""

    @property
    def shown(self) -> str:
        """The text as it stands in errors."""
        return _shown(self.text)


@dataclass(slots=True)
class _Made:
    """SQL in the making: the predicate's fields with the types of their values, and the parameters so far."""

    predicate: Predicate
    kinds: Mapping[Field, frozenset[Kind]]
    parameters: list[Any] = field(default_factory=list)

    def parameter(self, value: Any) -> str:
        """The place of a value."""
        self.parameters.append(value)
        return f"${len(self.parameters)}"


def column_name(number: int, kind: Kind | Literal["present"]) -> str:
    """Column with the values of one type of field `number` of a predicate; `present` is bool: has a value."""
    return f"{kind}_{number}"


@cache
def _sqlglot() -> ModuleType:
    try:
        import sqlglot
    except ImportError as error:
        raise MissingExtraError(
            "sqlglot is not installed and reading a filter needs it; run `pip install sqlglot`, or install refrag again"
        ) from error
    logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # it logs what it refuses; ours is the one message
    module: ModuleType = sqlglot
    return module


def parse_predicate(text: str) -> Predicate:
    """Read a condition. Raises FilterError, with what is allowed, for anything that is not one."""
    if len(text) > MAX_CHARACTERS:
        raise FilterError(f"the filter has {len(text):,} characters; expected at most {MAX_CHARACTERS:,}")
    try:
        statements = [tree for tree in _sqlglot().parse(text, dialect="duckdb") if tree is not None]
    except (_sqlglot().errors.SqlglotError, RecursionError, ValueError) as error:
        details: Any = getattr(error, "errors", None)
        said = str(details[0]["description"] if details else error).split("\n")[0]
        raise FilterError(f"the filter {_shown(text)} cannot be read ({said[:200]}): {_GRAMMAR}") from None
    if len(statements) != 1:
        found = "is empty" if not statements else f"holds {len(statements)} statements"
        raise FilterError(f"the filter {_shown(text)} {found}; expected one condition: {_GRAMMAR}")
    fields = dict.fromkeys(_path(node, text) for node in statements[0].find_all(*_columns(), bfs=False))
    predicate = Predicate(text, statements[0], tuple(fields))
    # Without knowing the fields' types every type is possible: this pass refuses all that no index could answer.
    to_sql(predicate, dict.fromkeys(fields, frozenset(_NAMES)))
    return predicate


def _shown(text: str) -> str:
    return json.dumps(text if len(text) <= 200 else text[:200] + "…", ensure_ascii=False)


def _columns() -> tuple[type, ...]:
    expressions = _sqlglot().exp
    return expressions.Column, expressions.Dot


def _path(node: Any, text: str) -> Field:
    """Names from the outermost object to the field."""
    parts = node.parts if _name(node) == "Column" else []
    if not parts or not all(_name(part) == "Identifier" and part.name for part in parts):
        raise FilterError(f"the filter {_shown(text)} has {_sql(node)} in it, which is no field: {_GRAMMAR}")
    return tuple(part.name for part in parts)


def _name(node: Any) -> str:
    return type(node).__name__


def _sql(node: Any) -> str:
    shown = str(node.sql(dialect="duckdb"))
    return _shown(shown if len(shown) <= 80 else shown[:80] + "…")


def to_sql(predicate: Predicate, kinds: Mapping[Field, frozenset[Kind]]) -> tuple[str, list[Any]]:
    """SQL over the columns of `column_name` and its parameters, for fields with values of these types.

    Raises FilterError where a field is compared with a value of a type that none of its own have.
    """
    made = _Made(predicate, kinds)
    try:
        return _condition(predicate.tree, made), made.parameters
    except RecursionError:
        raise FilterError(f"the filter {predicate.shown} is nested too deeply: {_GRAMMAR}") from None


def _refused(node: Any, made: _Made, why: str = "") -> FilterError:
    """The error for a node that has no place in a filter."""
    reason = f" ({why})" if why else ""
    return FilterError(
        f"the filter {made.predicate.shown} has {_sql(node)} in it, which is not allowed{reason}: {_GRAMMAR}"
    )


def _check_arguments(node: Any, made: _Made) -> None:
    """Refuse what a construct may carry besides the operands that are read here (a query, a modifier)."""
    own = _OWN_ARGUMENTS.get(_name(node), {"this", "expression"})
    if any(value for name, value in node.args.items() if name not in own):
        raise _refused(node, made)


def _condition(node: Any, made: _Made) -> str:
    """SQL of a node that is true, false or NULL."""
    name = _name(node)
    _check_arguments(node, made)
    if name in ("Column", "Paren", "Not", "And", "Or", "Boolean"):
        return _logic(node, name, made)
    if name in _COMPARISONS:
        return _comparison(node, made)
    if name in ("Like", "ILike", "Escape"):
        return _like(node, made)
    reader = {"Is": _is, "In": _in, "Between": _between, "Contains": _contains, "ArrayContains": _contains}.get(name)
    if reader is None:
        raise _refused(node, made)
    return reader(node, made)


def _logic(node: Any, name: str, made: _Made) -> str:
    if name == "Column":
        return _column(node, "flag", made)
    if name == "Boolean":
        return "TRUE" if node.this else "FALSE"
    if name in ("And", "Or"):
        terms = [_condition(term, made) for term in node.flatten(unnest=False)]
        return f"({f' {name.upper()} '.join(terms)})"
    return f"({'NOT ' if name == 'Not' else ''}{_condition(node.this, made)})"


def _comparison(node: Any, made: _Made) -> str:
    operator = _COMPARISONS[_name(node)]
    for side in (node.this, node.expression):
        if _name(side) == "Null":
            raise _refused(node, made, "nothing equals NULL; write IS NULL or IS NOT NULL")
    kind = _kind(node.this) or _kind(node.expression)
    if kind is not None:
        return f"({_operand(node.this, kind, made)} {operator} {_operand(node.expression, kind, made)})"
    return _between_fields(node, operator, made)


def _between_fields(node: Any, operator: str, made: _Made) -> str:
    """Two fields: compared where a document's values are of one type."""
    shared = [made.kinds.get(_path(side, made.predicate.text), frozenset()) for side in (node.this, node.expression)]
    kinds = [kind for kind in _SCALARS if kind in shared[0] & shared[1]]
    if not kinds:
        raise _refused(node, made, "the two fields never hold values of one type")
    terms = [f"({_operand(node.this, k, made)} {operator} {_operand(node.expression, k, made)})" for k in kinds]
    return f"COALESCE({', '.join(terms)})"


def _kind(node: Any) -> Kind | None:
    """The type that an operand has by itself; None for a field."""
    name = _name(node)
    if name == "Paren":
        return _kind(node.this)
    if name in _TEXT_FUNCTIONS or (name == "Literal" and node.is_string):
        return "text"
    if name in ("Literal", "Neg", "Length"):
        return "number"
    return "flag" if name == "Boolean" else None


def _operand(node: Any, kind: Kind, made: _Made) -> str:
    """SQL of a value of type `kind`: a field, a literal, or a function of a text."""
    name, own = _name(node), _kind(node)
    _check_arguments(node, made)
    if name == "Column":
        return _column(node, kind, made)
    if name == "Paren":
        return _operand(node.this, kind, made)
    if own is None:
        raise _refused(node, made)
    if own != kind:
        raise _refused(node.parent, made, f"{_NAMES[kind]} beside {_NAMES[own]}")
    if name in _TEXT_FUNCTIONS or name == "Length":
        return f"{_TEXT_FUNCTIONS.get(name, 'length')}({_operand(node.this, 'text', made)})"
    return made.parameter(_value(node, made))


def _value(node: Any, made: _Made) -> str | int | float | bool:
    """Python value of a literal."""
    name = _name(node)
    if name == "Boolean" or (name == "Literal" and node.is_string):
        return node.this  # type: ignore[no-any-return]
    if name == "Neg" and _name(node.this) == "Literal" and not node.this.is_string:
        return -_number(node.this)
    if name != "Literal":
        raise _refused(node, made, "expected a literal")
    return _number(node)


def _number(node: Any) -> int | float:
    whole = int(node.this) if node.this.isdecimal() else _BEYOND
    return whole if whole < _BEYOND else float(node.this)


def _column(node: Any, kind: Kind | Literal["present"], made: _Made) -> str:
    path = _path(node, made.predicate.text)
    kinds = made.kinds.get(path, frozenset())
    if kind != "present" and kind not in kinds:
        held = " and ".join(_NAMES[k] for k in sorted(kinds)) or "nothing but null"
        raise FilterError(
            f"the filter {made.predicate.shown} takes field {'.'.join(path)!r} for {_NAMES[kind]}, but it holds "
            f"{held} in this index: compare it with such a value (text stands in single quotes, numbers in none)"
        )
    return column_name(made.predicate.fields.index(path), kind)


def _like(node: Any, made: _Made) -> str:
    escape = ""
    if _name(node) == "Escape":
        escape = f" ESCAPE {made.parameter(_text(node.expression, made, characters=1))}"
        node = node.this
    if _name(node) not in _LIKES:
        raise _refused(node, made)
    _check_arguments(node, made)
    operator = f"{'NOT ' if node.args.get('negate') else ''}{_LIKES[_name(node)]}"
    value = _operand(node.this, "text", made)
    return f"({value} {operator} {made.parameter(_text(node.expression, made))}{escape})"


def _text(node: Any, made: _Made, characters: int | None = None) -> str:
    if _name(node) != "Literal" or not node.is_string or (characters is not None and len(node.this) != characters):
        raise _refused(node.parent, made, "expected text in single quotes")
    return str(node.this)


def _is(node: Any, made: _Made) -> str:
    meant = _name(node.expression)
    if meant == "Boolean":
        return f"({_operand(node.this, 'flag', made)} IS {'TRUE' if node.expression.this else 'FALSE'})"
    if meant != "Null" or _name(node.this) != "Column":
        raise _refused(node, made)
    return f"(NOT {_column(node.this, 'present', made)})"


def _in(node: Any, made: _Made) -> str:
    if node.args.get("field") is not None:
        return _holds(node.args["field"], node.this, made)
    values: Sequence[Any] = node.expressions
    kinds = {_kind(value) for value in values}
    if len(kinds) != 1 or None in kinds:
        raise _refused(node, made, "expected literals of one type in the brackets")
    kind = next(k for k in kinds if k)
    return f"({_operand(node.this, kind, made)} IN ({', '.join(_operand(value, kind, made) for value in values)}))"


def _contains(node: Any, made: _Made) -> str:
    return _holds(node.this, node.expression, made)


def _holds(field_node: Any, value: Any, made: _Made) -> str:
    """Whether a list holds a value; its elements lie in JSON as canonical as the needle."""
    if _name(field_node) != "Column":
        raise _refused(field_node.parent, made, "expected the name of a field that holds lists")
    column, wanted = _column(field_node, "list", made), _value(value, made)
    needles = [wanted]
    if isinstance(wanted, int | float) and not isinstance(wanted, bool) and float(wanted).is_integer():
        needles = [int(wanted), float(wanted)]  # 1 and 1.0 are one number, but not one text
    found = [f"json_contains({column}, {made.parameter(json.dumps(n, ensure_ascii=False))})" for n in needles]
    return f"({' OR '.join(found)})"


def _between(node: Any, made: _Made) -> str:
    low, high = node.args["low"], node.args["high"]
    kind = _kind(node.this) or _kind(low) or _kind(high)
    if kind is None:
        raise _refused(node, made, "expected literals")
    value, least, most = (_operand(side, kind, made) for side in (node.this, low, high))
    return f"({value} BETWEEN {least} AND {most})"
