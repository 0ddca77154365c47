"""vLLM itself, offline and as a server, against the embedded engine: equal greedy tokens in float32.

`pytest -m vllm` in an environment with vLLM runs all; elsewhere, with `REFRAG_VLLM_PYTHON` naming the Python of one, it
runs what asks a server.
"""

import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from refrag_core.decoder_engine import DecoderEngine, Sampling, generate_by
from refrag_core.engine_choice import EngineOptions, open_engine
from refrag_core.errors import ConfigError, EngineError, FingerprintMismatchError
from refrag_core.merged_decoder import merged_folder, merged_name
from refrag_core.runtime import AskOptions, Runtime
from refrag_core.vllm_server import Address, VllmServerEngine
from tests.small_index import SmallIndex
from tests.vllm_engines import QUESTIONS, adapted_index, embedded, mixed_prompts, vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]

SLOTS = 4
POSITIONS = 512
GREEDY = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallIndex]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        yield adapted_index(tmp_path_factory.mktemp("adapted"))


@pytest.fixture(scope="module")
def whole(index: SmallIndex) -> Runtime:
    return Runtime.open(index.path, device="cpu")


@pytest.fixture(scope="module")
def composing(index: SmallIndex) -> Runtime:
    return Runtime.open(index.path, device="cpu", composes_only=True)


@pytest.fixture(scope="module")
def url(whole: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = merged_folder(whole.checkpoint, whole.decoder_folder, torch.float32)
    name = merged_name(whole.checkpoint, whole.decoder_folder)
    log = tmp_path_factory.mktemp("server") / "log"
    with vllm_server(folder, name, "--enable-prompt-embeds", "--max-model-len", str(POSITIONS), log=log) as address:
        yield address


@pytest.fixture(scope="module", params=["vllm", "vllm-server"])
def engine(request: pytest.FixtureRequest, composing: Runtime) -> Iterator[DecoderEngine]:
    if request.param == "vllm":
        if find_spec("vllm") is None:
            pytest.skip("vLLM is not in this environment")
        options = EngineOptions(name="vllm")
    else:
        options = EngineOptions(name="vllm-server", url=request.getfixturevalue("url"))
    opened = open_engine(composing, options, slots=SLOTS, max_positions=POSITIONS)
    yield opened
    opened.close()
    with pytest.raises(EngineError, match="closed"):
        opened.submit(torch.zeros(3, composing.decoder.dim), GREEDY)


def test_greedy_tokens_are_those_of_the_embedded_engine(
    engine: DecoderEngine, whole: Runtime, composing: Runtime
) -> None:
    """Compressed, mixed and expanded, more prompts at a time than there are slots."""
    ours = mixed_prompts(whole, new_tokens=GREEDY.max_new_tokens)
    prompts = mixed_prompts(composing, new_tokens=GREEDY.max_new_tokens)
    assert all(torch.equal(a, b) for a, b in zip(ours, prompts, strict=True))
    streams = [engine.submit(prompt, GREEDY) for prompt in prompts]
    found = [list(stream) for stream in streams]
    assert found == [embedded(whole, prompt, GREEDY) for prompt in prompts]
    assert len({tuple(tokens) for tokens in found}) > len(QUESTIONS)


def test_prompts_of_equal_length_are_told_apart(engine: DecoderEngine, whole: Runtime) -> None:
    """vLLM keeps the keys and values of prompts: by their vectors, not by their length."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(64, whole.decoder.dim, generator=generator) * 0.3
    second = torch.cat([first[:48], torch.randn(16, whole.decoder.dim, generator=generator) * 0.3])
    for prompt in (first, second, first):
        assert list(engine.submit(prompt, GREEDY)) == embedded(whole, prompt, GREEDY)


def test_an_answer_through_the_runtime_is_the_same(engine: DecoderEngine, whole: Runtime, composing: Runtime) -> None:
    options = AskOptions(top_k=3, policy="random", expansion_fraction=0.25, max_new_tokens=24)
    pieces: list[str] = []
    answer = composing.ask(QUESTIONS[0], options, on_text=pieces.append, generate=generate_by(engine))
    expected = whole.ask(QUESTIONS[0], options)
    assert answer.answer == expected.answer == "".join(pieces).strip()
    assert answer.stats.new_tokens == expected.stats.new_tokens
    assert answer.stats.decoder_positions == expected.stats.decoder_positions
    assert 0 < answer.stats.prefill_ms < answer.stats.ttft_ms
    assert answer.stats.ttit_ms > 0


def test_a_stop_text_ends_the_answer_and_frees_its_slot(
    engine: DecoderEngine, whole: Runtime, composing: Runtime
) -> None:
    options = AskOptions(top_k=3, policy="all", max_new_tokens=24)
    text = whole.ask(QUESTIONS[1], options).answer
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    asked = AskOptions(top_k=3, policy="all", max_new_tokens=200, stop=(stop,))
    answer = composing.ask(QUESTIONS[1], asked, generate=generate_by(engine))
    assert answer.finish_reason == "stop"
    assert answer.answer == whole.ask(QUESTIONS[1], asked).answer
    _idle(engine)


def test_an_end_of_sequence_id_ends_the_answer(engine: DecoderEngine, whole: Runtime) -> None:
    """The decoder's ids alone, and the id itself comes."""
    long = Sampling(max_new_tokens=200)
    prompts = mixed_prompts(whole, new_tokens=200)
    streams = [engine.submit(prompt, long) for prompt in prompts]
    found = [list(stream) for stream in streams]
    assert found == [embedded(whole, prompt, long) for prompt in prompts]
    assert all(tokens[-1] in whole.decoder.eos_ids for tokens in found if len(tokens) < 200)
    assert any(len(tokens) < 200 for tokens in found)


def test_a_cancelled_answer_ends_and_the_others_go_on(engine: DecoderEngine, whole: Runtime) -> None:
    prompts = mixed_prompts(whole, new_tokens=24)[: SLOTS + 2]
    long = engine.submit(prompts[0], Sampling(max_new_tokens=200))
    streams = [engine.submit(prompt, GREEDY) for prompt in prompts[1:]]
    first = next(iter(long))
    long.cancel()
    assert [first] == embedded(whole, prompts[0], GREEDY)[:1]
    assert len(list(long)) < 199
    assert [list(stream) for stream in streams] == [embedded(whole, prompt, GREEDY) for prompt in prompts[1:]]
    _idle(engine)


def test_drawn_tokens_follow_the_seed(engine: DecoderEngine, whole: Runtime) -> None:
    prompt = mixed_prompts(whole, new_tokens=24)[0]

    def drawn(seed: int) -> list[int]:
        return list(engine.submit(prompt, Sampling(max_new_tokens=24, temperature=1.0, top_p=0.9, seed=seed)))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_prompts_that_do_not_fit_are_refused(engine: DecoderEngine, whole: Runtime) -> None:
    assert engine.max_positions == POSITIONS
    with pytest.raises(ConfigError, match="expected the same decoder"):
        engine.submit(torch.zeros(3, whole.decoder.dim + 1), GREEDY)
    with pytest.raises(ConfigError, match="expected at most 512 together"):
        engine.submit(torch.zeros(500, whole.decoder.dim), GREEDY)


def test_a_decoder_without_the_adapter_goes_by_another_name(url: str, whole: Runtime, tmp_path: Path) -> None:
    """The server's model is this one, but not under the name that some other checkpoint's would have."""
    with pytest.raises(FingerprintMismatchError, match=r"has the models 'refrag-.*'; expected 'other'"):
        open_engine(whole, EngineOptions(name="vllm-server", url=url, model="other"), slots=1, max_positions=POSITIONS)


def test_a_decoder_of_another_width_or_with_other_embeddings(url: str, whole: Runtime) -> None:
    ids = [5, 6, 7, 8]
    right = whole.decoder.embed(torch.tensor(ids))

    def connect(inputs_embeds: torch.Tensor) -> None:
        VllmServerEngine.connect(Address.parse(url), probe=(ids, inputs_embeds), eos_ids=frozenset(), slots=1).close()

    connect(right)
    with pytest.raises(EngineError, match=r"has a decoder of another width \(.*hidden_size 65 does not match"):
        connect(torch.zeros(4, 65))
    with pytest.raises(FingerprintMismatchError, match="goes on differently from the same words"):
        connect(right.flip(0))


def test_a_server_that_was_started_without_embeddings(composing: Runtime, tmp_path: Path) -> None:
    with vllm_server(composing.decoder_folder, "plain", "--max-model-len", "256", log=tmp_path / "log") as address:
        options = EngineOptions(name="vllm-server", url=address, model="plain")
        with pytest.raises(EngineError, match=r"takes no embeddings: start it with --enable-prompt-embeds$"):
            open_engine(composing, options, slots=1, max_positions=256)


def _idle(engine: DecoderEngine) -> None:
    """Wait until no answer is being decoded."""
    deadline = time.monotonic() + 30
    while engine.active:
        assert time.monotonic() < deadline
        time.sleep(0.01)
