"""What a policy learns from questions: the chunks that hold their answers.

A question's answer stands word for word in its gold passage, so that the chunks worth their tokens are known without
a decoder. Notation as in `refrag_core.training.policy_data`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from refrag_core.chunking import num_chunks
from refrag_core.errors import CorpusError
from refrag_core.training.batches import NO_TOKEN, Ids, Mask
from refrag_core.training.instruct_data import InstructionSet, TokenizedExample, padded_chunks


@dataclass(frozen=True, slots=True)
class AnsweredContexts:
    """Questions with the chunks of their passages, on the host; L chunks in the longest context."""

    questions: list[str]
    """b of them."""
    chunk_ids: Ids
    """int64 `[b, L, k]`, NO_TOKEN behind the end of short and of absent chunks."""
    present: Mask
    """bool `[b, L]`."""
    holds_answer: Mask
    """bool `[b, L]`, at least one True in every row."""

    @property
    def targets(self) -> npt.NDArray[np.float32]:
        """Soft labels float32 `[b, L]`: the chunks that hold the answer, in equal parts."""
        labels = self.holds_answer.astype(np.float32)
        made: npt.NDArray[np.float32] = labels / labels.sum(axis=1, keepdims=True)
        return made


class AnsweredQuestions:
    """The examples of an instruction file whose answers stand in their gold passages.

    Args:
        tokenizer: the decoder's.
        seed: of the order.

    Raises CorpusError when no example is left.
    """

    def __init__(self, instructions: InstructionSet, tokenizer: Tokenizer, *, seed: int) -> None:
        self.fingerprint = instructions.fingerprint
        self.examples = [made for made in instructions.examples if any(mask.any() for mask in made.spells_answer)]
        self._tokenizer = tokenizer
        self._seed = seed
        if not self.examples:
            raise CorpusError(
                f"none of {len(instructions.examples)} instruction examples has its answer word for word in a gold "
                f'passage; expected some, with "gold" saying which passages hold the answer'
            )

    def batch(self, step: int, rows: int, *, chunk_size: int) -> AnsweredContexts:
        """The examples of a step, which follow from the seed and the step's number alone."""
        random = np.random.default_rng([self._seed, step, 2])
        return self.contexts(random.integers(0, len(self.examples), rows), chunk_size=chunk_size)

    def contexts(self, numbers: Sequence[int] | npt.NDArray[np.int64], *, chunk_size: int) -> AnsweredContexts:
        """The examples of these numbers."""
        examples = [self.examples[number] for number in numbers]
        length = max(example.num_chunks(chunk_size) for example in examples)
        chunk_ids = np.full((len(examples), length, chunk_size), NO_TOKEN, dtype=np.int64)
        present = np.zeros((len(examples), length), dtype=np.bool_)
        holds = np.zeros_like(present)
        for row, example in enumerate(examples):
            chunks = padded_chunks(example, chunk_size)
            chunk_ids[row, : len(chunks)] = chunks
            present[row, : len(chunks)] = True
            holds[row, : len(chunks)] = answer_chunks(example, chunk_size)
        questions = self._tokenizer.decode_batch([list(example.question) for example in examples])
        return AnsweredContexts(questions, chunk_ids, present, holds)


def answer_chunks(example: TokenizedExample, chunk_size: int) -> Mask:
    """Bool `[L]`: which chunks have a token of the answer."""
    parts = []
    for mask in example.spells_answer:
        padded = np.zeros(num_chunks(len(mask), chunk_size) * chunk_size, dtype=np.bool_)
        padded[: len(mask)] = mask
        parts.append(padded.reshape(-1, chunk_size).any(axis=1))
    return np.concatenate(parts)
