"""What a build would take on a cluster, from rates: plain values against sums done by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refrag.pipelines import measured_rates
from refrag.pipelines.cluster_plan import ClusterOptions, ClusterPlan, Work, plan_cluster
from refrag.pipelines.measured_rates import AROUND, GPUS, chunk_rate, gpu_rates, index_cost, relative_size
from refrag_core.errors import ConfigError
from tests.command_line import call
from tests.small_index import SmallIndex, documents

WORK = Work(
    documents=1_000_000,
    shards=1000,
    text_bytes=4_000_000_000,
    chunks=62_500_000,
    passages=5_000_000,
    disk_bytes=60_000_000_000,
    core_seconds={"scan": 3600.0, "tokenize": 7200.0, "embeddings": 160_000.0, "vectors": 100_000.0},
    device="cpu",
    device_cores=2,
)


def model(folder: Path, layers: int) -> Path:
    folder.mkdir()
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(shape))
    return folder


@pytest.fixture
def models(tmp_path: Path) -> Any:
    """MiniLM as retriever, a body of twice its size as encoder."""
    encoder, retriever = model(tmp_path / "encoder", 12), model(tmp_path / "retriever", 6)
    checkpoint = type("Checkpoint", (), {"encoder_folder": lambda self: encoder})()
    parameters = type("Parameters", (), {"chunk_size": 16, "vector_dim": 384})()
    return type("Models", (), {"checkpoint": checkpoint, "retriever": retriever, "parameters": parameters})()


def planned(models: Any, **changes: Any) -> ClusterPlan:
    options: dict[str, Any] = {"engine": "ray", "workers": 4, "cores": 8} | changes
    return plan_cluster(ClusterOptions(**options), WORK, models)


def test_phases_of_a_cluster_with_cards(models: Any) -> None:
    plan = planned(models, gpu="h100")
    device = 62_500_000 / (355_116 / 2) + 5_000_000 / GPUS["h100"].passages_a_second
    assert plan.phases["scan"] == pytest.approx(3600 / 32 / 3600, abs=1e-3)
    assert plan.phases["stages"] == pytest.approx(device / 4 / 3600, rel=1e-3)
    assert plan.bottleneck == "device"
    assert plan.gpu_hours == pytest.approx(device / 3600, rel=1e-3)
    assert plan.hours == pytest.approx(sum(plan.phases.values()), abs=1e-3)
    driver = 1_000_000 * AROUND.document + 1000 * AROUND.shard
    assert plan.phases["commit"] == pytest.approx(driver / 3600, abs=1e-3)
    assert plan.storage_gb == 60
    assert plan.requests["PUT"] == 9000
    assert "divided by 2.00" in plan.rates["encode"].source
    assert "benchmarks/results/gpu_check-h100.json" in plan.rates["embed"].source
    assert plan.rates["tokenize"].source == "measured here, on a sample (cpu)"


def test_scoring_that_no_card_was_measured_at_is_said_to_be_left_out(models: Any) -> None:
    scored = replace(WORK, core_seconds=dict(WORK.core_seconds) | {"scores": 1e6})
    carded, plain = (ClusterOptions(engine="ray", workers=4, cores=8, gpu=gpu) for gpu in ("h100", None))
    assert "scoring (--score), which no card was measured at" in plan_cluster(carded, scored, models).left_out[-1]
    assert plan_cluster(carded, WORK, models).left_out == ("starting machines, workers and models",)
    counted = plan_cluster(plain, scored, models)
    assert counted.left_out == ("starting machines, workers and models",)
    assert counted.hours > plan_cluster(plain, WORK, models).hours


def test_without_cards_this_machine_s_rates_count(models: Any) -> None:
    plan = planned(models)
    assert plan.phases["stages"] == pytest.approx(260_000 * 2 / 32 / 3600, rel=1e-3)
    assert plan.gpu_hours == 0
    assert plan.cpu_hours == pytest.approx((3600 + 7200 + 520_000) / 3600, rel=0.02)
    assert plan.rates["encode"].value == pytest.approx(62_500_000 / 160_000 / 2, abs=0.1)


def test_more_machines_take_less_time_down_to_the_driver_s_own(models: Any) -> None:
    hours = [planned(models, workers=workers, gpu="h100").hours for workers in (1, 4, 16, 4096)]
    assert hours == sorted(hours, reverse=True)
    many = planned(models, workers=4096, gpu="h100")
    assert many.bottleneck in ("commit", "index")


def test_machines_without_a_shard_stand_idle(models: Any) -> None:
    few = replace(WORK, shards=3, core_seconds=dict(WORK.core_seconds) | {"tokenize": 1.0})
    hours = [
        plan_cluster(ClusterOptions(engine="ray", workers=workers, gpu="h100"), few, models).phases["stages"]
        for workers in (2, 3, 100)
    ]
    assert hours[0] > hours[1] == hours[2]


def test_tokenizing_can_be_what_is_slow(models: Any) -> None:
    slow = replace(WORK, core_seconds=dict(WORK.core_seconds) | {"tokenize": 1e6})
    options = ClusterOptions(engine="beam", workers=4, cores=1, gpu="h100")
    assert plan_cluster(options, slow, models).bottleneck == "tokenize"


def test_rates_of_the_table() -> None:
    card = gpu_rates("h100")
    assert [chunk_rate(card, size) for size in (8, 16, 32)] == [476_446, 355_116, 235_976]
    assert chunk_rate(card, 64) == pytest.approx(235_976 / 2)
    with pytest.raises(ConfigError, match=r"--gpu a100 has no measured rates; expected h100: leave --gpu out"):
        gpu_rates("a100")


def test_the_table_is_what_was_measured() -> None:
    results = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    gpu = json.loads((results / "gpu_check-h100.json").read_text())
    for size, rate in gpu["encode_chunks_per_s"].items():
        assert GPUS["h100"].chunks_a_second[int(size)] == pytest.approx(rate, abs=1)
    passages = gpu["build"]["passages"] / gpu["build"]["steps"]["vectors"]
    assert GPUS["h100"].passages_a_second == pytest.approx(passages)
    costs = json.loads((results / "scaling-costs.json").read_text())["costs"]
    assert AROUND.record == pytest.approx(costs["plan_seconds_a_record"], rel=0.25)
    assert AROUND.train == pytest.approx(costs["train_seconds_a_row_and_list"], rel=0.25)
    assert AROUND.add == pytest.approx(costs["add_seconds_a_row"] / 1024, rel=0.25)
    assert AROUND.gate == pytest.approx(costs["exact_seconds_a_row"] + costs["gate_seconds_a_row"], rel=0.25)
    assert AROUND.document == pytest.approx(costs["content_seconds_a_document"], rel=0.25)
    assert AROUND.shard == pytest.approx(costs["driver_seconds_a_shard"], rel=0.25)


def test_the_cost_of_a_vector_index() -> None:
    flat, large = index_cost(1000, 384), index_cost(5_000_000, 384)
    assert (flat.train, flat.segments) == (0, pytest.approx(1000 * (AROUND.add + AROUND.gate)))
    assert large.train == pytest.approx(128 * 4096 * 4096 * AROUND.train)
    assert large.segments == pytest.approx(5_000_000 * (AROUND.add * 4096 + AROUND.gate))
    assert index_cost(5_000_000, 768).train == 2 * large.train


def test_the_size_of_a_body(tmp_path: Path) -> None:
    assert relative_size(model(tmp_path / "same", 6)) == 1
    assert relative_size(model(tmp_path / "half", 3)) == 0.5
    assert measured_rates.MINILM_TOKEN_FLOPS == 21_233_664


def test_the_command_plans_for_a_cluster(tmp_path: Path, own_cache: Path) -> None:
    small = SmallIndex(tmp_path, documents(6))
    shown = (
        *("index", "plan", small.corpus, "-o", small.path, "--checkpoint", small.models / "checkpoint"),
        *("--retriever", small.models / "encoder", "--device", "cpu", "--engine", "ray"),
    )
    plan = call(*shown, "--workers", 2, "--gpu", "h100", "--json").json["cluster"]
    assert (plan["engine"], plan["workers"], plan["gpu"]) == ("ray", 2, "h100")
    assert plan["hours"] == pytest.approx(sum(plan["phases"].values()), abs=1e-3)
    assert {rate["source"].split(":")[0].split(",")[0] for rate in plan["rates"].values()} == {
        "measured here",
        "benchmarks/results/gpu_check-h100.json",
        "benchmarks/results/scaling-costs.json",
    }
    text = call(*shown, "--workers", 2, "--gpu", "h100").out
    assert "ray, 2 machines with one h100 each" in text
    assert "left out" in text
    assert " min" not in text  # six documents take seconds, and are told in seconds
    assert not small.path.exists()
    without = call(*shown)
    assert without.code == 2
    assert "--engine ray was planned without machines, expected how many: say --workers N" in without.err
    for option, value in (("--gpu", "h100"), ("--cores", 4)):  # the last --engine counts
        local = call(*shown, "--engine", "local", option, value)
        assert local.code == 2
        assert f"{option} was given for the local engine, expected --engine ray or beam" in local.err
    unknown = call(*shown, "--workers", 2, "--gpu", "tpu")
    assert unknown.code == 2
    assert "--gpu tpu has no measured rates" in unknown.err
