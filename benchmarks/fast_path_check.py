"""Whether the captured path says what the eager one says: `python -m benchmarks.fast_path_check` on a CUDA device.

Float32: greedy tokens of the slot decoder, padded, batched, with a kept prefix, equal `Decoder.generate`'s, for several
families. Bfloat16: its logits differ from a float32 run no more than twice as far as the eager bfloat16 run's do, and
its tokens equal the eager ones wherever the eager logits' two highest are further apart than that difference. Chunk
embeddings of every form of attention and passage embeddings lie near those of float32 on the CPU. Prints JSON; exits
with 1 where something does not hold. Runs on a CPU too, where nothing is captured.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.decoder_shapes import byte_tokenizer
from benchmarks.encoder_shapes import shaped_encoder_module, shaped_retriever
from benchmarks.measurement import add_output, say
from refrag_core.composition import pad_batch
from refrag_core.decoder import Decoder
from refrag_core.encoder import ChunkEncoder
from refrag_core.fast_path import FastPath
from refrag_core.packed_body import ATTENTION_FORMS
from refrag_core.policy import initialise_policy, policy_logits
from refrag_core.projection import initialise_projection
from refrag_core.slot_decoder import SlotDecoder

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gpt2", "opt")
NEW_TOKENS = 24
LENGTHS = (70, 3, 130, 64, 200)
EMBEDDING_ERROR = 0.01
"""Relative error that half precision may bring to a chunk or passage embedding."""


def tiny(family: str, device: str, dtype: torch.dtype) -> Decoder:
    """Four random layers of width 256 whose tokens depend on their whole input."""
    sizes: dict[str, Any] = {
        "vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "pad_token_id": 1,
        "max_position_embeddings": 1_024, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    if family == "opt":
        sizes |= {"ffn_dim": 512}
    elif family != "gpt2":
        sizes |= {"intermediate_size": 512, "num_key_value_heads": 2, "head_dim": 64}
    if family == "mistral":
        sizes |= {"sliding_window": None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return Decoder(model.to(device, dtype), byte_tokenizer(), eos_ids=())


def prompts(decoder: Decoder, lengths: Sequence[int]) -> list[Tensor]:
    """Random prompts, the same for every dtype."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, 512, (length,), generator=generator) for length in lengths]
    return [decoder.embed(each.to(decoder.device)) for each in ids]


def generated(decoder: Decoder, prompt: Tensor) -> list[int]:
    """The plain path's greedy tokens."""
    return [step[0] for step in decoder.generate(pad_batch([prompt]), max_new_tokens=NEW_TOKENS)]


def slotted(
    slots: SlotDecoder, rows: Sequence[int], given: Sequence[Tensor], start: list[int] | None
) -> list[list[int]]:
    """The slot decoder's greedy tokens."""
    chosen = slots.prefill(rows, given, start=start).argmax(dim=-1)
    steps = [chosen.tolist()]
    for _ in range(NEW_TOKENS - 1):
        chosen = slots.step(rows, chosen).argmax(dim=-1)
        steps.append(chosen.tolist())
    return [list(column) for column in zip(*steps, strict=True)]


def tokens_in_float32(family: str, device: str) -> dict[str, Any]:
    """Batches of several sizes, a second round over the same graphs, and a kept prefix."""
    decoder = tiny(family, device, torch.float32)
    given = prompts(decoder, LENGTHS)
    expected = [generated(decoder, prompt) for prompt in given]
    slots = SlotDecoder(decoder, slots=len(given), max_positions=512, padded=True)
    equal = []
    for rows in ((0,), (3, 1), (0, 1, 2, 3, 4), (4, 2, 0), (0, 1, 2, 3, 4)):
        made = slotted(slots, rows, [given[row] for row in rows], None)
        equal.append(made == [expected[row] for row in rows])
    whole = torch.cat([given[2][:100], given[1]])
    slots.prefill([2], [given[2]])
    kept = slotted(slots, (2,), [given[1]], [100])
    return {"equal": all(equal), "kept_prefix_equal": kept == [generated(decoder, whole)]}


def noise_in_bfloat16(family: str, device: str) -> dict[str, Any]:
    """Logits of every step, forced along the float32 run's tokens: eager and captured against float32."""
    exact, eager = tiny(family, device, torch.float32), tiny(family, device, torch.bfloat16)
    worst = {"eager": 0.0, "captured": 0.0}
    disagreements = 0
    slots = SlotDecoder(tiny(family, device, torch.bfloat16), slots=1, max_positions=512, padded=True)
    for length in LENGTHS:
        (prompt,), (rounded,) = prompts(exact, (length,)), prompts(eager, (length,))
        forced = generated(exact, prompt)
        wanted, plain = _forced(exact, prompt, forced), _forced(eager, rounded, forced)
        made = [slots.prefill([0], [rounded])]
        made += [slots.step([0], torch.tensor([token], device=exact.device)) for token in forced[:-1]]
        captured = torch.cat(made)
        worst["eager"] = max(worst["eager"], float((plain - wanted).abs().max()))
        worst["captured"] = max(worst["captured"], float((captured - wanted).abs().max()))
        best = plain.topk(2, dim=-1).values
        clear = best[:, 0] - best[:, 1] > 2 * (captured - plain).abs().max()
        disagreements += int(((captured.argmax(-1) != plain.argmax(-1)) & clear).sum())
    within = worst["captured"] <= 2 * worst["eager"]
    return {"largest_difference": worst, "within_noise": within, "clear_disagreements": disagreements}


def _forced(decoder: Decoder, prompt: Tensor, tokens: Sequence[int]) -> Tensor:
    prefilled = decoder.prefill(pad_batch([prompt]))
    rows = [prefilled.logits]
    for number, token in enumerate(tokens[:-1]):
        place = torch.tensor([len(prompt) + number], device=decoder.device)
        rows.append(decoder.step(torch.tensor([token], device=decoder.device), prefilled.cache, None, place))
    return torch.cat(rows)


def embeddings(device: str) -> dict[str, float]:
    """Largest relative error of chunk embeddings, by body and form, and of passage embeddings."""
    errors = {}
    random = np.random.default_rng(0)
    for shape in ("minilm", "roberta-base"):
        ids = random.integers(0, 1_000, (300, 16), dtype=np.int32)
        lengths = np.where(random.random(300) < 0.2, random.integers(1, 17, 300), 16).astype(np.int16)
        expected = ChunkEncoder(shaped_encoder_module(shape, 1_000), fingerprint="").encode(ids, lengths)
        for form in ATTENTION_FORMS:
            if form == "tiled" and not device.startswith("cuda"):
                continue
            module = shaped_encoder_module(shape, 1_000)
            encoder = ChunkEncoder(module, fingerprint="", device=device, packed=True, form=form, batch_rows=128)
            errors[f"{shape} {form}"] = relative(encoder.encode(ids, lengths), expected)
    texts = [" ".join(["the fox"] * count) for count in (1, 3, 20, 90, 200)]
    errors["passages"] = relative(
        shaped_retriever("minilm", device).embed(texts)[0], shaped_retriever("minilm", "cpu").embed(texts)[0]
    )
    return errors


def relative(made: Any, expected: Any) -> float:
    """The largest relative error of a row."""
    a, b = (np.asarray(each, np.float32) for each in (made, expected))
    return round(float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max()), 6)


def projection_and_policy(device: str) -> dict[str, float]:
    """Relative errors of the captured projection and policy logits in float32."""
    decoder = tiny("llama", device, torch.float32)
    projection = initialise_projection(384, decoder.dim, output_rms=0.3, seed=0).to(device).requires_grad_(False)
    policy = initialise_policy(384, seed=0).to(device).requires_grad_(False)
    path = FastPath(decoder, projection, policy, max_positions=512, padded=True)
    rows = np.random.default_rng(0).standard_normal((77, 384)).astype(np.float16)
    sent = torch.from_numpy(rows).to(device)
    logits = policy_logits(policy, rows)
    made = [relative(path.project(sent).cpu(), projection(sent).detach().cpu()) for _ in range(2)]
    steps = list(path.generate(prompts(decoder, (70,))[0], max_new_tokens=NEW_TOKENS))
    same = [step[0] for step in steps] == generated(decoder, prompts(decoder, (70,))[0])
    scored = relative(path.policy_logits(sent)[None], logits[None])
    return {"projection": max(made), "policy": scored, "tokens_equal": float(same)}


def main() -> int:
    """Run all checks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--families", default=",".join(FAMILIES))
    add_output(parser)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {"device": arguments.device, "torch": torch.__version__}
    if arguments.device.startswith("cuda"):
        report["gpu"] = torch.cuda.get_device_name()
    failed = []
    checks: list[tuple[str, Callable[[], dict[str, Any]], Callable[[dict[str, Any]], bool]]] = [
        ("projection and policy", lambda: projection_and_policy(arguments.device), _good_parts),
        ("embeddings", lambda: embeddings(arguments.device), lambda found: max(found.values()) < EMBEDDING_ERROR),
    ]
    for family in arguments.families.split(","):
        checks.append((f"{family} float32", lambda f=family: tokens_in_float32(f, arguments.device), _all_true))  # type: ignore[misc]
        checks.append((f"{family} bfloat16", lambda f=family: noise_in_bfloat16(f, arguments.device), _within))  # type: ignore[misc]
    for name, run, holds in checks:
        started = time.perf_counter()
        try:
            report[name] = run()
            good = holds(report[name])
        except Exception as error:  # the others are worth knowing all the same
            report[name], good = {"error": f"{type(error).__name__}: {error}"}, False
        if not good:
            failed.append(name)
        say(
            f"{'holds ' if good else 'FAILS '} {name} ({time.perf_counter() - started:.1f} s): "
            f"{json.dumps(report[name])}"
        )
    report["failed"] = failed
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.output:
        Path(arguments.output).write_text(text + "\n")
    return 1 if failed else 0


def _all_true(found: dict[str, Any]) -> bool:
    return all(found.values())


def _within(found: dict[str, Any]) -> bool:
    return bool(found["within_noise"]) and found["clear_disagreements"] == 0


def _good_parts(found: dict[str, Any]) -> bool:
    return bool(found["projection"] < 1e-3 and found["policy"] < 1e-3 and found["tokens_equal"])


if __name__ == "__main__":
    sys.exit(main())
