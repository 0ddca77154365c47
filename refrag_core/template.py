"""Prompt templates: lists of decoder token ids around the passages and the question.

A template is made once, from the decoder's chat template, and kept in the checkpoint; composing a prompt is
then concatenation of ids and needs neither Jinja nor a tokenizer for anything but the question. The parts
are tokenised apart, so that a prompt has the same ids whatever the passages are. The order is
    bos prefix {passages} before_question QUESTION after_question suffix        (question last)
    bos prefix before_question QUESTION after_question {passages} suffix        (question_first, the paper's)
with {passages} = before_passages, then passage_header PASSAGE passage_footer for each. The turns of a conversation
stand behind the prefix, without passages, each as
    before_question QUESTION after_question before_answer ANSWER after_answer
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from refrag_core.digests import JSON
from refrag_core.errors import ConfigError
from refrag_core.models import load_tokenizer

INSTRUCTION = "Answer the question from the passages."

_SENTINEL = "REFRAG-CONTENT"
_PASSAGES = "Passages:\n"
_FOOTER = "\n\n"
_QUESTION = "Question:\n"
_AFTER_QUESTION = "\n\n"
_PLAIN_ANSWER = "Answer:"
_PLAIN_PAST_ANSWER = "Answer: "

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TurnTemplate:
    """Token ids around the answers of earlier turns."""

    before_answer: Ids
    """From the end of a turn's question to where its answer starts."""
    after_answer: Ids
    """From the end of the answer to where the content of the user's next turn starts."""


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """Token ids of all in a prompt but passages, question and earlier turns. See the module's docstring."""

    bos: Ids
    """The decoder's beginning-of-sequence token, empty where it uses none."""
    prefix: Ids
    """Up to where the content of the user's turn starts, and the instruction."""
    before_passages: Ids
    passage_header: Ids
    passage_footer: Ids
    before_question: Ids
    after_question: Ids
    suffix: Ids
    """From the end of the content to where the answer starts."""
    question_first: bool
    """True: the question stands before the passages (the paper); chosen by evaluation."""
    turns: TurnTemplate | None = None
    """None in checkpoints from before conversations, and for chat templates that render none."""

    def to_json(self) -> dict[str, JSON]:
        """Plain JSON of all fields; without `turns` where there are none, as older checkpoints have it."""
        values = {name: getattr(self, name) for name in _names(type(self)) - {"turns"}}
        made: dict[str, JSON] = {name: _plain(value) for name, value in values.items()}
        if self.turns is not None:
            made["turns"] = {name: list(getattr(self.turns, name)) for name in _names(TurnTemplate)}
        return made

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PromptTemplate":
        """The template that `to_json` wrote. Raises ConfigError for missing, unknown or ill-typed fields."""
        _check_names(cls, {"turns": None, **value})
        if not isinstance(value["question_first"], bool):
            raise ConfigError(f"template field question_first must be true or false, found {value['question_first']!r}")
        return cls(
            question_first=value["question_first"],
            turns=_turns(value["turns"]) if "turns" in value else None,
            **{name: _ids(name, value[name]) for name in _names(cls) - {"question_first", "turns"}},
        )

    def turn(self, question_ids: Sequence[int], answer_ids: Sequence[int]) -> Ids:
        """The ids of an earlier turn. Raises ConfigError for a template without turns."""
        if self.turns is None:
            raise ConfigError("the prompt template has no turns; expected one made for conversations: see `with_turns`")
        question = (*self.before_question, *question_ids, *self.after_question)
        return (*question, *self.turns.before_answer, *answer_ids, *self.turns.after_answer)

    def num_fixed(self, num_passages: int) -> int:
        """Positions that the template itself takes in a prompt of `num_passages` passages."""
        around = (self.bos, self.prefix, self.before_passages, self.before_question, self.after_question, self.suffix)
        a_passage = len(self.passage_header) + len(self.passage_footer)
        return sum(map(len, around)) + num_passages * a_passage


def _names(template: type) -> set[str]:
    return {field.name for field in fields(template)}


def _check_names(template: type, value: Mapping[str, Any]) -> None:
    names = _names(template)
    if set(value) != names:
        odd = sorted(names.symmetric_difference(value))
        raise ConfigError(f"template fields {', '.join(odd)} are missing or unknown; expected exactly {sorted(names)}")


def _turns(value: Any) -> TurnTemplate:
    if not isinstance(value, dict):
        raise ConfigError(f"template field turns must be an object of lists of token ids, found {value!r}")
    _check_names(TurnTemplate, value)
    return TurnTemplate(**{name: _ids(name, ids) for name, ids in value.items()})


def _plain(value: Ids | bool) -> JSON:
    return value if isinstance(value, bool) else list(value)


def _ids(name: str, value: Any) -> Ids:
    whole = isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)
    if not whole:
        raise ConfigError(f"template field {name} must be a list of token ids, found {value!r}")
    return tuple(value)


def make_template(decoder: Path, *, question_first: bool = False, instruction: str = INSTRUCTION) -> PromptTemplate:
    """The template for the decoder in folder `decoder`, from its chat template or, without one, as plain text.

    Raises ConfigError when the chat template does not hand on the user's content as it is.
    """
    chat, ids = _chat(decoder), _encoder(decoder)
    bos, head, tail = _frame(chat, instruction)
    turns = _turn_texts(chat)
    return PromptTemplate(
        bos=bos,
        prefix=ids(head),
        before_passages=ids(_PASSAGES),
        passage_header=(),
        passage_footer=ids(_FOOTER),
        before_question=ids(_QUESTION),
        after_question=ids(_AFTER_QUESTION) if question_first or not chat.chat_template else (),
        suffix=ids(tail),
        question_first=question_first,
        turns=None if turns is None else TurnTemplate(*map(ids, turns)),
    )


def with_turns(template: PromptTemplate, decoder: Path) -> PromptTemplate:
    """The template itself, or with the turns of the decoder in folder `decoder` where its checkpoint has none.

    Raises ConfigError when the decoder's chat template renders no conversations.
    """
    if template.turns is not None:
        return template
    turns = _turn_texts(_chat(decoder))
    if turns is None:
        raise ConfigError(
            "the decoder's chat template does not hand on the turns of a conversation one after another as they are; "
            "expected one that does: ask single questions, or give the decoder another chat template"
        )
    return replace(template, turns=TurnTemplate(*map(_encoder(decoder), turns)))


def _chat(decoder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(decoder, local_files_only=True)


def _encoder(decoder: Path) -> Callable[[str], Ids]:
    """Text → ids, special tokens written in it included."""
    tokenizer = load_tokenizer(decoder, parse_special=True)
    return lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def _frame(chat: Any, instruction: str) -> tuple[Ids, str, str]:
    """BOS ids and the texts before and after a prompt's content."""
    if not chat.chat_template:
        return _bos_of_plain_text(chat), f"{instruction}\n\n", _PLAIN_ANSWER
    rendered = _render(chat, [f"{instruction}\n\n{_SENTINEL}"])
    head, *tails = rendered.split(_SENTINEL)
    if len(tails) != 1:
        raise ConfigError(
            f"the decoder's chat template repeats or drops the user's content ({len(tails)} times in it); expected it "
            f"once: give the decoder a chat template that renders the content once"
        )
    if chat.bos_token and head.startswith(chat.bos_token):
        return (chat.bos_token_id,), head.removeprefix(chat.bos_token), tails[0]
    return (), head, tails[0]


def _turn_texts(chat: Any) -> tuple[str, str] | None:
    """The texts before and after an earlier turn's answer; None where the chat template renders no conversations.

    Two earlier turns are rendered, since all between questions and answers must be the same in each, and what is
    before and after as for a single question: a prompt is put together of parts.
    """
    if not chat.chat_template:
        return _PLAIN_PAST_ANSWER, _AFTER_QUESTION
    try:
        head, *between, tail = _render(chat, [_SENTINEL] * 5).split(_SENTINEL)
        alone = _render(chat, [_SENTINEL]).split(_SENTINEL)
    except TemplateError:  # raise_exception of a template that refuses such messages
        return None
    same = len(between) == 4 and between[:2] == between[2:] and [head, tail] == alone
    return (between[0], between[1]) if same else None


def _render(chat: Any, contents: Sequence[str]) -> str:
    """The chat template over messages that are the user's and the assistant's in turn, up to the next answer."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    rendered: str = chat.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return rendered


def _bos_of_plain_text(chat: Any) -> Ids:
    """The BOS that the tokenizer itself would put before a text."""
    ids = chat("a", add_special_tokens=True).input_ids
    return (chat.bos_token_id,) if chat.bos_token_id is not None and ids[0] == chat.bos_token_id else ()
