"""Decoders by shape, with random weights made on the device: speed does not depend on what weights say."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from refrag_core.decoder import Decoder
from refrag_core.errors import UsageError
from refrag_core.models import resolve_model

LLAMA = {"intermediate_size": 11_008, "vocab_size": 32_000, "num_attention_heads": 32, "num_key_value_heads": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 512,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "smollm2-135m": {
        "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1_536, "vocab_size": 49_152,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        "hidden_size": 3_072, "num_hidden_layers": 28, "intermediate_size": 8_192, "vocab_size": 128_256,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    },
    "llama-2-7b": {"hidden_size": 4_096, "num_hidden_layers": 32, **LLAMA},
    "llama-3.1-8b": {
        "hidden_size": 4_096, "num_hidden_layers": 32, "intermediate_size": 14_336, "vocab_size": 128_256,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "llama-2-13b": {
        "hidden_size": 5_120, "num_hidden_layers": 40, "intermediate_size": 13_824, "vocab_size": 32_000,
        "num_attention_heads": 40, "num_key_value_heads": 40,
    },
}  # fmt: skip


def byte_tokenizer(vocabulary: int = 512) -> Tokenizer:
    """Byte-level tokens: any text, at most one token a byte."""
    return _trained(vocabulary, [])


def word_tokenizer(vocabulary: int) -> Tokenizer:
    """Byte-level BPE over invented words: about as many tokens a word as a real one gives."""
    from refrag.benchmarks.encoder_shapes import words_of

    return _trained(vocabulary, [" ".join(words_of(60_000))])


def _trained(vocabulary: int, texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def shaped_decoder(shape: str, *, device: str, dtype: torch.dtype, max_positions: int) -> Decoder:
    """A Llama of that shape that never ends an answer by itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=max_positions, pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return Decoder(model.to(device, dtype), byte_tokenizer(), eos_ids=())


def decoder_named(name: str, *, device: str, dtype: torch.dtype | None, max_positions: int) -> Decoder:
    """The decoder of a SHAPE or a model reference. Raises UsageError where the context does not fit it."""
    if name in SHAPES:
        chosen = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        return shaped_decoder(name, device=device, dtype=chosen, max_positions=max_positions)
    decoder = Decoder.load(resolve_model(name), device=device, dtype=dtype)
    decoder.eos_ids = frozenset()
    if decoder.max_positions is not None and decoder.max_positions < max_positions:
        raise UsageError(
            f"{name} has {decoder.max_positions} positions and the longest context needs {max_positions}; expected it "
            f"to fit: ask for a shorter --context, or for one of the shapes {', '.join(SHAPES)}"
        )
    return decoder
