"""What refrag needs with some extras, a requirement a line: for an image's layer that does not change with the code.

python infra/requirements.py cpu ray s3
"""

import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(extras: Sequence[str], project: Path = PROJECT) -> list[str]:
    """Sorted requirements of the project with these extras. Raises SystemExit for an extra that it does not have."""
    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    known = table["optional-dependencies"]
    if unknown := sorted(set(extras) - set(known)):
        raise SystemExit(f"{project.name} has no extra {', '.join(unknown)}; expected some of {', '.join(known)}")
    return sorted({*table["dependencies"], *_of_extras(extras, known)})


def _of_extras(extras: Sequence[str], known: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The requirements of extras, with those of the extras that they name themselves."""
    for extra in extras:
        for requirement in known[extra]:
            if requirement.startswith("refrag["):
                yield from _of_extras(requirement.removeprefix("refrag[").rstrip("]").split(","), known)
            else:
                yield requirement


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
