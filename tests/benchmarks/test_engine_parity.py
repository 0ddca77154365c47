"""The comparison of engines finds what differs, and builds nothing twice."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import zstandard

from benchmarks import engine_parity
from benchmarks.engine_parity import ENGINES, built, differences, main, missing_package, mixed, write_mixed

SAME: dict[str, Any] = {"content_id": "c", "build_id": "b", "files": {"shards/a": "1", "shards/b": "2"}}


def test_equal_builds_have_no_differences() -> None:
    assert differences(SAME, json.loads(json.dumps(SAME))) == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"content_id": "x"}, ["content_id differs"]),
        ({"build_id": "x"}, ["build_id differs"]),
        ({"files": {"shards/a": "1"}}, ["shards/b: missing"]),
        ({"files": SAME["files"] | {"shards/c": "3"}}, ["shards/c: in this one only"]),
        ({"files": {"shards/a": "1", "shards/b": "9"}}, ["shards/b: other bytes"]),
    ],
)
def test_every_difference_is_told(change: dict[str, Any], found: list[str]) -> None:
    assert differences(SAME, SAME | change) == found


def test_an_engine_without_its_package_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_parity.importlib.util, "find_spec", lambda name: None)
    assert {name: missing_package(options) for name, options in ENGINES.items()} == {
        "local": None,
        "ray": "ray",
        "beam-direct": "apache_beam",
        "beam-processes": "apache_beam",
        "beam-portable": "apache_beam",
    }


def test_the_mixed_corpus_takes_so_much_text_in_every_format(tmp_path: Path) -> None:
    for name in "abcd":
        lines = [json.dumps({"id": f"{number}", "text": "x" * 100}) for number in range(10)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "made").mkdir()
    write_mixed(tmp_path / "made", mixed(tmp_path, 2500))
    made = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert made == ["a.jsonl", "b.jsonl.zst", "c.parquet"]
    first = (tmp_path / "made" / "a.jsonl").read_text().splitlines()
    second = zstandard.ZstdDecompressor().decompress((tmp_path / "made" / "b.jsonl.zst").read_bytes()).splitlines()
    third = pq.read_table(tmp_path / "made" / "c.parquet").to_pylist()
    assert (len(first), len(second), len(third)) == (10, 10, 5)
    assert third[0] == {"id": "c/0", "text": "x" * 100, "source": "c"}
    with pytest.raises(SystemExit, match="expected 1: add some to it"):
        list(mixed(tmp_path, 1 << 20))


@pytest.mark.slow
def test_two_engines_agree_and_a_second_run_builds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--documents", "12", "--engines", "local", "beam-direct", "--work", str(tmp_path)]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["equal"]
    assert set(report["engines"]) == {"local", "beam-direct"}
    assert report["files"] >= 10
    monkeypatch.setattr(engine_parity, "subprocess", None)  # nothing is started
    assert main(arguments) == 0
    record = tmp_path / "made" / "beam-direct.json"
    found = json.loads(record.read_text())
    found["files"][next(iter(found["files"]))] = "0"
    record.write_text(json.dumps(found))
    assert main(arguments) == 1


@pytest.mark.slow
def test_a_build_that_fails_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"failed with exit code 1; run again to go on"):
        built("local", ENGINES["local"], [str(tmp_path / "nowhere")], tmp_path)
