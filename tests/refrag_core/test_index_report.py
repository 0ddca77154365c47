"""The page about an index: its figures against the tables, and how a real browser takes it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refrag_core import index_report
from refrag_core.bundle import ExportOptions, export_bundle
from refrag_core.index_reader import IndexReader
from refrag_core.index_report import draw, draw_sweep, gather, render, write_report
from refrag_core.manifest import run_record_name
from refrag_core.storage import FolderStore
from refrag_core.vector_index import NprobeMeasurement
from tests.browser import NO_BROWSER, find_browser, visit
from tests.small_index import SmallIndex, documents


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Measuring recall loads the retriever."""


@pytest.fixture(scope="module")
def page(library: SmallIndex, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        write_report(library.path, path)
    return path


def test_histograms_count_every_live_row_once(library: SmallIndex) -> None:
    reader = IndexReader(library.path)
    counts = reader.manifest.counts
    lengths, passages, scores = (
        index_report.chunk_lengths(reader),
        index_report.passage_lengths(reader),
        index_report.perplexities(reader),
    )
    assert sum(bar.count for bar in lengths.bars) == counts.chunks
    assert sum(bar.count * int(bar.label) for bar in lengths.bars) == counts.tokens
    assert sum(bar.count for bar in passages.bars) == counts.passages
    assert scores is not None
    assert sum(bar.count for bar in scores.bars) == counts.chunks


def test_bars_fill_the_drawing() -> None:
    drawn = draw("T", "u", np.array([0, 5, 10]), ["a", "b", "c"], "s")
    assert [bar.height for bar in drawn.bars] == [0, index_report.HEIGHT / 2, index_report.HEIGHT]
    assert all(bar.y + bar.height == index_report.HEIGHT for bar in drawn.bars)
    assert drawn.bars[-1].x + drawn.bars[-1].width <= index_report.WIDTH


def test_points_of_a_sweep() -> None:
    rows = [NprobeMeasurement(1, 0.5, 0.1), NprobeMeasurement(2, 1.0, 0.2)]
    sweep = draw_sweep(rows, 7, chosen=2)
    assert [(p.x, p.y, p.chosen) for p in sweep.points] == [
        (0, index_report.HEIGHT, False),
        (index_report.WIDTH, 0, True),
    ]


def test_the_page_says_what_the_index_holds(page: Path, library: SmallIndex) -> None:
    text = re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))
    manifest = IndexReader(library.path).manifest
    for shown in (manifest.content_id[:16], manifest.build_id[:16], f"{manifest.counts.chunks:,}", "malformed json"):
        assert shown in text
    for role in ("tokenizer", "encoder", "retriever", "scorer"):
        assert getattr(manifest.components, role).fingerprint[:16] in text
    for stage in ("scan", "tokenize", "embeddings", "vectors", "scores", "index"):
        assert re.search(rf"{stage}\s+\d", text), stage
    assert re.search(r"scan .*tokenize .*embeddings .*vectors .*scores .*index ", text, re.DOTALL)
    assert re.search(r"\+1 new, 1 changed, −1", text)


def test_a_record_of_another_build_is_not_believed(tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(4))
    small.build()
    assert gather(small.path)["run"].documents_in == 4
    path = small.path / run_record_name(1)
    whole = path.read_text()
    for text in (whole.replace('"build_id": "', '"build_id": "x'), "{", "[]", "{}", '{"stages": 1}'):
        path.write_text(text)
        assert gather(small.path)["run"] is None
    path.unlink()
    assert "its rates are not known" in render(gather(small.path))


def test_text_from_the_index_is_only_text(tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(4))
    small.build()
    values = gather(small.path)
    planted = '<script>alert("x")</script>'
    manifest = values["manifest"]
    values["name"] = planted
    values["manifest"] = replace(manifest, quarantine=replace(manifest.quarantine, counts={planted: 1}))
    values["models"] = {planted: {"reference": planted, "fingerprint": planted}}
    assert "<script" not in render(values)


def test_a_bundle_has_a_page_and_without_its_retriever_it_says_so(
    library: SmallIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_bundle(library.path, tmp_path / "bundle", ExportOptions())
    values = gather(tmp_path / "bundle")
    assert values["kind"] == "Bundle"
    assert values["sweep"].points
    assert gather(tmp_path / "bundle", retriever=str(library.models / "decoder"))["sweep"].note.startswith(
        "Not measured: "
    )


def test_the_record_is_no_part_of_the_generation(library: SmallIndex) -> None:
    store = FolderStore(library.path)
    assert store.exists(run_record_name(2))
    assert run_record_name(2) not in IndexReader(library.path).manifest.files


@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_draws_it_without_a_word_and_without_a_request(page: Path, tmp_path: Path, dark: bool) -> None:
    browser = find_browser()
    if browser is None:
        pytest.skip(NO_BROWSER)
    seen = visit(browser, page, tmp_path / "page.png", dark=dark)
    assert seen.console == ()
    assert seen.requests == ()
    assert seen.screenshot.read_bytes().startswith(b"\x89PNG")
    assert seen.screenshot.stat().st_size > 50_000


def test_what_the_browser_would_have_told(tmp_path: Path) -> None:
    browser = find_browser()
    if browser is None:
        pytest.skip(NO_BROWSER)
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://example.invalid/a.png"><script>console.error("planted")</script>')
    seen = visit(browser, bad, tmp_path / "bad.png")
    assert seen.requests == ("http://example.invalid/a.png",)
    assert any("planted" in message for message in seen.console)


def test_a_page_that_cannot_be_written_leaves_nothing(library: SmallIndex, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_report(library.path, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("folder")] == ["folder"]
