"""The engine over a vLLM server, against a server that speaks as one does."""

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from refrag_core.composition import pad_batch
from refrag_core.decoder import Decoder
from refrag_core.decoder_engine import Sampling, TokenStream
from refrag_core.errors import ConfigError, EngineError, FingerprintMismatchError, UsageError
from refrag_core.vllm_server import Address, ServedModel, VllmServerEngine, served_models
from tests import tiny_models
from tests.fake_vllm import POSITIONS, Behaviour, fake_server

SAMPLING = Sampling(max_new_tokens=12)
IDS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(tiny_models.decoder(), tiny_models.decoder_tokenizer())


@pytest.fixture
def server(decoder: Decoder) -> Iterator[tuple[str, Behaviour]]:
    with fake_server(decoder) as running:
        yield running


@pytest.fixture
def url(server: tuple[str, Behaviour]) -> str:
    return server[0]


@pytest.fixture
def behaviour(server: tuple[str, Behaviour]) -> Behaviour:
    return server[1]


def connect(url: str, decoder: Decoder, **changes: Any) -> VllmServerEngine:
    given: dict[str, Any] = {
        "probe": (IDS, decoder.embed(torch.tensor(IDS))),
        "eos_ids": decoder.eos_ids,
        "slots": 3,
        **changes,
    }
    return VllmServerEngine.connect(Address.parse(url, given.pop("api_key", None)), **given)


def prompts(decoder: Decoder, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(4 + 7 * number, decoder.dim, generator=generator) * 0.3 for number in range(count)]


def alone(decoder: Decoder, prompt: Tensor, new_tokens: int = SAMPLING.max_new_tokens) -> list[int]:
    return [token for (token,) in decoder.generate(pad_batch([prompt]), max_new_tokens=new_tokens)]


# --- answers -----------------------------------------------------------------------------------------


def test_tokens_are_the_servers(url: str, decoder: Decoder) -> None:
    """More answers at a time than slots; a slice of a larger tensor sends no more than itself."""
    engine = connect(url, decoder)
    asked = [*prompts(decoder, 6), torch.randn(20, decoder.dim)[3:9], torch.randn(decoder.dim, 9).T]
    streams = [engine.submit(prompt, SAMPLING) for prompt in asked]
    assert [list(stream) for stream in streams] == [alone(decoder, prompt) for prompt in asked]
    assert all(stream.began is not None for stream in streams)
    engine.close()
    assert engine.active == 0


def test_a_request_says_all_that_the_server_would_choose_itself(
    url: str, behaviour: Behaviour, decoder: Decoder
) -> None:
    engine = connect(url, decoder)
    list(engine.submit(prompts(decoder, 1)[0], Sampling(max_new_tokens=3, temperature=0.7, top_p=0.9, seed=5)))
    body = behaviour.bodies[-1]
    assert len(body.pop("prompt_embeds")) > 100
    assert body == {
        "model": "tiny",
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "seed": 5,
        "stop_token_ids": [1],
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    engine.close()


def test_a_cancelled_answer_closes_its_connection(url: str, behaviour: Behaviour, decoder: Decoder) -> None:
    """One that is being decoded, and one that waits for its slot; the next answer has the slot."""
    engine = connect(url, decoder, slots=1)
    behaviour.hold = True
    stream = engine.submit(prompts(decoder, 1)[0], Sampling(max_new_tokens=60))
    waiting = engine.submit(prompts(decoder, 1)[0], SAMPLING)
    tokens = iter(stream)
    first = [next(tokens), next(tokens)]
    assert engine.active == 1
    waiting.cancel()
    stream.cancel()
    assert first == alone(decoder, prompts(decoder, 1)[0])[:2]
    assert list(tokens) == []
    assert list(waiting) == []
    behaviour.held.set()
    assert behaviour.left.wait(30)
    assert list(engine.submit(prompts(decoder, 1)[0], SAMPLING)) == alone(decoder, prompts(decoder, 1)[0])
    engine.close()


def test_an_answer_that_nobody_wants_any_more_is_not_asked_for(
    url: str, behaviour: Behaviour, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled between its turn and its connection."""
    engine = connect(url, decoder)
    begin = TokenStream.begin

    def begin_and_cancel(stream: TokenStream) -> None:
        begin(stream)
        stream.cancel()

    monkeypatch.setattr(TokenStream, "begin", begin_and_cancel)
    behaviour.bodies.clear()
    assert list(engine.submit(prompts(decoder, 1)[0], SAMPLING)) == []
    assert behaviour.bodies == []
    engine.close()


def test_closing_waits_for_what_was_submitted(url: str, behaviour: Behaviour, decoder: Decoder) -> None:
    engine = connect(url, decoder)
    behaviour.hold = True
    stream = engine.submit(prompts(decoder, 1)[0], SAMPLING)
    closing = threading.Thread(target=engine.close)
    closing.start()
    deadline = time.monotonic() + 30
    while not engine._closed:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with pytest.raises(EngineError, match=r"^the decoder takes no more prompts, since it is being closed: ask again$"):
        engine.submit(prompts(decoder, 1)[0], SAMPLING)
    behaviour.held.set()
    assert list(stream) == alone(decoder, prompts(decoder, 1)[0])
    closing.join(30)
    assert not closing.is_alive()


def test_prompts_that_do_not_fit_are_refused_before_they_are_sent(url: str, decoder: Decoder) -> None:
    engine = connect(url, decoder)
    assert engine.max_positions == POSITIONS
    with pytest.raises(ConfigError, match=r"shape \[3, 33\], and the engine's decoder takes \[positions, 32\]"):
        engine.submit(torch.zeros(3, 33), SAMPLING)
    with pytest.raises(ConfigError, match="has 120 positions and 12 new tokens may follow; expected at most 128"):
        engine.submit(torch.zeros(120, 32), SAMPLING)
    engine.close()


# --- what goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("break", r"the connection to the vLLM server at http://127.0.0.1:\d+ broke off"),
        ("error", r"the vLLM server at http://127.0.0.1:\d+ failed: EngineCore died"),
    ],
)
def test_an_answer_that_ends_early_fails(
    url: str, behaviour: Behaviour, decoder: Decoder, fault: str, message: str
) -> None:
    """The tokens until then come; the engine goes on."""
    engine = connect(url, decoder)
    behaviour.fault = fault
    stream = engine.submit(prompts(decoder, 1)[0], SAMPLING)
    tokens: list[int] = []
    with pytest.raises(EngineError, match=message):
        tokens.extend(iter(stream))
    behaviour.fault = ""
    assert list(engine.submit(prompts(decoder, 1)[0], SAMPLING)) == alone(decoder, prompts(decoder, 1)[0])
    engine.close()


def test_a_server_that_is_not_there(decoder: Decoder) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(EngineError) as failed:
        connect(f"http://127.0.0.1:{port}", decoder)
    assert str(failed.value) == (
        f"the vLLM server at http://127.0.0.1:{port} does not answer ([Errno 111] Connection refused); expected a "
        "running `vllm serve MODEL --enable-prompt-embeds`: start it, or give its address with --vllm-url"
    )


def test_a_server_that_takes_no_embeddings(url: str, behaviour: Behaviour, decoder: Decoder) -> None:
    behaviour.takes_embeddings = False
    with pytest.raises(EngineError) as failed:
        connect(url, decoder)
    assert str(failed.value) == f"the vLLM server at {url} takes no embeddings: start it with --enable-prompt-embeds"


def test_a_decoder_of_another_width(url: str, behaviour: Behaviour, decoder: Decoder) -> None:
    behaviour.hidden_size = 64
    with pytest.raises(EngineError, match=r"has a decoder of another width \(.* hidden_size 32 does not match .* 64"):
        connect(url, decoder)


def test_a_decoder_with_other_embeddings(url: str, behaviour: Behaviour, decoder: Decoder) -> None:
    behaviour.shift = 0.5
    with pytest.raises(FingerprintMismatchError, match=r"'tiny' of the vLLM server at .* goes on differently"):
        connect(url, decoder)


def test_a_key(url: str, behaviour: Behaviour, decoder: Decoder) -> None:
    behaviour.key = "secret"
    with pytest.raises(EngineError, match=r"wants a key: put it into \$VLLM_API_KEY$"):
        connect(url, decoder)
    with pytest.raises(EngineError, match=r"wants a key"):
        connect(url, decoder, api_key="wrong")
    connect(url, decoder, api_key="secret").close()


def test_something_else_answers(url: str, behaviour: Behaviour, decoder: Decoder) -> None:
    behaviour.fault = "odd"
    with pytest.raises(EngineError, match=r"does not speak as a vLLM server does; expected a `vllm serve`"):
        connect(url, decoder)


def test_which_model(url: str, behaviour: Behaviour, decoder: Decoder) -> None:
    assert served_models(Address.parse(f"{url}/v1/")) == [ServedModel("tiny", POSITIONS)]
    with pytest.raises(FingerprintMismatchError, match=r"has the models 'tiny'; expected 'refrag-1': the checkpoint"):
        connect(url, decoder, needed="refrag-1")
    with pytest.raises(FingerprintMismatchError, match=r"expected 'big': give one of these with --vllm-model$"):
        connect(url, decoder, model="big", needed="tiny")
    behaviour.models = [*behaviour.models, {"id": "refrag-1"}]
    with pytest.raises(ConfigError, match=r"has the models 'tiny', 'refrag-1': name one with --vllm-model$"):
        connect(url, decoder)
    engine = connect(url, decoder, needed="refrag-1")
    assert engine.max_positions is None
    engine.close()
    connect(url, decoder, model="tiny", needed="refrag-1").close()


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:port", "http://u:p@host"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError, match=r"expected one like http://127\.0\.0\.1:8000$"):
        Address.parse(url)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host", "http://host:80"),
        ("https://host/v1", "https://host:443"),
        ("http://[::1]:8000/proxy/v1/", "http://[::1]:8000/proxy"),
    ],
)
def test_addresses(url: str, shown: str) -> None:
    assert str(Address.parse(url)) == shown
