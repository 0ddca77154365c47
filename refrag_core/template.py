"""Prompt templates: lists of decoder token ids around the passages and the question.

A template is made once, from the decoder's chat template, and kept in the checkpoint; composing a prompt is
then concatenation of ids and needs neither Jinja nor a tokenizer for anything but the question. The parts
are tokenised apart, so that a prompt has the same ids whatever the passages are. The order is
    bos prefix {passages} before_question QUESTION after_question suffix        (question last)
    bos prefix before_question QUESTION after_question {passages} suffix        (question_first, the paper's)
with {passages} = before_passages, then passage_header PASSAGE passage_footer for each.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

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

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """Token ids of everything in a prompt but the passages and the question. See the module's docstring."""

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

    def to_json(self) -> dict[str, JSON]:
        """Plain JSON of all fields."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "PromptTemplate":
        """The template that `to_json` wrote. Raises ConfigError for missing, unknown or ill-typed fields."""
        names = {field.name for field in fields(cls)}
        if set(value) != names:
            odd = sorted(names.symmetric_difference(value))
            raise ConfigError(
                f"template fields {', '.join(odd)} are missing or unknown; expected exactly {sorted(names)}"
            )
        if not isinstance(value["question_first"], bool):
            raise ConfigError(f"template field question_first must be true or false, found {value['question_first']!r}")
        return cls(
            question_first=value["question_first"],
            **{name: _ids(name, value[name]) for name in names - {"question_first"}},
        )

    def num_fixed(self, num_passages: int) -> int:
        """Positions that the template itself takes in a prompt of `num_passages` passages."""
        around = (self.bos, self.prefix, self.before_passages, self.before_question, self.after_question, self.suffix)
        a_passage = len(self.passage_header) + len(self.passage_footer)
        return sum(map(len, around)) + num_passages * a_passage


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
    from transformers import AutoTokenizer

    chat = AutoTokenizer.from_pretrained(decoder, local_files_only=True)
    bos, head, tail = _frame(chat, instruction)
    tokenizer = load_tokenizer(decoder, parse_special=True)

    def ids(text: str) -> Ids:
        return tuple(tokenizer.encode(text, add_special_tokens=False).ids)

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
    )


def _frame(chat: Any, instruction: str) -> tuple[Ids, str, str]:
    """BOS ids and the texts before and after a prompt's content."""
    if not chat.chat_template:
        return _bos_of_plain_text(chat), f"{instruction}\n\n", _PLAIN_ANSWER
    rendered = chat.apply_chat_template(
        [{"role": "user", "content": f"{instruction}\n\n{_SENTINEL}"}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    head, *tails = rendered.split(_SENTINEL)
    if len(tails) != 1:
        raise ConfigError(
            f"the decoder's chat template repeats or drops the user's content ({len(tails)} times in it); expected it "
            f"once: give the decoder a chat template that renders the content once"
        )
    if chat.bos_token and head.startswith(chat.bos_token):
        return (chat.bos_token_id,), head.removeprefix(chat.bos_token), tails[0]
    return (), head, tails[0]


def _bos_of_plain_text(chat: Any) -> Ids:
    """The BOS that the tokenizer itself would put before a text."""
    ids = chat("a", add_special_tokens=True).input_ids
    return (chat.bos_token_id,) if chat.bos_token_id is not None and ids[0] == chat.bos_token_id else ()
