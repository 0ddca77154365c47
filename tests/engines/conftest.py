"""One Ray cluster for all tests of the engine, since each takes seconds to start."""

from collections.abc import Iterator

import pytest

from tests.ray_cluster import RayCluster, ray_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[RayCluster]:
    """Two nodes of two CPUs each."""
    with ray_cluster(2, 2) as running:
        yield running
