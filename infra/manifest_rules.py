"""What no schema says: images and versions that agree, secrets by reference, limits, schedules that do not overlap."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from croniter import croniter

ROOT = Path(__file__).resolve().parents[1]
UNBUILT = "# Images: UNBUILT."
"""Begins the first line of a manifest whose images nobody has built yet."""
BUILT: frozenset[str] = frozenset()
"""Tags of refrag's images that were built and run."""

_OWN_IMAGE = re.compile(r"(?:[\w.:-]+/)*refrag:([\w.-]+)")
_SENSITIVE = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_ACCESS_KEY = re.compile(r"\bA[KS]IA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----")
_GPU = "nvidia.com/gpu"
_RUNS_LOOKED_AT = 60


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions that every tag and manifest has to agree with."""

    refrag: str
    ray: str

    @property
    def tags(self) -> tuple[str, str]:
        """Tags of the images for nodes without and with GPUs."""
        return (f"{self.refrag}-ray{self.ray}-cpu", f"{self.refrag}-ray{self.ray}-cuda")


def project_versions(root: Path = ROOT) -> Versions:
    """From pyproject.toml and constraints.txt. Raises SystemExit where constraints.txt does not pin Ray."""
    refrag = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    pin = re.search(r"^ray==(\S+)$", (root / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if pin is None:
        raise SystemExit("constraints.txt has no line ray==VERSION: pin the version that the images are to have")
    return Versions(refrag, pin[1])


def text_errors(text: str, versions: Versions) -> Iterator[str]:
    """Rules for the text of any file: tags that are stale or unmarked, and values of secrets."""
    tags = set(_OWN_IMAGE.findall(text))
    for tag in sorted(tags - set(versions.tags)):
        yield f"image tag refrag:{tag} is of other versions, expected {' or '.join(versions.tags)}"
    if _ACCESS_KEY.search(text):
        yield "found what looks like a secret's value; expected a reference to a Secret or an environment file"


def manifest_errors(document: Mapping[str, Any], text: str, versions: Versions) -> Iterator[str]:
    """Rules for one document of a manifest whose schema is in order."""
    if _OWN_IMAGE.search(str(document)) and set(_OWN_IMAGE.findall(text)) - BUILT and not text.startswith(UNBUILT):
        yield f"its images were not built; expected the first line to begin with {UNBUILT!r}"
    if document.get("kind") == "Secret":
        yield "found a Secret with its values; expected only references: make it with kubectl create secret"
    yield from _schedule_errors(document)
    for path, value in _mappings(document, ""):
        if value.get("rayVersion", versions.ray) != versions.ray:
            yield f"{path}.rayVersion: found {value['rayVersion']}, expected {versions.ray} as in constraints.txt"
        if "containers" in value:
            yield from _pod_errors(path, value)


def _mappings(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping inside a document, with its path."""
    if isinstance(value, dict):
        yield path, value
        for key, item in value.items():
            yield from _mappings(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _mappings(item, f"{path}[{at}]")


def _pod_errors(path: str, pod: Mapping[str, Any]) -> Iterator[str]:
    if not pod.get("securityContext", {}).get("runAsNonRoot"):
        yield f"{path}.securityContext.runAsNonRoot: expected true"
    tolerated = {toleration.get("key") for toleration in pod.get("tolerations", [])}
    for container in pod["containers"]:
        where = f"{path} {container['name']}"
        yield from _container_errors(where, container)
        if _wants_gpu(container) and _GPU not in tolerated:
            yield f"{where}: asks for {_GPU}; expected a toleration of the taint {_GPU} on its pod"


def _wants_gpu(container: Mapping[str, Any]) -> bool:
    return _GPU in container.get("resources", {}).get("limits", {})


def _container_errors(where: str, container: Mapping[str, Any]) -> Iterator[str]:
    image = container["image"]
    tag = image.rpartition("/")[2].partition(":")[2]
    if not tag or tag == "latest":
        yield f"{where}: image {image} has no fixed version; expected a tag"
    if _OWN_IMAGE.fullmatch(image) and tag.endswith("-cuda") != _wants_gpu(container):
        yield f"{where}: image {image} expected where {_GPU} is asked for, and there alone"
    if container.get("securityContext", {}).get("allowPrivilegeEscalation") is not False:
        yield f"{where}: securityContext.allowPrivilegeEscalation expected to be false"
    for kind in ("requests", "limits"):
        if missing := {"cpu", "memory"} - set(container.get("resources", {}).get(kind, {})):
            yield f"{where}: resources.{kind} has no {' and no '.join(sorted(missing))}"
    for variable in container.get("env", []):
        if "value" in variable and _SENSITIVE.search(variable["name"]):
            yield f"{where}: {variable['name']} has a value here; expected valueFrom or envFrom with a Secret's name"


def _schedule_errors(document: Mapping[str, Any]) -> Iterator[str]:
    kind, spec = document.get("kind"), document.get("spec", {})
    if kind not in ("CronJob", "RayCronJob"):
        return
    if not croniter.is_valid(spec["schedule"]):
        yield f"spec.schedule: {spec['schedule']!r} is no cron expression of five fields"
    elif kind == "CronJob":
        yield from _cron_job_errors(spec)
    elif spec["jobTemplate"].get("activeDeadlineSeconds", float("inf")) > shortest_gap_seconds(spec["schedule"]):
        yield "spec.jobTemplate.activeDeadlineSeconds: expected less than the time between two runs, lest they overlap"


def _cron_job_errors(spec: Mapping[str, Any]) -> Iterator[str]:
    if spec.get("concurrencyPolicy") != "Forbid":
        yield f"spec.concurrencyPolicy: found {spec.get('concurrencyPolicy')}, expected Forbid"
    for name in ("successfulJobsHistoryLimit", "failedJobsHistoryLimit"):
        if name not in spec:
            yield f"spec.{name}: expected a number, lest finished jobs pile up"


def shortest_gap_seconds(schedule: str) -> float:
    """Seconds between the two closest of a schedule's next runs."""
    runs = croniter(schedule, datetime(2026, 1, 1, tzinfo=UTC))
    times: list[float] = [runs.get_next(float) for _ in range(_RUNS_LOOKED_AT)]
    return min(later - earlier for earlier, later in pairwise(times))
