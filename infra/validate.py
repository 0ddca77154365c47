"""Check every file of infra/ against real schemas and command lines, without a cluster.

python -m infra.validate [--crds FOLDER] [FILE…]

Manifests are checked against KubeRay's CRDs, Kubernetes' schemas and Ray's schema of `ray up`, unknown fields
refused; commands against refrag's and Ray's own command lines; images and versions against pyproject.toml and
constraints.txt. The rules that a CRD writes in CEL (x-kubernetes-validations) are left to the cluster.
Exit codes: 0 all good, 1 something is wrong, with a line for each on stdout.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from infra.commands import command_errors, commands_in, is_ours, simple_commands
from infra.manifest_rules import Versions, manifest_errors, project_versions, text_errors
from infra.manifest_schemas import Schemas, load_crds, schema_errors

FOLDER = Path(__file__).resolve().parent
CRDS = FOLDER / "kuberay-crds"
_PATTERNS = ("*.yaml", "kubernetes/*.yaml", "schedules/*", "Dockerfile", "README.md")
_RUNS_A_BUILD = ("RayJob", "RayCronJob")


def shipped_files() -> list[Path]:
    """The files of infra/ that say what runs where."""
    return sorted(path for pattern in _PATTERNS for path in FOLDER.glob(pattern) if path.is_file())


def file_errors(path: Path, crds: Schemas, versions: Versions) -> Iterator[str]:
    """Everything that is wrong with one file."""
    text = path.read_text(encoding="utf-8")
    yield from text_errors(text, versions)
    if path.suffix == ".yaml":
        try:
            documents = list(yaml.load_all(text, yaml.CSafeLoader))
        except yaml.YAMLError as error:
            yield f"found no YAML ({' '.join(str(error).split())})"
            return
        for document in documents:
            yield from _document_errors(document, text, crds, versions)
    for line in commands_in(path):
        yield from command_errors(line)


def _document_errors(document: object, text: str, crds: Schemas, versions: Versions) -> Iterator[str]:
    broken = schema_errors(document, crds)
    yield from broken
    if broken or not isinstance(document, dict):
        return
    yield from manifest_errors(document, text, versions)
    if document.get("kind") in _RUNS_A_BUILD:
        spec = document["spec"]
        entrypoint = spec.get("jobTemplate", spec).get("entrypoint", "")
        if not any(map(is_ours, simple_commands(entrypoint))):
            yield f"spec.entrypoint: found {entrypoint!r}, expected a command of refrag"


def _shown(path: Path) -> Path:
    return path.relative_to(FOLDER.parent) if path.is_relative_to(FOLDER.parent) else path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.validate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--crds", type=Path, default=CRDS, metavar="FOLDER", help="KubeRay's CRDs, .yaml or .yaml.xz")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="default: all of infra/")
    options = parser.parse_args(arguments)
    crds, versions = load_crds(options.crds), project_versions()
    files = options.files or shipped_files()
    errors = [f"{_shown(path)}: {error}" for path in files for error in file_errors(path, crds, versions)]
    print("\n".join(errors) if errors else f"{len(files)} files: all good")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
