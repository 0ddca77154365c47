import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from refrag_core.errors import ConfigError
from refrag_core.training.loop import Trainer
from refrag_core.training.processes import Processes, join_processes
from tests.refrag_core.training.conftest import settings

ROOT = Path(__file__).parents[3]

RUN = """
import json, sys
from refrag_core.training.config import parse_config
from refrag_core.training.loop import Trainer
Trainer(parse_config(json.loads(sys.argv[1]))).run()
"""


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line)["losses"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    one = settings(data, models, tmp_path / "one", micro_batches=2)
    Trainer(one).run()
    script = tmp_path / "run.py"
    script.write_text(RUN)
    two = {**one.to_json(), "output": str(tmp_path / "two")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(script), json.dumps(two)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found, expected = logged(tmp_path / "two"), logged(tmp_path / "one")
    assert [losses.keys() for losses in found] == [losses.keys() for losses in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert list(mine.values()) == pytest.approx(list(theirs.values()), rel=1e-4)
    evaluations = [json.loads((tmp_path / name / "evaluation.json").read_text())["held_out"] for name in ("one", "two")]
    assert evaluations[1]["full"] == pytest.approx(evaluations[0]["full"], rel=1e-4)


def test_micro_batches_are_shared_evenly(
    tmp_path: Path, data: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    three = Processes()
    three.count = 3
    monkeypatch.setattr("refrag_core.training.loop.join_processes", lambda device: three)
    with pytest.raises(ConfigError, match="3 processes cannot share 4 micro_batches"):
        Trainer(settings(data, models, tmp_path / "run", micro_batches=4))


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = join_processes("auto")
    assert (processes.count, processes.own([1, 2, 3]), processes.gather("x")) == (1, [1, 2, 3], ["x"])


def test_a_share_of_the_plan() -> None:
    second = Processes()
    second.rank, second.count = 1, 2
    assert second.own([0, 1, 2, 3]) == [1, 3]


def test_several_processes_take_no_single_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="'cuda:1' in a run of several"):
        join_processes("cuda:1")
