"""Encoder bodies and retrievers by shape, with random weights: what benchmarks run where no model is at hand."""

from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from refrag_core.encoder import EncoderModule, strip_pooler
from refrag_core.retriever import Retriever

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"type": "bert", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "minilm": {"type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12},
    "roberta-base": {"type": "roberta", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "roberta-large": {"type": "roberta", "hidden_size": 1_024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
_WORDS = 20_000
_PIECES = 16_000


def words_of(count: int, *, seed: int = 0) -> list[str]:
    """`count` words drawn as often as words are: a few all the time, most of them hardly ever."""
    random = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    odds = np.linspace(2.0, 0.2, len(letters))
    lengths = random.integers(2, 11, _WORDS)
    flat = "".join(random.choice(letters, size=int(lengths.sum()), p=odds / odds.sum()))
    ends = np.cumsum(lengths)
    vocabulary = [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    ranks = np.minimum(random.zipf(1.2, count) - 1, _WORDS - 1)
    return [vocabulary[rank] for rank in ranks]


def piece_tokenizer() -> Tokenizer:
    """WordPiece over such words, with a BERT's special tokens around a text; the same in one process."""
    return Tokenizer.from_str(_trained_pieces())


@cache
def _trained_pieces() -> str:
    """Trained once: where counts are equal, training chooses as it comes."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=_PIECES, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator([" ".join(words_of(60_000))], trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return str(tokenizer.to_str())


def shaped_body(shape: str, vocabulary: int) -> Any:
    """A transformers encoder of that shape, float32 on the CPU."""
    from transformers import AutoConfig, AutoModel

    sizes = dict(SHAPES[shape])
    config = AutoConfig.for_model(
        sizes.pop("type"),
        vocab_size=vocabulary,
        intermediate_size=4 * sizes["hidden_size"],
        max_position_embeddings=514,
        pad_token_id=0,
        **sizes,
    )
    torch.manual_seed(0)
    return AutoModel.from_config(config)


def shaped_encoder_module(shape: str, vocabulary: int) -> EncoderModule:
    """A chunk encoder's module of that shape over a decoder vocabulary of that size."""
    table = torch.randn((vocabulary, SHAPES[shape]["hidden_size"]), generator=torch.Generator().manual_seed(1))
    return EncoderModule(strip_pooler(shaped_body(shape, 32)), table * 0.05)


def shaped_retriever(shape: str, device: str) -> Retriever:
    """A retriever of that shape."""
    tokenizer = piece_tokenizer()
    body = strip_pooler(shaped_body(shape, tokenizer.get_vocab_size()))
    return Retriever(body, tokenizer, max_length=256, pad_id=0, fingerprint=f"shape {shape}", device=device)
