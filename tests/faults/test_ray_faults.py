"""Whatever goes wrong on a Ray cluster, the build that is finished is the calm one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.engine_faults import FAULTS, Scene, play, scene


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("faults")) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_build_under_a_fault_is_the_calm_one(at: Scene, own_cache: Path, name: str) -> None:
    ending = play(at, name)
    assert ending.ids == ending.expected
    assert ending.problems == ()
