"""Shared fixtures: no test reaches a model hub."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.object_server import FaultyServer, environment, make_bucket, s3_server

_buckets = itertools.count()


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


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """An S3 server for the whole session."""
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(s3_endpoint: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """URI of an empty bucket, with its credentials in the environment and an empty cache."""
    name = f"test-{next(_buckets)}"
    make_bucket(s3_endpoint, name)
    for variable, value in environment(s3_endpoint).items():
        monkeypatch.setenv(variable, value)
    return f"s3://{name}"


@pytest.fixture
def faulty(bucket: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A proxy between the clients and the server of `bucket` that fails as it is told."""
    proxy = FaultyServer(s3_endpoint)
    with proxy.running() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield proxy
