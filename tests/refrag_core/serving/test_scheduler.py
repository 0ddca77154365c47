"""Continuous batching against decoding each prompt alone."""

import threading
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from refrag_core.composition import pad_batch
from refrag_core.decoder import Decoder
from refrag_core.decoder_engine import Sampling
from refrag_core.errors import ConfigError, EngineError
from refrag_core.serving.scheduler import SMALLEST_REUSE, EmbeddedEngine, embedded_engine
from refrag_core.slot_decoder import SlotDecoder
from tests import tiny_models
from tests.served import Brake

POSITIONS = 96
LONG = 256
"""Positions of a slot, for prompts that have something in common."""


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(tiny_models.decoder(), tiny_models.decoder_tokenizer())


def prompts(decoder: Decoder, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    lengths = [3 + 5 * (number % 11) for number in range(count)]
    return [torch.randn(length, decoder.dim, generator=generator) * 0.3 for length in lengths]


def alone(decoder: Decoder, prompt: Tensor, sampling: Sampling) -> list[int]:
    steps = decoder.generate(
        pad_batch([prompt]),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
    return [token for (token,) in steps]


def braked(
    decoder: Decoder,
    *,
    slots: int,
    eos_ids: frozenset[int] = frozenset(),
    max_positions: int = POSITIONS,
    reuse: bool = False,
) -> tuple[EmbeddedEngine, Brake]:
    brake = Brake(SlotDecoder(decoder, slots=slots, max_positions=max_positions))
    return EmbeddedEngine(brake, slots=slots, max_positions=max_positions, eos_ids=eos_ids, reuse=reuse), brake


@pytest.mark.parametrize("slots", [1, 4])
def test_tokens_are_those_of_each_prompt_alone(decoder: Decoder, slots: int) -> None:
    """Greedy and drawn, whoever else is in the batch, however many wait."""
    samplings = [
        Sampling(max_new_tokens=4 + number, temperature=0.9 * (number % 3 == 2), top_p=0.8, seed=number)
        for number in range(9)
    ]
    asked = prompts(decoder, len(samplings))
    engine = embedded_engine(decoder, slots=slots, max_positions=POSITIONS)
    streams = [engine.submit(prompt, sampling) for prompt, sampling in zip(asked, samplings, strict=True)]
    found = [list(stream) for stream in streams]
    engine.close()
    expected = [alone(decoder, prompt, sampling) for prompt, sampling in zip(asked, samplings, strict=True)]
    assert found == expected
    assert len({token for tokens in found for token in tokens}) > 10
    assert engine.active == 0


def test_answers_share_steps_and_slots_are_used_again(decoder: Decoder) -> None:
    engine, brake = braked(decoder, slots=4)
    brake.on()
    streams = [engine.submit(prompt, Sampling(max_new_tokens=6)) for prompt in prompts(decoder, 8)]
    brake.off()
    assert [len(list(stream)) for stream in streams] == [6] * 8
    engine.close()
    assert brake.largest_batch == 4
    assert brake.steps <= 12  # 8 answers of 5 steps, 4 at a time; the first may have been alone for a step
    assert sorted(brake.released) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_an_end_of_sequence_id_ends_an_answer(decoder: Decoder) -> None:
    (prompt,) = prompts(decoder, 1)
    plain = alone(Decoder(decoder.model, decoder.tokenizer, eos_ids=[]), prompt, Sampling(max_new_tokens=20))
    end = plain[9]
    engine, _ = braked(decoder, slots=2, eos_ids=frozenset({end}))
    assert list(engine.submit(prompt, Sampling(max_new_tokens=20))) == plain[: plain.index(end) + 1]
    engine.close()


def test_a_cancelled_answer_frees_its_slot_and_one_that_waits_its_place(decoder: Decoder) -> None:
    engine, brake = braked(decoder, slots=1)
    brake.on()
    first, second, third = (engine.submit(p, Sampling(max_new_tokens=30)) for p in prompts(decoder, 3))
    assert next(iter(first)) >= 0  # it has the slot
    second.cancel()
    first.cancel()
    brake.off()
    assert len(list(third)) == 30
    assert list(second) == []
    assert second.began is None
    assert len(list(first)) <= 1
    engine.close()
    assert brake.released == [0, 0]


def test_a_failure_ends_the_answers_that_it_struck_and_no_others(decoder: Decoder) -> None:
    engine, brake = braked(decoder, slots=2)
    inner, failing = brake.step, threading.Event()

    def step(slots: list[int], token_ids: Tensor) -> Tensor:
        if failing.is_set():
            failing.clear()
            raise RuntimeError("out of memory at /secret/path")
        result: Tensor = inner(slots, token_ids)
        return result

    brake.step = step  # type: ignore[method-assign]
    failing.set()
    first, second, third = (engine.submit(p, Sampling(max_new_tokens=5)) for p in prompts(decoder, 3))

    with pytest.raises(EngineError, match=r"^the decoder failed \(RuntimeError\): ask again$"):
        list(first)
    with suppress(EngineError):  # in the same batch, or just after it
        list(second)
    assert list(third) == alone(decoder, prompts(decoder, 3)[2], Sampling(max_new_tokens=5))
    engine.close()


def test_what_no_row_holds_is_refused(decoder: Decoder) -> None:
    engine = embedded_engine(decoder, slots=1, max_positions=16)
    with pytest.raises(ConfigError, match="10 positions and 7 new tokens may follow; expected at most 16 together"):
        engine.submit(torch.zeros(10, decoder.dim), Sampling(max_new_tokens=7))
    engine.close()


def test_closing_finishes_what_was_submitted_and_takes_nothing_more(decoder: Decoder) -> None:
    engine, brake = braked(decoder, slots=1)
    brake.on()
    streams = [engine.submit(prompt, Sampling(max_new_tokens=3)) for prompt in prompts(decoder, 3)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._queue.closed:
        pass
    with pytest.raises(EngineError, match="takes no more prompts"):
        engine.submit(prompts(decoder, 1)[0], Sampling(max_new_tokens=3))
    brake.off()
    assert [len(list(stream)) for stream in streams] == [3, 3, 3]
    closing.join(30)
    assert not closing.is_alive()


# --- prompts that begin alike


class Asked:
    """One engine, asked one prompt after another."""

    def __init__(self, decoder: Decoder, engine: EmbeddedEngine) -> None:
        self._decoder = decoder
        self._engine = engine

    def __call__(self, prompt: Tensor, *, temperature: float = 0.0) -> int:
        """Positions that the prompt took over; its tokens must be those that it gets alone."""
        sampling = Sampling(max_new_tokens=6, temperature=temperature, seed=3)
        stream = self._engine.submit(prompt, sampling)
        assert list(stream) == alone(self._decoder, prompt, sampling)
        return stream.reused


def random_prompt(decoder: Decoder, length: int, seed: int) -> Tensor:
    return torch.randn(length, decoder.dim, generator=torch.Generator().manual_seed(seed)) * 0.3


def test_a_prompt_reads_only_what_is_new_of_it(decoder: Decoder) -> None:
    engine = embedded_engine(decoder, slots=2, max_positions=LONG)
    ask = Asked(decoder, engine)
    first = random_prompt(decoder, 150, 1)
    assert ask(first) == 0
    assert ask(first) == 149  # the first token comes from the last position
    longer = torch.cat([first[:120], random_prompt(decoder, 80, 2)])
    assert ask(longer, temperature=0.9) == 120
    assert ask(longer[:100]) == 99
    assert ask(torch.cat([longer[: SMALLEST_REUSE - 1], first])) == 0
    engine.close()


def test_each_conversation_finds_its_own_slot_and_a_new_one_the_oldest(decoder: Decoder) -> None:
    engine = embedded_engine(decoder, slots=2, max_positions=LONG)
    ask = Asked(decoder, engine)
    template = random_prompt(decoder, SMALLEST_REUSE - 4, 9)
    talks = [torch.cat([template, random_prompt(decoder, 60, seed)]) for seed in (1, 2, 3)]
    ends = [random_prompt(decoder, 20, seed) for seed in range(4, 12)]
    shared = len(talks[0])
    assert [ask(torch.cat([talks[0], ends[0]])), ask(torch.cat([talks[1], ends[1]]))] == [0, 0]
    assert [ask(torch.cat([talks[n], ends[2 + n]])) for n in (1, 0, 1)] == [shared, shared, len(talks[1]) + 19]
    assert ask(torch.cat([talks[2], ends[5]])) == 0  # where talk 0 was
    assert [ask(torch.cat([talks[n], ends[6]])) for n in (1, 0)] == [shared, 0]
    engine.close()


def test_prompts_with_and_without_a_beginning_share_steps(decoder: Decoder) -> None:
    engine, brake = braked(decoder, slots=4, max_positions=LONG, reuse=True)
    begun = random_prompt(decoder, 100, 1)
    Asked(decoder, engine)(begun)
    brake.on()
    asked = [torch.cat([begun, random_prompt(decoder, 5, 2)]), *prompts(decoder, 3), begun[:90]]
    streams = [engine.submit(prompt, Sampling(max_new_tokens=12)) for prompt in asked]
    brake.off()
    found = [list(stream) for stream in streams]
    engine.close()
    assert found == [alone(decoder, prompt, Sampling(max_new_tokens=12)) for prompt in asked]
    assert [stream.reused for stream in streams] in ([100, 0, 0, 0, 0], [100, 0, 0, 0, 89])
    assert brake.largest_batch == 4
    assert brake.released == []


def test_a_cancelled_answer_leaves_its_prompt(decoder: Decoder) -> None:
    engine, brake = braked(decoder, slots=1, max_positions=LONG, reuse=True)
    prompt = random_prompt(decoder, 100, 1)
    brake.on()
    stream = engine.submit(prompt, Sampling(max_new_tokens=50))
    assert next(iter(stream)) >= 0
    stream.cancel()
    brake.off()
    assert Asked(decoder, engine)(prompt) == 99
    engine.close()


def test_after_a_failure_nothing_is_taken_over(decoder: Decoder) -> None:
    engine, brake = braked(decoder, slots=1, max_positions=LONG, reuse=True)
    ask, prompt, inner = Asked(decoder, engine), random_prompt(decoder, 100, 1), brake.step

    def step(slots: list[int], token_ids: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    assert ask(prompt) == 0
    brake.step = step  # type: ignore[method-assign]
    with pytest.raises(EngineError):
        list(engine.submit(prompt, Sampling(max_new_tokens=5)))
    brake.step = inner  # type: ignore[method-assign]
    assert [ask(prompt), ask(prompt)] == [0, 99]
    assert brake.released == [0]
    engine.close()


def test_prompts_that_cannot_be_compared_are_read_whole(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Tensor) -> int:
        raise RuntimeError("out of memory")

    engine = embedded_engine(decoder, slots=1, max_positions=LONG)
    ask, prompt = Asked(decoder, engine), random_prompt(decoder, 100, 1)
    monkeypatch.setattr("refrag_core.serving.scheduler._common", fail)
    assert [ask(prompt), ask(prompt)] == [0, 0]
    monkeypatch.undo()
    assert ask(prompt) == 99
    engine.close()


def test_decoders_that_would_read_it_again_reuse_nothing() -> None:
    sliding = Decoder(tiny_models.sliding_decoder(), tiny_models.decoder_tokenizer(), eos_ids=())
    assert not SlotDecoder(sliding, slots=1, max_positions=LONG).keeps_prefixes
    engine = embedded_engine(sliding, slots=1, max_positions=LONG)
    ask, prompt = Asked(sliding, engine), random_prompt(sliding, 100, 1)
    assert [ask(prompt), ask(prompt)] == [0, 0]
    engine.close()
