"""`refrag eval perplexity` on tiny models: against training's own evaluation, and against sums by hand."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refrag_core.checkpoint import Checkpoint
from refrag_core.errors import ConfigError, CorpusError, FingerprintMismatchError, UntrainedProjectionError, UsageError
from refrag_core.evaluation import perplexity
from refrag_core.evaluation.perplexity import PerplexityOptions, evaluate_perplexity
from refrag_core.evaluation.perplexity_scoring import MixedInputScorer
from refrag_core.evaluation.perplexity_selection import ChunkRanker, policy_is_trained, top_masks
from refrag_core.evaluation.perplexity_table import table_lines
from refrag_core.evaluation.perplexity_windows import (
    EvaluationWindows,
    cut_windows,
    other_documents,
    read_tokens,
    shuffle_passages,
)
from refrag_core.packing import pack_checkpoint
from refrag_core.policy import initialise_policy
from refrag_core.retriever import load_retriever
from refrag_core.scoring import ChunkScorer
from refrag_core.training.__main__ import _load
from refrag_core.training.evaluate import EvaluationOptions, evaluate
from refrag_core.training.loop import Trainer, autocast_of
from refrag_core.training.token_shards import PrepareOptions, TextDocument, TokenShards, prepare_token_shards
from tests.refrag_core.training.conftest import settings
from tests.tiny_models import D_ENC, TRAINING_TEXT, decoder_folder, encoder_folder

WORDS = sorted(set(" ".join(TRAINING_TEXT).split()))
TABLE_KEYS = {"none", "full", "last", "wrong", "refrag", "gap_closed", "intervals"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("refrag_core.packing.SHORT_NAMES", {})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return encoder_folder(root / "encoder"), decoder_folder(root / "decoder")


def _documents() -> list[tuple[str, str]]:
    draw = random.Random(0)
    return [(str(i), " ".join(draw.choice(WORDS) for _ in range(40 + i))) for i in range(40)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, models: tuple[Path, Path]) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    documents = [TextDocument("toy", name, text) for name, text in _documents()]
    prepare_token_shards(documents, models[1], folder, PrepareOptions(held_out_fraction=0.5))
    return folder


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "toy.jsonl"
    path.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in _documents()))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, shards: Path, models: tuple[Path, Path]) -> Checkpoint:
    """A checkpoint with trained layers, adapter, projection and, made up, a policy."""
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(output / "cache"))
        Trainer(settings(shards, models, output, evaluation_windows=4)).run()
    checkpoint = Checkpoint.load(output / "checkpoint")
    with torch.no_grad():
        for layer in checkpoint.policy.modules():
            if isinstance(layer, torch.nn.Linear) and layer.bias is not None:
                layer.bias.uniform_(-1.0, 1.0, generator=torch.Generator().manual_seed(1))
    return checkpoint.save(output / "checkpoint")


def test_a_packed_checkpoint_is_measured_like_any_other(trained: Checkpoint, lines: Path, tmp_path: Path) -> None:
    report = evaluate_perplexity(trained, lines, _options(policies=("random",)))
    pack_checkpoint(trained, tmp_path / "packed")
    packed = evaluate_perplexity(Checkpoint.load(tmp_path / "packed"), lines, _options(policies=("random",)))
    assert packed["settings"]["checkpoint_fingerprint"] != report["settings"]["checkpoint_fingerprint"]
    for p in ("0", "0.25"):
        assert packed["refrag"][p]["random"] == pytest.approx(report["refrag"][p]["random"], abs=0.01)
        assert packed["refrag"][p]["random"] != report["refrag"][p]["random"]


def _options(**changes: Any) -> PerplexityOptions:
    values: dict[str, Any] = {
        "context_tokens": (16,),
        "output_tokens": (8,),
        "chunk_sizes": (4,),
        "windows": 12,
        "device": "cpu",
        "batch_rows": 5,
    }
    return PerplexityOptions(**values | changes)


def test_equals_the_evaluation_within_training(trained: Checkpoint, shards: Path, models: tuple[Path, Path]) -> None:
    config = settings(shards, models, Path("unused"))
    assert trained.folder is not None
    model = _load(trained.folder, config, CPU)
    fractions = (0.0, 0.25, 0.5)
    expected = evaluate(
        model,
        TokenShards.open(shards).split("held_out"),
        EvaluationOptions(
            context_tokens=16,
            output_tokens=8,
            chunk_sizes=(2, 4),
            expansion_fractions=fractions,
            selections=("random", "last"),
            windows=12,
            batch_rows=4,
        ),
        autocast=autocast_of(CPU, "fp32"),
        reference=model,
    )
    options = _options(
        chunk_sizes=(2, 4), expansion_fractions=fractions, policies=("random", "last"), embedding_dtype="float32"
    )
    report = evaluate_perplexity(trained, shards, options, reference=trained)
    assert report["corpus"]["windows"] == expected["windows"]
    assert report["corpus"]["documents"] == expected["documents"]
    for table in report["tables"]:
        known = expected[f"chunk_size_{table['chunk_size']}"]
        assert table["none"] == pytest.approx(expected["none"], abs=1e-5)
        assert table["full"] == pytest.approx(expected["full"], abs=1e-5)
        assert table["wrong"] == pytest.approx(known["wrong"], abs=1e-5)
        assert table["last"] == pytest.approx(known["last"]["0"]["loss"], abs=1e-5)
        assert table["reference"]["full"] == pytest.approx(expected["reference"]["full"], abs=1e-5)
        for p, row in known["refrag"].items():
            assert table["refrag"][p] == pytest.approx(row, abs=1e-5)
            assert table["compression"][p]["positions"] == known["last"][p]["positions"]
            assert table["last_at_equal_positions"][p]["loss"] == pytest.approx(known["last"][p]["loss"], abs=1e-5)
            better = table["intervals"]["better_than_last_tokens"][p]["random"]
            assert better["interval"] == pytest.approx(known["better_than_last"][p]["random"]["interval"], abs=1e-4)


def test_losses_are_those_of_logits_over_inputs_put_together_by_hand(trained: Checkpoint) -> None:
    decoder, projection = trained.load_decoder(), trained.load_projection()
    scorer = MixedInputScorer(decoder, projection, first=2, batch_rows=1)
    draw = np.random.default_rng(0)
    context, output = draw.integers(4, 200, (3, 12)), draw.integers(4, 200, (3, 6))
    embeddings = draw.normal(size=(3, 3, D_ENC)).astype(np.float16)
    mask = np.array([[False, True, False], [True, False, False], [False, False, True]])
    found = scorer.from_chunks(context, output, embeddings, mask)
    for row in range(3):
        parts = [
            decoder.embed(torch.from_numpy(context[row, 4 * i : 4 * i + 4]))
            if mask[row, i]
            else projection(torch.from_numpy(embeddings[row, i : i + 1]))
            for i in range(3)
        ]
        inputs = torch.cat([*parts, decoder.embed(torch.from_numpy(output[row]))])
        assert len(inputs) == 6 + 6
        log_p = decoder.model(inputs_embeds=inputs[None]).logits[0].log_softmax(-1).detach()
        expected = -np.mean([float(log_p[6 + i - 1, output[row, i]]) for i in range(2, 6)])
        assert found[row] == pytest.approx(expected, abs=1e-5)


def test_with_every_chunk_expanded_it_is_the_full_context(trained: Checkpoint) -> None:
    scorer = MixedInputScorer(trained.load_decoder(), trained.load_projection())
    draw = np.random.default_rng(1)
    context, output = draw.integers(4, 200, (3, 8)), draw.integers(4, 200, (3, 5))
    everything = scorer.from_chunks(context, output, np.zeros((3, 2, D_ENC), np.float16), np.ones((3, 2), np.bool_))
    np.testing.assert_allclose(everything, scorer.from_text(context, output), atol=1e-6)


def test_report_has_the_documented_keys_and_writes_json(trained: Checkpoint, lines: Path) -> None:
    options = _options()
    report = evaluate_perplexity(trained, lines, options)
    assert TABLE_KEYS | {"settings", "corpus"} <= report.keys()
    assert list(report["refrag"]) == ["0", "0.1", "0.25"]
    assert list(report["gap_closed"]["0.1"]) == ["random", "last", "perplexity", "learned"]
    assert len(set(report["refrag"]["0"].values())) == 1
    # 4 chunks of 4 tokens: at p=.1 and .25 one is expanded, 3 + 4 = 7 positions for 16 tokens.
    assert report["compression"]["0"] == {"expanded_chunks": 0, "positions": 4, "effective": 4.0}
    assert report["compression"]["0.25"] == {"expanded_chunks": 1, "positions": 7, "effective": 16 / 7}
    gap = (report["none"] - report["refrag"]["0.1"]["learned"]) / (report["none"] - report["full"])
    assert report["gap_closed"]["0.1"]["learned"] == pytest.approx(gap)
    saved = report["intervals"]["learned_better_than"]["0.1"]["random"]["nats"]
    assert saved == pytest.approx(report["refrag"]["0.1"]["random"] - report["refrag"]["0.1"]["learned"])
    low, high = report["intervals"]["gap_closed"]["0"]["last"]
    assert low <= report["gap_closed"]["0"]["last"] <= high
    assert json.loads(json.dumps(report)) == report
    assert any(line.strip().startswith("refrag p=0.1 learned") for line in table_lines(report))


def test_several_lengths_give_several_tables_over_the_same_output(trained: Checkpoint, lines: Path) -> None:
    report = evaluate_perplexity(trained, lines, _options(context_tokens=(16, 8), output_tokens=(8, 6)))
    shapes = [(table["context_tokens"], table["output_tokens"]) for table in report["tables"]]
    assert shapes == [(16, 8), (16, 6), (8, 8), (8, 6)]
    none = [table["none"] for table in report["tables"]]
    assert none[0] == pytest.approx(none[2], abs=1e-6)
    assert none[1] == pytest.approx(none[3], abs=1e-6)
    assert sum("context" in line and "chunk size" in line for line in table_lines(report)) == 4


def test_int8_embeddings_are_measured_beside_float16(trained: Checkpoint, lines: Path) -> None:
    plain = evaluate_perplexity(trained, lines, _options())
    assert plain["embedding_storage"] == {"dtype": "float16", "bytes_per_source_token": 2 * D_ENC / 4}
    report = evaluate_perplexity(trained, lines, _options(embedding_dtype="int8"))
    storage = report["embedding_storage"]
    assert storage["bytes_per_source_token"] == (D_ENC + 4) / 4
    assert storage["its_bytes_per_source_token"] == 2 * D_ENC / 4
    change = report["gap_closed"]["0"]["random"] - plain["gap_closed"]["0"]["random"]
    assert storage["gap_closed_change"]["0"]["random"] == pytest.approx(change, abs=1e-6)
    assert change != 0.0


# --- windows


def test_windows_end_their_context_and_begin_their_output_at_one_place(models: tuple[Path, Path], shards: Path) -> None:
    split = TokenShards.open(shards).split("held_out")
    longest: dict[str, Any] = {"longest_context": 16, "longest_output": 8, "limit": 9}
    whole = cut_windows(split, context_tokens=16, output_tokens=8, **longest)
    part = cut_windows(split, context_tokens=4, output_tokens=3, **longest)
    np.testing.assert_array_equal(part.context, whole.context[:, -4:])
    np.testing.assert_array_equal(part.output, whole.output[:, :3])
    np.testing.assert_array_equal(whole.context[0], split.document(int(whole.documents[0]))[:16])
    np.testing.assert_array_equal(whole.wrong[1:], whole.context[:-1])
    np.testing.assert_array_equal(whole.wrong[0], whole.context[-1])


def _windows(documents: list[int]) -> EvaluationWindows:
    """Contexts of 8 tokens that say which window they are of: 10, 11, … 17 in the first, 20, … in the second."""
    context = (np.arange(len(documents))[:, None] + 1) * 10 + np.arange(8)
    return EvaluationWindows(context, context[:, :4] + 1000, context, np.array(documents))


def test_wrong_contexts_are_never_of_the_same_document() -> None:
    documents = np.array([0, 1, 1, 1, 0])
    np.testing.assert_array_equal(other_documents(documents), [3, 0, 0, 0, 3])
    with pytest.raises(ConfigError, match="one document"):
        other_documents(np.zeros(3, dtype=np.int64))


def test_shuffled_contexts_have_the_right_passage_anywhere_and_three_of_other_documents() -> None:
    windows = _windows([0, 1, 2, 3, 4, 5, 0, 1, 2, 3])
    shuffled = shuffle_passages(windows, seed=0)
    np.testing.assert_array_equal(shuffled.output, windows.output)
    places = set()
    for row in range(10):
        passages = shuffled.context[row].reshape(4, 2)
        ours = [i for i in range(4) if passages[i].tolist() == windows.context[row, -2:].tolist()]
        assert len(ours) == 1
        places.add(ours[0])
        documents = [windows.documents[passage[0] // 10 - 1] for passage in passages]
        assert len(set(documents)) == 4
        assert (passages % 10).tolist() == [[6, 7]] * 4
        wrong = shuffled.wrong[row].reshape(4, 2)
        changed = [i for i in range(4) if wrong[i].tolist() != passages[i].tolist()]
        assert changed == ours
        assert windows.documents[wrong[ours[0], 0] // 10 - 1] not in documents
    assert len(places) > 2
    np.testing.assert_array_equal(shuffle_passages(windows, seed=0).context, shuffled.context)


def test_shuffling_needs_five_documents() -> None:
    with pytest.raises(ConfigError, match="4 documents"):
        shuffle_passages(_windows([0, 1, 2, 3]), seed=0)


def test_lines_are_read_as_far_as_needed(trained: Checkpoint, lines: Path, tmp_path: Path) -> None:
    decoder = trained.load_decoder()
    keys: dict[str, Any] = {"split": None, "tokenizer": decoder.tokenizer, "tokenizer_fingerprint": "", "length": 24}
    split = read_tokens(lines, limit=4, **keys)
    first = decoder.tokenizer.encode(_documents()[0][1], add_special_tokens=False).ids
    assert split.document(0).tolist() == first
    broken = tmp_path / "broken.jsonl"
    broken.write_text(lines.read_text() + "not JSON\n")
    with pytest.raises(CorpusError, match="line 41"):
        read_tokens(broken, limit=41, **keys)
    with pytest.raises(UsageError, match="no split"):
        read_tokens(lines, limit=4, **keys | {"split": "held_out"})


# --- selection


def test_top_masks_take_the_highest_and_the_earlier_of_equals() -> None:
    scores = np.array([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    np.testing.assert_array_equal(top_masks(scores, 2), [[False, True, False, True], [True, True, False, False]])
    assert not top_masks(scores, 0).any()


def _ranker(checkpoint: Checkpoint, models: tuple[Path, Path], policy: Any = None) -> ChunkRanker:
    return ChunkRanker(
        checkpoint.load_decoder().tokenizer,
        policy or checkpoint.load_policy(),
        chunk_scorer=lambda: ChunkScorer(checkpoint.load_decoder()),
        retriever=lambda: load_retriever(models[0]),
        query_tokens=4,
        seed=0,
    )


def _text_windows(checkpoint: Checkpoint) -> EvaluationWindows:
    tokenizer = checkpoint.load_decoder().tokenizer
    ids = [tokenizer.encode(text, add_special_tokens=False).ids[:24] for _, text in _documents()[:6]]
    windows = np.array(ids)
    return EvaluationWindows(windows[:, :16], windows[:, 16:], windows[:, :16], np.arange(6))


def test_the_chunk_that_says_what_the_query_says_is_the_most_similar(
    trained: Checkpoint, models: tuple[Path, Path]
) -> None:
    windows = _text_windows(trained)
    for row in range(6):
        windows.context[row, 4 * (row % 4) : 4 * (row % 4) + 4] = windows.output[row, :4]
    scores = _ranker(trained, models).scores("similarity", windows, np.zeros((6, 4, D_ENC), np.float16))
    np.testing.assert_array_equal(scores.argmax(axis=1), np.arange(6) % 4)
    np.testing.assert_allclose(scores.max(axis=1), 1.0, atol=2e-3)


def test_perplexity_of_chunks_is_given_the_passage_so_far(trained: Checkpoint, models: tuple[Path, Path]) -> None:
    windows = _text_windows(trained)
    embeddings = np.zeros((6, 4, D_ENC), np.float16)
    whole = _ranker(trained, models).scores("perplexity", windows, embeddings)
    expected = ChunkScorer(trained.load_decoder()).score([windows.context[2].astype(np.int32)], 4)[0]
    np.testing.assert_allclose(whole[2], expected, rtol=1e-4)
    apart = EvaluationWindows(windows.context, windows.output, windows.wrong, windows.documents, passages=4)
    alone = ChunkScorer(trained.load_decoder()).score([windows.context[2, 8:12].astype(np.int32)], 4)[0]
    assert _ranker(trained, models).scores("perplexity", apart, embeddings)[2, 2] == pytest.approx(alone[0], rel=1e-4)


@pytest.mark.parametrize("selection", ["random", "last", "similarity", "perplexity", "learned"])
def test_no_policy_sees_what_is_scored(trained: Checkpoint, models: tuple[Path, Path], selection: Any) -> None:
    policy = initialise_policy(D_ENC, query_dim=D_ENC, seed=0)
    with torch.no_grad():
        policy.logit.bias.fill_(1.0)
    windows = _text_windows(trained)
    embeddings = np.random.default_rng(0).normal(size=(6, 4, D_ENC)).astype(np.float16)
    ranker = _ranker(trained, models, policy)
    before = ranker.scores(selection, windows, embeddings)
    assert before.shape == (6, 4)
    windows.output[:, 4:] = 7
    np.testing.assert_array_equal(ranker.scores(selection, windows, embeddings), before)
    if selection in ("similarity", "learned"):
        windows.output[:, :4] = 9
        assert not np.array_equal(ranker.scores(selection, windows, embeddings), before)


def test_an_untrained_policy_is_told_from_a_trained_one(trained: Checkpoint, lines: Path) -> None:
    assert policy_is_trained(trained.policy)
    untrained = initialise_policy(D_ENC, seed=3)
    assert not policy_is_trained(untrained)
    bare = replace(trained, policy=untrained)
    with pytest.raises(ConfigError, match="policy was never trained"):
        evaluate_perplexity(bare, lines, _options(policies=("learned",)))
    report = evaluate_perplexity(bare, lines, _options(expansion_fractions=(0.25,)))
    assert list(report["refrag"]["0.25"]) == ["random", "last", "perplexity"]


# --- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_tokens": (18,)}, "no multiple of 4"),
        ({"shuffled": True, "context_tokens": (24,)}, "no multiple of 16"),
        ({"chunk_sizes": (5,)}, "none that the checkpoint serves"),
        ({"policies": ("similarity",)}, "leaves none to score"),
        ({"context_tokens": (512,)}, "the decoder has 512"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    trained: Checkpoint, lines: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate_perplexity(trained, lines, _options(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"expansion_fractions": (1.5,)},
        {"output_tokens": (0,)},
        {"policies": ("best",)},
        {"query_tokens": 8},
        {"query_tokens": 0},
        {"embedding_dtype": "int4"},
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        _options(**changes)


def test_a_reference_of_another_tokenizer_is_refused(trained: Checkpoint, lines: Path) -> None:
    decoder = replace(trained.config.decoder, tokenizer_fingerprint="0" * 64)
    other = replace(trained, config=replace(trained.config, decoder=decoder))
    with pytest.raises(FingerprintMismatchError, match="reference"):
        evaluate_perplexity(trained, lines, _options(), reference=other)


def test_an_untrained_projection_is_refused_unless_asked_for(
    models: tuple[Path, Path], lines: Path, tmp_path: Path
) -> None:
    from refrag_core.checkpoint import initialise_checkpoint

    checkpoint = initialise_checkpoint(
        encoder_reference=str(models[0]), decoder_reference=str(models[1]), chunk_size=4, chunk_sizes=(4,)
    )
    with pytest.raises(UntrainedProjectionError):
        evaluate_perplexity(checkpoint, lines, _options())
    report = evaluate_perplexity(checkpoint, lines, _options(allow_untrained=True, shuffled=True))
    assert report["settings"]["trained"] is False


def test_command_line_prints_tables_or_json(
    trained: Checkpoint, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", str(trained.folder), "--text", str(shards), "--split", "held_out", "--context", "16"]
    arguments += ["--output", "8", "--chunk-size", "4", "--windows", "6", "--device", "cpu", "--policies", "random"]
    saved = tmp_path / "made" / "report.json"
    assert perplexity.main([*arguments, "--json", "--save", str(saved)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(saved.read_text())
    assert "none" in captured.err
    assert perplexity.main(arguments) == 0
    assert "last 4 tokens" in capsys.readouterr().out
    assert perplexity.main([*arguments, "--policies", "best"]) == 2
    assert "'best' is unknown" in capsys.readouterr().err
    assert perplexity.main([*arguments, "--context", "x"]) == 2
