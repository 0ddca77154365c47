"""`python -m refrag_core.training CONFIG.toml [--set key=value …]`: run, or resume, one training run.

`--evaluate CHECKPOINT` evaluates a trained checkpoint on the config's token shards instead, with
`--reference CHECKPOINT` beside the full context of that checkpoint's decoder.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from refrag_core.checkpoint import Checkpoint
from refrag_core.devices import resolve_device
from refrag_core.errors import RefragError, UsageError
from refrag_core.training.config import TrainingConfig, load_config
from refrag_core.training.evaluate import EvaluationOptions, evaluate
from refrag_core.training.loop import Trainer, autocast_of, summary
from refrag_core.training.model import DecoderTraining, TrainingModel
from refrag_core.training.token_shards import TokenShards
from refrag_core.training.trained_checkpoint import load_training_model


def evaluate_checkpoint(config: TrainingConfig, checkpoint: Path, reference: Path | None) -> dict[str, Any]:
    """Losses on held-out documents and on the reported corpora."""
    device = torch.device(resolve_device(config.device))
    model = _load(checkpoint, config, device)
    options = EvaluationOptions(
        context_tokens=config.context_tokens,
        output_tokens=config.output_tokens,
        chunk_sizes=config.chunk_sizes,
        selections=("random", "last"),
        windows=config.evaluation_windows,
        seed=config.seed,
    )
    tokenizer = Checkpoint.load(checkpoint).config.decoder.tokenizer_fingerprint
    shards = TokenShards.open(Path(config.data), tokenizer_fingerprint=tokenizer)
    fixed = None if reference is None else _load(reference, config, device)
    autocast = autocast_of(device, config.precision)
    return {
        split: evaluate(model, shards.split(split), options, autocast=autocast, reference=fixed)
        for split in ("held_out", "reported")
        if shards.index["splits"][split]["tokens"]
    }


def _load(folder: Path, config: TrainingConfig, device: torch.device) -> TrainingModel:
    checkpoint = Checkpoint.load(folder)
    adapter = checkpoint.load_adapter()
    rank = adapter.rank if adapter else 1
    training: DecoderTraining = "frozen" if adapter is None else "lora"
    return load_training_model(checkpoint, replace(config, decoder_training=training, adapter_rank=rank)).to(device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 failed, 2 wrong usage, 4 stopped before its end and to be resumed."""
    parser = argparse.ArgumentParser(prog="python -m refrag_core.training", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--evaluate", type=Path, metavar="CHECKPOINT", help="evaluate this checkpoint, train nothing")
    parser.add_argument(
        "--reference", type=Path, metavar="CHECKPOINT", help="whose full context is the fixed reference"
    )
    given = parser.parse_args(arguments)
    try:
        config = load_config(given.config, given.set)
        torch.set_float32_matmul_precision("high")
        if given.evaluate is None:
            return 0 if Trainer(config).run() else 4
        result = evaluate_checkpoint(config, given.evaluate, given.reference)
    except RefragError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    for split, rows in result.items():
        print(f"{split}: {summary(rows)}", file=sys.stderr)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
