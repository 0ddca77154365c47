"""What the run that made a generation took: times, rates and counts, for people.

Lies beside the generation as `runs/<n>.json` and is no part of it: no id or digest depends on it, it is never signed,
and a generation without one is as good. It holds no content of any document.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from refrag_core.manifest import run_record_name
from refrag_core.storage import Store


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What one stage did in a run."""

    seconds: float
    """Of work; stages run beside one another."""
    done: int
    """Units made in this run."""
    reused: int
    """Units that an earlier, interrupted run had made already."""
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run of `refrag index build`."""

    build_id: str
    started: str
    """ISO 8601, UTC."""
    seconds: float
    device: str
    cores: int
    documents_in: int
    new: int
    changed: int
    unchanged: int
    deleted: int
    missing: int
    filtered: int
    quarantined: int
    truncated_passages: int
    stages: Mapping[str, StageRecord]


_ORDER = ("scan", "tokenize", "embeddings", "vectors", "scores", "index")


def _in_order(stage: tuple[str, Any]) -> int:
    return _ORDER.index(stage[0]) if stage[0] in _ORDER else len(_ORDER)


def write_run_record(store: Store, version: int, record: RunRecord) -> None:
    """Keep the record beside generation `version`."""
    text = json.dumps(asdict(record), indent=2, sort_keys=True)
    store.replace(run_record_name(version), f"{text}\n".encode())


def read_run_record(store: Store, version: int, build_id: str) -> RunRecord | None:
    """The record of the run that made this generation; None where there is none that can be read."""
    try:
        body: dict[str, Any] = json.loads(store.read(run_record_name(version)))
        stages = {name: StageRecord(**stage) for name, stage in sorted(body.pop("stages").items(), key=_in_order)}
        record = RunRecord(**body, stages=stages)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # it decides nothing: a page without rates is better than none
    return record if record.build_id == build_id else None
