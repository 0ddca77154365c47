from dataclasses import replace
from pathlib import Path

from benchmarks.training_profile import part_milliseconds, profile_task
from refrag_core.training.loop import Trainer
from tests.refrag_core.training.conftest import data, models, settings

__all__ = ["data", "models"]


def test_a_task_is_profiled_by_itself(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    tasks = [{"kind": "text", "batch_rows": 2}, {"kind": "reconstruct", "batch_rows": 2, "weight": 0.1}]
    config = settings(data, models, tmp_path / "run", tasks=tasks)
    found = profile_task(config, config.tasks[1], tmp_path, warm_up=1, steps=2)
    assert set(found["parts_ms"]) == {"forward_backward", "sum_over_processes", "clip", "update"}
    assert found["positions_a_second"] > 0
    assert 0 < found["mfu"] < 1
    assert found["parts_ms"]["forward_backward"] > found["parts_ms"]["sum_over_processes"]
    assert not (tmp_path / "run").exists()


def test_parts_are_put_back_after_they_were_timed(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    config = settings(data, models, tmp_path / "run", tasks=[{"kind": "text", "batch_rows": 2}])
    trainer = Trainer(replace(config, micro_batches=2))
    backward = trainer.backward
    assert part_milliseconds(trainer, 2)["forward_backward"] > 0
    assert trainer.backward is backward
    assert trainer.step == 2
