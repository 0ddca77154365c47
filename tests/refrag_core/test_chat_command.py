"""`refrag chat` as its users meet it: pipes, terminals, sessions, interruptions."""

import inspect
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refrag import cli
from refrag_core.conversation import Conversation
from refrag_core.history import POSITIONS, TURN_WEIGHT, HistoryOptions
from refrag_core.runtime import AskOptions, Runtime
from refrag_core.session import SessionFile
from tests.command_line import Finished, call, without_traceback
from tests.small_index import SmallIndex

QUESTIONS = ["Which river is the capital?", "And the copper king?", "Who wrote the letter?"]

Chat = Callable[..., Finished]


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Commands remember the models' fingerprints."""


@pytest.fixture
def chat(runtime: Runtime, library: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Run the command on lines of standard input; the runtime is opened once for all."""
    monkeypatch.setattr(Runtime, "open", lambda *_, **__: runtime)

    def run(*more: object, lines: list[str] | None = None) -> Finished:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines or [])))
        return call("chat", library.path, *more, "--top-k", "2", "--max-new-tokens", "8", "--device", "cpu")

    return run


def expected(runtime: Runtime, questions: list[str]) -> list[str]:
    conversation = runtime.chat(AskOptions(top_k=2, max_new_tokens=8, policy="all"))
    return [conversation.ask(question).answer for question in questions]


def test_every_line_is_a_question(chat: Chat, runtime: Runtime) -> None:
    done = chat(lines=[QUESTIONS[0], "", *QUESTIONS[1:]])
    assert done.code == 0
    assert done.out == "".join(f"{answer}\n" for answer in expected(runtime, QUESTIONS))
    assert "UNTRAINED" in done.err


def test_json_is_one_line_an_answer(chat: Chat, runtime: Runtime) -> None:
    done = chat("--json", lines=[*QUESTIONS, "/stats"])
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert [answer["answer"] for answer in answers] == expected(runtime, QUESTIONS)
    assert answers[2]["history"] == {
        "dropped": 0,
        "passages": 0,
        "raw": 2,
        "budget": answers[2]["history"]["budget"],
    } | {"positions": answers[2]["history"]["positions"]}
    assert answers[2]["stats"]["reused_positions"] > 0
    assert "positions reused; history: 2 turns raw" in done.err  # stdout is for the answers


def test_a_session_goes_on_where_it_was(chat: Chat, runtime: Runtime, tmp_path: Path) -> None:
    session = tmp_path / "session.json"
    first = chat(QUESTIONS[0], "--session", session)
    second = chat("--session", session, lines=QUESTIONS[1:])
    assert (first.out + second.out).splitlines() == "\n".join(expected(runtime, QUESTIONS)).splitlines()
    saved = SessionFile(session).read()
    assert saved is not None
    assert [turn.question for turn in saved.turns] == QUESTIONS


def test_what_is_no_session_is_refused_before_a_model_is_loaded(
    chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    monkeypatch.setattr(Runtime, "open", None)
    refused = chat(QUESTIONS[0], "--session", notes)
    assert refused.code == 2
    assert "is no saved conversation" in without_traceback(refused)
    assert notes.read_text() == "mine"


def test_a_session_of_another_checkpoint_has_to_be_adopted(chat: Chat, tmp_path: Path) -> None:
    session = tmp_path / "session.json"
    chat(QUESTIONS[0], "--session", session)
    session.write_text(json.dumps(json.loads(session.read_text()) | {"checkpoint": "0" * 64}))
    refused = chat(QUESTIONS[1], "--session", session)
    assert refused.code == 2
    assert "go on all the same with --adopt" in refused.err.splitlines()[-1]
    assert chat(QUESTIONS[1], "--session", session, "--adopt").code == 0
    assert len(json.loads(session.read_text())["turns"]) == 2


def test_commands_show_and_save(chat: Chat, tmp_path: Path) -> None:
    saved = tmp_path / "a name with spaces.json"
    done = chat(
        *("--history-positions", "70"),
        lines=[
            *QUESTIONS,
            "/history",
            "/passages",
            "/stats",
            f"/save {saved}",
            "/reset",
            "/history",
            "/help",
            "/quit",
            "?",
        ],
    )
    assert done.code == 0
    out = done.out
    assert f"2. [raw] {QUESTIONS[1]}" in out
    assert f"3. [new] {QUESTIONS[2]}" in out
    assert "passages (# chunk expanded" in out
    assert "positions reused; history: 1 turns raw, 0 as passages, 1 dropped" in out
    assert f"saved 3 turns in {saved}" in out
    assert out.index("all turns are forgotten") < out.index("/save FILE")
    assert out.endswith("/quit       end\n")  # the question behind it was not asked
    assert "note: turn 1 is not in the prompt any more, for want of room: see --history-positions" in done.err
    session = SessionFile(saved).read()
    assert session is not None
    assert len(session.turns) == 3


@pytest.mark.parametrize("line", ["/nothing", "/save", "/quit now", "/etc/passwd is what?"])
def test_a_command_that_there_is_none_of(chat: Chat, line: str) -> None:
    done = chat(lines=[line])
    assert done.code == 2
    assert f"error: {line!r} is no command; expected /history" in done.err


def test_a_file_that_was_there_is_not_written_over(chat: Chat, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    done = chat(lines=[QUESTIONS[0], f"/save {notes}"])
    assert done.code == 2
    assert "save this conversation under another name" in done.err
    assert notes.read_text() == "mine"


def test_a_filter_that_nothing_passes(chat: Chat) -> None:
    assert chat(QUESTIONS[0], "--where", "year = 1").out == "nothing to answer from: no passage passes the filter\n"


def test_defaults_are_the_library_s(chat: Chat) -> None:
    parameters = inspect.signature(cli.chat).parameters
    assert (parameters["history_positions"].default, parameters["turn_weight"].default) == (POSITIONS, TURN_WEIGHT)
    assert HistoryOptions(positions=POSITIONS, turn_weight=TURN_WEIGHT) == HistoryOptions()


# --- in a terminal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(chat: Chat, library: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """The command with a person at its input, who types these lines and then Ctrl-D."""
    del chat

    def run(*more: object, lines: list[str]) -> Finished:
        typed: Iterator[str] = iter(lines)

        def read(prompt: str) -> str:
            assert prompt == "> "
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr("builtins.input", read)
        return call("chat", library.path, *more, "--top-k", "2", "--max-new-tokens", "8", "--device", "cpu")

    return run


def test_in_a_terminal_an_error_does_not_end_the_conversation(terminal: Chat, runtime: Runtime) -> None:
    done = terminal(lines=["/passages", "/nonsense", QUESTIONS[0]])
    assert done.code == 0
    assert expected(runtime, QUESTIONS[:1])[0] in done.out
    assert "error: there is no answer yet; expected a question first" in done.err
    assert "error: '/nonsense' is no command" in done.err
    assert "Ask away; /help lists the commands, Ctrl-D ends." in done.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 130)])
def test_ctrl_c_ends_the_answer_and_sigterm_the_program(
    terminal: Chat, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int, code: int
) -> None:
    ask, asked = Conversation.ask, 0

    def disturbed(self: Conversation, question: str, **more: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            os.kill(os.getpid(), number)
        return ask(self, question, **more)

    monkeypatch.setattr(Conversation, "ask", disturbed)
    done = terminal("--session", tmp_path / "s.json", lines=[QUESTIONS[0], "Something else?", QUESTIONS[1]])
    assert done.code == code
    session = SessionFile(tmp_path / "s.json").read()
    assert session is not None
    answered = QUESTIONS[:2] if number == signal.SIGINT else QUESTIONS[:1]
    assert [turn.question for turn in session.turns] == answered
    monkeypatch.setattr(Conversation, "ask", ask)
    assert [turn.answer for turn in session.turns] == expected(runtime, answered)
    assert ("this question and its answer are not kept" in done.err) == (code == 0)
