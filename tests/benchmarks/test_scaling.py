"""The simulation of clusters: sums that can be done by hand, and what must hold whatever the costs."""

import math
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.scaling import Setting, StageSimulation, StageTimes, phases_of, shape_of

COSTS = {
    "scan_seconds_a_byte": 2e-8,
    "tokenize_seconds_a_token": 1e-5,
    "plan_seconds_a_record": 2e-5,
    "content_seconds_a_document": 1e-6,
    "driver_seconds_a_shard": 1e-3,
    "manifest_bytes_a_shard": 1500,
    "train_seconds_a_row_and_list": 1.5e-7,
    "add_seconds_a_row": 2e-5,
    "exact_seconds_a_row": 1e-5,
    "gate_seconds_a_row": 1e-6,
}
SETTING = Setting(tokens=1e9, machines=4, shard_bytes=16 << 20)


def stages(machines: int, shards: int, *, losses: float = 0.0, **times: float) -> Any:
    taken = {"tokenize": 1.0, "card": 2.0, "publish": 0.5} | times
    setting = replace(SETTING, machines=machines, losses_an_hour=losses)
    return StageSimulation(setting, shards, StageTimes(**taken)).run()


def test_one_machine_works_through_its_shards() -> None:
    outcome = stages(1, 10)
    assert outcome.seconds == pytest.approx(
        1 + 10 * 2 + 0.5, abs=0.05
    )  # the first tokenized, then the card is never idle
    assert outcome.card_use == pytest.approx(20 / outcome.seconds, abs=0.01)


def test_machines_share_the_work() -> None:
    assert stages(5, 10).seconds == pytest.approx(1 + 2 * 2 + 0.5, abs=0.05)
    assert stages(100, 10).seconds == pytest.approx(1 + 2 + 0.5, abs=0.05)  # more machines than shards are no help


def test_tokenizing_may_be_what_is_slow() -> None:
    """Sixteen cores tokenize sixteen shards in 64 s, the card would do them in 1.6 s."""
    assert stages(1, 160, tokenize=64.0, card=0.1).seconds == pytest.approx(10 * 64, rel=0.05)


def test_the_driver_hands_out_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "ASSUMED", dict(scaling.ASSUMED) | {"dispatch_seconds": 1.0})
    assert stages(1000, 1000, tokenize=0.01, card=0.01).seconds == pytest.approx(1000, rel=0.01)


def test_lost_machines_repeat_their_shards_and_all_is_done() -> None:
    calm, stormy = stages(10, 2000), stages(10, 2000, losses=20.0)
    assert (calm.losses, calm.repeated_shards) == (0, 0)
    assert stormy.losses > 5
    assert stormy.repeated_shards > 0
    assert stormy.seconds > calm.seconds
    assert stages(10, 2000, losses=20.0) == stormy  # seeded


def test_shapes_and_phases() -> None:
    shape = shape_of(SETTING)
    assert (shape.documents, shape.passages, shape.shards) == (1e6, 5e6, 238)
    assert shape.lists == 4096
    outcome = phases_of(SETTING, COSTS)
    seconds = outcome["seconds"]
    assert seconds["content id"] == 1
    assert seconds["scan"] == pytest.approx(4e9 * 2e-8 / 60, abs=0.1)  # 60 units on 64 cores: one round
    assert seconds["train"] == pytest.approx(128 * 4096**2 * 1.5e-7 / 700, abs=0.1)
    assert outcome["hours"] == pytest.approx(sum(seconds.values()) / 3600, abs=1e-3)
    assert outcome["largest"] == "stages"
    assert outcome["training_sample_gb"] == pytest.approx(128 * 4096 * 384 * 4 / 1e9, abs=0.01)
    slower = phases_of(replace(SETTING, train_on_card=False), COSTS)["seconds"]
    assert slower["train"] == pytest.approx(seconds["train"] * 700 / 16, rel=0.2)
    assert not math.isnan(outcome["card_use"])
