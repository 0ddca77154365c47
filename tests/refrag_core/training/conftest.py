"""Tiny models and token shards that every test of training shares."""

import random
from pathlib import Path
from typing import Any

import pytest

from refrag_core.training.config import TrainingConfig, parse_config
from refrag_core.training.token_shards import PrepareOptions, TextDocument, prepare_token_shards
from tests.tiny_models import TRAINING_TEXT, decoder_folder, encoder_folder

WORDS = sorted(set(" ".join(TRAINING_TEXT).split()))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFRAG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of a tiny encoder and a tiny decoder."""
    root = tmp_path_factory.mktemp("models")
    return encoder_folder(root / "encoder"), decoder_folder(root / "decoder")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, models: tuple[Path, Path]) -> Path:
    """Token shards of 60 documents of random words."""
    draw = random.Random(0)
    documents = [
        TextDocument("toy" if index % 5 else "kept-out", str(index), " ".join(draw.choice(WORDS) for _ in range(120)))
        for index in range(60)
    ]
    folder = tmp_path_factory.mktemp("data")
    prepare_token_shards(documents, models[1], folder, PrepareOptions(held_out_fraction=0.2, reported=("kept-out",)))
    return folder


def settings(data: Path, models: tuple[Path, Path], output: Path, **changes: Any) -> TrainingConfig:
    """A run of seconds on a CPU."""
    values: dict[str, Any] = {
        "data": str(data),
        "output": str(output),
        "encoder": str(models[0]),
        "decoder": str(models[1]),
        "chunk_sizes": [2, 4],
        "context_tokens": 16,
        "output_tokens": 8,
        "steps": 4,
        "device": "cpu",
        "precision": "fp32",
        "compile": False,
        "adapter_rank": 4,
        "log_every": 1,
        "evaluation_windows": 8,
        "tasks": [
            {"kind": "reconstruct", "batch_rows": 4},
            {"kind": "next-paragraph", "batch_rows": 4, "distillation": 0.5},
            {"kind": "text", "batch_rows": 4},
        ],
    }
    return parse_config(values | changes)
