import json
from pathlib import Path

import pytest

from refrag_core.errors import MissingExtraError
from refrag_core.training.run_log import RunLog, read_metrics, scalars


def test_numbers_by_their_path() -> None:
    line = {"step": 3, "losses": {"text": 1.5, "reconstruct/k8": 2}, "interval": [0.1, 0.2], "name": "x", "ok": True}
    assert list(scalars(line)) == [("losses/text", 1.5), ("losses/reconstruct/k8", 2.0)]


def test_what_a_killed_run_logged_too_early_comes_again(tmp_path: Path) -> None:
    """In metrics.jsonl and, where TensorBoard is installed, in its events."""
    killed = RunLog(tmp_path, tensorboard=None)
    killed.begin(0)
    for step in range(1, 6):
        killed.write({"step": step, "loss": float(step)})
    killed.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')
    resumed = RunLog(tmp_path, tensorboard=None)
    resumed.begin(3)
    resumed.write({"step": 4, "loss": 40.0})
    resumed.close()
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "metrics.jsonl")] == expected
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


def test_only_the_first_process_logs(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=True, active=False)
    log.begin(0)
    log.write({"step": 1})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_events_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = r"tensorboard = true needs the package tensorboard: pip install 'refrag\[train\]'"
    with pytest.raises(MissingExtraError, match=message):
        RunLog(tmp_path, tensorboard=True)
    log = RunLog(tmp_path, tensorboard=None)
    log.begin(0)
    log.write({"step": 1, "loss": 2.0})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
