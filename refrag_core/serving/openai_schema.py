"""Bodies of requests: OpenAI's fields, and beside them refrag's own.

What a field would change and this server cannot do is refused by name; what changes no answer (`user`, `metadata` …)
is taken and ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from refrag_core.policy import PolicyName

MAX_MESSAGES = 256
MAX_STOPS = 16
_INT64 = 1 << 63

Text = Annotated[str, Field(max_length=1 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """A JSON object with known fields of exact types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(default=None, description="Ignored.")


class RetrievalFields(Body):
    """Which passages may be found."""

    filter: str | None = Field(
        default=None,
        max_length=10_000,
        description="Only documents whose metadata fulfil this: `lang = 'en' and year > 2020`.",
    )
    hybrid: bool = Field(default=False, description="Rank by words (BM25) too and fuse the two rankings.")


class AnswerFields(RetrievalFields):
    """What a chat request and a completion request have in common."""

    model: str | None = Field(default=None, max_length=256)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=_INT64 - 1)
    temperature: float | None = Field(default=None, ge=0, le=2, description="0, the default, is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-_INT64, le=_INT64 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    n: Literal[1] | None = None
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    user: str | None = Field(default=None, description="Ignored.")
    metadata: dict[str, Any] | None = Field(default=None, description="Ignored.")
    store: bool | None = Field(default=None, description="Ignored.")
    service_tier: str | None = Field(default=None, description="Ignored.")
    safety_identifier: str | None = Field(default=None, description="Ignored.")
    prompt_cache_key: str | None = Field(default=None, description="Ignored.")

    policy: PolicyName | None = Field(default=None, description="Who chooses the chunks to expand.")
    expansion_fraction: float | None = Field(
        default=None, ge=0, le=1, description="Share of chunks given as full tokens (p)."
    )
    top_k: int = Field(default=5, ge=1, le=_INT64 - 1, description="Passages to retrieve.")
    strict: bool = Field(default=False, description="Fail instead of dropping passages that do not fit.")
    include_passages: bool = Field(
        default=False, description="Give passages, chunks and times of each step under `refrag`."
    )


class TextPart(Body):
    """One part of a message."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
    name: str | None = Field(default=None, description="Ignored.")

    @property
    def text(self) -> str:
        """All of its content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(AnswerFields):
    """Body of `/v1/chat/completions`: the last message, the user's, is the question; those before it its history."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_INT64 - 1)
    logprobs: Literal[False] | None = None
    history_positions: int | None = Field(
        default=None,
        ge=0,
        le=_INT64 - 1,
        description="Decoder positions for earlier turns: newest raw, older compressed, oldest dropped.",
    )
    parallel_tool_calls: bool | None = Field(default=None, description="Ignored.")


class CompletionRequest(AnswerFields):
    """Body of `/v1/completions`: the prompt is the question."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


class RetrieveRequest(RetrievalFields):
    """Body of `/v1/retrieve`."""

    query: Text
    top_k: int = Field(default=5, ge=1, le=_INT64 - 1)


class ReloadRequest(Body):
    """Body of `/v1/reload`."""

    version: int | None = Field(default=None, ge=1, le=_INT64 - 1, description="None: the newest.")
