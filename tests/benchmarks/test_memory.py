import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks.memory import FORMATS, documents, main, write_corpus

pytestmark = pytest.mark.usefixtures("own_cache")


def test_documents_are_a_function_of_size_and_seed() -> None:
    records = list(documents(20_000))
    assert records == list(documents(20_000))
    assert records != list(documents(20_000, seed=1))
    assert list(documents(30_000))[: len(records)] == records
    assert 20_000 <= sum(len(record["text"]) for record in records) < 30_000
    assert len({record["id"] for record in records}) == len(records)


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as stream:
        return [json.loads(line) for line in stream]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_holds_the_same_records(tmp_path: Path, kind: str) -> None:
    folder = write_corpus(tmp_path / "corpus", 20_000, kind)
    (path,) = folder.iterdir()
    assert path.name == f"documents.{kind}"
    assert read(path) == list(documents(20_000))


@pytest.mark.slow
def test_a_run_reports_its_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "result.json"
    assert main(["--megabytes", "0.02", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result == json.loads(capsys.readouterr().out)
    (run,) = result["runs"]
    assert run["documents_in"] == len(list(documents(20_000)))
    assert run["peak_mb"]["rss"] > run["peak_mb"]["anonymous"] >= run["peak_mb"]["main_anonymous"] > 50
    assert max(run["peak_by_tenth_mb"]) == run["peak_mb"]["anonymous"]
    assert set(result["ratio"].values()) == {1.0}
    assert str(tmp_path) not in output.read_text()
