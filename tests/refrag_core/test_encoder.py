import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from refrag_core.chunk_attention import attend_within_chunks, fits_a_tile
from refrag_core.encoder import (
    ChunkEncoder,
    EncoderModule,
    encode_fingerprint,
    extend_encoder,
    load_body,
    load_encoder_module,
    random_gates,
    strip_pooler,
    token_texts,
    trained_layers,
    transplant_vocabulary,
)
from refrag_core.errors import ConfigError, ModelNotFoundError
from refrag_core.packed_body import ATTENTION_FORMS, AttentionForm, PackedBody, is_packable
from tests.tiny_models import (
    D_ENC,
    ENCODER_FAMILIES,
    cache_for,
    decoder_folder,
    decoder_tokenizer,
    encoder_body,
    encoder_folder,
    encoder_tokenizer,
)

VOCABULARY = 400


@pytest.fixture(autouse=True)
def _cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRAG_CACHE", str(cache_for(request, tmp_path_factory)))


def make_encoder(
    family: str = "bert", *, batch_rows: int | None = None, form: AttentionForm | None = None, gated: bool = False
) -> ChunkEncoder:
    table = torch.randn((VOCABULARY, D_ENC), generator=torch.Generator().manual_seed(1))
    gates = random_gates(32, D_ENC, seed=0) if gated else None
    module = EncoderModule(strip_pooler(encoder_body(family)), table, gates=gates)
    return ChunkEncoder(module, fingerprint="f", batch_rows=batch_rows, packed=form is not None, form=form)


def make_chunks(num_chunks: int, chunk_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Chunks of which a quarter are short, zero behind their tokens."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, VOCABULARY, (num_chunks, chunk_size), dtype=np.int32)
    lengths = np.where(random.random(num_chunks) < 0.25, random.integers(1, chunk_size + 1, num_chunks), chunk_size)
    ids[np.arange(chunk_size)[None] >= lengths[:, None]] = 0
    return ids, lengths.astype(np.int16)


def test_token_texts_keep_spaces_and_drop_what_is_no_text() -> None:
    tokenizer = decoder_tokenizer()
    texts = token_texts(tokenizer)
    assert len(texts) == tokenizer.get_vocab_size()
    assert texts[tokenizer.token_to_id("Ġthe")] == " the"
    assert texts[tokenizer.token_to_id("<|im_end|>")] == ""
    assert texts[tokenizer.token_to_id("Ã")] == ""  # the first byte of a two-byte character
    assert texts[tokenizer.token_to_id("Ċ")] == "\n"


def test_transplant_is_the_mean_of_sub_tokens() -> None:
    body = encoder_tokenizer()
    table = torch.arange(body.get_vocab_size() * 2, dtype=torch.float32).reshape(-1, 2)
    row = {token: table[index] for token, index in body.get_vocab().items()}
    transplanted = transplant_vocabulary([" the", "Fox", "aging", "", "\n", "é"], body, table)
    assert torch.equal(transplanted[0], row["the"])
    assert torch.equal(transplanted[1], row["fox"])
    assert torch.equal(transplanted[2], (row["a"] + row["##g"] + row["##ing"]) / 3)
    assert torch.equal(transplanted[3], row["[UNK]"])
    assert torch.equal(transplanted[4], row["[UNK]"])
    assert torch.equal(transplanted[5], row["e"])  # the body's own normaliser strips accents


def test_encode_equals_the_body_run_by_hand() -> None:
    encoder = make_encoder()
    ids, lengths = make_chunks(20, 8)
    embeddings = encoder.encode(ids, lengths)
    module = encoder._module
    with torch.inference_mode():
        for row, length, embedding in zip(ids, lengths, embeddings, strict=True):
            hidden = module.body(inputs_embeds=module.embedding(torch.from_numpy(row[:length]).long())[None])
            expected = hidden.last_hidden_state[0].mean(0).numpy()
            np.testing.assert_allclose(embedding.astype(np.float32), expected, atol=2e-3)


@pytest.mark.parametrize("family", ENCODER_FAMILIES)
@pytest.mark.parametrize("chunk_size", [1, 3, 16])
def test_an_embedding_has_the_same_bits_in_any_company(family: str, chunk_size: int) -> None:
    ids, lengths = make_chunks(100, chunk_size)
    encoder = make_encoder(family)
    reference = encoder.encode(ids, lengths)
    for batch_rows in (1, 2, 5, 33):
        assert reference.tobytes() == make_encoder(family, batch_rows=batch_rows).encode(ids, lengths).tobytes()
    order = np.random.default_rng(1).permutation(100)
    assert np.array_equal(encoder.encode(ids[order], lengths[order]), reference[order])
    alone = np.concatenate([encoder.encode(ids[i : i + 1], lengths[i : i + 1]) for i in range(20)])
    assert np.array_equal(alone, reference[:20])


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("form", [form for form in ATTENTION_FORMS if form != "tiled"])
def test_the_packed_body_gives_the_plain_one_s_embeddings(
    family: str, form: AttentionForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refrag_core.encoder.PIECE_ROWS", 150)
    ids, lengths = make_chunks(400, 16)
    expected = make_encoder(family, gated=True).encode(ids, lengths).astype(np.float32)
    packed = make_encoder(family, batch_rows=48, form=form, gated=True)
    np.testing.assert_allclose(packed.encode(ids, lengths), expected, rtol=2e-3, atol=2e-3)


def test_short_chunks_share_a_batch() -> None:
    ids, lengths = make_chunks(200, 16)
    encoder, sizes = make_encoder(form="plain"), []
    call = encoder._calls
    encoder._calls = lambda tensors: sizes.append([len(tensor) for tensor in tensors]) or call(tensors)  # type: ignore[assignment]
    encoder.encode(ids, lengths)
    assert sizes == [[64, 64], [256]]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with PyTorch for CUDA")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs with TRITON_INTERPRET=1 on a CPU")
@pytest.mark.parametrize("shape", [(37, 16, 3, 32), (5, 8, 2, 64), (11, 12, 2, 16), (3, 64, 2, 32), (4, 1, 2, 16)])
def test_tiles_keep_chunks_apart(shape: tuple[int, int, int, int]) -> None:
    chunks, length, heads, head_dim = shape
    merged = torch.randn((chunks, length, 3, heads, head_dim), generator=torch.Generator().manual_seed(0))
    queries, keys, values = merged.permute(2, 0, 3, 1, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend_within_chunks(merged), expected, rtol=1e-5, atol=1e-5)


def test_which_bodies_are_packed() -> None:
    assert [family for family in ENCODER_FAMILIES if is_packable(encoder_body(family))] == ["bert", "roberta"]
    assert [fits_a_tile(16, 32), fits_a_tile(64, 64), fits_a_tile(65, 64), fits_a_tile(16, 12)] == [
        *(True, True),
        *(False, False),
    ]
    with pytest.raises(ConfigError, match="unknown form of attention 'other'; expected one of tiled, masked"):
        PackedBody(encoder_body(), form="other")  # type: ignore[arg-type]


def test_shape_and_dtype_without_chunks() -> None:
    embeddings = make_encoder().encode(np.zeros((0, 16), np.int32), np.zeros(0, np.int16))
    assert embeddings.shape == (0, D_ENC)
    assert embeddings.dtype == np.float16


def test_out_of_memory_halves_the_batch_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, lengths = make_chunks(64, 16)
    encoder, seen = make_encoder(batch_rows=64), []
    expected = make_encoder(batch_rows=64).encode(ids, lengths)
    forward = encoder._module.forward

    def limited(token_ids: torch.Tensor) -> torch.Tensor:
        seen.append(len(token_ids))
        if len(token_ids) > 20:
            raise RuntimeError("out of memory")
        return forward(token_ids)

    monkeypatch.setattr(encoder._module, "_widened", None, raising=False)
    monkeypatch.setattr(encoder, "_widened", lambda ids: ids)
    monkeypatch.setattr(encoder._module, "forward", limited)
    np.testing.assert_allclose(encoder.encode(ids, lengths).astype(np.float32), expected.astype(np.float32), atol=2e-3)
    assert max(seen) > 20 >= seen[-1]


def test_numbers_that_float16_cannot_hold_are_not_hidden() -> None:
    encoder = make_encoder()
    encoder._module.body.encoder.layer[-1].output.LayerNorm.weight.mul_(1e6)
    ids, lengths = make_chunks(4, 8)
    assert np.isinf(encoder.encode(ids, lengths)).any(axis=1).all()


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        (np.zeros((2, 4), np.int32), np.array([1, 5]), "num_tokens must be 1 to 4"),
        (np.zeros((2, 4), np.int32), np.array([0, 4]), "num_tokens must be 1 to 4"),
        (np.full((1, 4), VOCABULARY, np.int32), np.array([4]), "made with another tokenizer"),
        (np.zeros((2, 4), np.int32), np.array([4]), "do not fit"),
    ],
)
def test_impossible_chunks_are_refused(ids: np.ndarray, lengths: np.ndarray, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_encoder().encode(ids, lengths)


def test_load_transplants_and_fingerprints(tmp_path: Path) -> None:
    body, decoder = encoder_folder(tmp_path / "encoder"), decoder_folder(tmp_path / "decoder")
    encoder = ChunkEncoder.load(body, decoder)
    texts = token_texts(decoder_tokenizer())
    expected = transplant_vocabulary(texts, encoder_tokenizer(), encoder_body().get_input_embeddings().weight)
    assert torch.equal(encoder._module.embedding.weight, expected)
    assert encoder.dim == D_ENC
    other = ChunkEncoder.load(encoder_folder(tmp_path / "other", seed=1), decoder)
    assert encoder.fingerprint != other.fingerprint
    assert encoder.fingerprint == ChunkEncoder.load(body, decoder).fingerprint


def test_every_part_changes_the_fingerprint() -> None:
    prints = {
        encode_fingerprint("a", "b"),
        encode_fingerprint("x", "b"),
        encode_fingerprint("a", "x"),
        encode_fingerprint("a", "b", embedding="x"),
        encode_fingerprint("a", "b", pooling="x"),
    }
    assert len(prints) == 5


def test_a_decoder_is_no_encoder_body(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a 'llama' model; expected an encoder body"):
        load_body(decoder_folder(tmp_path))


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = encoder_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match="lacks 1 weights of its encoder"):
        load_body(folder)


@pytest.mark.models
def test_transplanted_tokens_mean_what_the_body_s_own_mean() -> None:
    """A chunk's embedding is closer to that of its paraphrase than to that of an unrelated chunk."""
    from refrag_core.checkpoint import initialise_checkpoint
    from refrag_core.models import load_tokenizer

    checkpoint = initialise_checkpoint()
    encoder, tokenizer = checkpoint.load_encoder(), load_tokenizer(checkpoint.decoder_folder())
    texts = [
        "The capital of France is the city of Paris, on the river Seine.",
        "Paris, a city on the Seine, is where the French government sits.",
        "Memory is allocated by the kernel in pages of four kilobytes each.",
    ]
    ids = np.zeros((3, 16), np.int32)
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids[:16] for text in texts]
    for row, tokens in zip(ids, encoded, strict=True):
        row[: len(tokens)] = tokens
    vectors = encoder.encode(ids, np.array([len(tokens) for tokens in encoded])).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


@pytest.mark.models
def test_the_default_encoder_has_the_same_bits_in_any_company() -> None:
    from refrag_core.checkpoint import initialise_checkpoint

    encoder = initialise_checkpoint().load_encoder()
    random = np.random.default_rng(0)
    ids = random.integers(5, 49_000, (70, 16), dtype=np.int32)
    lengths = random.integers(1, 17, 70)
    reference = encoder.encode(ids, lengths)
    for rows in (1, 3, 7):
        parts = [encoder.encode(ids[i : i + rows], lengths[i : i + rows]) for i in range(0, 70, rows)]
        assert np.array_equal(np.concatenate(parts), reference)


def test_gates_tell_the_order_of_tokens_apart() -> None:
    """A body without layers: the plain mean forgets the order, the gated one does not."""

    class Echo(torch.nn.Module):
        def forward(self, inputs_embeds: torch.Tensor) -> object:
            return type("Output", (), {"last_hidden_state": inputs_embeds})

    table = torch.tensor([[1.0, 2.0], [5.0, 3.0]])
    gates = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]])
    one, other = torch.tensor([[0, 1]]), torch.tensor([[1, 0]])
    plain, gated = EncoderModule(Echo(), table), EncoderModule(Echo(), table.clone(), gates=gates)
    assert torch.equal(plain(one), plain(other))
    assert gated(one).tolist() == [[3.0, -0.5]]
    assert gated(other).tolist() == [[3.0, 0.5]]


def test_gates_are_drawn_by_the_seed_around_a_plain_mean() -> None:
    gates = random_gates(16, 8, seed=1)
    assert sorted(gates.unique().tolist()) == pytest.approx([0.7, 1.3])
    assert torch.equal(gates, random_gates(16, 8, seed=1))
    assert not torch.equal(gates, random_gates(16, 8, seed=2))


def test_a_folded_map_computes_the_same(tmp_path: Path) -> None:
    body, decoder = encoder_folder(tmp_path / "body"), decoder_folder(tmp_path / "decoder")
    module = extend_encoder(
        load_encoder_module(body, decoder), decoder, embedding="subtoken-mean-decoder-map-1", gates=None
    )
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        untouched = module(ids)
        assert torch.equal(untouched, load_encoder_module(body, decoder)(ids))
        assert module.token_map is not None
        module.token_map.weight.normal_(generator=torch.Generator().manual_seed(0))
        expected = module(ids)
        assert not torch.allclose(expected, untouched, atol=1e-3)
        stored = trained_layers(module)
        assert torch.allclose(load_encoder_module(body, decoder, trained=stored).fold()(ids), expected, atol=1e-5)
    with pytest.raises(ConfigError, match="token_map"):
        load_encoder_module(body, decoder, trained=stored | {"token_map.weight": torch.zeros((2, 2))})
