"""The inspector: a page that shows what the policy saw, at a server's `/` and, for one answer, from `ask --html`.

Three plain files, nothing from elsewhere. Written for one answer, all is in one file: scripts are allowed by their
digest, and nothing is loaded.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from refrag_core.runtime import Answer

FILES = {"inspector.css": ("page.css", "text/css"), "inspector.js": ("page.js", "text/javascript")}
"""Name below `/` → file here and its media type."""

SERVED_POLICY = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; " + (
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def read(name: str) -> str:
    """One of the page's files."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def served_page() -> str:
    """The page as the server has it: styles and script beside it."""
    style = '<link rel="stylesheet" href="inspector.css">'
    return _filled(policy="", style=style, data="", script='<script src="inspector.js" defer></script>')


def answer_page(answer: Answer) -> str:
    """The page for one answer that was made with `explain`, all in one file."""
    style, script = read("page.css"), read("page.js")
    allowed = f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; img-src data:"
    # The data is no script to a browser, and can hold no end of its element: < is written as an escape.
    data = json.dumps(_plain(asdict(answer)), default=str, allow_nan=False).replace("<", "\\u003c")
    return _filled(
        policy=f'<meta http-equiv="Content-Security-Policy" content="{allowed}">',
        style=f"<style>{style}</style>",
        data=f'<script id="data" type="application/json">{data}</script>',
        script=f"<script>{script}</script>",
    )


def write_answer(answer: Answer, output: Path) -> None:
    """Write the page for one answer to `output`, in place of what is there."""
    temporary = output.with_name(f"{output.name}.tmp")
    try:
        temporary.write_text(answer_page(answer), encoding="utf-8")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def _filled(**parts: str) -> str:
    page = read("page.html")
    for name, part in parts.items():
        page = page.replace(f"<!--{name}-->", part, 1)
    return page


def _plain(value: Any) -> Any:
    """Without the numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
