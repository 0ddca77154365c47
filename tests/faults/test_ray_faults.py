"""Whatever goes wrong on a Ray cluster, the build that is finished is the calm one; so on the local engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.engine_faults import FAULTS, Scene, one_record_on_the_local_engine, play, scene
from tests.small_index import documents


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


def test_one_record_of_which_the_local_engine_makes_nothing(tmp_path: Path, own_cache: Path) -> None:
    ending = one_record_on_the_local_engine(tmp_path, documents(30, sentences=6), workers=0)
    assert ending.unharmed
    assert ending.notes == ("30 documents in, 29 indexed, 1 quarantined",)
