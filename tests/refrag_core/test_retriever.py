import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from refrag_core.errors import ConfigError, ModelNotFoundError
from refrag_core.models import resolve_model
from refrag_core.retriever import Retriever, load_retriever, mean_pool, retriever_fingerprint
from tests.tiny_models import D_ENC, ENCODER_FAMILIES, encoder_body, encoder_folder, encoder_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")

LONG = "fox and the answer " * 100
TEXTS = ["The capital of France", "", "a" * 31, "one question and one answer " * 5, LONG, "fox"]


def tiny_retriever(
    batch_tokens: int | None = None, family: str = "bert", on_device: bool = False, max_length: int = 128
) -> Retriever:
    tokenizer = encoder_tokenizer()
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    body = encoder_body(family)
    body.pooler = None
    return Retriever(
        body,
        tokenizer,
        max_length=max_length,
        pad_id=0,
        fingerprint="tiny",
        device="cpu",
        batch_tokens=batch_tokens,
        on_device=on_device,
    )


def test_mean_pool_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 4.0]]


def test_passages_are_unit_float16_and_queries_unit_float32():
    retriever = tiny_retriever()
    vectors, truncated = retriever.embed(TEXTS)
    queries = retriever.embed_queries(TEXTS)
    assert (vectors.dtype, vectors.shape, truncated.dtype) == (np.float16, (6, D_ENC), np.bool_)
    assert (queries.dtype, queries.shape, retriever.dim) == (np.float32, (6, D_ENC), D_ENC)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors, queries.astype(np.float16))


def test_a_vector_is_the_mean_over_the_tokens_without_padding():
    retriever = tiny_retriever()
    ids = torch.tensor([[2, *encoder_tokenizer().encode("the fox").ids, 3]])
    with torch.inference_mode():
        mean = encoder_body()(input_ids=ids).last_hidden_state.mean(dim=1)[0]
    np.testing.assert_allclose(retriever.embed_queries(["the fox"])[0], mean / mean.norm(), atol=1e-6)


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
def test_an_embedding_depends_on_its_text_alone(family: str):
    whole = tiny_retriever(family=family).embed_queries(TEXTS)
    for batch_tokens in (1, 64, 200):
        np.testing.assert_array_equal(tiny_retriever(batch_tokens, family).embed_queries(TEXTS), whole)
    alone = np.concatenate([tiny_retriever(family=family).embed_queries([text]) for text in TEXTS])
    np.testing.assert_array_equal(alone, whole)
    np.testing.assert_array_equal(tiny_retriever(family=family).embed_queries(TEXTS[::-1])[::-1], whole)


class Watched:
    """In place of a retriever's captured calls: notes the shapes of the token ids, fails above `most` rows."""

    def __init__(self, retriever: Retriever, *, most: int = 1 << 20, computed: bool = True) -> None:
        self._embed, self._dim = retriever._embed_gathered, retriever.dim
        self._most, self._computed = most, computed
        self.shapes: list[tuple[int, int]] = []
        retriever._calls = self  # type: ignore[assignment]

    def __call__(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        ids, counts = tensors
        self.shapes.append((ids.shape[0], ids.shape[1]))
        if len(ids) > self._most:
            raise RuntimeError("out of memory")
        made = self._embed(ids, counts) if self._computed else torch.zeros(len(ids), self._dim)
        assert made.isfinite().all()  # in the rows that fill up as well
        return made


def token_runs(lengths: Sequence[int], seed: int = 0) -> list[np.ndarray]:
    """Token ids of texts with these many tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(4, 60, length, dtype=np.int32) for length in lengths]


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
@pytest.mark.parametrize("batch_tokens", [64, 700, None])
def test_every_length_and_number_of_texts_gives_the_plain_vectors(family: str, batch_tokens: int | None):
    retriever = tiny_retriever(batch_tokens, family, on_device=True)
    plain = tiny_retriever(family=family)
    for lengths in (range(2, 129), [128, 2], [40] * 5, [128] * 5 + [3], [2], [33, 64, 65, 97, 128]):
        ids = token_runs(list(lengths))
        np.testing.assert_allclose(retriever.embed_ids(ids), plain.embed_ids(ids), atol=1e-5)


def test_the_passages_of_many_documents_share_few_shapes():
    retriever = tiny_retriever(on_device=True, max_length=512)
    watched, random = Watched(retriever, computed=False), np.random.default_rng(0)
    for shard in range(100):
        ends, whole = random.integers(2, 513, random.integers(5, 120)), [512] * (7 * shard % 64)
        retriever.embed_ids(token_runs([*ends, *whole], seed=shard))
    assert len(watched.shapes) <= 10 * 100  # a batch for every length, and what one batch does not hold
    assert len(set(watched.shapes)) <= 40
    assert {width for _, width in watched.shapes} <= {32, 64, 128, 192, 256, 320, 384, 448, 512}
    assert all(2_048 <= rows * width <= 32_768 for rows, width in watched.shapes)


def test_a_few_short_texts_have_batches_of_their_size():
    retriever = tiny_retriever(on_device=True)
    watched = Watched(retriever)
    for lengths in ([9], [128], [9, 40, 60], [128] * 4):
        retriever.embed_ids(token_runs(lengths))
    assert watched.shapes == [(1, 32), (1, 128), (2, 64), (1, 32), (4, 128)]
    retriever.embed_ids(token_runs([9] * 5))
    assert watched.shapes[-1] == (128, 32)


@pytest.mark.parametrize("lengths", [[9] * 300 + [100] * 40 + [70], [9] * 6 + [100]])
def test_out_of_memory_on_the_device_halves_batches_that_are_filled_up_too(lengths: list[int]):
    ids = token_runs(lengths)
    retriever = tiny_retriever(on_device=True)
    watched = Watched(retriever, most=8)
    np.testing.assert_allclose(retriever.embed_ids(ids), tiny_retriever().embed_ids(ids), atol=1e-5)
    assert max(rows for rows, _ in watched.shapes) >= 32
    Watched(retriever, most=0)
    with pytest.raises(RuntimeError, match="out of memory"):
        retriever.embed_ids(ids)


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
@pytest.mark.parametrize("batch_tokens", [64, None])
def test_padding_on_the_device_gives_the_same_vectors(family: str, batch_tokens: int | None):
    texts = [*TEXTS, "", *(f"fox {number} " * number for number in range(12))]
    whole, truncated = tiny_retriever(family=family).embed(texts)
    made, also_truncated = tiny_retriever(batch_tokens, family, on_device=True).embed(texts)
    np.testing.assert_allclose(made.astype(np.float32), whole.astype(np.float32), atol=2e-3)
    assert also_truncated.tolist() == truncated.tolist()
    alone = np.concatenate([tiny_retriever(batch_tokens, family, on_device=True).embed([text])[0] for text in texts])
    np.testing.assert_allclose(alone.astype(np.float32), whole.astype(np.float32), atol=2e-3)
    assert tiny_retriever(on_device=True).embed([])[0].shape == (0, D_ENC)


def test_truncation_is_reported_and_keeps_the_last_special_token():
    retriever = tiny_retriever()
    vectors, truncated = retriever.embed(TEXTS)
    assert truncated.tolist() == [False, False, False, False, True, False]
    # 126 tokens of the text fit between [CLS] and [SEP]
    tokens = encoder_tokenizer().encode(LONG)
    fitting = LONG[: tokens.offsets[125][1]]
    np.testing.assert_array_equal(retriever.embed([fitting])[0][0], vectors[4])
    assert not retriever.embed([fitting])[1][0]


def test_no_texts_give_no_rows():
    vectors, truncated = tiny_retriever().embed([])
    assert (vectors.shape, truncated.shape) == ((0, D_ENC), (0,))


def test_out_of_memory_halves_the_batch_and_changes_nothing():
    expected = tiny_retriever().embed_queries(["fox"] * 9)
    retriever = tiny_retriever()
    body, rows_seen = retriever._body, []

    def failing(input_ids: torch.Tensor, attention_mask: torch.Tensor):
        rows_seen.append(len(input_ids))
        if len(input_ids) > 4:
            raise RuntimeError("out of memory")
        return body(input_ids=input_ids, attention_mask=attention_mask)

    retriever._body = failing
    np.testing.assert_array_equal(retriever.embed_queries(["fox"] * 9), expected)
    assert rows_seen[0] == 9
    assert rows_seen[-1] <= 4


@pytest.mark.parametrize(("family", "max_length"), [("bert", 130), ("roberta", 128), ("mpnet", 128)])
def test_a_folder_is_loaded_with_its_own_limit(tmp_path: Path, family: str, max_length: int):
    retriever = load_retriever(encoder_folder(tmp_path, family), device="cpu")
    assert (retriever.dim, retriever.max_length) == (D_ENC, max_length)
    vectors, truncated = retriever.embed([LONG])
    assert np.isfinite(vectors).all()
    assert truncated.all()


def test_special_tokens_named_beside_the_tokenizer_are_added(tmp_path: Path):
    loaded = load_retriever(encoder_folder(tmp_path), device="cpu")
    np.testing.assert_array_equal(loaded.embed_queries(["the fox"]), tiny_retriever().embed_queries(["the fox"]))


def test_a_special_token_in_the_text_is_plain_text(tmp_path: Path):
    loaded = load_retriever(encoder_folder(tmp_path), device="cpu")
    inside = loaded._tokenizer.encode("a [SEP] b").ids
    assert (inside[0], inside[-1], inside.count(3)) == (2, 3, 1)


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path: Path):
    folder = encoder_folder(tmp_path)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load_retriever(folder, device="cpu")
    assert str(caught.value) == (
        f"the tokenizer in {folder} adds no special tokens and names no cls_token and sep_token; expected those "
        "of a sentence encoder: save the tokenizer with its post-processor"
    )


@pytest.mark.parametrize(
    ("file", "content", "found"),
    [
        ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, "pooling_mode_cls_token"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling_mode_lasttoken_tokens"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "Dense"),
        ("config_sentence_transformers.json", {"prompts": {"query": "query: "}}, "prompt 'query: '"),
    ],
)
def test_another_recipe_is_refused(tmp_path: Path, file: str, content: object, found: str):
    folder = encoder_folder(tmp_path)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        load_retriever(folder, device="cpu")
    assert str(caught.value) == (
        f"the retriever in {folder} asks for {found}; expected mean pooling and L2 normalisation alone: choose "
        "a MiniLM-type model"
    )


def test_missing_weights_are_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = encoder_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.0.attention.self.query.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match=r"lacks 1 weights of its encoder"):
        load_retriever(folder, device="cpu")


def test_the_fingerprint_follows_weights_and_special_tokens(tmp_path: Path):
    first = encoder_folder(tmp_path / "first")
    same = encoder_folder(tmp_path / "same")
    other = encoder_folder(tmp_path / "other", seed=1)
    swapped = encoder_folder(tmp_path / "swapped")
    settings = json.loads((swapped / "tokenizer_config.json").read_text())
    (swapped / "tokenizer_config.json").write_text(json.dumps(settings | {"cls_token": "[MASK]"}))
    assert load_retriever(first, device="cpu").fingerprint == retriever_fingerprint(same)
    assert len({retriever_fingerprint(folder) for folder in (first, other, swapped)}) == 3


@pytest.mark.models
def test_the_real_model_ranks_by_meaning_and_is_bit_equal_in_any_batch():
    retriever = load_retriever(resolve_model("all-minilm-l6-v2"), device="cpu")
    assert (retriever.dim, retriever.max_length) == (384, 512)
    texts = ["A dog is a domesticated descendant of wolves.", "Basalt is a volcanic rock.", "word " * 600]
    vectors, truncated = retriever.embed(texts)
    assert truncated.tolist() == [False, False, True]
    query = retriever.embed_queries(["Which animal comes from the wolf?"])
    scores = (query @ vectors.astype(np.float32).T)[0]
    assert scores[0] > 0.5 > 0.2 > scores[1]
    alone = np.concatenate([retriever.embed([text])[0] for text in texts])
    np.testing.assert_array_equal(alone, vectors)
    np.testing.assert_array_equal(retriever.embed(texts * 7)[0], np.tile(vectors, (7, 1)))
