"""Every `refrag` command that the README shows is one that this version has, with the options that it shows."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from refrag import cli
from refrag_core.training.runs import Stage, shipped_configs

README = Path(__file__).resolve().parents[1] / "README.md"


def shown_commands() -> Iterator[str]:
    for block in re.findall(r"^```\w*\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        yield from (line for line in block.splitlines() if line.startswith("refrag "))


def parsed(line: str) -> tuple[Any, list[str]]:
    """The command that a line names, and the words behind its name."""
    command: Any = typer.main.get_command(cli.app)
    words = shlex.split(line, comments=True)[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    return command, words


def test_the_readme_shows_training() -> None:
    names = {parsed(line)[0].name for line in shown_commands()}
    assert {"build", "ask", "prepare", "reconstruct", "next-paragraph", "policy", "instruct", "plot", "config"} <= names


def test_training_configs_that_are_named_come_along() -> None:
    words = [line.split() for line in shown_commands() if line.startswith("refrag train ")]
    named = {
        config for _, _, stage, config, *_ in (line for line in words if len(line) > 3) if stage in get_args(Stage)
    }
    assert {name for name in named if not name.endswith(".toml")} <= shipped_configs().keys()
    assert len(named) > 4


@pytest.mark.parametrize("line", sorted(set(shown_commands())))
def test_a_shown_command_exists_with_its_options(line: str) -> None:
    command, words = parsed(line)
    assert not hasattr(command, "commands"), f"{line}: no such command"
    known = {option for parameter in command.params for option in parameter.opts}
    assert [word for word in words if word.startswith("-") and word.partition("=")[0] not in known] == []
    if not {"<", ">"} & set(words):
        assert command.make_context(command.name, list(words)).params
