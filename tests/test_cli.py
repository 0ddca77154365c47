"""The command line as its users meet it: results, exit codes, one-line errors, help, and being interrupted."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import typer

from refrag import cli
from refrag_core.checkpoint import load_checkpoint
from refrag_core.evaluation.questions import Question, question_lines
from refrag_core.manifest import read_manifest
from refrag_core.policy import num_expanded
from refrag_core.storage import FolderStore
from refrag_core.verification import verify_index
from tests import command_line, tiny_models
from tests.command_line import Finished, call, without_traceback
from tests.faults.kill_builds import problems_of
from tests.small_index import documents, models_folder, write_jsonl

QUESTION = "Which river is the capital of the northern island?"

BUILD_KEYS = {
    *("documents_in", "indexed", "filtered", "quarantined", "passages", "chunks", "tokens", "encoded_chunks"),
    *("content_id", "build_id", "seconds"),
}
ASK_STATS = {
    *("retrieval_ms", "fetch_ms", "policy_ms", "prefill_ms", "ttft_ms", "ttit_ms", "num_chunks", "num_expanded"),
    *("context_tokens", "decoder_positions", "compression"),
}


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Commands remember the models' fingerprints."""


def model_options() -> list[str]:
    models = models_folder()
    return [
        *("--checkpoint", str(models / "checkpoint"), "--retriever", str(models / "encoder")),
        *("--max-passage-tokens", "64", "--device", "cpu"),
    ]


def build(corpus: Path, index: Path, *more: object) -> Finished:
    """A build in this process."""
    fixed = ["--min-recall", "0.5", "--shard-bytes", "2000", "--workers", "0"]
    return call("index", "build", corpus, "-o", index, *model_options(), *fixed, *more)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with two bad records and an empty one."""
    root = tmp_path_factory.mktemp("cli")
    write_jsonl(root / "corpus" / "records.jsonl", ["{broken", {"id": "x"}, {"id": "y", "text": " "}, *documents(24)])
    return root


@pytest.fixture(scope="module")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        return build(root / "corpus", root / "index", "--json")


@pytest.fixture
def index(root: Path, built: Finished) -> Path:
    """The built index; not to be written to."""
    return root / "index"


@pytest.fixture
def copy(index: Path, tmp_path: Path) -> Path:
    shutil.copytree(index, tmp_path / "index")
    return tmp_path / "index"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint, which says of itself that it was trained."""
    opened = load_checkpoint(str(models_folder() / "checkpoint"))
    folder = tmp_path_factory.mktemp("trained")
    replace(opened, config=replace(opened.config, trained=True)).save(folder)
    return folder


def state(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- refrag index build and plan -----------------------------------------------------------------------


def test_build_accounts_for_every_document(built: Finished, root: Path) -> None:
    report = built.json
    assert set(report) >= BUILD_KEYS
    assert (report["documents_in"], report["indexed"], report["filtered"], report["quarantined"]) == (27, 24, 1, 2)
    assert report["encoded_chunks"] == report["chunks"] > report["passages"] > 24
    assert report["tokens"] > report["chunks"]
    manifest = read_manifest(FolderStore(root / "index"))
    assert (report["content_id"], report["build_id"]) == (manifest.content_id, manifest.build_id)
    assert report["reasons"] == {"empty": 1, "malformed_json": 1, "missing_field": 1}
    assert report["seconds"] > 0


def test_a_build_with_quarantined_records_exits_3_and_says_where_they_are(built: Finished, root: Path) -> None:
    assert built.code == 3
    assert f"2 records were quarantined; see `refrag index inspect {root / 'index'} --quarantine`" in built.err
    assert "scan: done, 27 documents in" in built.err
    assert "encode: done, 24 documents in" in built.err


def test_running_it_again_encodes_nothing(root: Path, copy: Path, built: Finished) -> None:
    again = build(root / "corpus", copy, "--json").json
    assert (again["encoded_chunks"], again["committed"], again["unchanged"]) == (0, False, 24)
    assert again["build_id"] == built.json["build_id"]


def test_a_clean_build_exits_0_and_reads_well(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "corpus" / "a.jsonl", documents(3))
    done = build(tmp_path / "corpus", tmp_path / "index")
    assert done.code == 0
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert lines["index"] == f"{tmp_path / 'index'} version 1, committed"
    assert lines["indexed"] == "3 (3 new, 0 changed, 0 unchanged, 0 deleted)"
    assert lines["build"].removeprefix("id").strip() == read_manifest(FolderStore(tmp_path / "index")).build_id


def test_plan_writes_nothing(root: Path, index: Path, tmp_path: Path) -> None:
    before = state(index)
    again = call("index", "plan", root / "corpus", "-o", index, *model_options(), "--json").json
    assert state(index) == before
    assert (again["new"], again["unchanged"], again["chunks"]) == (0, 24, 0)
    done = call("index", "plan", root / "corpus", "-o", tmp_path / "new", *model_options(), "--workers", "0", "--json")
    assert (done.code, (tmp_path / "new").exists()) == (0, False)
    assert (done.json["documents_in"], done.json["new"]) == (27, 24)
    assert {"tokens", "chunks", "passages", "shards", "disk_bytes", "seconds", "total_seconds", "device"} <= set(
        done.json
    )
    shown = call("index", "plan", root / "corpus", "-o", tmp_path / "new", *model_options(), "--workers", "0")
    assert "documents in  27 (24 new, 0 changed, 0 unchanged, 0 deleted)" in shown.out


# --- refrag index verify, repair, inspect, search -----------------------------------------------------------


def test_verify_and_repair(root: Path, copy: Path) -> None:
    whole = call("index", "verify", copy, "--json")
    assert (whole.code, whole.json["problems"], whole.json["unlisted"]) == (0, [], [])
    assert whole.json["files"] > 10
    assert call("index", "verify", copy).out.endswith("all good\n")
    manifest = read_manifest(FolderStore(copy))
    damaged, gone = manifest.shards[0].tables["embeddings"], manifest.shards[1].tables["chunks"]
    (copy / damaged).write_bytes((copy / damaged).read_bytes()[::-1])
    (copy / gone).unlink()
    found = call("index", "verify", copy, "--json")
    assert found.code == 1
    assert {problem["file"] for problem in found.json["problems"]} == {damaged, gone}
    assert f"mend it with `refrag index repair {copy} CORPUS`" in found.err
    shown = call("index", "verify", copy)
    assert f"{gone}: missing" in shown.out
    assert shown.out.endswith("2 problems\n")
    refused = call("index", "repair", copy, "--device", "cpu", "--checkpoint", models_folder() / "checkpoint")
    assert refused.code == 2
    assert "can only be made from the corpus" in without_traceback(refused)
    mended = call(
        *("index", "repair", copy, root / "corpus", "--device", "cpu", "--workers", "0", "--json"),
        *("--checkpoint", models_folder() / "checkpoint"),
    )
    assert mended.code == 0
    assert set(mended.json) == {"version", "build_id", "repaired", "lost"}
    assert set(mended.json["repaired"]) >= {damaged, gone}
    assert mended.json["build_id"] == manifest.build_id
    assert verify_index(FolderStore(copy)).problems == ()


def test_inspect(index: Path, built: Finished) -> None:
    shown = call("index", "inspect", index, "--json").json
    assert list(shown) == ["index", "counts", "quarantine", "models", "parameters", "vector_index", "bytes"]
    assert shown["index"]["content_id"] == built.json["content_id"]
    assert {key: shown["counts"][key] for key in ("documents", "passages", "chunks", "tokens")} == {
        "documents": 24,
        **{key: built.json[key] for key in ("passages", "chunks", "tokens")},
    }
    assert shown["quarantine"] == {"empty": 1, "malformed_json": 1, "missing_field": 1}
    plain = call("index", "inspect", index).out
    assert re.search(r"^  documents +24$", plain, re.MULTILINE)
    assert built.json["build_id"] in plain


def test_inspect_a_passage(index: Path) -> None:
    shown = call("index", "inspect", index, "--passage", "doc-0003#0", "--json").json
    assert (shown["document_id"], shown["ordinal"]) == ("doc-0003", 0)
    assert "".join(chunk["text"] for chunk in shown["chunks"]) == shown["text"]
    assert call("index", "inspect", index, "--passage", shown["passage_id"], "--json").json == shown
    plain = call("index", "inspect", index, "--passage", "doc-0003#0").out
    assert len(re.findall(r"^  chunk +\d+ +\d+ tokens  '", plain, re.MULTILINE)) == len(shown["chunks"])


def test_inspect_the_quarantine(index: Path) -> None:
    records = call("index", "inspect", index, "--quarantine", "--json").json
    found = {(r["reason"], r["disposition"], r["document_id"], r["raw"]) for r in records}
    assert ("malformed_json", "quarantined", None, "{broken") in found
    assert {(reason, disposition) for reason, disposition, _, _ in found} == {
        ("malformed_json", "quarantined"),
        ("missing_field", "quarantined"),
        ("empty", "filtered"),
    }
    lines = call("index", "inspect", index, "--quarantine").out.splitlines()
    assert len(lines) == 3
    assert any(re.match(r"quarantined: malformed_json: .*records\.jsonl:0: ", line) for line in lines)


def test_search(index: Path) -> None:
    found = call("index", "search", index, QUESTION, "--top-k", "4", "--json").json
    assert found["query"] == QUESTION
    assert [set(hit) for hit in found["hits"]] == [{"rank", "score", "doc_id", "passage", "text", "metadata"}] * 4
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3, 4]
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)
    assert set(found["hits"][0]["metadata"]) == {"year", "importance"}
    plain = call("index", "search", index, QUESTION, "--top-k", "4").out
    assert re.findall(r"^(\d)\. ", plain, re.MULTILINE) == ["1", "2", "3", "4"]
    assert call("index", "search", index, QUESTION, "--json").json["hits"][:4] == found["hits"]


# --- refrag ask ---------------------------------------------------------------------------------------------


def ask(index: Path, *more: object) -> Finished:
    return call("ask", index, QUESTION, "--top-k", "3", "--max-new-tokens", "8", "--device", "cpu", *more)


def test_an_untrained_index_answers_with_every_chunk_expanded_and_warns(index: Path) -> None:
    done = ask(index, "--json")
    assert done.code == 0
    assert done.err.startswith("WARNING: this index was built with an UNTRAINED projection")
    answer, stats = done.json, done.json["stats"]
    assert set(stats) >= ASK_STATS
    assert (answer["question"], answer["trained"], answer["policy"]) == (QUESTION, False, "all")
    assert len(answer["passages"]) == 3
    for passage in answer["passages"]:
        assert passage["expanded"] == list(range(passage["num_chunks"]))
    assert stats["num_expanded"] == stats["num_chunks"] == sum(p["num_chunks"] for p in answer["passages"])
    assert stats["compression"] == 1.0
    assert stats["decoder_positions"] > stats["context_tokens"] > 0
    hits = call("index", "search", index, QUESTION, "--top-k", "3", "--json").json["hits"]
    assert [p["passage"] for p in answer["passages"]] == [hit["passage"] for hit in hits]


@pytest.mark.parametrize("asked", [["--expansion-fraction", ".1"], ["--policy", "none"], ["--policy", "random"]])
def test_an_untrained_projection_has_to_be_asked_for_twice(index: Path, asked: list[str]) -> None:
    refused = ask(index, *asked)
    assert refused.code == 2
    error = without_traceback(refused)
    assert "the projection of this index's checkpoint was never trained" in error
    assert "pass --allow-untrained to see the noise" in error
    done = ask(index, *asked, "--allow-untrained", "--json")
    assert (done.code, "UNTRAINED" in done.err) == (0, True)
    stats = done.json["stats"]
    expected = 0 if "none" in asked else num_expanded(stats["num_chunks"], 0.1)
    assert stats["num_expanded"] == sum(len(p["expanded"]) for p in done.json["passages"]) == expected
    assert stats["compression"] > 1


def test_a_trained_checkpoint_compresses_by_default(index: Path, trained: Path) -> None:
    done = ask(index, "--checkpoint", trained, "--json")
    assert (done.code, "UNTRAINED" in done.err) == (0, False)
    assert (done.json["policy"], done.json["expansion_fraction"], done.json["trained"]) == ("learned", 0.1, True)
    assert done.json["stats"]["num_expanded"] == num_expanded(done.json["stats"]["num_chunks"], 0.1)


def test_perplexity_without_scores_names_the_command(index: Path, trained: Path) -> None:
    refused = ask(index, "--checkpoint", trained, "--policy", "perplexity")
    assert refused.code == 2
    assert "refrag index build CORPUS -o INDEX --score" in without_traceback(refused)


def test_the_plain_answer_and_the_streamed_one(index: Path) -> None:
    answer = ask(index, "--json").json
    plain, streamed = ask(index).out, ask(index, "--stream").out
    assert plain.startswith(answer["answer"] + "\n")
    assert streamed.split("\n\npassages")[0].strip() == answer["answer"]
    rows = re.findall(r"^  (\d)\. [\d.]+ (\S+)  \[(#+)\]", plain, re.MULTILINE)
    assert rows == [(str(p["rank"]), p["doc_id"], "#" * p["num_chunks"]) for p in answer["passages"]]
    assert f"{answer['stats']['decoder_positions']:,} decoder positions, compression 1.00x" in plain


def test_ask_with_a_text_of_one_s_own(index: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("The capital of the island is a harbour of stone.")
    cache = tmp_path / "cache.sqlite"
    done = ask(index, "--context", tmp_path / "notes.txt", "--chunk-cache", cache, "--json")
    first = done.json["passages"][0]
    assert (first["rank"], first["score"], first["doc_id"]) == (1, None, str(tmp_path / "notes.txt"))
    assert first["text"] == "The capital of the island is a harbour of stone."
    assert cache.stat().st_size > 0
    assert "  1. given " in ask(index, "--context", tmp_path / "notes.txt").out
    (tmp_path / "notes.txt").write_bytes(b"\xff\xfe\x00")
    refused = ask(index, "--context", tmp_path / "notes.txt")
    assert (refused.code, "is not UTF-8 text" in without_traceback(refused)) == (2, True)


def test_passages_that_do_not_fit(index: Path) -> None:
    wide = ["--top-k", "12"]
    dropped = ask(index, *wide, "--json").json["dropped"]
    assert dropped
    assert ask(index, *wide).out.count("dropped, does not fit the decoder: ") == len(dropped)
    refused = ask(index, *wide, "--strict")
    assert (refused.code, "expected it to fit (strict)" in without_traceback(refused)) == (2, True)


# --- filters and hybrid retrieval -----------------------------------------------------------------------------


def search(index: Path, *options: object) -> Finished:
    return call("index", "search", index, QUESTION, "--device", "cpu", *options)


def test_search_among_the_documents_of_a_filter(index: Path) -> None:
    everything = search(index, "--top-k", 1000, "--json").json
    assert everything["passing"] is None
    found = search(index, "--top-k", 1000, "--where", "year < 1910 and importance > .2", "--json").json
    expected = [
        hit["passage"]
        for hit in everything["hits"]
        if hit["metadata"]["year"] < 1910 and hit["metadata"]["importance"] > 0.2
    ]
    assert [hit["passage"] for hit in found["hits"]] == expected
    assert found["passing"] == len(expected) > 0
    plain = search(index, "--top-k", 2, "--where", "year < 1910").out.splitlines()
    assert re.fullmatch(r"\d+ of \d+ passages are of documents with year < 1910", plain[0])
    assert [line[:3] for line in plain[1::2]] == ["1. ", "2. "]


def test_a_filter_that_nothing_fulfils(index: Path) -> None:
    nothing = ["--where", "year > 3000"]
    assert search(index, *nothing, "--json").json == {"query": QUESTION, "passing": 0, "hits": []}
    assert re.fullmatch(r"0 of \d+ passages are of documents with year > 3000\n", search(index, *nothing).out)
    answer = ask(index, *nothing, "--json").json
    assert (answer["passing"], answer["passages"], answer["answer"]) == (0, [], "")
    assert ask(index, *nothing).out.splitlines()[1:] == ["nothing to answer from: no passage passes the filter"]


def test_ask_among_the_documents_of_a_filter(index: Path) -> None:
    answer = ask(index, "--where", "year = 1903", "--hybrid", "--top-k", 1, "--json")
    assert {passage["metadata"]["year"] for passage in answer.json["passages"]} == {1903}
    assert answer.json["passing"] >= len(answer.json["passages"]) == 1
    assert "passages indexed in memory in" in answer.err


def test_search_by_vectors_and_words(index: Path) -> None:
    words = ["--hybrid", "--dense-weight", 0, "--json"]
    hits = search(index, *words).json["hits"]
    assert [hit["score"] for hit in hits] == [round(1 / (60 + rank), 4) for rank in range(1, 6)]
    fused = search(index, "--hybrid", "--json")
    assert len(fused.json["hits"]) == 5
    assert fused.json["hits"][0]["score"] <= round(2 / 61, 4)
    assert re.search(r"^ranking by words: \d+ passages indexed in memory in \d+\.\d s$", fused.err, re.MULTILINE)


def test_eval_with_a_filter_and_hybrid(index: Path, questions: Path) -> None:
    common = ["eval", "retrieval", index, "--questions", questions, "--device", "cpu", "--hybrid"]
    report = call(*common, "--where", "year < 1910", "--lexical-weight", 2, "--json").json
    assert list(report["systems"]) == ["dense", "bm25", "hybrid"]
    assert report["options"] == {"where": "year < 1910", "hybrid": True, "dense_weight": 1.0, "lexical_weight": 2.0}
    assert 0 < report["passing"] < report["passages"]
    nobody = call(*common, "--where", "year > 1990", "--json").json
    assert {score for scores in nobody["systems"].values() for score in scores.values()} == {0}
    assert re.search(r"^  hybrid +recall@1 \d\.\d{3}", call(*common).out, re.MULTILINE)
    qa = ["eval", "qa", index, "--questions", questions, "--max-new-tokens", 2, "--device", "cpu"]
    answers = call(*qa, "--where", "document_id = 'doc-0001'", "--json").json
    assert answers["gold_retrieved"] == 1
    assert answers["options"]["where"] == "document_id = 'doc-0001'"


# --- refrag eval ----------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    made = [Question(str(n), f"{QUESTION} {n}", ("river",), (f"doc-{n:04d}",)) for n in range(2)]
    path.write_text(question_lines(made))
    return path


def test_eval_retrieval(index: Path, questions: Path) -> None:
    report = call("eval", "retrieval", index, "--questions", questions, "--device", "cpu", "--json").json
    assert (report["questions"], report["version"]) == (2, 1)
    assert set(report["systems"]) == {"dense", "bm25"}
    for scores in report["systems"].values():
        assert set(scores) == {"recall@1", "recall@5", "recall@20", "mrr"}
        assert scores["recall@1"] <= scores["recall@5"] <= scores["recall@20"] <= 1
        assert scores["mrr"] > 0
    plain = call("eval", "retrieval", index, "--questions", questions, "--device", "cpu", "--no-bm25").out
    assert re.search(r"^  dense +recall@1 \d\.\d{3}", plain, re.MULTILINE)
    assert "bm25" not in plain


def test_eval_qa(index: Path, questions: Path, trained: Path) -> None:
    short = ["eval", "qa", index, "--questions", questions, "--max-new-tokens", "4", "--device", "cpu"]
    ends = call(*short, "--json")
    assert list(ends.json["settings"]) == ["no context", "full context"]
    assert "UNTRAINED" in ends.err
    refused = call(*short, "--expansion-fraction", "0,.1")
    assert refused.code == 2
    assert "--allow-untrained" in without_traceback(refused)
    done = call(*short, "--checkpoint", trained, "--json")
    assert list(done.json["settings"]) == [
        *("no context", "learned p=0", "learned p=0.1", "learned p=0.25", "full context"),
    ]
    assert done.json["questions"] == len(done.json["answers"]) == 2
    plain = call(*short, "--checkpoint", trained, "--expansion-fraction", ".5").out
    assert re.search(r"^  learned p=0.5 +answered +\d+  from the right passage", plain, re.MULTILINE)
    saved = index.parent / "answers.jsonl"
    gold = call(
        *(*short, "--checkpoint", trained, "--retriever-mode", "gold", "--limit", "1", "--save", saved, "--json")
    ).json
    assert (gold["questions"], gold["retriever_mode"], gold["gold_retrieved"]) == (1, "gold", 1)
    assert list(gold["equal_latency"]) == ["0", "0.1", "0.25"]
    assert len(saved.read_text().splitlines()) == 2
    saved.unlink()
    wrong = call(*short, "--checkpoint", trained, "--expansion-fraction", "a lot")
    assert (wrong.code, "expected numbers from 0 to 1 separated by commas" in without_traceback(wrong)) == (2, True)


def test_eval_perplexity(trained: Path, tmp_path: Path) -> None:
    text, saved = tmp_path / "text.jsonl", tmp_path / "report.json"
    write_jsonl(text, documents(6))
    short = ["eval", "perplexity", "--text", text, "--context", 32, "--output", 16, "--device", "cpu"]
    done = call(
        *short, "--checkpoint", trained, "--chunk-size", 8, "--policies", "random,last", "--save", saved, "--json"
    )
    keys = {"none", "full", "last", "wrong", "refrag", "gap_closed", "intervals", "settings", "corpus"}
    assert keys <= done.json.keys()
    assert saved.read_text().strip() == done.out.strip()
    assert [list(row) for row in done.json["refrag"].values()] == [["random", "last"]] * 3
    plain = call(*short, "--checkpoint", trained, "--chunk-size", 8, "--shuffled", "--windows", 6).out
    assert re.search(r"^  refrag p=0.25 random +11 +2.91x +\d+\.\d{4}", plain, re.MULTILINE)
    refused = call(*short, "--checkpoint", trained, "--policies", "best")
    assert (refused.code, "--policies 'best' is unknown" in without_traceback(refused)) == (2, True)


# --- errors -----------------------------------------------------------------------------------------------------


def failures(root: Path) -> Iterator[tuple[list[object], int, str]]:
    """Commands that cannot succeed, their exit code, and what they must say."""
    index, corpus, nothing = root / "index", root / "corpus", root / "nothing"
    models = model_options()
    other_encoder = tiny_models.encoder_folder(root / "other", seed=1)
    yield ["index", "verify", nothing], 1, f"{nothing} holds no index"
    yield ["index", "search", nothing, "q"], 1, "expected a committed generation under versions/"
    yield ["ask", nothing, "q"], 1, "build one with `refrag index build"
    yield ["index", "inspect", index, "--version", "9"], 1, "expected generation 9"
    yield ["index", "inspect", index, "--passage", "nobody#0"], 2, "no passage 'nobody#0'"
    yield ["index", "search", index, "q", "--retriever", other_encoder], 1, "give that one with --retriever"
    yield ["index", "search", index, "q", "--retriever", nothing], 1, str(nothing)
    yield ["index", "search", index, "q", "--where", "yeer > 1"], 2, "one of: document_id, importance, year"
    yield ["ask", nothing, "q", "--where", "a = read_text('/etc/passwd')"], 2, "which is no field"
    yield ["ask", index, "q", "--where", "year > 1; select 1"], 2, "holds 2 statements; expected one condition"
    yield ["index", "search", index, "q", "--where", "year = 'x'"], 2, "takes field 'year' for text, but it holds numb"
    yield ["index", "search", index, "q", "--hybrid", "--dense-weight", 0, "--lexical-weight", 0], 2, "not both 0"
    yield ["ask", index, "q", "--context", nothing], 1, "No such file"
    yield ["eval", "retrieval", index, "--questions", nothing], 2, "cannot be read as UTF-8 text"
    yield ["index", "build", nothing, "-o", root / "new", *models], 1, str(nothing)
    yield ["index", "build", corpus, "-o", root / "new", *models, "--chunk-size", 11], 2, "chunk size 11 was asked for"
    yield ["index", "build", corpus, "-o", root / "new", *models, "--decoder", "x"], 2, "and it names its own"
    yield ["index", "build", corpus, "-o", root / "new", "--checkpoint", nothing], 1, str(nothing)
    changed = [*models, "--chunk-size", 8, "--workers", 0]
    yield ["index", "build", corpus, "-o", index, *changed], 1, "chunk_size 16, now 8. Expected the same"


@pytest.mark.parametrize("number", range(19))
def test_an_error_is_one_line_and_an_exit_code(root: Path, index: Path, number: int) -> None:
    arguments, code, message = list(failures(root))[number]
    failed = call(*arguments)
    assert (failed.code, message in without_traceback(failed)) == (code, True), failed.err


def test_every_failure_is_tried(root: Path) -> None:
    assert len(list(failures(root))) == 19


@pytest.mark.parametrize(
    "arguments",
    [
        ["index", "build"],
        ["index", "build", "x", "--no-such-option"],
        ["index", "search", "x", "q", "--top-k", "0"],
        ["ask", "x", "q", "--policy", "magic"],
        ["ask", "x", "q", "--expansion-fraction", "2"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_exits_2_and_says_so_on_stderr(arguments: list[str]) -> None:
    refused = call(*arguments)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("Usage: ")


def test_in_a_process_of_its_own(root: Path, index: Path, tmp_path: Path) -> None:
    """Exit codes, streams and errors as the shell sees them."""
    failed = command_line.run("index", "verify", tmp_path / "nothing")
    assert failed.code == 1
    assert "holds no index" in without_traceback(failed)
    whole = command_line.run("index", "verify", index, "--json")
    assert (whole.code, whole.json["problems"]) == (0, [])
    again = command_line.run("index", "build", root / "corpus", "-o", index, *model_options(), "--json")
    assert (again.code, again.json["committed"]) == (3, False)
    assert "scan: done, 27 documents" in again.err


# --- help ---------------------------------------------------------------------------------------------------------


def every_command() -> Iterator[tuple[str, Any]]:
    def walk(command: Any, words: str) -> Iterator[tuple[str, Any]]:
        yield words, command
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, f"{words} {name}")

    return walk(typer.main.get_command(cli.app), "refrag")


def test_every_command_and_option_says_what_it_is() -> None:
    commands = dict(every_command())
    assert {"refrag", "refrag index build", "refrag ask", "refrag eval qa"} <= set(commands)
    silent = [words for words, command in commands.items() if not (command.help or "").strip()]
    silent += [
        f"{words} {parameter.name}"
        for words, command in commands.items()
        for parameter in command.params
        if not (getattr(parameter, "help", None) or "").strip()
    ]
    assert silent == []


def test_options_are_spelt_alike_everywhere() -> None:
    spellings = {option for _, command in every_command() for parameter in command.params for option in parameter.opts}
    assert {"--expansion-fraction", "--json", "--output", "-o", "--checkpoint", "--retriever"} <= spellings
    assert not [option for option in spellings if "_" in option and option.startswith("-")]


# --- interruptions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_an_interrupted_build_goes_on_where_it_was(tmp_path: Path, number: signal.Signals) -> None:
    corpus, index, calm = tmp_path / "corpus", tmp_path / "index", tmp_path / "calm"
    write_jsonl(corpus / "records.jsonl", documents(40))
    expected = build(corpus, calm, "--json").json
    fixed = ["--min-recall", "0.5", "--shard-bytes", "2000", "--workers", "1", "--json"]
    process = command_line.start("index", "build", corpus, "-o", index, *model_options(), *fixed)
    command_line.wait_until(lambda: command_line.num_receipts(index) >= 4, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches the workers too
    else:
        process.send_signal(number)
    done = command_line.finish(process)
    assert (done.code, done.out) == (130, "")
    assert "interrupted: what is finished is kept; run the same command again to go on" in done.err
    assert "Traceback" not in done.err
    psutil.wait_procs(workers, timeout=30)
    assert [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE] == []
    assert not (index / "versions").exists()
    assert list((index / "work" / "tmp").glob("*")) == []
    receipts = command_line.num_receipts(index)
    assert 4 <= receipts < 3 * len(read_manifest(FolderStore(calm)).shards)
    again = build(corpus, index, "--json")
    assert again.code == 0
    assert (again.json["content_id"], again.json["build_id"]) == (expected["content_id"], expected["build_id"])
    assert again.json["encoded_chunks"] < expected["encoded_chunks"]
    assert list(problems_of(index)) == []
