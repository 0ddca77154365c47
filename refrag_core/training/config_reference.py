"""The settings of training configs with types, defaults and meanings, read from the dataclasses that define them."""

import ast
import inspect
import textwrap
from dataclasses import MISSING, dataclass, fields
from typing import Any

from refrag_core.training.config import TaskConfig, TrainingConfig
from refrag_core.training.policy_config import PolicyTrainingConfig

TABLES = {
    "reconstruct, next-paragraph, instruct": TrainingConfig,
    "[[tasks]], one table for each task of these": TaskConfig,
    "policy": PolicyTrainingConfig,
}


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of a config."""

    name: str
    type: str
    default: str
    """As TOML has it; `required`, or `none` for a setting that is left out."""
    meaning: str


def settings_of(kind: type[Any]) -> list[Setting]:
    """The fields of a config dataclass, in order. A field's meaning is the docstring below it."""
    meanings = _docstrings(kind)
    return [
        Setting(field.name, _type(field.type), _default(field.default), meanings.get(field.name, ""))
        for field in fields(kind)
        if field.name != "tasks"
    ]


def _docstrings(kind: type[Any]) -> dict[str, str]:
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement, after in zip(definition.body, definition.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            found[ast.unparse(statement.target)] = " ".join(str(after.value.value).split())
    return found


def _type(annotation: Any) -> str:
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    literal = ", ".join(repr(value) for value in getattr(annotation, "__args__", ()) if isinstance(value, str))
    if literal:
        return f"one of {literal.replace(chr(39), chr(34))}"
    return name.replace(" | None", "").replace("tuple[", "list of ").replace(", ...]", "").replace("str", "text")


def _default(value: Any) -> str:
    if value is MISSING:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_default, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def reference_lines() -> list[str]:
    """All settings, for people."""
    lines: list[str] = []
    for title, kind in TABLES.items():
        lines += ["", title] if lines else [title]
        for setting in settings_of(kind):
            lines.append(f"  {setting.name} = {setting.default}    ({setting.type})")
            lines += textwrap.wrap(setting.meaning, 110, initial_indent="      ", subsequent_indent="      ")
    return lines
