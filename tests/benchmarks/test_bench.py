"""`refrag bench`: small runs on a CPU, their rows and their refusals."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refrag.benchmarks import build, encode, ttft
from refrag.benchmarks.bench_plots import merged, plot_ttft
from refrag_core.errors import UsageError


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """A build remembers fingerprints."""


def test_ttft_rows_add_up(tmp_path: Path) -> None:
    options = ttft.TtftOptions(
        decoder="tiny", encoder="tiny", context=(512,), chunk_size=(16,), expansion_fraction=(0.0, 0.25),
        passages=64, batch=(2,), repeats=1, device="cpu",
    )  # fmt: skip
    report = ttft.measure(options)
    none, some = report["rows"]
    assert set(none) >= {"context", "chunk_size", "expansion_fraction", "ttft_ms", "full_ttft_ms", "speedup", "steps"}
    assert none["ttft_ms"] == pytest.approx(sum(none["steps"].values()), abs=1.0)
    assert none["full_positions"] - none["positions"] == 512 - 512 // 16
    assert some["positions"] - none["positions"] == 8 * 15  # a quarter of 32 chunks, 16 positions each in place of one
    layers, heads, width, float32 = 2, 2, 16, 4
    assert none["kv_bytes"] == none["positions"] * layers * 2 * heads * width * float32
    assert none["speedup"] == pytest.approx(none["full_ttft_ms"] / none["ttft_ms"], abs=0.01)
    assert set(report["throughput"][0]) == {"context", "batch", "new_tokens", "k=16", "full"}
    assert "512  16   0.0" in ttft.table(report)
    ttft.plot(report, tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").stat().st_size > 5_000


def test_encode_rows(tmp_path: Path) -> None:
    report = encode.measure(encode.EncodeOptions(body=("tiny",), chunks=200, texts=40, device="cpu"))
    rows: dict[tuple[str, str], Any] = {(row["stage"], row["baseline"]): row for row in report["rows"]}
    ours, bare = rows["encode", "refrag, ids"], rows["encode", "bare loop, ids"]
    assert ours["tokens_per_s"] == pytest.approx(16 * ours["chunks_per_s"], rel=1e-3)
    assert bare["speedup"] == pytest.approx(ours["chunks_per_s"] / bare["chunks_per_s"], rel=0.01)
    assert rows["embed", "refrag, ids"]["passages_per_s"] > 0
    assert report["rates"][0]["bottleneck"] in report["rates"][0]["chunks_per_s"]
    encode.plot(report, tmp_path / "encode.png")
    assert (tmp_path / "encode.png").is_file()


def test_build_says_what_is_left_out_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "faiss" else object())
    report = build.measure(build.BuildBenchOptions(device="cpu"))
    assert build.table(report).startswith("left out: the whole build: faiss is missing")


def test_a_device_stage_s_seconds_are_shared_by_the_engine_s_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "threads_for", lambda devices: 5 if list(devices) == ["cpu"] else 1)
    steps = {"embeddings": 10.0, "vectors": 20.0, "index": 3.0}
    made = SimpleNamespace(steps=steps, parts={}, seconds=30.0, chunks=1, tokens=1, recall_at_10=None)
    report = build._summary(made, build.BuildBenchOptions(device="cpu"), {"environment": {}}, 31.0)  # type: ignore[arg-type]
    assert [row["seconds"] for row in report["rows"]] == [2.0, 4.0, 3.0]
    assert report["bottleneck"] == "vectors"


def test_contexts_are_whole_passages() -> None:
    with pytest.raises(UsageError, match="--context 1000 is no multiple of a passage's 256 tokens"):
        ttft.measure(ttft.TtftOptions(context=(1000,), device="cpu"))
    with pytest.raises(UsageError, match="--dtype is 'int4'; expected one of float32, bfloat16, float16"):
        ttft.dtype_named("int4")


def test_reports_of_one_machine_are_one_figure(tmp_path: Path) -> None:
    def report(gpu: str, *contexts: int) -> dict[str, Any]:
        rows = [
            {"context": c, "chunk_size": 8, "expansion_fraction": 0.0, "ttft_ms": 1.0, "speedup": 2.0} for c in contexts
        ]
        return {"environment": {"decoder": "d", "gpu": gpu, "cpu": "c", "date": "2026-11-29"}, "rows": rows}

    made = merged([report("g", 64, 16), report("g", 32)])
    assert [row["context"] for row in made["rows"]] == [16, 32, 64]
    plot_ttft(made, tmp_path / "made.png")
    assert (tmp_path / "made.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="2 decoders or machines"):
        merged([report("g", 64), report("h", 32)])
