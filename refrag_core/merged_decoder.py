"""A decoder with its checkpoint's adapter merged, as a model folder of the usual form that other engines load."""

import json
import os
import shutil
from pathlib import Path

import torch

from refrag_core.batching import cache_dir
from refrag_core.checkpoint import Checkpoint
from refrag_core.decoder import Decoder
from refrag_core.digests import digest_json
from refrag_core.errors import ConfigError
from refrag_core.models import fingerprint_model, without_progress_bars

RECORD_FILE = "refrag_decoder.json"
"""What the folder was made from."""
_GENERATION_CONFIG = "generation_config.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")


def merged_name(checkpoint: Checkpoint, folder: Path) -> str:
    """A name that only this decoder with this adapter has, for whoever serves it."""
    return f"refrag-{_fingerprint(checkpoint, folder)[:12]}"


def merged_folder(checkpoint: Checkpoint, folder: Path, dtype: torch.dtype) -> Path:
    """The decoder in `folder` with the checkpoint's adapter: the folder itself without one, else one in the cache."""
    if checkpoint.config.adapter is None:
        return folder
    kept = cache_dir() / "merged-decoders" / f"{merged_name(checkpoint, folder)}-{_dtype_name(dtype)}"
    if not (kept / RECORD_FILE).is_file():
        write_merged(checkpoint, folder, kept, dtype=dtype)
    return kept


def write_merged(checkpoint: Checkpoint, folder: Path, output: Path, *, dtype: torch.dtype | None = None) -> str:
    """Write the decoder in `folder` with the checkpoint's adapter merged to `output`, all or nothing; its name.

    Args:
        dtype: of the written weights; None for that of the decoder's own. The adapter is added in float32.

    Raises ConfigError when `output` holds something else already, and what loading raises.
    """
    name, output = merged_name(checkpoint, folder), output.resolve()
    _check_free(output)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _copy_all_but_weights(folder, temporary)
        chosen = dtype or _own_dtype(folder)
        decoder = Decoder.load(folder, dtype=chosen, adapter=checkpoint.load_adapter())
        from transformers import GenerationConfig

        decoder.model.generation_config = GenerationConfig()  # its own may be one that transformers refuses to write
        with without_progress_bars():
            decoder.model.save_pretrained(temporary)
        if (folder / _GENERATION_CONFIG).is_file():
            shutil.copyfile(folder / _GENERATION_CONFIG, temporary / _GENERATION_CONFIG)
        record = {"name": name, "dtype": _dtype_name(chosen), "decoder": checkpoint.config.decoder.reference}
        (temporary / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _replace(output, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return name


def _replace(output: Path, made: Path) -> None:
    """Put `made` in the place of `output`, of which others may be reading: it is there, whole, at all times but one."""
    old = made.with_name(f"{made.name}.old")
    if output.exists():
        output.rename(old)
    made.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def _check_free(output: Path) -> None:
    if output.exists() and not (output / RECORD_FILE).is_file() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} holds something else; expected a new folder, or one that was written before")


def _copy_all_but_weights(folder: Path, output: Path) -> None:
    """Tokenizer, chat template, generation settings, licence."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHTS and not path.name.endswith(".safetensors.index.json"):
            shutil.copyfile(path, output / path.name)


def _fingerprint(checkpoint: Checkpoint, folder: Path) -> str:
    adapter = checkpoint.config.adapter
    files = [] if adapter is None else [[file.name, file.digest] for file in adapter.files]
    return digest_json(
        {"decoder": fingerprint_model(folder), "scale": None if adapter is None else adapter.scale, "files": files}
    )


def _own_dtype(folder: Path) -> torch.dtype:
    from transformers import AutoConfig

    found = getattr(AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config(), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
