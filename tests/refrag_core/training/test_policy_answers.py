from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refrag_core.errors import CorpusError
from refrag_core.models import load_tokenizer
from refrag_core.training.batches import NO_TOKEN
from refrag_core.training.instruct_data import TokenizedExample
from refrag_core.training.policy_answers import AnsweredQuestions, answer_chunks


def example(*spells: list[bool]) -> TokenizedExample:
    """Passages of as many tokens as `spells` has entries, numbered through all of them."""
    starts = np.cumsum([10, *(len(mask) for mask in spells[:-1])])
    return TokenizedExample(
        question=np.asarray([5, 6], dtype=np.int32),
        answer=np.asarray([7], dtype=np.int32),
        passages=tuple(np.arange(a, a + len(mask), dtype=np.int32) for a, mask in zip(starts, spells, strict=True)),
        gold=tuple(any(mask) for mask in spells),
        spells_answer=tuple(np.asarray(mask) for mask in spells),
    )


def questions(tokenizer: Any, *examples: TokenizedExample) -> AnsweredQuestions:
    return AnsweredQuestions(SimpleNamespace(examples=examples, fingerprint="f"), tokenizer, seed=0)  # type: ignore[arg-type]


F, T = False, True


def test_chunks_that_share_a_token_with_the_answer_hold_it() -> None:
    made = example([F, F, F], [F, T, T, F, F])
    assert answer_chunks(made, 2).tolist() == [F, F, T, T, F]
    assert answer_chunks(made, 4).tolist() == [F, T, F]


def test_contexts_by_hand(models: tuple[Any, Any]) -> None:
    tokenizer = load_tokenizer(models[1])
    answered = questions(tokenizer, example([F, T, T], [F]), example([F, F]), example([T]))
    assert len(answered.examples) == 2
    made = answered.contexts([0, 1], chunk_size=2)
    n = NO_TOKEN
    assert made.chunk_ids.tolist() == [[[10, 11], [12, n], [13, n]], [[10, n], [n, n], [n, n]]]
    assert made.present.tolist() == [[T, T, T], [T, F, F]]
    assert made.targets.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    assert made.questions == [tokenizer.decode([5, 6])] * 2


def test_a_steps_questions_follow_from_its_number(models: tuple[Any, Any]) -> None:
    answered = questions(load_tokenizer(models[1]), *(example([F] * n + [T]) for n in range(8)))
    one, again, other = (answered.batch(step, 6, chunk_size=2).holds_answer for step in (3, 3, 4))
    assert np.array_equal(one, again)
    assert one.shape != other.shape or not np.array_equal(one, other)


def test_answers_that_stand_nowhere_are_refused(models: tuple[Any, Any]) -> None:
    with pytest.raises(CorpusError, match="none of 1 instruction examples has its answer word for word"):
        questions(load_tokenizer(models[1]), example([F, F]))
