"""The figure of what one training run after the other made of held-out losses."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import progress_plot
from benchmarks.progress_plot import read_points
from refrag_core.errors import UsageError


def write(path: Path, loss: float, **changes: Any) -> Path:
    row = {"refrag": {"0": {"random": loss}, "0.25": {"random": loss - 0.1}}, "last": {"0": {"loss": 2.4}}}
    held_out = {"windows": 8, "base": {"full": 2.5}, "none": 3.0, "full": 2.0, "chunk_size_8": row} | changes
    path.write_text(json.dumps({"held_out": held_out}))
    return path


def test_every_run_is_a_point_of_every_curve(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.json", 2.8), write(tmp_path / "b.json", 2.6)
    assert read_points([f"100:{first}", f"250.5:{second}"]) == {
        8: {
            "no context": [(100.0, 3.0), (250.5, 3.0)],
            "p = 0": [(100.0, 2.8), (250.5, 2.6)],
            "p = 0.25": [(100.0, 2.8 - 0.1), (250.5, 2.6 - 0.1)],
            "last tokens, as many positions as p = 0": [(100.0, 2.4), (250.5, 2.4)],
            "full context": [(100.0, 2.0), (250.5, 2.0)],
        }
    }


@pytest.mark.parametrize("argument", ["100:nothing.json", "x:{file}", "{file}"])
def test_what_is_no_evaluation_is_refused(tmp_path: Path, argument: str) -> None:
    file = write(tmp_path / "a.json", 2.8)
    with pytest.raises(UsageError, match="is no SECONDS:FILE of a training run's evaluation"):
        read_points([argument.format(file=file)])


def test_evaluations_over_other_windows_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.json", 2.8)
    told = [("'windows': 16.*2.500 nats, and .*'windows': 8", {"windows": 16}), ("2.700 nats", {"base": {"full": 2.7}})]
    for message, changes in told:
        second = write(tmp_path / "b.json", 2.6, **changes)
        with pytest.raises(UsageError, match=f"was evaluated on .*{message}.*; expected the same windows"):
            read_points([f"1:{first}", f"2:{second}"])
    rounded = write(tmp_path / "b.json", 2.6, base={"full": 2.502})
    assert len(read_points([f"1:{first}", f"2:{rounded}"])[8]["p = 0"]) == 2


def test_the_figure_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "made" / "progress.png"
    assert progress_plot.main([f"1:{write(tmp_path / 'a.json', 2.8)}", "--output", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    assert progress_plot.main([f"1:{tmp_path / 'a.json'}", "--output", str(tmp_path / "made.xyz")]) == 2
    assert "expected an image's" in capsys.readouterr().err
    assert progress_plot.main(["1:none.json", "--output", str(output)]) == 2
    assert "error: '1:none.json' is no SECONDS:FILE" in capsys.readouterr().err
