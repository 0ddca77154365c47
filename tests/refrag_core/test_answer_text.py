"""An answer's text from its tokens: characters whole, stop texts never shown."""

import pytest

from refrag_core.answer_text import AnswerText
from tests import tiny_models

EOS = frozenset({1})


def shown(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], AnswerText]:
    """The pieces that the tokens of `text` give."""
    tokenizer = tiny_models.decoder_tokenizer()
    answer, pieces = AnswerText(tokenizer, EOS, stop), []
    for token in tokenizer.encode(text, add_special_tokens=False).ids:
        pieces.append(answer.push(token))
        if answer.ended:
            break
    pieces.append(answer.finish())
    return pieces, answer


@pytest.mark.parametrize("text", ["The capital of France.", "東京 🦊 Zürich", ""])
def test_without_stops_it_is_the_text(text: str) -> None:
    pieces, answer = shown(text)
    assert "".join(pieces) == answer.text == text
    assert answer.finish_reason == ("length" if text else "stop")


@pytest.mark.parametrize(
    ("stop", "left"),
    [
        (("France",), "The capital of "),
        (("f Fr", "capital"), "The "),
        (("🦊",), "The capital of France. Zü"),
        (("T",), ""),
        (("Zürich",), "The capital of France. Zü🦊"),
        (("France!", "nce?"), "The capital of France. Zü🦊"),
    ],
)
def test_it_ends_before_the_first_stop(stop: tuple[str, ...], left: str) -> None:
    pieces, answer = shown("The capital of France. Zü🦊", stop)
    assert "".join(pieces) == answer.text == left
    stopped = left != "The capital of France. Zü🦊"
    assert (answer.ended, answer.finish_reason) == (stopped, "stop" if stopped else "length")


def test_what_may_become_a_stop_is_held_back() -> None:
    pieces, _ = shown("aaab", ("aab",))
    assert "".join(pieces) == "a"
    assert not any(piece.startswith("aa") for piece in pieces)


def test_an_end_of_sequence_ends_it() -> None:
    answer = AnswerText(tiny_models.decoder_tokenizer(), EOS)
    assert answer.push(1) == ""
    assert (answer.ended, answer.new_tokens, answer.finish_reason) == (True, 1, "stop")
