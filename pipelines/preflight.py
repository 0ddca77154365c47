"""Whether every worker has what a build needs: looked at there, compared here, before anything is submitted.

`look` runs on each worker and on the driver; `check_workers` compares. Neither knows of any engine: one that sends
work to other machines sends `look` first, with the resources that its stages will ask for.
"""

import importlib
import platform
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from refrag.pipelines.stages import EmbedStage, ScoreStage, Stages, fingerprint_of
from refrag_core.digests import digest_bytes, digest_json
from refrag_core.errors import ClusterError, ModelNotFoundError
from refrag_core.models import model_on_this_machine

_ALWAYS = ("numpy", "pyarrow", "safetensors", "tokenizers", "torch", "transformers")
# What each extra brings, by the names that are imported.
_OF_EXTRA: Mapping[str, Sequence[str]] = {
    "beam": ("apache_beam",),
    "cpu": ("faiss",),
    "gguf": ("gguf", "accelerate"),
    "gpu": ("faiss",),
    "lance": ("lancedb", "lance"),
    "ray": ("ray",),
    "s3": ("obstore",),
}
_NAMES_SHOWN = 3

ModelKind = Literal["tokenizer", "retriever", "decoder"]


@dataclass(frozen=True, slots=True)
class ModelNeed:
    """A model that a stage opens."""

    kind: ModelKind
    folder: str
    """Where the driver found it."""
    reference: str
    """What it is elsewhere, where a machine has no such folder: a folder, a package or a hub id."""
    fingerprint: str
    """Of what the stage reads of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a machine must have to run the stages of one build."""

    extras: tuple[str, ...] = ()
    """Of pyproject.toml, like ("ray", "s3")."""
    models: tuple[ModelNeed, ...] = ()
    gpus: int = 0
    """CUDA devices that a process which encodes has to see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What one process saw; crosses from a worker to the driver."""

    name: str
    python: str
    source: str
    """Digest of refrag's own source files, which a version alone does not tell apart."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions by import name, of those that could be imported, without a build's local part (+cpu, +cu130)."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Why the others could not be."""
    models: Sequence[str | None] = ()
    """Fingerprints of the models in the order of the needs; None where one is not found."""
    gpus: int = 0


@dataclass(frozen=True, slots=True)
class _Problem:
    """One thing that is wrong, in the same words for every machine where it is."""

    found: str
    remedy: str


def needs_of(stages: Stages, *, extras: Iterable[str] = (), gpus: int = 0) -> Needs:
    """The needs of a build's stages. The encoder's body is not among them: a checkpoint names it, on first use."""
    tokenize = stages.tokenize
    models = [_need("tokenizer", tokenize.tokenizer, tokenize.reference, tokenize.tokenizer_fingerprint)]
    for stage in stages.device:
        if isinstance(stage, EmbedStage):
            models.append(_need("retriever", stage.retriever, stage.reference, stage.retriever_fingerprint))
        elif isinstance(stage, ScoreStage):
            models.append(_need("decoder", stage.decoder, stage.reference, stage.decoder_fingerprint))
    return Needs(extras=tuple(extras), models=tuple(models), gpus=gpus)


def _need(kind: ModelKind, folder: str, reference: str, fingerprint: str) -> ModelNeed:
    return ModelNeed(kind, folder, reference or folder, fingerprint)


def look(needs: Needs) -> Machine:
    """What this process can see of `needs`; raises nothing, since it runs where nobody reads a traceback.

    Imports each package (PyTorch alone takes seconds) and hashes weights that this machine has not hashed before.
    """
    packages, failures = _imported(_modules(needs))
    return Machine(
        name=socket.gethostname(),
        python=platform.python_version(),
        source=source_digest(),
        packages=packages,
        failures=failures,
        models=tuple(_fingerprint(need) for need in needs.models),
        gpus=_visible_gpus() if needs.gpus else 0,
    )


def _modules(needs: Needs) -> Iterator[str]:
    yield from _ALWAYS
    for extra in needs.extras:
        yield from _OF_EXTRA[extra]


def _imported(modules: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the modules that import, and why the others do not."""
    packages, failures = {}, {}
    for name in dict.fromkeys(modules):
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a broken wheel may raise anything
            failures[name] = _reason(name, error)
        else:
            packages[name] = str(getattr(module, "__version__", "unknown")).partition("+")[0]
    return packages, failures


def _reason(name: str, error: Exception) -> str:
    absent = isinstance(error, ModuleNotFoundError) and error.name == name
    return "not installed" if absent else f"broken ({error})"


def source_digest() -> str:
    """Digest of the source that runs the stages, the same for a checkout, a wheel and a copy in an image."""
    folders = {name: Path(importlib.import_module(name).__path__[0]) for name in ("refrag.pipelines", "refrag_core")}
    return digest_json(
        {
            f"{name}/{path.relative_to(folder).as_posix()}": digest_bytes(path.read_bytes())
            for name, folder in folders.items()
            for path in sorted(folder.rglob("*.py"))
        }
    )


def _fingerprint(need: ModelNeed) -> str | None:
    try:
        return fingerprint_of(need.kind, model_on_this_machine(need.reference, need.folder))
    except (ModelNotFoundError, OSError):
        return None


def _visible_gpus() -> int:
    try:
        import torch

        return torch.cuda.device_count()
    except Exception:  # PyTorch that does not import is reported as such
        return 0


def check_workers(needs: Needs, driver: Machine, workers: Sequence[Machine]) -> None:
    """Compare what `look` saw on the workers with what it saw on the driver.

    Raises ClusterError: one message with every difference, the machines that have it, and what to do.
    """
    problems = {at: tuple(_problems(needs, driver, worker)) for at, worker in enumerate(workers)}
    names_by_problem: defaultdict[_Problem, list[str]] = defaultdict(list)
    for at, found in problems.items():
        for problem in found:
            names_by_problem[problem].append(workers[at].name)
    if names_by_problem:
        lacking = sum(1 for found in problems.values() if found)
        raise ClusterError(_message(names_by_problem, f"{lacking} of {len(workers)} workers"))


def _problems(needs: Needs, driver: Machine, worker: Machine) -> Iterator[_Problem]:
    yield from _program_problems(needs, driver, worker)
    yield from _package_problems(needs, driver, worker)
    for need, found in zip(needs.models, worker.models, strict=True):
        yield from _model_problems(need, found)
    if worker.gpus < needs.gpus:
        yield _Problem(
            f"{worker.gpus} CUDA devices are seen, expected {needs.gpus}",
            "use an image with CUDA on nodes with a GPU and its driver, or build with --device cpu",
        )


def _program_problems(needs: Needs, driver: Machine, worker: Machine) -> Iterator[_Problem]:
    if _minor(worker.python) != _minor(driver.python):
        found = f"Python is {_minor(worker.python)}, expected {_minor(driver.python)}"
        yield _Problem(found, "start every node from one image")
    if worker.source != driver.source:
        yield _Problem("refrag's own code is another than the driver's", _reinstall(needs))


def _minor(python: str) -> str:
    return ".".join(python.split(".")[:2])


def _package_problems(needs: Needs, driver: Machine, worker: Machine) -> Iterator[_Problem]:
    for name in dict.fromkeys(_modules(needs)):
        if name in worker.failures:
            yield _Problem(f"{name} is {worker.failures[name]}", _reinstall(needs))
        elif name in driver.packages and worker.packages[name] != driver.packages[name]:
            found = f"{name} is {worker.packages[name]}, expected {driver.packages[name]}"
            yield _Problem(found, "start every node from one image, or pip install the same versions there")


def _reinstall(needs: Needs) -> str:
    extras = f"[{','.join(needs.extras)}]" if needs.extras else ""
    try:
        own = f"=={version('refrag')}"
    except PackageNotFoundError:  # a checkout that is only on the path
        own = ""
    return f"pip install 'refrag{extras}{own}' there"


def _model_problems(need: ModelNeed, found: str | None) -> Iterator[_Problem]:
    if found is None:
        yield _Problem(
            f"the {need.kind} {need.reference!r} is not found",
            "give models by a reference that every node resolves: a folder on shared storage, a package, a hub id",
        )
    elif found != need.fingerprint:
        yield _Problem(
            f"the {need.kind} {need.reference!r} has fingerprint {found[:12]}, expected {need.fingerprint[:12]}",
            "copy the driver's model there, or pin its hub revision",
        )


def _message(names_by_problem: Mapping[_Problem, Sequence[str]], who: str) -> str:
    problems = "; ".join(f"{problem.found} on {_listed(names)}" for problem, names in names_by_problem.items())
    remedies = "; ".join(dict.fromkeys(problem.remedy for problem in names_by_problem))
    return f"{who} cannot run this build: {problems}; expected on each what the driver has. To mend it: {remedies}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown if len(names) <= _NAMES_SHOWN else f"{shown} and {len(names) - _NAMES_SHOWN} more"
