"""What a manifest may say: KubeRay's published CRDs, Kubernetes' own schemas, and Ray's for `ray up`.

Unknown fields are refused everywhere. A cluster would drop or refuse them; here nobody has to wait for one.
"""

import json
import lzma
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

KUBERNETES = "1.33"
"""Version whose schemas the core kinds are checked against."""

Schemas = Mapping[tuple[str, str], Any]
"""JSON Schemas of custom resources by (apiVersion, kind)."""


def load_crds(folder: Path) -> Schemas:
    """The schemas of every served version of the CRDs in `folder`, `.yaml` or `.yaml.xz`.

    Raises SystemExit where there are none.
    """
    paths = sorted([*folder.glob("*.yaml"), *folder.glob("*.yaml.xz")])
    schemas = {key: schema for path in paths for key, schema in _served(yaml.load(_text(path), yaml.CSafeLoader))}
    if not schemas:
        raise SystemExit(f"{folder} has no CRD; expected *.yaml or *.yaml.xz of CustomResourceDefinitions: see --crds")
    return schemas


def _text(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def _served(crd: Any) -> Iterator[tuple[tuple[str, str], Any]]:
    if crd.get("kind") != "CustomResourceDefinition":
        return
    group, kind = crd["spec"]["group"], crd["spec"]["names"]["kind"]
    for version in crd["spec"]["versions"]:
        if version["served"]:
            yield (f"{group}/{version['name']}", kind), strict(version["schema"]["openAPIV3Schema"])


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses unknown fields, except where it asks to keep them.

    An object without named fields, like `metadata`, stays open: a CRD leaves it to Kubernetes.
    """
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) if key in ("items", "additionalProperties") else value for key, value in schema.items()}
    if "properties" in schema:
        made["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    return made


def schema_errors(document: Any, crds: Schemas) -> list[str]:
    """Every way in which a document breaks its schema, "path: what"; empty for a valid one."""
    if not isinstance(document, dict):
        return [f"found {type(document).__name__}, expected a mapping"]
    if "cluster_name" in document:
        return _broken(document, _ray_up_schema())
    key = (str(document.get("apiVersion")), str(document.get("kind")))
    if key in crds:
        return [*_metadata_errors(document), *_broken(document, crds[key])]
    return _core_errors(document)


def _broken(document: Any, schema: Any) -> list[str]:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(document)
    return sorted(f"{error.json_path.removeprefix('$.')}: {error.message}" for error in errors)


def _ray_up_schema() -> Any:
    spec = find_spec("ray")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("Ray's schema of cluster files comes with Ray: pip install 'refrag[ray]'")
    return json.loads(Path(spec.submodule_search_locations[0], "autoscaler", "ray-schema.json").read_text())


def _metadata_errors(document: Any) -> list[str]:
    """A custom resource's metadata, checked as that of a kind that Kubernetes knows."""
    return _core_errors({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document.get("metadata")})


def _core_errors(document: Any) -> list[str]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path.removeprefix('$.')}: {error.message}"]
    except (kubernetes_validate.SchemaNotFoundError, KeyError):
        kind = f"{document.get('apiVersion')} {document.get('kind')}"
        return [f"found {kind}, expected a kind of Kubernetes {KUBERNETES} or of the CRDs given with --crds"]
    return []
