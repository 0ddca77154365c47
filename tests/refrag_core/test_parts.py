"""Seconds by part."""

from types import SimpleNamespace

import pytest

from refrag_core import parts
from refrag_core.parts import collected, part


def test_a_part_within_a_part_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 8.0, 16.0])  # model { capture, capture }
    monkeypatch.setattr(parts, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with collected() as seconds, part("model"):
        for _ in range(2):
            with part("capture"):
                pass
    assert seconds == {"capture": 2.0 + 4.0, "model": 16.0 - 6.0}
    assert next(clock, None) is None


def test_what_fails_is_counted_and_nothing_is_where_nobody_collects() -> None:
    with pytest.raises(ValueError, match="torn"), collected() as seconds, part("read"):
        raise ValueError("torn")
    with part("write"):
        pass
    assert list(seconds) == ["read"]
