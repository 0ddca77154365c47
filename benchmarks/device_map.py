"""A decoder spread over all GPUs beside the same one on a single GPU: `python -m benchmarks.device_map`.

    python -m benchmarks.device_map [--shape llama-3.2-3b] [--positions 512] [--device-map balanced] [--dtype float32]
        [--output FILE]

Random weights of that shape are saved, and loaded by `Decoder.load` as they are and with a device map. Reported: on how
many devices the layers lie, greedy tokens, how far the first token's logits are apart, and the median time of a prefill
each way. Both run eagerly: a spread decoder is never captured. Tokens must be the same in float32; in bfloat16 the
logits of random weights lie so near one another that kernels of another order of summing may part them.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoder_shapes import SHAPES, shaped_decoder
from benchmarks.measurement import add_output, finish, say
from refrag_core.composition import pad_batch
from refrag_core.decoder import DEVICE_MAPS, Decoder

NEW_TOKENS = 16
REPEATS = 10


def measured(decoder: Decoder, prompt: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Devices, greedy tokens and milliseconds of a prefill of the prompt `[s, d_dec]`; the first token's logits."""
    batch = pad_batch([prompt.to(decoder.device, decoder.dtype)])
    tokens = [step[0] for step in decoder.generate(batch, max_new_tokens=NEW_TOKENS)]
    logits = decoder.prefill(batch).logits.float().cpu()
    times = []
    for _ in range(REPEATS):
        synchronise()
        started = time.perf_counter()
        decoder.prefill(batch)
        synchronise()
        times.append(1000 * (time.perf_counter() - started))
    devices = sorted({str(parameter.device) for parameter in decoder.model.parameters()})
    return {"devices": devices, "tokens": tokens, "prefill_ms": round(median(times), 3)}, logits


def synchronise() -> None:
    """Wait for every GPU."""
    for number in range(torch.cuda.device_count()):
        torch.cuda.synchronize(number)


def main(arguments: list[str] | None = None) -> int:
    """Save, spread, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-3b")
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--device-map", choices=DEVICE_MAPS, default="balanced")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    add_output(parser)
    options = parser.parse_args(arguments)
    dtype = getattr(torch, options.dtype)
    made = shaped_decoder(options.shape, device="cuda:0", dtype=dtype, max_positions=options.positions + NEW_TOKENS)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn((options.positions, made.dim), generator=generator) * 0.02
    found, logits = {}, {}
    with tempfile.TemporaryDirectory(prefix="refrag-spread-") as folder:
        made.model.save_pretrained(folder)
        made.tokenizer.save(str(Path(folder, "tokenizer.json")))
        del made
        for name, device_map in (("one", None), ("spread", options.device_map)):
            torch.cuda.empty_cache()
            decoder = Decoder.load(Path(folder), device="cuda:0", dtype=dtype, device_map=device_map)
            decoder.eos_ids = frozenset()
            found[name], logits[name] = measured(decoder, prompt)
            say(f"{name}: {len(found[name]['devices'])} GPUs, {found[name]['prefill_ms']} ms")
    equal = found["one"]["tokens"] == found["spread"]["tokens"]
    apart = float((logits["one"] - logits["spread"]).abs().max() / logits["one"].abs().max())
    given = {name: value for name, value in vars(options).items() if name != "output"}
    finish("device_map", given, {**found, "logits_apart": apart, "equal": equal}, options.output)
    return 0 if equal or options.dtype != "float32" else 1


if __name__ == "__main__":
    sys.exit(main())
