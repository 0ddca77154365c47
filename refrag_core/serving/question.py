"""From a request's body to a question with its options."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from refrag_core.decoder_engine import Sampling
from refrag_core.errors import ConfigError, UntrainedProjectionError, UsageError
from refrag_core.history import HistoryOptions
from refrag_core.policy import PolicyName
from refrag_core.retrieval import RetrievalOptions
from refrag_core.runtime import AskOptions, needs_training
from refrag_core.serving.openai_schema import AnswerFields, ChatRequest, CompletionRequest, Message, RetrievalFields
from refrag_core.serving.settings import ServeSettings
from refrag_core.session import Turn

_SYSTEM = ("system", "developer")
_EXPANSION_FRACTION = 0.1


@dataclass(frozen=True, slots=True)
class Question:
    """What one request asks."""

    text: str
    instructions: str
    """Stand before the question in the prompt."""
    turns: tuple[Turn, ...]
    """Before it in its conversation."""
    history: HistoryOptions
    """What becomes of these."""
    options: AskOptions

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        o = self.options
        return Sampling(max_new_tokens=o.max_new_tokens, temperature=o.temperature, top_p=o.top_p, seed=o.seed)


def chat_question(body: ChatRequest, settings: ServeSettings, *, trained: bool) -> Question:
    """The last message as the question, system messages as instructions, the others as the turns before it."""
    *earlier, last = body.messages
    if last.role != "user":
        raise UsageError(f"the last message is the {last.role}'s; expected the user's, which is the question")
    instructions = "\n\n".join(message.text for message in earlier if message.role in _SYSTEM)
    turns = earlier_turns([message for message in earlier if message.role not in _SYSTEM])
    history = settings.history
    if body.history_positions is not None:
        history = replace(history, positions=body.history_positions)
    options = _options(body, body.max_completion_tokens or body.max_tokens, settings, trained=trained)
    return Question(_asked(last.text), instructions, turns, history, options)


def earlier_turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """The user's messages with the answers to them. Blank ones are left out, and several of one role in a row are one.

    A question that nobody answered has an empty answer, and an answer before any question an empty question.
    """
    turns: list[Turn] = []
    for role, own in groupby((message for message in messages if message.text.strip()), lambda message: message.role):
        text = "\n\n".join(message.text.strip() for message in own)
        if role == "user":
            turns.append(Turn(text, ""))
        elif turns:
            turns[-1] = replace(turns[-1], answer=text)
        else:
            turns.append(Turn("", text))
    return tuple(turns)


def completion_question(body: CompletionRequest, settings: ServeSettings, *, trained: bool) -> Question:
    """The prompt as the question."""
    prompt = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    options = _options(body, body.max_tokens, settings, trained=trained)
    return Question(_asked(prompt), "", (), settings.history, options)


def retrieval_options(body: RetrievalFields) -> RetrievalOptions:
    """Which passages a request wants. A blank filter is an error, as any other that is no condition."""
    return RetrievalOptions(where=body.filter, hybrid=body.hybrid)


def check_top_k(top_k: int, settings: ServeSettings) -> int:
    """`top_k` where the server gives so many. Raises ConfigError."""
    if top_k > settings.max_top_k:
        raise ConfigError(f"top_k is {top_k}; expected at most {settings.max_top_k}: ask for fewer passages")
    return top_k


def _asked(text: str) -> str:
    if not text.strip():
        raise UsageError("the question is blank; expected some text")
    return text


def _options(body: AnswerFields, max_tokens: int | None, settings: ServeSettings, *, trained: bool) -> AskOptions:
    max_new_tokens = max_tokens or settings.max_new_tokens
    if max_new_tokens > settings.max_positions:
        raise ConfigError(
            f"max_tokens is {max_new_tokens}; expected less than this server's {settings.max_positions} positions"
        )
    policy, fraction = _selection(body, settings, trained=trained)
    return AskOptions(
        top_k=check_top_k(body.top_k, settings),
        policy=policy,
        expansion_fraction=fraction,
        max_new_tokens=max_new_tokens,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=secrets.randbits(32) if body.seed is None else body.seed % (1 << 63),
        stop=_stops(body.stop),
        strict=body.strict,
        max_positions=settings.max_positions,
        explain=body.include_passages,
        retrieval=retrieval_options(body),
    )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _selection(body: AnswerFields, settings: ServeSettings, *, trained: bool) -> tuple[PolicyName, float]:
    """Policy and expansion_fraction; without a trained projection every chunk is expanded unless told otherwise."""
    asked = body.policy is not None or body.expansion_fraction is not None
    fraction = _EXPANSION_FRACTION if body.expansion_fraction is None else body.expansion_fraction
    if not asked and not trained:
        return "all", fraction
    if needs_training(body.policy, body.expansion_fraction) and not (trained or settings.allow_untrained):
        raise UntrainedProjectionError(
            "compressed chunks were asked for, but the projection of this server's index was never trained; expected "
            "policy all: leave policy and expansion_fraction out, or have the server started with --allow-untrained"
        )
    return body.policy or "learned", fraction
