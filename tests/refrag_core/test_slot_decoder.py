from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from refrag_core.captured import CapturedCalls, bucket, filled_rows
from refrag_core.composition import pad_batch
from refrag_core.decoder import Decoder
from refrag_core.errors import ConfigError
from refrag_core.llama_forward import is_llama_like
from refrag_core.slot_decoder import STATIC_TYPES, SlotDecoder, _StaticRows
from tests.tiny_models import DECODER_FAMILIES, decoder, decoder_tokenizer, sliding_decoder

NEW_TOKENS = 9
LENGTHS = (11, 3, 70)


def tiny(family: str) -> Decoder:
    """A decoder of the family, or one whose layers see no further than 8 positions."""
    model = sliding_decoder() if family == "sliding" else decoder(family)
    return Decoder(model, decoder_tokenizer(), eos_ids=())


def prompts(tiny_decoder: Decoder, *lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [tiny_decoder.embed(torch.randint(4, 400, (length,), generator=generator)) for length in lengths]


def plainly(tiny_decoder: Decoder, prompt: Tensor, count: int = NEW_TOKENS) -> list[int]:
    return [step[0] for step in tiny_decoder.generate(pad_batch([prompt]), max_new_tokens=count)]


def greedily(
    slotted: SlotDecoder, slots: Sequence[int], inputs: Sequence[Tensor], start: Sequence[int] | None = None
) -> list[list[int]]:
    chosen = slotted.prefill(slots, inputs, start=start).argmax(dim=-1)
    steps = [chosen.tolist()]
    for _ in range(NEW_TOKENS - 1):
        chosen = slotted.step(slots, chosen).argmax(dim=-1)
        steps.append(chosen.tolist())
    return [list(column) for column in zip(*steps, strict=True)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", [*DECODER_FAMILIES, "sliding"])
def test_greedy_tokens_are_the_decoder_s(family: str, padded: bool) -> None:
    plain = tiny(family)
    inputs = prompts(plain, *LENGTHS)
    expected = [plainly(plain, prompt) for prompt in inputs]
    slotted = SlotDecoder(tiny(family), slots=4, max_positions=128, padded=padded)
    assert greedily(slotted, (2, 0, 3), inputs) == expected
    assert [slotted.length(slot) for slot in range(4)] == [3 + 8, 0, 11 + 8, 70 + 8]


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_logits_are_the_decoder_s(family: str) -> None:
    plain = tiny(family)
    (prompt,) = prompts(plain, 21)
    expected = plain.prefill(pad_batch([prompt])).logits
    made = SlotDecoder(plain, slots=1, max_positions=64, padded=True).prefill([0], [prompt])
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, expected, rtol=2e-5, atol=2e-5)


def test_which_decoders_share_one_cache() -> None:
    def form(family: str, max_positions: int = 128) -> str:
        return type(SlotDecoder(tiny(family), slots=1, max_positions=max_positions)._rows).__name__

    assert {family: form(family) for family in DECODER_FAMILIES} == dict.fromkeys(DECODER_FAMILIES, "_StaticRows")
    assert {family for family in DECODER_FAMILIES if not is_llama_like(decoder(family))} == set(STATIC_TYPES)
    assert form("sliding") == "_SeparateRows"
    assert form("sliding", max_positions=8) == "_StaticRows"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "sliding"])
def test_a_prompt_takes_over_the_beginning_that_its_slot_holds(family: str, padded: bool) -> None:
    plain = tiny(family)
    first, second, other = prompts(plain, 20, 7, 9)
    slotted = SlotDecoder(plain, slots=2, max_positions=128, padded=padded)
    greedily(slotted, (1, 0), (first, other))
    changed = torch.cat([first[:15], second])
    made = greedily(slotted, (0, 1), (other, second), start=(0, 15))
    assert made == [plainly(plain, other), plainly(plain, changed)]
    assert slotted.length(1) == 15 + 7 + NEW_TOKENS - 1


def test_rows_are_never_padded_beyond_their_end() -> None:
    """What reads rows in place counts positions from the end, which must be where the mask has it."""
    plain = tiny("llama")
    (late, long), rests = prompts(plain, 150, 20, seed=2), prompts(plain, 3, 100, seed=3)
    expected = [plainly(plain, torch.cat(pair)) for pair in zip((late, long), rests, strict=True)]
    slotted = SlotDecoder(tiny("llama"), slots=2, max_positions=190, padded=True)
    assert isinstance(slotted._rows, _StaticRows)
    shapes, logits = [], slotted._rows._logits

    def seen(inputs: Tensor, rows: Sequence[int], start: Sequence[int], *more: Any) -> Tensor:
        shapes.append(max(start) + inputs.shape[1])
        return logits(inputs, rows, start, *more)

    slotted._rows._logits = seen  # type: ignore[method-assign]
    greedily(slotted, (0, 1), (late, long))
    for slot, kept in enumerate((150, 20)):
        slotted._lengths[slot] = kept
    assert greedily(slotted, (0, 1), rests, [150, 20]) == expected
    assert max(shapes) <= slotted._rows.cache.capacity


@pytest.mark.parametrize("family", ["qwen3", "opt", "sliding"])
def test_sequences_come_and_go_while_others_take_steps(family: str) -> None:
    plain = tiny(family)
    long, short, late = prompts(plain, 30, 5, 12)
    slotted = SlotDecoder(plain, slots=2, max_positions=64, padded=True)
    tokens: dict[str, list[int]] = {"long": [], "late": []}
    chosen = slotted.prefill((0, 1), (long, short)).argmax(dim=-1)
    tokens["long"].append(int(chosen[0]))
    slotted.release(1)
    assert slotted.length(1) == 0
    assert slotted.keeps_prefixes == (family != "sliding")
    late_token = slotted.prefill([1], [late]).argmax(dim=-1)
    tokens["late"].append(int(late_token))
    chosen = torch.cat([late_token, chosen[:1]])
    for _ in range(NEW_TOKENS - 1):
        chosen = slotted.step((1, 0), chosen).argmax(dim=-1)
        tokens["late"].append(int(chosen[0]))
        tokens["long"].append(int(chosen[1]))
    assert tokens == {"long": plainly(plain, long), "late": plainly(plain, late)}


def test_the_last_position_can_be_filled() -> None:
    plain = tiny("llama")
    (prompt,) = prompts(plain, 30)
    slotted = SlotDecoder(plain, slots=1, max_positions=32, padded=True)
    chosen = slotted.prefill([0], [prompt]).argmax(dim=-1)
    made = [int(chosen)]
    for _ in range(2):
        chosen = slotted.step([0], chosen).argmax(dim=-1)
        made.append(int(chosen))
    assert made == plainly(plain, prompt, 3)
    with pytest.raises(ConfigError, match="slot 0 holds 32 of 32 positions"):
        slotted.step([0], chosen)


def test_merging_holds_no_weight_twice_and_leaves_the_model_as_it_was() -> None:
    plain, merged = tiny("qwen2"), tiny("qwen2")
    (prompt,) = prompts(plain, 13)
    for _ in range(2):  # a second decoder over the same model merges nothing again
        slotted = SlotDecoder(merged, slots=1, max_positions=64)
        assert greedily(slotted, [0], [prompt]) == [plainly(plain, prompt)]
    attention = merged.model.model.layers[0].self_attn
    storages = {getattr(attention, f"{name}_proj").weight.untyped_storage().data_ptr() for name in "qkv"}
    assert len(storages) == 1
    assert plainly(merged, prompt) == plainly(plain, prompt)


def test_bytes_are_positions_times_bytes_a_position() -> None:
    plain = tiny("llama")
    slotted = SlotDecoder(plain, slots=3, max_positions=100)
    slotted.prefill([0], prompts(plain, 5))
    layers, heads, width, float32 = 2, 2, 8, 4
    assert slotted.position_bytes == layers * 2 * heads * width * float32
    assert slotted.allocated_bytes == slotted.position_bytes * 3 * 128


def test_warming_leaves_the_slots_empty() -> None:
    plain = tiny("llama")
    slotted = SlotDecoder(plain, slots=2, max_positions=64, padded=True)
    slotted.warm([10, 1000], batch=8)
    assert [slotted.length(slot) for slot in (0, 1)] == [0, 0]
    inputs = prompts(plain, 10)
    assert greedily(slotted, [1], inputs) == [plainly(plain, inputs[0])]
    with pytest.raises(ConfigError, match="warming needs empty slots"):
        slotted.warm([10], batch=2)


@pytest.mark.parametrize(
    ("slots", "lengths", "start", "message"),
    [
        ([], [], None, "slots are []; expected different ones, 0 to 1"),
        ([0, 0], [3, 3], None, "slots are [0, 0]; expected different ones, 0 to 1"),
        ([2], [3], None, "slots are [2]; expected different ones, 0 to 1"),
        ([0], [3, 3], None, "1 slots and 2 inputs; expected one each"),
        ([0], [3], [1], "a prompt starts at 1, and slot 0 holds 0 positions"),
        ([0], [33], None, "a prompt of 33 positions from 0 on; expected 1 to 32"),
    ],
)
def test_prompts_out_of_range_are_refused(
    slots: list[int], lengths: list[int], start: list[int] | None, message: str
) -> None:
    plain = tiny("llama")
    slotted = SlotDecoder(plain, slots=2, max_positions=32)
    with pytest.raises(ConfigError) as raised:
        slotted.prefill(slots, prompts(plain, *lengths), start=start)
    assert str(raised.value) == message
    with pytest.raises(ConfigError, match="slot 1 holds 0 of 32 positions"):
        slotted.step([1], torch.tensor([5]))


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1, found 0 and 5"):
        SlotDecoder(tiny("llama"), slots=0, max_positions=5)
    with pytest.raises(ConfigError, match="max_positions is 513, and the decoder has 512"):
        SlotDecoder(tiny("llama"), slots=1, max_positions=513)


@pytest.mark.parametrize(
    ("size", "padded"),
    [(1, 64), (64, 64), (65, 128), (512, 512), (513, 576), (1024, 1024), (1025, 1088), (16384, 16384)],
)
def test_buckets(size: int, padded: int) -> None:
    assert bucket(size, smallest=64) == padded


@pytest.mark.parametrize(("rows", "filled"), [(1, 8), (8, 8), (9, 16), (65, 100), (100, 100)])
def test_filled_rows(rows: int, filled: int) -> None:
    assert filled_rows(rows, smallest=8, largest=100) == filled
    assert filled_rows(1, smallest=8, largest=2) == 2


def test_calls_on_a_cpu_are_the_function_s_own() -> None:
    calls = CapturedCalls(lambda a, b, factor: (a + b) * factor, torch.device("cpu"))
    assert calls((torch.ones(2), torch.ones(2)), 3).tolist() == [6.0, 6.0]
    assert calls((torch.ones(2), torch.ones(3)), 3, shapes=((4,), (4,))).tolist() == [6.0, 6.0, 3.0, 0.0]
    assert len(calls) == 0


class _Reads(TorchDispatchMode):
    """Sizes of the host's tensors that operations read, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.sizes += [len(arg) for arg in args if isinstance(arg, Tensor) and arg.device.type == "cpu"]
        return function(*args, **(kwargs or {}))


def test_a_tensor_of_the_host_travels_once() -> None:
    calls = CapturedCalls(lambda a, b: a + b, torch.device("meta"))
    given = torch.ones(2), torch.ones(4)
    with _Reads() as reads:
        made = calls(given, shapes=((4,), (4,)))
    assert (made.device.type, made.shape, made.dtype) == ("meta", (4,), torch.float32)
    assert reads.sizes == [2, 4]


@pytest.mark.parametrize("family", DECODER_FAMILIES)
def test_what_a_longer_prompt_left_behind_does_not_matter(family: str, replayed: None) -> None:
    plain = tiny(family)
    inputs = prompts(plain, *LENGTHS)
    slotted = SlotDecoder(tiny(family), slots=4, max_positions=128, padded=True)
    assert greedily(slotted, (2, 0, 3), inputs) == [plainly(plain, prompt) for prompt in inputs]
    for prompt in inputs:
        assert greedily(slotted, (1,), [prompt]) == [plainly(plain, prompt)]
        slotted.release(1)
