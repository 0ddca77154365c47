"""The figure of quality against compression: what is drawn, and that it is drawn."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality_plot
from benchmarks.quality_plot import Point, panels
from refrag_core.errors import UsageError


def _table(chunk_size: int) -> dict[str, Any]:
    """0 and .25 of a context of 64 tokens in chunks of 8 or 16."""
    count = 64 // chunk_size
    positions = {"0": count, "0.25": count - count // 4 + count // 4 * chunk_size}
    losses = {"0": {"random": 2.5, "learned": 2.5}, "0.25": {"random": 2.25, "learned": 2.2}}
    return {
        "context_tokens": 64,
        "output_tokens": 32,
        "chunk_size": chunk_size,
        "none": 3.0,
        "full": 2.0,
        "refrag": losses,
        "gap_closed": {p: {name: 3.0 - loss for name, loss in row.items()} for p, row in losses.items()},
        "intervals": {"gap_closed": {p: {name: [0.1, 0.9] for name in row} for p, row in losses.items()}},
        "compression": {p: {"positions": n, "effective": 64 / n} for p, n in positions.items()},
        "last_at_equal_positions": {p: {"tokens": n, "loss": 2.4, "gap_closed": 0.6} for p, n in positions.items()},
    }


def _report(*sizes: int, shuffled: bool = False) -> dict[str, Any]:
    head = {"settings": {"shuffled": shuffled}, "corpus": {"source": "data/tokens", "split": "held_out"}}
    return head | (_table(sizes[0]) if len(sizes) == 1 else {"tables": [_table(size) for size in sizes]})


def test_a_curve_goes_from_little_to_much_compression() -> None:
    (panel,) = panels([_report(8)], log_perplexity=False)
    assert panel.title == "held_out, next tokens, s=64, o=32"
    assert (panel.none, panel.full) == (0.0, 1.0)
    assert [curve.choice for curve in panel.curves] == ["last tokens", "random", "learned"]
    # 8 chunks of which 2 are expanded: 6 + 16 positions.
    assert panel.curves[2].points == (Point(64 / 22, 3.0 - 2.2, (0.1, 0.9)), Point(8.0, 0.5, (0.1, 0.9)))
    assert panel.curves[0].points == (Point(64 / 22, 0.6, None), Point(8.0, 0.6, None))


def test_chunk_sizes_share_a_panel_and_shuffled_contexts_have_their_own() -> None:
    drawn = panels([_report(8, 16), _report(16, shuffled=True)], log_perplexity=True)
    assert [len(panel.curves) for panel in drawn] == [6, 3]
    assert [curve.chunk_size for curve in drawn[0].curves] == [8, 8, 8, 16, 16, 16]
    assert (drawn[0].none, drawn[0].full) == (3.0, 2.0)
    assert drawn[0].curves[1].points[1] == Point(8.0, 2.5, None)


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for content in ("[]", "{}", "no JSON"):
        path.write_text(content)
        with pytest.raises(UsageError, match="is no report"):
            quality_plot.read_report(path)


@pytest.mark.parametrize("more", [[], ["--log-perplexity"]])
def test_the_figure_is_a_png(tmp_path: Path, more: list[str]) -> None:
    pytest.importorskip("matplotlib")
    report = tmp_path / "report.json"
    report.write_text(json.dumps(_report(8, 16)))
    output = tmp_path / "made" / "quality.png"
    assert quality_plot.main([str(report), "--output", str(output), *more]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
