"""The load of `refrag bench serve` against a real server over tiny models: what it counts, and what it says."""

from pathlib import Path

import pytest

from refrag.benchmarks import serve
from refrag.benchmarks.serve import ServeBenchOptions, Timing
from tests.command_line import call
from tests.small_index import SmallIndex


def test_a_row_is_of_its_timings() -> None:
    timings = [Timing(0.1, 0.4, 4, 50, 200), Timing(0.3, 0.3, 1, 70, 300)]
    row = serve._row("full", 2, timings, 2.0)
    assert (row["requests_a_second"], row["tokens_a_second"]) == (1.0, 2.5)
    assert (row["decoder_positions"], row["context_tokens"]) == (60, 250)
    assert row["ttft_ms"] == {"p50": 200.0, "p95": 290.0, "p99": 298.0}
    assert row["ttit_ms"] == {"p50": 100.0, "p95": 100.0, "p99": 100.0}  # one token has no time between
    assert serve._row("full", 1, timings[1:], 1.0)["ttit_ms"] == {"p50": None, "p95": None, "p99": None}


def test_wrong_numbers_of_clients_are_said(tmp_path: Path) -> None:
    for clients in ("1,x", "", "0"):
        done = call("bench", "serve", tmp_path, "--clients", clients)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"error: --clients is '{clients}'; expected whole numbers from 1 on")


def test_a_client_s_conversation_carries_its_turns() -> None:
    options = ServeBenchOptions(index="index")
    made = serve.bodies(iter("abcde"), 2, options, {"policy": "none"})
    asked = [[message["content"] for message in next(made)["messages"]] for _ in range(4)]
    assert asked == [["a"], ["a", serve._REPLY, "b"], ["c"], ["c", serve._REPLY, "d"]]


@pytest.fixture
def small(tmp_path: Path, own_cache: Path) -> SmallIndex:
    made = SmallIndex(tmp_path)
    made.build()
    return made


@pytest.mark.slow
def test_rows_compare_compressed_with_full_context(small: SmallIndex) -> None:
    options = {"--requests": 8, "--new-tokens": 4, "--max-positions": 512, "--slots": 2, "--device": "cpu"}
    words = [word for option in options.items() for word in option]
    report = call("bench", "serve", small.path, "--clients", "1,3", *words, "--json").json
    assert [(row["context"], row["clients"], row["requests"]) for row in report["rows"]] == [
        *(("compressed", 1, 8), ("full", 1, 8)),
        *(("compressed", 3, 8), ("full", 3, 8)),
    ]
    for compressed, full in zip(report["rows"][::2], report["rows"][1::2], strict=True):
        assert compressed["context_tokens"] == full["context_tokens"] > 0
        assert compressed["decoder_positions"] < full["decoder_positions"]
        assert 0 < compressed["ttft_ms"]["p50"] <= compressed["ttft_ms"]["p99"]
    shown = serve.table(report)
    assert len(shown.splitlines()) == 5


@pytest.mark.slow
def test_a_soak_counts_answers_and_clients_that_leave(small: SmallIndex) -> None:
    report = serve.measure(
        ServeBenchOptions(index=small.path, clients=(3,), new_tokens=4, max_positions=512, device="cpu", soak_seconds=4)
    )
    soak = report["soak"]
    assert soak["answered"] > 5 * soak["left_early"] > 0
    assert soak["answered"] >= soak["with_cached_positions"] >= 0
    assert len(soak["megabytes"]) > 3
    assert "clients left early" in serve.table(report)
