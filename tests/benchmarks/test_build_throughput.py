import json
from pathlib import Path

import pytest

from benchmarks import build_throughput
from benchmarks.build_throughput import Inputs, Times, main, read_inputs, summary
from refrag.pipelines.build import BuildReport
from refrag_core.checkpoint import load_checkpoint
from tests.small_index import SmallIndex, models_folder

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def small(tmp_path: Path) -> SmallIndex:
    return SmallIndex(tmp_path)


@pytest.mark.slow
def test_a_run_measures_build_and_bare_loop(
    small: SmallIndex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_throughput, "sentence_transformer", lambda retriever: None)
    folder = models_folder()
    models = {"checkpoint": str(folder / "checkpoint"), "retriever": str(folder / "encoder")}
    arguments = ["--corpus", str(small.corpus), "--rounds", "2", "--workers", "0", "--min-recall", "0"]
    assert main(arguments, models) == 0
    text = capsys.readouterr().out
    result = json.loads(text)
    assert result["corpus"]["documents"] == 60
    assert result["sentence_transformers"] == "not installed"
    assert len(result["build_to_bare"]["rounds"]) == len(result["rounds"]["build"]) == 2
    assert result["matmul"]["gflops"] > 0
    assert str(small.root) not in text


def test_inputs_are_what_the_index_holds(small: SmallIndex) -> None:
    report = small.build()
    decoder = load_checkpoint(small.models / "checkpoint").decoder_folder()
    inputs = read_inputs(small.path, decoder)
    assert inputs.tokens.shape == (report.chunks, 16)
    assert int(inputs.num_tokens.sum()) == report.tokens
    assert len(inputs.passages) == report.passages
    assert inputs.passages[0].startswith(inputs.chunk_texts[0])


def test_summary_divides_neighbouring_rounds(small: SmallIndex) -> None:
    report: BuildReport = small.build()
    tokens = small_inputs(chunks=100, tokens=1600, passages=10)
    times = Times(
        build=[10.0, 20.0], encode_stage=[4.0, 4.0], embed_stage=[2.0, 2.0],
        bare_encode=[4.0, 10.0], bare_embed=[4.0, 6.0],
        sentence_transformers={32: [5.0, 5.0]}, matmul_gflops=[100.0, 100.0], load_average=[1.0, 1.0],
    )  # fmt: skip
    result = summary(times, [report, report], tokens, cold=24.0, gflops_a_token=0.021)
    assert result["build_to_bare"]["rounds"] == [0.8, 0.8]
    assert result["build_to_bare"]["with_model_loading"] == 0.5  # (8 + 16) / 2 of 24
    assert result["build"]["encode_stage_chunks_a_second"] == 25.0
    assert result["bare_loop"] == {"seconds": 12.0, "chunks_a_second": 14.3, "passages_a_second": 2.0}
    assert result["sentence_transformers"] == {"batch 32": {"chunks_a_second": 20.0}}
    assert result["matmul"]["encoder_gflops"] == 4.8  # 1600 tokens of 0.021 GFLOP in 7 s


def small_inputs(*, chunks: int, tokens: int, passages: int) -> Inputs:
    import numpy as np

    counts = np.full(chunks, tokens // chunks, np.int16)
    return Inputs(np.zeros((chunks, 16), np.int32), counts, [""] * chunks, [""] * passages)
