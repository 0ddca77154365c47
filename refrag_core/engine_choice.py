"""Which engine decodes: the embedded one, vLLM in this program, or a running vLLM server; opened for a runtime."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from refrag_core.decoder import Decoder, lowest
from refrag_core.decoder_engine import DecoderEngine
from refrag_core.errors import UsageError
from refrag_core.runtime import Runtime

EngineName = Literal["embedded", "vllm", "vllm-server"]

_PROBE = "Which of the passages answers the question?"
"""Any words: a server is to go on alike from their ids and their embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Which engine, and what it needs to know. Raises UsageError for what does not belong together."""

    name: EngineName = "embedded"
    url: str | None = None
    """Of the vLLM server."""
    model: str | None = None
    """Under which that server has the decoder; None takes the one that the checkpoint needs, or its only one."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """More arguments of `vllm.EngineArgs`."""

    def __post_init__(self) -> None:
        if self.name == "vllm-server" and self.url is None:
            raise UsageError("--engine vllm-server needs the server's address: give it with --vllm-url")
        given = {"--vllm-url": self.url, "--vllm-model": self.model}
        if self.name != "vllm-server" and (foreign := [option for option, value in given.items() if value is not None]):
            raise UsageError(f"{', '.join(foreign)} was given with --engine {self.name}; expected vllm-server")
        if self.name != "vllm" and self.settings:
            raise UsageError(f"--vllm-option was given with --engine {self.name}; expected --engine vllm")

    @property
    def decodes_elsewhere(self) -> bool:
        """Whether the runtime needs no more of its decoder than the input embeddings."""
        return self.name != "embedded"


def parse_settings(texts: list[str]) -> dict[str, Any]:
    """`NAME=VALUE` each, the values JSON where they can be. Raises UsageError."""
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--vllm-option is {text!r}; expected NAME=VALUE, as in gpu_memory_utilization=0.5")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def open_engine(
    runtime: Runtime, options: EngineOptions, *, slots: int, max_positions: int, reuse: bool = True
) -> DecoderEngine:
    """The engine for the generation that a runtime has now; vLLM is started, or its server asked, at once.

    Args:
        runtime: opened with `composes_only` where `options.decodes_elsewhere`.
        slots: answers side by side.
        max_positions: slots + new tokens of one answer at most, where the decoder has as many.
        reuse: the embedded engine's, see EmbeddedEngine; vLLM has its own way with prompts that begin alike.

    Raises MissingExtraError without vLLM, EngineError and FingerprintMismatchError for a server that cannot be
    reached or has another decoder.
    """
    if options.name == "vllm":
        return _vllm(runtime, options, slots, max_positions)
    if options.name == "vllm-server":
        return _vllm_server(runtime, options, slots)
    from refrag_core.serving.scheduler import embedded_engine

    return embedded_engine(runtime.decoder, slots=slots, max_positions=max_positions, reuse=reuse)


def _vllm(runtime: Runtime, options: EngineOptions, slots: int, max_positions: int) -> DecoderEngine:
    from refrag_core.merged_decoder import merged_folder
    from refrag_core.vllm_engine import VllmEngine, require_vllm

    require_vllm()  # before a decoder is merged for it
    decoder = runtime.decoder
    return VllmEngine.load(
        merged_folder(runtime.checkpoint, runtime.decoder_folder, decoder.dtype),
        dim=decoder.dim,
        eos_ids=decoder.eos_ids,
        slots=slots,
        max_positions=lowest(max_positions, decoder.max_positions),
        dtype=decoder.dtype,
        settings=options.settings,
    )


def _vllm_server(runtime: Runtime, options: EngineOptions, slots: int) -> DecoderEngine:
    from refrag_core.merged_decoder import merged_name
    from refrag_core.vllm_server import KEY_VARIABLE, Address, VllmServerEngine

    checkpoint, decoder = runtime.checkpoint, runtime.decoder
    adapted = checkpoint.config.adapter is not None
    return VllmServerEngine.connect(
        Address.parse(options.url or "", os.environ.get(KEY_VARIABLE) or None),
        probe=_probe(decoder),
        eos_ids=decoder.eos_ids,
        slots=slots,
        model=options.model,
        needed=merged_name(checkpoint, runtime.decoder_folder) if adapted else None,
    )


def _probe(decoder: Decoder) -> tuple[list[int], torch.Tensor]:
    ids: list[int] = decoder.tokenizer.encode(_PROBE, add_special_tokens=False).ids
    return ids, decoder.embed(torch.tensor(ids, device=decoder.device))
