from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, BloomConfig, BloomForCausalLM

from refrag_core.composition import PromptBatch, pad_batch
from refrag_core.decoder import (
    FINISHED,
    Decoder,
    TextStream,
    generated_ids,
    input_embedding_size,
    lowest,
    nucleus,
    refuse_unsupported,
)
from refrag_core.errors import ConfigError, ModelNotFoundError, UnsupportedDecoderError
from tests.tiny_models import D_DEC, cache_for, decoder, decoder_folder, decoder_tokenizer


@pytest.fixture(autouse=True)
def _cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRAG_CACHE", str(cache_for(request, tmp_path_factory)))


@pytest.fixture
def llama() -> Decoder:
    return Decoder(decoder("llama"), decoder_tokenizer(), eos_ids=())


def prompt(llama: Decoder, *lengths: int) -> PromptBatch:
    random = np.random.default_rng(0)
    return pad_batch([llama.embed(torch.from_numpy(random.integers(4, 400, length))) for length in lengths])


def test_load_reads_what_a_prompt_needs(tmp_path: Path) -> None:
    loaded = Decoder.load(decoder_folder(tmp_path, max_positions=77))
    assert (loaded.dim, loaded.max_positions, loaded.bos_id, loaded.eos_ids) == (D_DEC, 77, 0, frozenset({1}))
    assert loaded.dtype == torch.float32
    table = decoder().get_input_embeddings().weight
    assert loaded.embedding_rms() == pytest.approx(table.square().mean().sqrt().item())


def test_the_lowest_of_the_limits_that_there_are() -> None:
    assert lowest(512, 77) == lowest(77, None, 512) == lowest(None, 77) == 77
    assert lowest(None, None) is None


@pytest.mark.parametrize(("family", "dim"), [("llama", 32), ("gpt2", 32), ("opt", 16), ("gpt_neox", 32)])
def test_input_embedding_size_reads_the_table_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dim: int
) -> None:
    folder = decoder_folder(tmp_path, family)
    loaded = Decoder.load(folder)
    monkeypatch.setattr(Decoder, "load", lambda *_, **__: pytest.fail("loaded the whole model"))
    assert input_embedding_size(folder) == (dim, pytest.approx(loaded.embedding_rms()))


def test_input_embedding_size_under_another_name_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = decoder_folder(tmp_path)
    monkeypatch.setattr("refrag_core.decoder._names", lambda *_: ["other"])
    assert input_embedding_size(folder) == (32, pytest.approx(Decoder.load(folder).embedding_rms()))


def test_prefill_s_logits_are_those_of_the_last_slot(llama: Decoder) -> None:
    batch = prompt(llama, 9)
    prefilled = llama.prefill(batch)
    with torch.inference_mode():
        expected = llama.model(inputs_embeds=batch.inputs_embeds).logits[:, -1]
    torch.testing.assert_close(prefilled.logits, expected)
    assert prefilled.logits.shape == (1, 400)


def test_the_first_token_comes_from_prefill_without_another_step(
    llama: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = prompt(llama, 9)
    first = int(llama.prefill(batch).logits.argmax())
    monkeypatch.setattr(llama, "step", lambda *_: pytest.fail("stepped before the first token"))
    assert next(llama.generate(batch, max_new_tokens=5)) == [first]
    assert list(llama.generate(batch, max_new_tokens=1)) == [[first]]


def test_an_ended_answer_stays_ended_and_the_others_go_on(llama: Decoder) -> None:
    batch = prompt(llama, 9, 5)
    free = np.array(list(llama.generate(batch, max_new_tokens=12))).T
    end = int(free[0][2])
    assert end not in free[0][:2]
    llama.eos_ids = frozenset({end})
    steps = list(llama.generate(batch, max_new_tokens=12))
    rows = np.array(steps).T
    assert rows[0].tolist() == [*free[0][:3], *[FINISHED] * (len(steps) - 3)]
    stop = free[1].tolist().index(end) + 1 if end in free[1] else 12
    assert rows[1][:stop].tolist() == free[1][:stop].tolist()
    answers = generated_ids(iter(steps), llama.eos_ids)
    assert answers[0].tolist() == free[0][:2].tolist()


def test_generation_stops_when_all_have_ended(llama: Decoder) -> None:
    batch = prompt(llama, 9)
    free = [tokens[0] for tokens in llama.generate(batch, max_new_tokens=12)]
    llama.eos_ids = frozenset({free[2]})
    assert [tokens[0] for tokens in llama.generate(batch, max_new_tokens=12)] == free[: free.index(free[2]) + 1]


def test_sampling_is_its_seed_s(llama: Decoder) -> None:
    def draw(seed: int) -> list[list[int]]:
        return list(llama.generate(prompt(llama, 9), max_new_tokens=12, temperature=1.5, top_p=0.9, seed=seed))

    assert draw(0) == draw(0) != draw(1)


def test_nucleus_by_hand() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    assert nucleus(probabilities, 0.5).tolist() == [[0.0, 0.5, 0.0, 0.0]]
    torch.testing.assert_close(nucleus(probabilities, 0.7), torch.tensor([[0.0, 0.5, 0.0, 0.25]]))
    assert torch.equal(nucleus(probabilities, 1.0), probabilities)
    torch.testing.assert_close(nucleus(probabilities, 1e-9), torch.tensor([[0.0, 0.5, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 1, "temperature": -1.0}, "temperature must be 0"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p must be more than 0"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(llama: Decoder, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        llama.generate(prompt(llama, 3), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["plain", "naïve café", "東京 🦊🦊 end", "𝔘𝔫𝔦 <b> ñ"])
def test_streamed_text_is_whole_and_never_half_a_character(text: str) -> None:
    tokenizer = decoder_tokenizer()
    stream = TextStream(tokenizer)
    pieces = [stream.push(index) for index in tokenizer.encode(text).ids]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_an_answer_that_stops_inside_a_character_ends_with_the_replacement() -> None:
    tokenizer = decoder_tokenizer()
    stream = TextStream(tokenizer)
    assert "".join(stream.push(index) for index in tokenizer.encode("ok🦊").ids[:-1]) == "ok"
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_special_tokens_stream_as_nothing() -> None:
    tokenizer = decoder_tokenizer()
    stream = TextStream(tokenizer)
    ids = [*tokenizer.encode("a b").ids, tokenizer.token_to_id("<|im_end|>")]
    assert "".join(map(stream.push, ids)) + stream.finish() == "a b"


@pytest.mark.parametrize("name", ["gemma3n", "gemma3n_text"])
def test_decoders_that_need_ids_in_every_layer_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedDecoderError, match=f"decoder type '{name}' cannot be fed chunk vectors"):
        refuse_unsupported(SimpleNamespace(model_type=name))


def test_per_layer_tables_are_refused_under_any_name() -> None:
    config = AutoConfig.for_model("llama", hidden_size_per_layer_input=256)
    with pytest.raises(UnsupportedDecoderError, match="tables of their own"):
        refuse_unsupported(config)


def test_encoder_decoders_are_refused() -> None:
    with pytest.raises(UnsupportedDecoderError, match="encoder-decoder"):
        refuse_unsupported(AutoConfig.for_model("t5"))


def test_decoders_without_positions_are_refused() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=10, hidden_size=8, n_layer=1, n_head=2))
    with pytest.raises(UnsupportedDecoderError, match="its forward has no position_ids"):
        Decoder(model, decoder_tokenizer())


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = decoder_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelNotFoundError, match="lacks 1 weights of its decoder"):
        Decoder.load(folder)


@pytest.mark.models
def test_the_default_decoder_answers() -> None:
    from refrag_core.checkpoint import initialise_checkpoint
    from refrag_core.composition import compose

    checkpoint = initialise_checkpoint()
    real = checkpoint.load_decoder()
    question = real.tokenizer.encode("What is the capital of France?", add_special_tokens=False).ids
    composed = compose(
        checkpoint.config.template,
        [],
        np.zeros(0, np.bool_),
        question,
        embed=real.embed,
        project=checkpoint.projection,
    )
    answer = generated_ids(real.generate(pad_batch([composed.inputs_embeds]), max_new_tokens=24), real.eos_ids)
    assert "Paris" in real.tokenizer.decode(answer[0].tolist())


@pytest.mark.parametrize(("device_map", "message"), [("auto", "finds none here"), ("cuda:0", "expected one of auto")])
def test_layers_are_spread_over_gpus_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_map: str, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # as on a machine without GPUs
    with pytest.raises(ConfigError, match=message):
        Decoder.load(decoder_folder(tmp_path), device_map=device_map)
