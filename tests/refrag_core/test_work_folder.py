"""Intermediate files in a folder and below a URI: the same names, the same bytes, one clear error where unseen."""

import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from refrag_core.errors import StageError
from refrag_core.object_store import RemoteObjects
from refrag_core.work_folder import WorkFolder, open_location, remove_location

TABLE = pa.table({"a": list(range(1000))})


@pytest.fixture(params=["folder", "uri"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> WorkFolder:
    place = str(tmp_path / "work") if request.param == "folder" else request.getfixturevalue("bucket") + "/work"
    made = WorkFolder(place).below("run-1")
    made.make()
    return made


def publish(work: WorkFolder) -> str:
    with work.temporary("run") as path:
        pq.write_table(TABLE, path)
        return work.publish(path, prefix="unit", suffix=".parquet")


def test_a_file_is_published_under_its_content_and_read_anywhere(work: WorkFolder) -> None:
    location = publish(work)
    assert publish(pickle.loads(pickle.dumps(work))) == location  # noqa: S301
    assert location.startswith(f"{work.location}/unit-")
    with open_location(location) as file:
        assert file.read().equals(TABLE)


def test_nothing_else_is_left(work: WorkFolder, tmp_path: Path, own_cache: Path) -> None:
    location = publish(work)
    with work.temporary("run") as path:
        path.write_bytes(b"half")
    left = [path.name for path in (own_cache / "work").iterdir()] if (own_cache / "work").exists() else []
    assert left == []
    remove_location(location)
    with pytest.raises(StageError, match=r"is missing on .*, expected an intermediate file of this run: keep"):
        open_location(location).__enter__()
    work.remove()
    if work.location.startswith("s3://"):
        assert list(RemoteObjects(work.location).list()) == []
    else:
        assert not Path(work.location).exists()


def test_a_machine_that_does_not_see_the_folder_says_so(work: WorkFolder) -> None:
    work.check()
    elsewhere = work.below("elsewhere")
    with pytest.raises(StageError) as caught:
        elsewhere.check()
    assert str(caught.value) == (
        f"{os.uname().nodename} does not see {elsewhere.location}, expected the folder of this run's intermediate "
        "files: put the index and the corpus on storage that all machines share (a mount under the same path "
        "everywhere, or s3://…), or name a shared folder or URI with --work, and run the command again"
    )


def test_what_a_killed_process_left_on_its_way_to_a_uri_is_removed(bucket: str, own_cache: Path) -> None:
    left = own_cache / "work" / f"{os.uname().nodename}-999999999-0-run"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    publish(WorkFolder(f"{bucket}/work"))
    assert not left.exists()
