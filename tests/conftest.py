"""Shared fixtures: no test reaches a model hub."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty refrag cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("REFRAG_CACHE", str(folder))
    return folder
