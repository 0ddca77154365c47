import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from refrag_core import chunking
from refrag_core.chunking import (
    ChunkingOptions,
    TokenizedText,
    chunk_rows,
    chunk_size_for,
    content_digest,
    cut_passages,
    num_chunks,
    passage_id,
    tokenize_documents,
)
from refrag_core.errors import ConfigError
from tests.tiny_models import cache_for

TRAINING = "The quick brown fox jumps over the lazy dog. It was 2024, and café owners in Zürich said: yes! Why?"
SPECIAL = "<|im_end|>"


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING] * 3, trainer)
    return tokenizer


def words() -> Tokenizer:
    """Not byte-level: one token a word or mark, spans from the tokenizer itself."""
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, ".": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


TOKENIZER = byte_level()


def one_character_tokens(text: str) -> TokenizedText:
    positions = np.arange(len(text), dtype=np.int64)
    return TokenizedText(np.array([ord(c) for c in text], dtype=np.int32), positions, positions + 1)


def spans(text: str, size: int) -> list[str]:
    passages = cut_passages(text, one_character_tokens(text), ChunkingOptions(4, size))
    return [passage.text for passage in passages]


# --- tokens -----------------------------------------------------------------------------------------


def test_tokens_decode_to_the_text_and_know_their_characters() -> None:
    text = "The fox said: 東京 é 🦊!"
    (tokens,) = tokenize_documents([text], TOKENIZER)
    assert tokens.ids.dtype == np.int32
    assert tokens.starts.dtype == tokens.ends.dtype == np.int64
    assert TOKENIZER.decode(tokens.ids.tolist(), skip_special_tokens=False) == text
    fox = text.index("🦊")
    parts = [(s, e) for s, e in zip(tokens.starts, tokens.ends, strict=True) if s <= fox < e]
    assert parts == [(fox, fox + 1)] * 4  # four byte tokens share the one character


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_spans_from_byte_lengths_equal_the_tokenizers_own(text: str) -> None:
    (tokens,) = tokenize_documents([text], TOKENIZER)
    encoding = TOKENIZER.encode(text, add_special_tokens=False)
    if SPECIAL not in text:
        assert tokens.ids.tolist() == encoding.ids
        assert list(zip(tokens.starts.tolist(), tokens.ends.tolist(), strict=True)) == encoding.offsets


def test_a_control_token_in_the_text_stays_text() -> None:
    (tokens,) = tokenize_documents([f"fox{SPECIAL}dog"], TOKENIZER)
    assert TOKENIZER.token_to_id(SPECIAL) not in tokens.ids
    assert TOKENIZER.decode(tokens.ids.tolist(), skip_special_tokens=False) == f"fox{SPECIAL}dog"


def test_the_callers_tokenizer_is_left_as_it_was() -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    (tokens,) = tokenize_documents(["The quick brown fox"], tokenizer)
    assert len(tokens.ids) > 2
    assert tokenizer.truncation is not None
    assert tokenizer.encode_special_tokens is False
    assert tokenizer.encode(SPECIAL).ids == [tokenizer.token_to_id(SPECIAL)]


def test_an_added_token_that_swallows_spaces_keeps_its_true_span() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tab>", lstrip=True, special=False, normalized=False)])
    (tokens,) = tokenize_documents(["fox   <tab>dog"], tokenizer)
    at = tokens.ids.tolist().index(tokenizer.token_to_id("<tab>"))
    assert (tokens.starts[at], tokens.ends[at]) == (3, 11)


def test_tokenizers_that_are_not_byte_level_give_their_own_spans() -> None:
    (tokens,) = tokenize_documents(["a  b."], words())
    assert tokens.ids.tolist() == [1, 2, 3]
    assert tokens.starts.tolist() == [0, 3, 4]
    assert tokens.ends.tolist() == [1, 4, 5]


def test_a_normalizer_that_changes_the_text_is_asked_for_spans() -> None:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFKC()
    (tokens,) = tokenize_documents(["ﬁx"], tokenizer)  # the ligature becomes "fi"
    assert (tokens.starts[0], tokens.ends[-1]) == (0, 2)


def test_no_texts_and_empty_texts() -> None:
    assert tokenize_documents([], TOKENIZER) == []
    (tokens,) = tokenize_documents([""], TOKENIZER)
    assert len(tokens.ids) == len(tokens.starts) == len(tokens.ends) == 0
    assert cut_passages("", tokens, ChunkingOptions(8)) == []


def test_long_texts_are_tokenised_in_pieces_that_join_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(["The quick brown fox", "jumps over 🦊", "the lazy dog."] * 20)
    (whole,) = tokenize_documents([text], TOKENIZER)
    monkeypatch.setattr(chunking, "PIECE_CHARS", 64)
    monkeypatch.setattr(chunking, "BATCH_CHARS", 100)
    before, pieces, after = tokenize_documents(["dog", text, "fox"], TOKENIZER)
    assert len(chunking._pieces(text)) > 10
    for name in ("ids", "starts", "ends"):
        assert np.array_equal(getattr(pieces, name), getattr(whole, name))
    assert (before.ends[-1], after.ends[-1]) == (3, 3)


def test_pieces_end_after_a_newline_before_a_space_or_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "PIECE_CHARS", 8)
    assert chunking._pieces("aaaaa\nb c dd") == ["aaaaa\n", "b c dd"]
    assert chunking._pieces("aaaaa b cc dd") == ["aaaaa b", " cc dd"]
    assert chunking._pieces("a" * 20) == ["a" * 8, "a" * 8, "a" * 4]


# --- passages ---------------------------------------------------------------------------------------


def test_a_passage_ends_at_the_last_sentence_end_of_its_final_quarter() -> None:
    #                   cuts may come before characters 12 to 16
    assert spans("aaaa bbbb ccc. dd ee ffff", 16) == ["aaaa bbbb ccc.", " dd ee ffff"]


def test_a_sentence_end_before_the_final_quarter_does_not_count() -> None:
    assert spans("aaaa. bbbb ccc ddd eeee", 16) == ["aaaa. bbbb ccc ", "ddd eeee"]


def test_closing_quotes_belong_to_the_sentence() -> None:
    assert spans("aaaa bbb “cc.” ddd eeeee", 16) == ["aaaa bbb “cc.”", " ddd eeeee"]


def test_a_point_inside_a_number_ends_no_sentence() -> None:
    assert spans("aaaaaaaaa 3.14159 bbbbb", 16)[0] == "aaaaaaaaa 3.1415"


def test_a_newline_ends_a_sentence_and_goes_with_it() -> None:
    assert spans("aaaaaaaaa bbb\nccc ddddddd", 16) == ["aaaaaaaaa bbb\n", "ccc ddddddd"]


def test_cjk_sentences_end_without_a_space() -> None:
    assert spans("一二三四五六七八九十一二。三四五六七", 16) == ["一二三四五六七八九十一二。", "三四五六七"]


def test_without_any_boundary_the_cut_is_at_the_limit() -> None:
    assert spans("a" * 20, 8) == ["a" * 8, "a" * 8, "a" * 4]


def test_whitespace_only_spans_are_left_out_and_ordinals_stay_consecutive() -> None:
    text = "a" * 8 + "\n" * 16 + "b" * 4
    passages = cut_passages(text, one_character_tokens(text), ChunkingOptions(4, 8))
    assert [(p.ordinal, p.text.strip(), p.token_start) for p in passages] == [(0, "a" * 8, 0), (1, "b" * 4, 24)]


def test_a_character_is_never_cut() -> None:
    text = "🦊" * 30
    (tokens,) = tokenize_documents([text], TOKENIZER)
    passages = cut_passages(text, tokens, ChunkingOptions(4, 10))  # 4 tokens a fox: 2 foxes a passage
    assert {p.text for p in passages} == {"🦊🦊"}
    assert "".join(p.text for p in passages) == text


def test_a_character_with_more_tokens_than_a_passage_is_cut_for_want_of_better() -> None:
    starts, ends = np.zeros(20, dtype=np.int64), np.ones(20, dtype=np.int64)
    tokens = TokenizedText(np.arange(20, dtype=np.int32), starts, ends)
    passages = cut_passages("ﷺ", tokens, ChunkingOptions(4, 8))
    assert [(p.token_start, p.token_end) for p in passages] == [(0, 8), (8, 16), (16, 20)]


@given(
    st.text(alphabet=st.sampled_from("ab .!?\n\t“”é東🦊。)\u3000"), max_size=300),
    st.integers(min_value=8, max_value=40),
)
@settings(max_examples=200, deadline=None)
def test_passages_cover_the_document_and_decode_to_their_text(text: str, size: int) -> None:
    (tokens,) = tokenize_documents([text], TOKENIZER)
    passages = cut_passages(text, tokens, ChunkingOptions(8, size))
    assert [p.ordinal for p in passages] == list(range(len(passages)))
    reached_token = reached_char = 0
    for passage in passages:
        assert text[reached_char : passage.char_start].strip() == ""
        assert passage.token_start >= reached_token
        assert 0 < passage.token_end - passage.token_start <= size
        assert passage.text == text[passage.char_start : passage.char_end]
        ids = tokens.ids[passage.token_start : passage.token_end].tolist()
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == passage.text
        reached_token, reached_char = passage.token_end, passage.char_end
    assert text[reached_char:].strip() == ""


@pytest.mark.parametrize(("chunk_size", "size"), [(0, 256), (8, 7), (32, 16)])
def test_sizes_out_of_range_are_refused(chunk_size: int, size: int) -> None:
    with pytest.raises(ConfigError):
        ChunkingOptions(chunk_size, size)


def test_the_message_of_a_refusal() -> None:
    with pytest.raises(ConfigError) as caught:
        ChunkingOptions(32, 16)
    assert str(caught.value) == (
        "max_passage_tokens 16: expected at least 8 and one chunk of 32. Choose a larger passage."
    )


# --- chunks and ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 1), (8, 1), (9, 2), (256, 32)])
def test_num_chunks(tokens: int, expected: int) -> None:
    assert num_chunks(tokens, 8) == expected


def test_chunk_rows_pads_the_last_chunk_only() -> None:
    tokens, lengths = chunk_rows(np.arange(1, 8, dtype=np.int32), 3)
    assert tokens.tolist() == [[1, 2, 3], [4, 5, 6], [7, 0, 0]]
    assert lengths.tolist() == [3, 3, 1]
    assert (tokens.dtype, lengths.dtype) == (np.int32, np.int16)


def test_chunk_rows_of_nothing() -> None:
    tokens, lengths = chunk_rows(np.array([], dtype=np.int32), 4)
    assert tokens.shape == (0, 4)
    assert lengths.shape == (0,)


@pytest.mark.parametrize(
    ("importance", "expected"),
    [(None, 16), (0, 32), (0.33, 32), (1 / 3, 16), (0.5, 16), (2 / 3, 8), (1, 8)],
)
def test_chunk_size_follows_importance(importance: float | None, expected: int) -> None:
    assert chunk_size_for(importance, (8, 16, 32), 16) == expected


def test_with_one_chunk_size_importance_decides_nothing() -> None:
    assert {chunk_size_for(value, (16,), 16) for value in (0.0, 0.5, 1.0)} == {16}


def test_a_passage_id_is_of_its_content() -> None:
    expected = hashlib.blake2b(
        b"\x01" + bytes(7) + b"d" + b"\x02" + bytes(7) + "é".encode() + b"\x08" + bytes(7) + bytes(8), digest_size=16
    )
    assert passage_id("d", "é", 0) == expected.digest()
    ids = {passage_id("d", "é", 0), passage_id("d", "é", 1), passage_id("dé", "", 0), passage_id("", "dé", 0)}
    assert len(ids) == 4


def test_the_content_digest_depends_on_every_part() -> None:
    ids = np.array([1, 2], dtype=np.int32)
    given = {"document_id": "d", "metadata": {"a": 1}, "chunk_size": 8, "passages": [(b"p" * 16, 0, 4, ids)]}
    changed = [
        {"document_id": "e"},
        {"metadata": {"a": 2}},
        {"chunk_size": 16},
        {"passages": []},
        {"passages": [(b"q" * 16, 0, 4, ids)]},
        {"passages": [(b"p" * 16, 1, 4, ids)]},
        {"passages": [(b"p" * 16, 0, 5, ids)]},
        {"passages": [(b"p" * 16, 0, 4, ids[::-1])]},
    ]
    digests = [content_digest(**(given | change)) for change in [{}, *changed]]  # type: ignore[arg-type]
    assert len(set(digests)) == len(digests)
    assert {len(digest) for digest in digests} == {32}


def test_the_content_digest_does_not_depend_on_memory_layout() -> None:
    ids = np.arange(10, dtype=np.int64)[::2]
    plain = np.array([0, 2, 4, 6, 8], dtype=np.int32)
    digests = {
        content_digest(document_id="d", metadata={}, chunk_size=8, passages=[(b"p", 0, 1, part)])
        for part in (ids, plain)
    }
    assert len(digests) == 1


@pytest.mark.models
def test_smollm2_passages_decode_to_their_text(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from refrag_core.models import load_tokenizer, resolve_model

    monkeypatch.setenv("REFRAG_CACHE", str(cache_for(request, tmp_path_factory)))
    tokenizer = load_tokenizer(resolve_model("smollm2-135m-instruct"))
    assert chunking._prepared(tokenizer)._lengths is not None
    text = "In 1987, 3.14 <|im_end|> was said. " * 40 + "東京 🦊\n\n" * 30
    (tokens,) = tokenize_documents([text], tokenizer)
    passages = cut_passages(text, tokens, ChunkingOptions(16))
    assert "".join(p.text for p in passages) == text
    for passage in passages:
        ids = tokens.ids[passage.token_start : passage.token_end].tolist()
        assert tokenizer.decode(ids, skip_special_tokens=False) == passage.text
