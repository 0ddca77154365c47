"""The formats that refrag writes: Arrow schemas, JSON Schemas, and their specs, BUNDLE.md and CHECKPOINT.md."""

import json
from functools import cache
from importlib import resources
from typing import Any

FORMAT = "refrag-index"
FORMAT_VERSION = 1


@cache
def manifest_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `versions/<n>.json`."""
    return _schema("manifest.schema.json")


@cache
def checkpoint_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a checkpoint's config.json."""
    return _schema("checkpoint.schema.json")


@cache
def session_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a saved conversation."""
    return _schema("session.schema.json")


def _schema(name: str) -> dict[str, Any]:
    return dict(json.loads(resources.files(__name__).joinpath(name).read_text(encoding="utf-8")))
