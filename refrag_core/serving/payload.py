"""Answers as OpenAI's clients expect them, whole and in pieces, with refrag's own figures beside."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from refrag_core.runtime import Answer, Runtime, Stats, UsedPassage

Kind = Literal["chat", "completion"]
_OBJECTS = {"chat": ("chat.completion", "chat.completion.chunk"), "completion": ("text_completion",) * 2}
_PREFIX = {"chat": "chatcmpl", "completion": "cmpl"}


def to_json(value: Any) -> bytes:
    """JSON in UTF-8; numbers that JSON has not become null."""
    from pydantic_core import to_json as dump

    return dump(value, inf_nan_mode="null", fallback=str)


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """The bodies of one answer.

    Args:
        detailed: give passages, chunks and times as well.
    """

    kind: Kind
    model: str
    runtime: Runtime
    detailed: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        """All at once."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = content if self.kind == "chat" else {"text": text}
        body = self._body(0, [self._choice(choice, answer.finish_reason)]) | {"usage": usage(answer.stats)}
        return body | self._own(answer)

    def first(self, passages: Sequence[UsedPassage]) -> dict[str, Any]:
        """Before any text."""
        choice = {"delta": {"role": "assistant", "content": ""}} if self.kind == "chat" else {"text": ""}
        body = self._body(1, [self._choice(choice, None)])
        return body | ({"refrag": {"passages": [asdict(passage) for passage in passages]}} if self.detailed else {})

    def piece(self, text: str) -> dict[str, Any]:
        """Some more text."""
        choice = {"delta": {"content": text}} if self.kind == "chat" else {"text": text}
        return self._body(1, [self._choice(choice, None)])

    def last(self, answer: Answer) -> dict[str, Any]:
        """After all text."""
        choice: dict[str, Any] = {"delta": {}} if self.kind == "chat" else {"text": ""}
        return self._body(1, [self._choice(choice, answer.finish_reason)]) | self._own(answer)

    def usage(self, answer: Answer) -> dict[str, Any]:
        """The piece that has no text but the counts."""
        return self._body(1, []) | {"usage": usage(answer.stats)}

    def _own(self, answer: Answer) -> dict[str, Any]:
        """What became of earlier turns is told whenever there were any: some may have been dropped."""
        if self.detailed:
            return {"refrag": self.details(answer)}
        use = answer.history
        return {"refrag": {"history": asdict(use)}} if use and use.dropped + use.passages + use.raw else {}

    def details(self, answer: Answer) -> dict[str, Any]:
        """refrag's own part of an answer."""
        shown = asdict(answer)
        del shown["answer"], shown["question"], shown["finish_reason"]
        return shown

    def _body(self, form: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{_PREFIX[self.kind]}-{self.id}",
            "object": _OBJECTS[self.kind][form],
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"generation-{self.runtime.version}-{self.runtime.reader.manifest.build_id[:12]}",
            "choices": choices,
        }

    @staticmethod
    def _choice(content: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def usage(stats: Stats) -> dict[str, Any]:
    """Counts: `prompt_tokens` are positions of the prompt, `context_tokens` what its passages stood for, and
    `cached_tokens` the positions that an earlier prompt had left in the decoder's cache."""
    return {
        "prompt_tokens": stats.decoder_positions,
        "completion_tokens": stats.new_tokens,
        "total_tokens": stats.decoder_positions + stats.new_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_positions},
        "context_tokens": stats.context_tokens,
        "decoder_positions": stats.decoder_positions,
    }
