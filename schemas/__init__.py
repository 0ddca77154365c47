"""The formats that refrag writes: Arrow schemas, the manifest's JSON Schema, and BUNDLE.md, the spec."""

import json
from functools import cache
from importlib import resources
from typing import Any

FORMAT = "refrag-index"
FORMAT_VERSION = 1


@cache
def manifest_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `versions/<n>.json`."""
    text = resources.files(__name__).joinpath("manifest.schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))
