"""The commands inside manifests and schedules: found, taken apart, and parsed by the programs' own command lines."""

import ast
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml

from refrag import cli

_OURS = ("refrag", "refrag-job")
_FENCE = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands_in(path: Path) -> Iterator[str]:
    """Shell lines of a file, by its kind: those of Ray and refrag are among them, others too."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        for document in yaml.load_all(text, yaml.CSafeLoader):
            yield from _shell_lines(document)
    elif path.suffix == ".py":
        yield from (value for value in _constants(text) if value.split(" ")[0] in ("ray", *_OURS))
    elif path.suffix == ".service":
        yield from re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    elif path.suffix == ".crontab":
        yield from (line.split(maxsplit=6)[6] for line in text.splitlines() if re.match(r"[\d*]", line))
    elif path.suffix == ".md":
        for block in _FENCE.findall(text):
            yield from block.replace("\\\n", " ").splitlines()


def _constants(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _shell_lines(value: Any) -> Iterator[str]:
    """Entrypoints of jobs and the start commands of `ray up`, wherever they stand."""
    if isinstance(value, list):
        for item in value:
            yield from _shell_lines(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "entrypoint":
                yield item
            elif isinstance(key, str) and key.endswith("_commands"):
                yield from item
            else:
                yield from _shell_lines(item)


def command_errors(line: str) -> list[str]:
    """What is wrong with the commands of Ray and refrag in a shell line, in their own words."""
    return [error for words in simple_commands(line) for error in _errors_of(words)]


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command that a shell line runs, without redirections and assignments before it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if not set(token) <= set("();<>|&"):
            words.append(token)
            continue
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words:
            yield words
        words = []


def is_ours(words: Sequence[str]) -> bool:
    """Whether a command runs refrag, itself or as a job of a Ray cluster."""
    return Path(words[0]).name in _OURS or (words[0] == "ray" and "--" in words)


def _errors_of(words: Sequence[str]) -> list[str]:
    program = Path(words[0]).name
    if program in _OURS:
        return _parse(typer.main.get_command(cli.app), program, words[1:])
    if program != "ray":
        return []
    from ray.scripts.scripts import cli as ray_cli

    entrypoint = list(words[words.index("--") + 1 :]) if "--" in words else []
    return [*_parse(ray_cli, program, words[1:]), *(command_errors(shlex.join(entrypoint)) if entrypoint else [])]


def _parse(command: Any, name: str, words: Sequence[str]) -> list[str]:
    rest = list(words)
    while hasattr(command, "commands"):
        if rest == ["--help"]:
            return []
        if not rest or rest[0] not in command.commands:
            return [f"{name}: found {rest[:1]}, expected one of {', '.join(sorted(command.commands))}"]
        name, command = f"{name} {rest[0]}", command.commands[rest.pop(0)]
    try:
        command.make_context(command.name, rest)
    except Exception as error:  # click's errors and those of typer's own click have no base of their own in common
        return [f"{name}: {error.format_message() if hasattr(error, 'format_message') else error}"]
    return []
