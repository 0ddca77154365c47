"""Instruction tuning: questions with passages and answers, composed as a host composes them.

One example a line of a JSON Lines file:
    {"id": str, "question": str, "answer": str, "answers": [str, …],
     "passages": [str, …], "gold": [int, …], "kind": str}
An empty `answer` cannot be answered from the passages: what is learnt then is `ABSTENTION`. `answers` (accepted
forms), `gold` (numbers of the passages that hold the answer) and `kind` may be left out.

Notation as in `refrag_core.training.batches`. All batches of one chunk size and expansion fraction have one shape,
whatever is in them, since every shape has to be captured: rows are filled up on the right, where a causal decoder's
predictions do not see it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from refrag_core.chunking import ChunkingOptions, TokenizedText, cut_passages, num_chunks, tokenize_documents
from refrag_core.composition import COMPRESSED, Arrangement, ContextPassage, arrange
from refrag_core.digests import digest_json
from refrag_core.errors import ConfigError, CorpusError
from refrag_core.evaluation.qa import ABSTENTION
from refrag_core.policy import num_expanded
from refrag_core.template import PromptTemplate
from refrag_core.training.batches import NO_TOKEN, Ids, Mask, TrainingBatch
from refrag_core.training.losses import IGNORED

_REQUIRED = ("id", "question", "answer", "passages")
_KNOWN = frozenset((*_REQUIRED, "answers", "gold", "kind"))
_EXPECTED = 'expected one object with "id", "question", "answer", "passages" and, where known, "gold" and "kind"'
_SLOT_STEP, _CHUNK_STEP, _TARGET_STEP = 32, 8, 4
_TOKENIZED_TEXTS = 4096

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of an instruction file."""

    id: str
    question: str
    answer: str
    """Empty where the passages hold none."""
    passages: tuple[str, ...]
    gold: tuple[int, ...]
    """Numbers, from 0, of the passages that hold the answer."""
    kind: str
    answers: tuple[str, ...] = ()
    """Other accepted forms of the answer."""


def read_instructions(path: Path) -> list[Instruction]:
    """The examples of a JSON Lines file, in its order; blank lines are skipped.

    Raises CorpusError, naming the line, for what is no example, a repeated id, and an unreadable or empty file.
    """
    found: dict[str, Instruction] = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    made = parse_instruction(line, where=f"{path} line {number}")
                    if made.id in found:
                        raise CorpusError(f"{path} line {number}: id {made.id!r} occurs twice; expected unique ids")
                    found[made.id] = made
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read as UTF-8 text ({error}); expected JSON lines of examples") from error
    if not found:
        raise CorpusError(f"{path} has no examples; {_EXPECTED}")
    return list(found.values())


def parse_instruction(line: str, *, where: str) -> Instruction:
    """The example in one JSON line; CorpusError starts with `where`."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"{where}: not JSON ({error}); {_EXPECTED}") from error
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: a JSON {type(record).__name__}; {_EXPECTED}")
    unknown, missing = sorted(record.keys() - _KNOWN), sorted(set(_REQUIRED) - record.keys())
    if unknown or missing:
        raise CorpusError(f"{where}: missing {missing}, unknown {unknown}; {_EXPECTED}")
    made = Instruction(
        id=_text(record, "id", where),
        question=_text(record, "question", where),
        answer=_text(record, "answer", where, may_be_empty=True),
        passages=_passages(record, where),
        gold=_gold(record, where),
        kind=_text(record, "kind", where, may_be_empty=True) if "kind" in record else "",
        answers=_answers(record, where),
    )
    if made.answer and not made.passages:
        raise CorpusError(f"{where}: an answer without passages; expected passages, or an empty answer")
    return made


def _text(record: dict[str, Any], field: str, where: str, *, may_be_empty: bool = False) -> str:
    value = record[field]
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise CorpusError(f"{where}: {field} is {value!r}; expected a text{'' if may_be_empty else ' not blank'}")
    return value.strip()


def _passages(record: dict[str, Any], where: str) -> tuple[str, ...]:
    value = record["passages"]
    if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
        raise CorpusError(f"{where}: passages is not a list of texts that are not blank; expected one")
    return tuple(value)


def _answers(record: dict[str, Any], where: str) -> tuple[str, ...]:
    value = record.get("answers", [])
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise CorpusError(f"{where}: answers is {value!r}; expected a list of texts")
    return tuple(text.strip() for text in value if text.strip())


def _gold(record: dict[str, Any], where: str) -> tuple[int, ...]:
    value, count = record.get("gold", []), len(record["passages"])
    if not isinstance(value, list) or not all(type(index) is int and 0 <= index < count for index in value):
        raise CorpusError(f"{where}: gold is {value!r}; expected a list of numbers from 0 to {count - 1}")
    return tuple(value)


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """An example in the decoder's tokens."""

    question: TokenIds
    answer: TokenIds
    """With the token that ends the turn."""
    passages: tuple[TokenIds, ...]
    gold: tuple[bool, ...]
    """Of each passage."""
    spells_answer: tuple[Mask, ...]
    """Of each passage bool, one a token: whether it is part of the answer, word for word, in a gold passage."""

    def num_chunks(self, chunk_size: int) -> int:
        """Chunks of all passages; none crosses passages."""
        return sum(num_chunks(len(ids), chunk_size) for ids in self.passages)


@dataclass(frozen=True, slots=True)
class BatchShape:
    """t, n and m of every batch of one chunk size and expansion fraction."""

    slots: int
    chunks: int
    targets: int


class InstructionSet:
    """The examples of a file, tokenised once; those whose answer is exchanged, as they come.

    Args:
        template: the checkpoint's.
        tokenizer: the decoder's, which reads control tokens in text as plain text.
        eos_ids: the decoder's ids that end an answer; the one that its own chat template uses is learnt.
        expansion_fractions: all that batches are made with.
        context_tokens: of all passages of an example, at most: distractors are left out from the last on, and
            examples whose gold passages alone are longer are left out themselves (`num_left_out`).
        max_answer_tokens: examples with longer answers are left out, since all rows are as long as the longest.
        max_passage_tokens: longer passages are cut as an index build cuts them.
        exchange: whether answers will be exchanged, so that kinds and accepted forms are part of the fingerprint.
        seed: of the order.

    Raises CorpusError when no example is left, and ConfigError for a decoder without an id that ends an answer.
    """

    def __init__(
        self,
        instructions: Sequence[Instruction],
        *,
        template: PromptTemplate,
        tokenizer: Tokenizer,
        eos_ids: Sequence[int],
        expansion_fractions: Sequence[float],
        context_tokens: int,
        max_answer_tokens: int = 48,
        max_passage_tokens: int = 256,
        exchange: bool = False,
        seed: int = 0,
    ) -> None:
        self.template = template
        self.fingerprint = digest_json([_plain(made, whole=exchange) for made in instructions])
        self._seed = seed
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._shapes: dict[tuple[int, float], BatchShape] = {}
        self._fractions = sorted(set(expansion_fractions))
        self._tokenizer = tokenizer
        self._end = end_of_turn(template, eos_ids)
        self._space = _answers_after_text(template, tokenizer)
        self._options = ChunkingOptions(1, max_passage_tokens)
        self._limits = context_tokens, max_answer_tokens
        fitting = zip(instructions, self._fitting(instructions), strict=True)
        kept = [(made, example) for made, example in fitting if example is not None]
        self.examples = [example for _, example in kept]
        self._texts = [made for made, _ in kept]
        self._answers = answers_by_kind(self._texts)
        self.num_left_out = len(instructions) - len(self.examples)
        if not self.examples:
            raise CorpusError(
                f"all {len(instructions)} examples need more than {context_tokens} context tokens or "
                f"{max_answer_tokens} tokens of an answer; expected shorter ones, or larger context_tokens"
            )

    @classmethod
    def open(cls, path: Path, **settings: Any) -> "InstructionSet":
        """The examples of a file. Arguments as for the class. Raises CorpusError."""
        return cls(read_instructions(path), **settings)

    def summary(self) -> str:
        """What was read, in one line."""
        left_out = (
            f", {self.num_left_out:,} left out whose answers or gold passages are too long" if self.num_left_out else ""
        )
        return f"{len(self.examples):,} instruction examples{left_out}"

    def take(self, position: int, count: int) -> list[TokenizedExample]:
        """Examples number `position` to `position + count` of all epochs, each shuffled by the seed alone."""
        return [self.examples[number] for number in self._numbers(position, count)]

    def _numbers(self, position: int, count: int) -> list[int]:
        size = len(self.examples)
        return [int(self._order(n // size)[n % size]) for n in range(position, position + count)]

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(len(self.examples))
        return self._orders[epoch]

    def batch(
        self,
        position: int,
        rows: int,
        *,
        chunk_size: int,
        expansion_fraction: float,
        gold_weight: float,
        random: np.random.Generator,
        exchanged_share: float = 0.0,
    ) -> TrainingBatch:
        """Examples number `position` to `position + rows`, a random `expansion_fraction` of their chunks expanded.

        Args:
            gold_weight: how many times as readily a chunk of a gold passage is drawn as another.
            exchanged_share: share of the examples whose answer is exchanged (`exchanged`) for a random one of their
                kind, but for those where it cannot be or what is made does not fit the shape.

        Raises ConfigError for a fraction that the shapes were not made for.
        """
        if expansion_fraction not in self._fractions:
            raise ConfigError(f"expansion_fraction {expansion_fraction} is none of {self._fractions}; expected one")
        shape = self.shape(chunk_size, expansion_fraction)
        numbers = self._numbers(position, rows)
        others = self._exchanged(numbers, exchanged_share, random)
        made = []
        for row, number in enumerate(numbers):
            example = others.get(row, self.examples[number])
            if not self._fits(example, chunk_size, expansion_fraction, shape):
                example = self.examples[number]
            mask = drawn_mask(example, chunk_size, expansion_fraction, gold_weight, random)
            made.append((compose_example(self.template, example, chunk_size, mask), example))
        return instruction_batch(made, chunk_size=chunk_size, shape=shape)

    def shape(self, chunk_size: int, expansion_fraction: float) -> BatchShape:
        """What every example fits at that fraction, with one padding slot and one padding chunk more."""
        key = chunk_size, expansion_fraction
        if key not in self._shapes:
            sizes = [self._sizes(made, chunk_size, expansion_fraction) for made in self.examples]
            slots, chunks, targets = (int(size) for size in np.asarray(sizes).max(axis=0))
            self._shapes[key] = BatchShape(
                slots=_rounded_up(slots + 1, _SLOT_STEP),
                chunks=_rounded_up(chunks + 1, _CHUNK_STEP),
                targets=_rounded_up(targets, _TARGET_STEP),
            )
        return self._shapes[key]

    def _fits(self, example: TokenizedExample, chunk_size: int, expansion_fraction: float, shape: BatchShape) -> bool:
        slots, chunks, targets = self._sizes(example, chunk_size, expansion_fraction)
        return slots < shape.slots and chunks < shape.chunks and targets <= shape.targets

    def _exchanged(
        self, numbers: Sequence[int], share: float, random: np.random.Generator
    ) -> dict[int, TokenizedExample]:
        """By row, a random share of these examples with another answer; not of those that cannot have it."""
        if not share:
            return {}
        made: dict[int, Instruction] = {}
        for row, number in enumerate(numbers):
            known = self._texts[number]
            if known.kind in self._answers and random.random() < share:
                answers = [answer for answer in self._answers[known.kind] if answer != known.answer]
                other = exchanged(known, answers[int(random.integers(len(answers)))])
                if other is not None:
                    made[row] = other
        examples = zip(made, self._fitting(list(made.values())), strict=True) if made else ()
        return {row: example for row, example in examples if example is not None}

    def _fitting(self, instructions: Sequence[Instruction]) -> list[TokenizedExample | None]:
        """Each in tokens, with the distractors that fit; None for those whose gold passages or answers are too long."""
        context_tokens, max_answer_tokens = self._limits
        tokenized = _tokenized(instructions, self._tokenizer, end=self._end, space=self._space, options=self._options)
        return [_fitted(made, context_tokens) if len(made.answer) <= max_answer_tokens else None for made in tokenized]

    def _sizes(self, example: TokenizedExample, chunk_size: int, expansion_fraction: float) -> tuple[int, int, int]:
        """Slots at most (all expanded chunks full), compressed chunks and targets of one example."""
        count = example.num_chunks(chunk_size)
        expanded = num_expanded(count, expansion_fraction)
        prompt = self.template.num_fixed(len(example.passages)) + len(example.question)
        slots = prompt + count - expanded + expanded * chunk_size + len(example.answer) - 1
        return slots, count - expanded, len(example.answer)


def _plain(made: Instruction, *, whole: bool) -> list[Any]:
    """What a run depends on: of a `whole` one, kind and accepted forms too."""
    plain = [made.id, made.question, made.answer, list(made.passages), list(made.gold)]
    return [*plain, made.kind, list(made.answers)] if whole else plain


def end_of_turn(template: PromptTemplate, eos_ids: Sequence[int]) -> int:
    """The id that ends an answer: of `eos_ids` the one that ends turns in the template, else the first.

    Raises ConfigError without any.
    """
    if not eos_ids:
        raise ConfigError("the decoder names no token that ends an answer; expected an eos_token_id in its config")
    used = {*template.prefix, *template.suffix}
    return next((index for index in eos_ids if index in used), eos_ids[0])


def _answers_after_text(template: PromptTemplate, tokenizer: Tokenizer) -> bool:
    """Whether a prompt ends in a word or mark that an answer stands a space away from, as "Answer:" does."""
    end = tokenizer.decode(list(template.suffix), skip_special_tokens=True)
    return end[-1:].isalnum() or end[-1:] == ":"


def _tokenized(
    instructions: Sequence[Instruction], tokenizer: Tokenizer, *, end: int, space: bool, options: ChunkingOptions
) -> list[TokenizedExample]:
    passages = _cut_once(sorted({text for made in instructions for text in made.passages}), tokenizer, options)
    questions = tokenizer.encode_batch([made.question for made in instructions], add_special_tokens=False)
    texts = [(" " if space else "") + (made.answer or ABSTENTION) for made in instructions]
    answers = tokenizer.encode_batch(texts, add_special_tokens=False)
    examples = []
    for made, question, answer in zip(instructions, questions, answers, strict=True):
        pieces = [
            (tokens.ids, number in made.gold, _spelling(text, tokens, made.answer if number in made.gold else ""))
            for number, text in enumerate(made.passages)
            for tokens in passages[text]
        ]
        examples.append(
            TokenizedExample(
                question=np.asarray(question.ids, dtype=np.int32),
                answer=np.asarray([*answer.ids, end], dtype=np.int32),
                passages=tuple(ids for ids, _, _ in pieces),
                gold=tuple(is_gold for _, is_gold, _ in pieces),
                spells_answer=tuple(mask for _, _, mask in pieces),
            )
        )
    return examples


def _cut_once(texts: Sequence[str], tokenizer: Tokenizer, options: ChunkingOptions) -> dict[str, list[TokenizedText]]:
    """Of each text the tokens of its passages, usually one."""
    pieces = {}
    for start in range(0, len(texts), _TOKENIZED_TEXTS):
        part = texts[start : start + _TOKENIZED_TEXTS]
        for text, tokens in zip(part, tokenize_documents(part, tokenizer), strict=True):
            own = [slice(passage.token_start, passage.token_end) for passage in cut_passages(text, tokens, options)]
            pieces[text] = [TokenizedText(tokens.ids[at], tokens.starts[at], tokens.ends[at]) for at in own]
    return pieces


def _spelling(text: str, tokens: TokenizedText, answer: str) -> Mask:
    """Bool, one a token: whether it overlaps a place in `text` where `answer` stands as whole words, in either case."""
    mask = np.zeros(len(tokens.ids), dtype=np.bool_)
    if answer:
        for found in _whole_words(answer).finditer(text):
            mask |= (tokens.starts < found.end()) & (tokens.ends > found.start())
    return mask


def _whole_words(answer: str, flags: re.RegexFlag = re.IGNORECASE) -> re.Pattern[str]:
    """Where `answer` stands by itself: not in a longer word, nor as a part of a number such as 2.5 or 2,500."""
    before = r"(?<!\d[.,])" if answer[:1].isdigit() else ""
    after = r"(?![.,]\d)" if answer[-1:].isdigit() else ""
    return re.compile(rf"(?<!\w){before}{re.escape(answer)}(?!\w){after}", flags)


def answers_by_kind(instructions: Sequence[Instruction]) -> dict[str, list[str]]:
    """The different answers to questions of each kind, in their order; kinds with one alone are left out."""
    found: dict[str, dict[str, None]] = {}
    for made in instructions:
        if made.answer:
            found.setdefault(made.kind, {})[made.answer] = None
    return {kind: list(answers) for kind, answers in found.items() if len(answers) > 1}


def exchanged(made: Instruction, answer: str) -> Instruction | None:
    """The example as if `answer` were its answer: the old one's places in gold passages hold the new one.

    What is so can only be read, not known (entity substitution, arXiv:2109.05052). None where the old answer stands
    word for word, in its own case, in no gold passage, or in the question, or where the new one stands somewhere
    already, or where another accepted form of the old one would stay in a gold passage.
    """
    if not made.answer:
        return None
    old, new = _whole_words(made.answer, re.NOFLAG), _whole_words(answer)
    gold = [made.passages[number] for number in made.gold]
    if _whole_words(made.answer).search(made.question) or not any(map(old.search, gold)):
        return None
    if any(map(new.search, (made.question, *made.passages))):
        return None
    passages = tuple(
        old.sub(lambda _: answer, text) if number in made.gold else text for number, text in enumerate(made.passages)
    )
    forms = [_whole_words(form) for form in made.answers if form.casefold() != made.answer.casefold()]
    if any(form.search(passages[number]) for form in forms for number in made.gold):
        return None
    return replace(made, answer=answer, passages=passages, answers=())


def _fitted(example: TokenizedExample, context_tokens: int) -> TokenizedExample | None:
    """The example without the last distractors that are too much; None where its gold passages alone are."""
    total = sum(map(len, example.passages))
    keep = [True] * len(example.passages)
    for number in reversed(range(len(keep))):
        if total > context_tokens and not example.gold[number]:
            keep[number] = False
            total -= len(example.passages[number])
    if total > context_tokens:
        return None
    if all(keep):
        return example
    kept = [number for number, wanted in enumerate(keep) if wanted]
    return TokenizedExample(
        question=example.question,
        answer=example.answer,
        passages=tuple(example.passages[number] for number in kept),
        gold=tuple(example.gold[number] for number in kept),
        spells_answer=tuple(example.spells_answer[number] for number in kept),
    )


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step


def drawn_mask(
    example: TokenizedExample,
    chunk_size: int,
    expansion_fraction: float,
    gold_weight: float,
    random: np.random.Generator,
) -> Mask:
    """expansion_mask bool `[L]` of an example, T′ chunks drawn one after another without replacement by weight.

    Exponential variables divided by the weights, in order, are such a sequence (Efraimidis and Spirakis, 2006).
    """
    counts = [num_chunks(len(ids), chunk_size) for ids in example.passages]
    weights = np.repeat(np.where(example.gold, gold_weight, 1.0), counts)
    order = (random.standard_exponential(len(weights)) / weights).argsort(kind="stable")
    mask = np.zeros(len(weights), dtype=np.bool_)
    mask[order[: num_expanded(len(weights), expansion_fraction)]] = True
    return mask


def compose_example(
    template: PromptTemplate, example: TokenizedExample, chunk_size: int, expansion_mask: Mask
) -> Arrangement:
    """The prompt's slots, arranged by what arranges a host's."""
    return arrange(template, context_passages(example, chunk_size), expansion_mask, example.question.tolist())


def context_passages(example: TokenizedExample, chunk_size: int) -> list[ContextPassage]:
    """The passages without vectors, which training makes of the tokens."""
    return [
        ContextPassage(ids, chunk_size, np.empty((num_chunks(len(ids), chunk_size), 0), dtype=np.float16))
        for ids in example.passages
    ]


def instruction_batch(
    prompts: Sequence[tuple[Arrangement, TokenizedExample]], *, chunk_size: int, shape: BatchShape
) -> TrainingBatch:
    """Prompts followed by their answers, which are predicted with the token that ends the turn.

    Rows are filled up with slots that nothing predicts from (NO_TOKEN), chunks of a single token whose vectors
    go to a row's last slot, which is always such a one, and IGNORED targets. Every batch has such chunks, so that
    all are `ragged`, whether or not a real chunk is short.
    """
    rows = len(prompts)
    ids = np.full((rows, shape.slots), NO_TOKEN, dtype=np.int64)
    chunk_ids = np.full((rows, shape.chunks, chunk_size), NO_TOKEN, dtype=np.int64)
    chunk_ids[:, :, 0] = 0
    places = np.full((rows, shape.chunks), shape.slots - 1, dtype=np.int64)
    predict_at = np.full((rows, shape.targets), shape.slots - 1, dtype=np.int64)
    targets = np.full((rows, shape.targets), IGNORED, dtype=np.int64)
    for row, (arrangement, example) in enumerate(prompts):
        prompt, answer, compressed = arrangement.ids, example.answer, arrangement.compressed
        ids[row, : len(prompt)] = prompt
        ids[row, len(prompt) : len(prompt) + len(answer) - 1] = answer[:-1]
        chunk_ids[row, : len(compressed)] = padded_chunks(example, chunk_size)[compressed]
        places[row, : len(compressed)] = np.flatnonzero(prompt == COMPRESSED)
        predict_at[row, : len(answer)] = len(prompt) - 1 + np.arange(len(answer))
        targets[row, : len(answer)] = answer
    return TrainingBatch(ids=ids, chunk_ids=chunk_ids, places=places, predict_at=predict_at, targets=targets)


def padded_chunks(example: TokenizedExample, chunk_size: int) -> Ids:
    """Int64 `[L, k]`: the chunks of all passages, NO_TOKEN behind the end of short ones."""
    chunks = np.full((example.num_chunks(chunk_size), chunk_size), NO_TOKEN, dtype=np.int64)
    first = 0
    for passage in example.passages:
        count = num_chunks(len(passage), chunk_size)
        chunks[first : first + count].reshape(-1)[: len(passage)] = passage
        first += count
    return chunks
