"""The runtime against an index: every number that an answer carries, recomputed from the tables."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from refrag_core.checkpoint import Checkpoint, load_checkpoint
from refrag_core.decoder import Decoder
from refrag_core.errors import ConfigError, FingerprintMismatchError, MissingScoresError, UntrainedProjectionError
from refrag_core.models import load_tokenizer
from refrag_core.policy import num_expanded, policy_logits
from refrag_core.retrieval import RetrievalOptions
from refrag_core.runtime import Answer, AskOptions, Runtime, Stats, check_untrained
from tests import tiny_models
from tests.small_index import SmallIndex, documents

QUESTION = "Which river is the capital of the northern island?"
NEW_TOKENS = 24


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Opening remembers the models' fingerprints."""


def options(**changes: Any) -> AskOptions:
    return AskOptions(**{"top_k": 3, "max_new_tokens": NEW_TOKENS, **changes})


def rows(index: Path) -> dict[str, dict[str, Any]]:
    """Every passage by its id: its tokens and scores, read from the tables the ordinary way."""
    found: dict[str, dict[str, Any]] = {}
    for folder in sorted((index / "shards").iterdir()):
        tables = {path.stem.split("-")[0]: pq.read_table(path).to_pylist() for path in folder.glob("*.parquet")}
        for passage in tables["passages"]:
            own = slice(passage["first_chunk"], passage["first_chunk"] + passage["num_chunks"])
            ids = [np.frombuffer(c["tokens"], "<i4")[: c["num_tokens"]].tolist() for c in tables["chunks"][own]]
            nll = [row["nll"] for row in tables.get("scores", [])[own]]
            embeddings = [np.frombuffer(row["embedding"], "<f2") for row in tables["embeddings"][own]]
            found[passage["passage_id"].hex()] = {"chunks": ids, "nll": nll, "embeddings": np.stack(embeddings)}
    return found


def joined(chunks: list[list[int]]) -> list[int]:
    return [token for ids in chunks for token in ids]


def prompt_ids(runtime: Runtime, answer: Answer, passages: list[list[int]]) -> list[int]:
    """The prompt as plain token ids, put together by hand."""
    t = runtime.template
    question = load_tokenizer(runtime.checkpoint.decoder_folder()).encode(answer.question, add_special_tokens=False).ids
    context = [*t.before_passages]
    for ids in passages:
        context += [*t.passage_header, *ids, *t.passage_footer]
    return [*t.bos, *t.prefix, *context, *t.before_question, *question, *t.after_question, *t.suffix]


def fixed_positions(runtime: Runtime, answer: Answer) -> int:
    """Positions of everything but the passages' own."""
    return len(prompt_ids(runtime, answer, [[]] * len(answer.passages)))


# --- what an answer is -------------------------------------------------------------------------------


def plain_decoding(runtime: Runtime, library: SmallIndex, answer: Answer) -> tuple[list[int], list[int]]:
    """The same passages and question as plain token ids, and what transformers' own greedy generate makes of them."""
    stored = rows(library.path)
    ids = prompt_ids(runtime, answer, [joined(stored[used.passage]["chunks"]) for used in answer.passages])
    with torch.inference_mode():
        output = tiny_models.decoder("llama").generate(
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones(1, len(ids))
        )
    return ids, output[0, len(ids) :].tolist()


def test_with_everything_expanded_it_is_plain_decoding(runtime: Runtime, library: SmallIndex) -> None:
    """Token for token, in float32."""
    answer = runtime.ask(QUESTION, options(policy="all"))
    ids, generated = plain_decoding(runtime, library, answer)
    expected = load_tokenizer(library.models / "decoder").decode([i for i in generated if i != 1])
    assert answer.answer == expected.strip()
    assert answer.stats.new_tokens == len(generated)
    assert answer.stats.decoder_positions == len(ids)
    assert len(set(generated)) > 3  # a decoder that repeats one token would agree with anything
    assert answer.stats.compression == 1.0


def test_an_answer_may_be_cut_anywhere(runtime: Runtime, library: SmallIndex) -> None:
    """Also within a character of several bytes, of which a replacement character is left."""
    tokenizer, texts = load_tokenizer(library.models / "decoder"), []
    _, generated = plain_decoding(runtime, library, runtime.ask(QUESTION, options(policy="all")))
    for length in range(1, 9):
        pieces: list[str] = []
        answer = runtime.ask(QUESTION, options(policy="all", max_new_tokens=length), on_text=pieces.append)
        texts.append(tokenizer.decode(generated[:length]))
        assert "".join(pieces) == texts[-1]
        assert answer.answer == texts[-1].strip()
    assert any(text.endswith("\N{REPLACEMENT CHARACTER}") for text in texts)


def test_with_nothing_expanded_a_chunk_is_one_position(runtime: Runtime, library: SmallIndex) -> None:
    answer = runtime.ask(QUESTION, options(policy="none"))
    stored = rows(library.path)
    chunks = [stored[used.passage]["chunks"] for used in answer.passages]
    slots = sum(-(-sum(map(len, passage)) // 16) for passage in chunks)
    assert answer.stats.decoder_positions == fixed_positions(runtime, answer) + slots
    assert [used.num_chunks for used in answer.passages] == [len(passage) for passage in chunks]
    assert [used.expanded for used in answer.passages] == [()] * 3
    assert (answer.stats.num_chunks, answer.stats.num_expanded) == (slots, 0)
    assert answer.stats.context_tokens == sum(len(ids) for passage in chunks for ids in passage)
    assert answer.stats.compression == pytest.approx(answer.stats.context_tokens / slots, abs=5e-4)
    assert answer.answer != runtime.ask(QUESTION, options(policy="all")).answer


@pytest.mark.parametrize("policy", ["learned", "random", "perplexity"])
@pytest.mark.parametrize("fraction", [0.1, 0.5])
def test_what_is_expanded_and_what_it_costs_agree(
    runtime: Runtime, library: SmallIndex, policy: Any, fraction: float
) -> None:
    answer = runtime.ask(QUESTION, options(policy=policy, expansion_fraction=fraction))
    stored, stats = rows(library.path), answer.stats
    chunks = [stored[used.passage]["chunks"] for used in answer.passages]
    assert stats.num_chunks == sum(map(len, chunks))
    assert stats.num_expanded == sum(len(used.expanded) for used in answer.passages)
    assert stats.num_expanded == num_expanded(stats.num_chunks, fraction) > 0
    slots = sum(
        len(ids) if at in used.expanded else 1
        for used, passage in zip(answer.passages, chunks, strict=True)
        for at, ids in enumerate(passage)
    )
    assert stats.decoder_positions == fixed_positions(runtime, answer) + slots
    assert stats.context_tokens == sum(len(ids) for passage in chunks for ids in passage)
    assert stats.compression == pytest.approx(stats.context_tokens / slots, abs=5e-4)
    assert (answer.policy, answer.expansion_fraction, answer.trained, answer.version) == (policy, fraction, False, 2)


def expanded(answer: Answer) -> list[tuple[int, int]]:
    return [(number, at) for number, used in enumerate(answer.passages) for at in used.expanded]


def best(scores: list[list[float]], count: int) -> list[tuple[int, int]]:
    """(passage, chunk) of the `count` highest scores."""
    ranked = sorted(((-s, n, at) for n, own in enumerate(scores) for at, s in enumerate(own)))
    return sorted((n, at) for _, n, at in ranked[:count])


def test_the_perplexity_policy_expands_what_surprised_the_decoder_most(runtime: Runtime, library: SmallIndex) -> None:
    answer = runtime.ask(QUESTION, options(policy="perplexity", expansion_fraction=0.4))
    stored = rows(library.path)
    nll = [stored[used.passage]["nll"] for used in answer.passages]
    assert expanded(answer) == best(nll, answer.stats.num_expanded)


def test_the_learned_policy_expands_its_highest_logits(runtime: Runtime, library: SmallIndex) -> None:
    answer = runtime.ask(QUESTION, options(policy="learned", expansion_fraction=0.4))
    stored = rows(library.path)
    embeddings = [stored[used.passage]["embeddings"] for used in answer.passages]
    logits = policy_logits(load_checkpoint(str(library.models / "checkpoint")).policy, np.concatenate(embeddings))
    bounds = np.cumsum([len(own) for own in embeddings])[:-1]
    assert expanded(answer) == best([own.tolist() for own in np.split(logits, bounds)], answer.stats.num_expanded)


def test_the_random_policy_is_its_seed_s(runtime: Runtime) -> None:
    def drawn(seed: int) -> list[tuple[int, int]]:
        return expanded(runtime.ask(QUESTION, options(policy="random", expansion_fraction=0.4, seed=seed)))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_passages_are_those_that_search_finds(runtime: Runtime) -> None:
    answer = runtime.ask(QUESTION, options(policy="none"))
    hits = runtime.searcher.search(QUESTION, 3)
    shown = [(p.rank, p.score, p.doc_id, p.passage, p.text, p.metadata) for p in answer.passages]
    assert shown == [(h.rank, h.score, h.doc_id, h.passage, h.text, h.metadata) for h in hits]
    assert answer.dropped == ()


def test_the_first_token_s_time_is_the_sum_of_its_parts(runtime: Runtime) -> None:
    s = runtime.ask(QUESTION, options(policy="learned")).stats
    parts = (s.retrieval_ms, s.fetch_ms, s.upload_ms, s.encode_ms, s.policy_ms, s.compose_ms, s.prefill_ms)
    assert all(part > 0 for part in parts)
    assert s.ttft_ms == pytest.approx(sum(parts), abs=0.01)
    assert s.ttit_ms > 0
    assert runtime.ask(QUESTION, options(policy="learned", max_new_tokens=1)).stats.ttit_ms == 0


def test_streamed_pieces_are_the_answer(runtime: Runtime) -> None:
    pieces: list[str] = []
    answer = runtime.ask(QUESTION, options(policy="all"), on_text=pieces.append)
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces).strip() == answer.answer
    assert answer.answer == runtime.ask(QUESTION, options(policy="all")).answer


def test_answers_from_chosen_passages(runtime: Runtime) -> None:
    refs = [ref for ref, _ in runtime.retrieve(QUESTION, 3)]
    asked, chosen = (
        runtime.ask(QUESTION, options(policy="all")),
        runtime.answer_from(QUESTION, refs, options(policy="all")),
    )
    assert chosen.answer == asked.answer
    assert [p.passage for p in chosen.passages] == [p.passage for p in asked.passages]
    assert [p.score for p in chosen.passages] == [None] * 3
    closed = runtime.answer_from(QUESTION, [], options(policy="learned"))
    assert closed.passages == ()
    assert (closed.stats.num_chunks, closed.stats.context_tokens, closed.stats.compression) == (0, 0, 1.0)
    assert closed.stats.decoder_positions == len(prompt_ids(runtime, closed, []))


# --- filters -----------------------------------------------------------------------------------------


def test_an_answer_from_the_documents_of_a_filter(runtime: Runtime) -> None:
    retrieval = RetrievalOptions(where="year < 1910", hybrid=True)
    answer = runtime.ask(QUESTION, options(policy="all", retrieval=retrieval))
    expected = runtime.searcher.search(QUESTION, 3, retrieval)
    assert [(p.passage, p.score) for p in answer.passages] == [(hit.passage, hit.score) for hit in expected]
    assert all(p.metadata["year"] < 1910 for p in answer.passages)
    assert answer.passing == runtime.reader.passing("year < 1910").rows
    assert runtime.ask(QUESTION, options(policy="all")).passing is None


def test_nothing_to_answer_from_is_no_answer(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder would make one up from the question alone."""
    nothing = options(policy="all", retrieval=RetrievalOptions(where="year > 3000"))
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "generate", lambda *_, **__: pytest.fail("the decoder was asked"))
        answer = runtime.ask(QUESTION, nothing)
    assert (answer.answer, answer.passages, answer.passing) == ("", (), 0)
    assert answer.stats.retrieval_ms > 0
    assert answer.stats == Stats(retrieval_ms=answer.stats.retrieval_ms)
    given = runtime.ask(QUESTION, nothing, given={"note": "The capital of the island is a harbour of stone."})
    assert [(p.doc_id, p.score) for p in given.passages] == [("note", None)]
    assert given.answer


# --- what does not fit -------------------------------------------------------------------------------


def test_passages_that_do_not_fit_are_dropped_from_the_last_and_named(runtime: Runtime) -> None:
    wide = options(policy="all", top_k=12, max_new_tokens=4)
    answer = runtime.ask(QUESTION, wide)
    hits = runtime.searcher.search(QUESTION, 12)
    kept = len(answer.passages)
    assert 0 < kept < 12
    assert [p.passage for p in answer.passages] == [h.passage for h in hits[:kept]]
    assert answer.dropped == tuple(h.doc_id for h in hits[kept:])
    assert answer.stats.decoder_positions + 4 <= tiny_models.MAX_POSITIONS
    assert answer.stats.num_chunks == sum(p.num_chunks for p in answer.passages) == answer.stats.num_expanded
    with pytest.raises(ConfigError, match=r"positions and the decoder has 512; expected it to fit \(strict\)"):
        runtime.ask(QUESTION, replace(wide, strict=True))
    assert runtime.ask(QUESTION, replace(wide, policy="none", strict=True)).dropped == ()


# --- text that is not in the index --------------------------------------------------------------------


class CountedEncoder:
    """Counts the chunks that the real encoder has to encode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chunks = self.loads = 0
        load = Checkpoint.load_encoder

        def counted(checkpoint: Checkpoint, **settings: Any) -> Any:
            self.loads += 1
            encoder = load(checkpoint, **settings)
            encode = encoder.encode

            def note(token_ids: Any, num_tokens: Any) -> Any:
                self.chunks += len(token_ids)
                return encode(token_ids, num_tokens)

            monkeypatch.setattr(encoder, "encode", note)
            return encoder

        monkeypatch.setattr(Checkpoint, "load_encoder", counted)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> CountedEncoder:
    return CountedEncoder(monkeypatch)


GIVEN = {"notes.txt": documents(1)[0]["text"]}


def test_given_text_stands_first_and_is_encoded_once(library: SmallIndex, encoder: CountedEncoder) -> None:
    fresh = Runtime.open(library.path, device="cpu")
    plain = fresh.ask(QUESTION, options(policy="none"))
    assert encoder.loads == 0  # the encoder is for text outside the index alone
    answer = fresh.ask(QUESTION, options(policy="none"), given=GIVEN)
    given = [p for p in answer.passages if p.score is None]
    assert [p.rank for p in answer.passages] == list(range(1, len(answer.passages) + 1))
    assert answer.passages[: len(given)] == tuple(given)
    assert {p.doc_id for p in given} == {"notes.txt"}
    assert "".join(p.text for p in given) == GIVEN["notes.txt"]
    assert [p.passage for p in answer.passages[len(given) :]] == [p.passage for p in plain.passages]
    chunks = sum(p.num_chunks for p in given)
    assert (encoder.loads, encoder.chunks) == (1, chunks)
    assert answer.stats.decoder_positions > plain.stats.decoder_positions + chunks - 1
    again = fresh.ask(QUESTION, options(policy="none"), given=GIVEN)
    assert (encoder.loads, encoder.chunks) == (1, chunks)
    assert again.answer == answer.answer


def test_given_text_is_cut_and_encoded_as_the_index_did_it(runtime: Runtime, library: SmallIndex) -> None:
    made = runtime.encode_text("doc-0000", GIVEN["notes.txt"])
    stored = rows(library.path)
    assert len(made) > 1
    for given, fetched in made:
        # The id of the same passage in the index differs from it in nothing: same document, text and occurrence.
        row = stored[given.passage]
        assert fetched.tokens.tolist() == joined(row["chunks"])
        assert np.array_equal(fetched.embeddings, row["embeddings"])


def test_the_cache_on_disk_outlives_the_runtime(library: SmallIndex, tmp_path: Path, encoder: CountedEncoder) -> None:
    cache = tmp_path / "chunks" / "cache.sqlite"
    first = Runtime.open(library.path, device="cpu", chunk_cache=cache)
    answer = first.ask(QUESTION, options(policy="none"), given=GIVEN)
    done = encoder.chunks
    assert done > 0
    second = Runtime.open(library.path, device="cpu", chunk_cache=cache)
    again = second.ask(QUESTION, options(policy="none"), given=GIVEN)
    assert encoder.chunks == done
    assert (again.answer, again.passages) == (answer.answer, answer.passages)


# --- adaptive chunk sizes -----------------------------------------------------------------------------


def test_every_passage_keeps_its_own_chunk_size(tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(30))
    models = small.with_models(chunk_size_field="importance")
    small.options = replace(models, corpus=replace(models.corpus, chunk_size_field="importance"))
    small.build()
    stored = rows(small.path)
    answer = Runtime.open(small.path, device="cpu").ask(QUESTION, options(policy="none", top_k=25))
    assert {used.chunk_size for used in answer.passages} == {8, 16, 32}
    for used in answer.passages:
        importance = used.metadata["importance"]
        assert used.chunk_size == (8 if importance >= 2 / 3 else 16 if importance >= 1 / 3 else 32)
        tokens = sum(len(ids) for ids in stored[used.passage]["chunks"])
        assert used.num_chunks == -(-tokens // used.chunk_size)
    assert answer.stats.num_chunks == sum(used.num_chunks for used in answer.passages)


# --- components that do not belong together -------------------------------------------------------------


def test_another_retriever_is_refused(library: SmallIndex, tmp_path: Path) -> None:
    other = tiny_models.encoder_folder(tmp_path / "other", seed=1)
    with pytest.raises(
        FingerprintMismatchError, match=r"retriever .* has fingerprint .*the passages were embedded with"
    ):
        Runtime.open(library.path, retriever=str(other), device="cpu")


def test_a_decoder_with_another_tokenizer_is_refused(library: SmallIndex, tmp_path: Path) -> None:
    other = tiny_models.decoder_folder(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(FingerprintMismatchError, match=r"has a tokenizer with fingerprint .*the index holds tokens of"):
        Runtime.open(library.path, decoder=str(other), device="cpu")


def test_a_checkpoint_with_another_encoder_is_refused(library: SmallIndex, tmp_path: Path) -> None:
    other = tiny_models.encoder_folder(tmp_path / "encoder", seed=1)
    from refrag_core.checkpoint import initialise_checkpoint

    made = initialise_checkpoint(encoder_reference=str(other), decoder_reference=str(library.models / "decoder"))
    made.save(tmp_path / "checkpoint")
    with pytest.raises(
        FingerprintMismatchError, match=r"the checkpoint's encoder has fingerprint .*the index was encoded"
    ):
        Runtime.open(library.path, checkpoint=str(tmp_path / "checkpoint"), device="cpu")


def test_a_checkpoint_with_another_projection_is_taken(library: SmallIndex, tmp_path: Path) -> None:
    """What the runtime alone reads may change without encoding anything again."""
    opened = load_checkpoint(str(library.models / "checkpoint"))
    other = replace(opened, config=replace(opened.config, trained=True, seed=5))
    other.save(tmp_path / "checkpoint")
    found = Runtime.open(library.path, checkpoint=str(tmp_path / "checkpoint"), device="cpu")
    assert found.trained
    assert found.ask(QUESTION, options(policy="learned")).trained


def test_other_weights_are_taken_by_an_untrained_checkpoint_alone(library: SmallIndex, tmp_path: Path) -> None:
    other = str(tiny_models.decoder_folder(tmp_path / "other", seed=1))
    assert not Runtime.open(library.path, decoder=other, device="cpu").trained
    opened = load_checkpoint(str(library.models / "checkpoint"))
    replace(opened, config=replace(opened.config, trained=True)).save(tmp_path / "checkpoint")
    with pytest.raises(FingerprintMismatchError, match=r"the decoder in .* has fingerprint .*expected the same model"):
        Runtime.open(library.path, decoder=other, checkpoint=str(tmp_path / "checkpoint"), device="cpu")


def test_a_decoder_of_another_width_is_refused(library: SmallIndex, tmp_path: Path) -> None:
    """Its tokenizer is the index's, but the projection maps into another space."""
    other = tiny_models.decoder_folder(tmp_path / "opt", "opt")
    assert Decoder.load(other).dim != tiny_models.D_DEC
    with pytest.raises(
        FingerprintMismatchError, match=r"takes embeddings of width 16, the checkpoint's projection gives 32"
    ):
        Runtime.open(library.path, decoder=str(other), device="cpu")


def test_perplexity_without_the_score_column(tmp_path: Path) -> None:
    small = SmallIndex(tmp_path, documents(3))
    small.build()
    opened = Runtime.open(small.path, device="cpu")
    with pytest.raises(MissingScoresError, match=r"refrag index build CORPUS -o INDEX --score"):
        opened.ask(QUESTION, options(policy="perplexity"))


# --- untrained projections ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "fraction", "refused"),
    [
        (None, None, False),
        ("all", None, False),
        ("all", 0.1, False),
        (None, 1.0, False),
        ("learned", 1.0, False),
        ("none", 1.0, True),
        ("none", None, True),
        (None, 0.1, True),
        ("random", 0.5, True),
        ("perplexity", None, True),
        (None, 0.0, True),
    ],
)
def test_untrained_chunks_are_not_compressed_unless_asked_twice(
    policy: str | None, fraction: float | None, refused: bool
) -> None:
    check_untrained(True, policy, fraction, False)
    check_untrained(False, policy, fraction, True)
    if not refused:
        check_untrained(False, policy, fraction, False)
        return
    with pytest.raises(UntrainedProjectionError, match=r"was never trained .* pass --allow-untrained to see the noise"):
        check_untrained(False, policy, fraction, False)
