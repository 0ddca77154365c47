"""Tiny random models and tokenizers: real architectures of a few kilobytes, equal on every run.

`decoder_folder` and `encoder_folder` write complete Hugging Face model folders (config, safetensors,
tokenizer) and are what a test gives wherever refrag takes a model reference; `checkpoint_folder` writes a
checkpoint over the two. The encoder folder also serves as a retriever.
"""

import json
import os
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from refrag_core.checkpoint import AdapterConfig, Checkpoint, initialise_checkpoint
from refrag_core.stored_weights import write_weights

DECODER_FAMILIES = ("llama", "gpt2", "opt", "gpt_neox", "qwen2", "qwen3", "mistral")
ENCODER_FAMILIES = ("bert", "roberta", "mpnet")

D_DEC = 32
D_ENC = 48
MAX_POSITIONS = 512

BOS, EOS, IM_START, IM_END = "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TRAINING_TEXT = [
    "The quick brown fox jumps over the lazy dog while the river runs down to the sea.",
    "A passage is cut into chunks, and every chunk becomes one vector that the decoder reads.",
    "Paris is the capital of France. Rome is the capital of Italy. Question and answer.",
    "café naïve Zürich 東京 🦊 numbers 0 1 2 3 4 5 6 7 8 9",
]


def decoder_tokenizer() -> Tokenizer:
    """Byte-level BPE of 400 tokens or fewer; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    return tokenizer


def encoder_tokenizer() -> Tokenizer:
    """Lower-cased WordPiece over ASCII characters and a few whole words; other characters are unknown."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    words = ["the", "and", "capital", "france", "##ing", "##er", "fox", "question", "answer"]
    tokens = [*special, *characters, *(f"##{c}" for c in string.ascii_lowercase + string.digits), *words]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(special)
    return tokenizer


VLLM_SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of width 32, the narrowest that vLLM takes on a CPU."""


def decoder(
    family: str = "llama", *, seed: int = 0, max_positions: int = MAX_POSITIONS, **changes: Any
) -> PreTrainedModel:
    """A causal language model of two layers, width 32, float32, whose argmax depends on its whole input.

    Args:
        changes: of the config, for other sizes.
    """
    sizes: dict[str, Any] = {
        "vocab_size": decoder_tokenizer().get_vocab_size(),
        "hidden_size": D_DEC,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": max_positions,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
    }
    if family == "opt":
        sizes |= {"ffn_dim": 64, "word_embed_proj_dim": 16}
    elif family != "gpt2":
        sizes |= {"intermediate_size": 64}
    if family in ("llama", "qwen2", "qwen3", "mistral"):
        sizes |= {"num_key_value_heads": 2}
    if family == "qwen3":
        sizes |= {"head_dim": 8}
    config = AutoConfig.for_model(family, **(sizes | changes))
    return randomised(AutoModelForCausalLM.from_config(config), seed, 0.3)


def sliding_decoder() -> PreTrainedModel:
    """A causal language model whose layers see no further than 8 positions."""
    config = AutoConfig.for_model(
        "mistral",
        vocab_size=decoder_tokenizer().get_vocab_size(),
        hidden_size=D_DEC,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=MAX_POSITIONS,
        sliding_window=8,
    )
    return randomised(AutoModelForCausalLM.from_config(config), 0, 0.3)


def encoder_body(family: str = "bert", *, seed: int = 0) -> PreTrainedModel:
    """A bidirectional encoder of two layers, width 48, float32."""
    config = AutoConfig.for_model(
        family,
        vocab_size=encoder_tokenizer().get_vocab_size(),
        hidden_size=D_ENC,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=130,
        pad_token_id=0,
        **({} if family == "mpnet" else {"type_vocab_size": 2}),
    )
    return randomised(AutoModel.from_config(config), seed, 0.15)


def decoder_folder(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    chat: bool = True,
    max_positions: int = MAX_POSITIONS,
    **changes: Any,
) -> Path:
    """Write a decoder's model folder and return it; `changes` are those of its config."""
    decoder(family, seed=seed, max_positions=max_positions, **changes).save_pretrained(folder)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
    }
    return _write_tokenizer(folder, decoder_tokenizer(), settings | ({"chat_template": CHAT_TEMPLATE} if chat else {}))


def encoder_folder(folder: Path, family: str = "bert", *, seed: int = 0) -> Path:
    """Write an encoder's model folder and return it; it is a retriever's folder as well."""
    encoder_body(family, seed=seed).save_pretrained(folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "model_max_length": 128,
    }
    return _write_tokenizer(folder, encoder_tokenizer(), settings)


def checkpoint(folder: Path, *, family: str = "llama", seed: int = 0, query_dim: int = 0, **changes: Any) -> Checkpoint:
    """An untrained checkpoint in memory over tiny models that are written to `folder`; `changes` are the decoder's."""
    return initialise_checkpoint(
        encoder_reference=str(encoder_folder(folder / "encoder")),
        decoder_reference=str(decoder_folder(folder / "decoder", family, **changes)),
        seed=seed,
        query_dim=query_dim,
    )


def checkpoint_folder(folder: Path, *, family: str = "llama", seed: int = 0, query_dim: int = 0) -> Path:
    """Write tiny models and an untrained checkpoint over them; returns the checkpoint's folder."""
    checkpoint(folder, family=family, seed=seed, query_dim=query_dim).save(folder / "checkpoint")
    return folder / "checkpoint"


def adapted_checkpoint(folder: Path, **changes: Any) -> Checkpoint:
    """A tiny checkpoint in `folder` that counts as trained and has an adapter; `changes` are the decoder's."""
    return with_random_adapter(checkpoint(folder, **changes), folder / "adapted", 0.3)


def with_random_adapter(made: Checkpoint, output: Path, deviation: float) -> Checkpoint:
    """The checkpoint, saved to `output` as a trained one, with a random adapter of rank 2 on attention layers."""
    model = AutoModelForCausalLM.from_pretrained(made.decoder_folder(), use_safetensors=True)
    generator = torch.Generator().manual_seed(7)
    state: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            wide, narrow = layer.weight.shape
            state[f"{name}.up"] = torch.randn(wide, 2, generator=generator) * deviation
            state[f"{name}.down"] = torch.randn(2, narrow, generator=generator) * deviation
    output.mkdir(parents=True, exist_ok=True)
    adapter = AdapterConfig(1.0, write_weights(output, "adapter", state, dtype="float32"))
    config = replace(made.config, trained=True, adapter=adapter)
    return replace(made, config=config, folder=output).save(output)


def cache_for(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of the test's own; tests of the real models share one, since converting takes half a minute."""
    if request.node.get_closest_marker("models"):
        base = tmp_path_factory.getbasetemp()
        return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "converted-models"
    return tmp_path_factory.mktemp("cache")


def randomised(model: PreTrainedModel, seed: int, deviation: float) -> PreTrainedModel:
    """The usual 0.02 leaves a tiny model repeating its last token, and a parity test that cannot fail."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return model.eval()


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
