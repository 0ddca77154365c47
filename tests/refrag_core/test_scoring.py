import numpy as np
import pytest
import torch

from refrag_core import devices, scoring
from refrag_core.decoder import Decoder
from refrag_core.errors import ConfigError
from refrag_core.parts import collected
from refrag_core.scoring import ChunkScorer, chunk_means
from tests.tiny_models import DECODER_FAMILIES, decoder, decoder_tokenizer

LENGTHS = (1, 5, 31, 32, 70, 16)


def make_decoder(family: str = "llama", *, bos: bool = True) -> Decoder:
    model = decoder(family)
    if not bos:
        model.config.bos_token_id = None
    return Decoder(model, decoder_tokenizer())


def make_passages() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(4, 400, length, dtype=np.int32) for length in LENGTHS]


def token_nll(model: Decoder, ids: np.ndarray, *, bos: bool) -> list[float]:
    """One plain forward of one passage."""
    inputs = torch.tensor([[0, *ids] if bos else ids.tolist()])
    with torch.inference_mode():
        log_probs = model.model(inputs).logits[0].log_softmax(-1)
    return [-float(log_probs[position - 1, inputs[0, position]]) for position in range(1, inputs.shape[1])]


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_scores_are_those_of_a_plain_forward(family: str) -> None:
    model, passages = make_decoder(family), make_passages()
    for ids, scores in zip(passages, ChunkScorer(model).score(passages, 16), strict=True):
        nll = token_nll(model, ids, bos=True)
        expected = [np.mean(nll[start : start + 16]) for start in range(0, len(ids), 16)]
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_without_a_bos_the_first_token_counts_for_nothing() -> None:
    model, passages = make_decoder(bos=False), make_passages()
    scores = ChunkScorer(model).score(passages, 16)
    assert scores[0].tolist() == [0.0]
    nll = token_nll(model, passages[4], bos=False)
    expected = [np.mean(nll[:15]), *(np.mean(nll[start : start + 16]) for start in range(15, 69, 16))]
    np.testing.assert_allclose(scores[4], expected, rtol=1e-4)


def test_a_passage_s_scores_do_not_depend_on_its_company() -> None:
    model, passages = make_decoder(), make_passages()
    together = ChunkScorer(model).score(passages * 3, 8)
    for number, ids in enumerate(passages):
        alone = ChunkScorer(model, batch_tokens=32).score([ids], 8)[0]
        np.testing.assert_allclose(together[number], alone, rtol=1e-5)
        assert np.array_equal(together[number], together[number + 2 * len(passages)])


def test_logits_of_few_positions_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passages = make_decoder(), make_passages()
    whole = ChunkScorer(model).score(passages, 8)
    monkeypatch.setattr(scoring, "LOGIT_BYTES", {"cpu": 4 * 400 * 3})
    for few, expected in zip(ChunkScorer(model).score(passages, 8), whole, strict=True):
        np.testing.assert_allclose(few, expected, rtol=1e-5)


def test_a_head_that_scales_its_logits_is_run_as_a_whole() -> None:
    model, passages = make_decoder(), make_passages()
    plain = ChunkScorer(model).score(passages, 16)
    forward = model.model.forward

    def scaled(*args: object, **kwargs: object) -> object:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    model.model.forward = scaled
    assert not np.allclose(ChunkScorer(model).score(passages, 16)[4], plain[4], rtol=1e-2)
    nll = token_nll(model, passages[4], bos=True)
    np.testing.assert_allclose(ChunkScorer(model).score(passages, 16)[4][0], np.mean(nll[:16]), rtol=1e-4)


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passages = make_decoder(), make_passages() * 8
    scorer, expected = ChunkScorer(model), ChunkScorer(model).score(passages, 16)
    states, seen = scorer._states, []

    def limited(given: torch.Tensor) -> object:
        seen.append(len(given))
        if len(given) > 3:
            raise RuntimeError("out of memory")
        return states(given)

    monkeypatch.setattr(scorer, "_states", limited)
    for scores, whole in zip(scorer.score(passages, 16), expected, strict=True):
        np.testing.assert_allclose(scores, whole, rtol=1e-5)
    assert max(seen) > 3


def test_chunk_means_by_hand() -> None:
    assert chunk_means(np.array([1, 2, 3, 4, 6], np.float32), 5, 2).tolist() == [1.5, 3.5, 6.0]
    assert chunk_means(np.array([2, 3, 4, 6], np.float32), 5, 2).tolist() == [2.0, 3.5, 6.0]
    assert chunk_means(np.array([], np.float32), 1, 2).tolist() == [0.0]


@pytest.mark.parametrize("length", [0, 512])
def test_a_passage_the_decoder_cannot_place_is_refused(length: int) -> None:
    with pytest.raises(
        ConfigError, match=f"cannot score a passage of {length} tokens; expected 1 to the decoder's 512"
    ):
        ChunkScorer(make_decoder()).score([np.zeros(length, np.int32)], 16)


def test_a_passage_that_fills_the_decoder_is_scored() -> None:
    assert len(ChunkScorer(make_decoder()).score([np.full(511, 5, np.int32)], 16)[0]) == 32


def test_scoring_takes_its_turn_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_has_turns", lambda _: True)
    scorer, passages = ChunkScorer(make_decoder()), make_passages()
    with collected() as seconds:
        scorer.score(passages, 16)
    assert set(seconds) == {"wait", "model"}
