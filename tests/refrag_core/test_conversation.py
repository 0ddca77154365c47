"""Conversations over a small index: every prompt recomputed as plain text and ids, every shortcut against none."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from refrag_core.chunking import chunk_rows
from refrag_core.composition import Composed
from refrag_core.conversation import Conversation, prepare_turn, turn_text
from refrag_core.errors import ConfigError, SessionError
from refrag_core.history import HistoryOptions
from refrag_core.retrieval import RetrievalOptions
from refrag_core.runtime import Answer, AskOptions, Runtime
from refrag_core.scoring import ChunkScorer
from refrag_core.session import SessionFile, Turn, new_session
from refrag_core.template import INSTRUCTION
from tests import tiny_models
from tests.served import served
from tests.small_index import SmallIndex, documents

QUESTIONS = [
    "Which river is the capital of the northern island?",
    "And the copper king?",
    "Who wrote the letter about the silent bridge?",
    "Is the garden of carbon light?",
    "Which paper has the number of the ship?",
    "What did you say about the river?",
]
NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Opening remembers the models' fingerprints."""


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[Composed]:
    """Every prompt that is composed."""
    made: list[Composed] = []
    compose = Runtime.compose

    def kept(self: Runtime, *arguments: Any, **more: Any) -> Composed:
        made.append(compose(self, *arguments, **more))
        return made[-1]

    monkeypatch.setattr(Runtime, "compose", kept)
    return made


def options(**changes: Any) -> AskOptions:
    return AskOptions(**{"top_k": 2, "max_new_tokens": NEW_TOKENS, "policy": "all", **changes})


def chat(runtime: Runtime, asked: AskOptions | None = None, **history: Any) -> Conversation:
    return runtime.chat(asked or options(), history=HistoryOptions(**history))


def ask_all(conversation: Conversation, questions: list[str] = QUESTIONS) -> list[Answer]:
    return [conversation.ask(question) for question in questions]


def texts(answers: list[Answer]) -> list[str]:
    return [answer.answer for answer in answers]


def use(answer: Answer) -> tuple[int, int, int]:
    """Turns dropped, given as passages, and raw."""
    assert answer.history is not None
    return answer.history.dropped, answer.history.passages, answer.history.raw


def encode(runtime: Runtime, text: str) -> list[int]:
    ids: list[int] = runtime.decoder.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


# --- exactness


def test_raw_history_is_the_conversation_that_the_chat_template_renders(
    runtime: Runtime, library: SmallIndex, prompts: list[Composed]
) -> None:
    """Its text, its ids, and what transformers' own greedy generate makes of them, in float32."""
    answers = ask_all(chat(runtime), QUESTIONS[:3])
    context = "".join(f"{passage.text}\n\n" for passage in answers[2].passages)
    messages = [
        {"role": "user", "content": f"{INSTRUCTION}\n\nQuestion:\n{QUESTIONS[0]}"},
        {"role": "assistant", "content": answers[0].answer},
        {"role": "user", "content": f"Question:\n{QUESTIONS[1]}"},
        {"role": "assistant", "content": answers[1].answer},
        {"role": "user", "content": f"Passages:\n{context}Question:\n{QUESTIONS[2]}"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(library.models / "decoder", local_files_only=True)
    ids = prompts[2].arrangement.ids
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids.tolist() == plain_ids(runtime, answers[:2], answers[2])
    with torch.inference_mode():
        output = tiny_models.decoder("llama").generate(
            torch.tensor(ids[None].astype(np.int64)), max_new_tokens=NEW_TOKENS, do_sample=False
        )
    generated = output[0, len(ids) :].tolist()
    assert answers[2].answer == runtime.decoder.tokenizer.decode([i for i in generated if i != 1]).strip()
    assert len(set(generated)) > 2
    assert use(answers[2]) == (0, 0, 2)


def test_without_a_chat_template_it_is_a_transcript(tmp_path: Path, prompts: list[Composed]) -> None:
    """Questions and answers as plain text, by `refrag chat` and over HTTP."""
    tiny_models.checkpoint(tmp_path, chat=False).save(tmp_path / "checkpoint")
    small = SmallIndex(tmp_path, documents(8))
    small.build(models=small.with_models(checkpoint=str(tmp_path / "checkpoint")).models)
    runtime = Runtime.open(small.path, device="cpu")
    first, second = ask_all(chat(runtime, options(top_k=1)), QUESTIONS[:2])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "decoder", local_files_only=True)
    assert tokenizer.decode(prompts[1].arrangement.ids) == (
        f"{INSTRUCTION}\n\n"
        f"Question:\n{QUESTIONS[0]}\n\nAnswer: {first.answer}\n\n"
        f"Passages:\n{second.passages[0].text}\n\nQuestion:\n{QUESTIONS[1]}\n\nAnswer:"
    )
    said = [("user", QUESTIONS[0]), ("assistant", first.answer), ("user", QUESTIONS[1])]
    body = {
        "messages": [{"role": role, "content": text} for role, text in said],
        "max_tokens": NEW_TOKENS,
        "top_k": 1,
        "policy": "all",
    }
    with served(runtime) as running:
        found = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).json()
    assert found["choices"][0]["message"]["content"].strip() == second.answer
    assert found["refrag"]["history"]["raw"] == 1


def plain_ids(runtime: Runtime, earlier: list[Answer], last: Answer) -> list[int]:
    """The prompt put together by hand from the ids of its parts."""
    t = runtime.template
    assert t.turns is not None
    ids = [*t.bos, *t.prefix]
    for answer in earlier:
        ids += [*t.before_question, *encode(runtime, answer.question), *t.after_question]
        ids += [*t.turns.before_answer, *encode(runtime, answer.answer), *t.turns.after_answer]
    ids += t.before_passages
    for passage in last.passages:
        ids += [*t.passage_header, *encode(runtime, passage.text), *t.passage_footer]
    return [*ids, *t.before_question, *encode(runtime, last.question), *t.after_question, *t.suffix]


@pytest.mark.parametrize(
    ("asked", "positions"),
    [
        (options(), 1024),
        (options(policy="learned", expansion_fraction=0.3), 120),
        (options(temperature=0.8, seed=3), 60),
    ],
)
def test_answers_are_equal_with_and_without_reuse(runtime: Runtime, asked: AskOptions, positions: int) -> None:
    with_reuse = ask_all(chat(runtime, asked, positions=positions))
    without = ask_all(chat(runtime, asked, positions=positions, reuse=False))
    assert texts(with_reuse) == texts(without)
    assert [answer.passages for answer in with_reuse] == [answer.passages for answer in without]
    assert [answer.stats.reused_positions for answer in without] == [0] * len(QUESTIONS)
    assert sum(answer.stats.reused_positions > 0 for answer in with_reuse) >= 3


def test_answers_are_equal_where_chunks_are_kept_on_the_device(runtime: Runtime, library: SmallIndex) -> None:
    asked = options(policy="learned", expansion_fraction=0.3)
    kept = Runtime.open(library.path, device="cpu", captured=True)
    for reuse in (True, False):
        answers = ask_all(chat(kept, asked, positions=120, reuse=reuse))
        assert texts(answers) == texts(ask_all(chat(runtime, asked, positions=120)))
    assert use(answers[-1])[1]


def test_all_before_the_newest_turn_is_reused(runtime: Runtime, prompts: list[Composed]) -> None:
    answers = ask_all(chat(runtime), QUESTIONS[:4])
    t, before = runtime.template, 0
    for number, answer in enumerate(answers):
        if number:
            assert answer.stats.reused_positions >= before
        ids = [prompt.arrangement.ids for prompt in prompts[max(0, number - 1) : number + 1]]
        common = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), 0) if number else 0
        assert answer.stats.reused_positions == common
        before = len(plain_ids(runtime, answers[:number], answer)) - len(plain_ids(runtime, [], answer))
        before += len(t.bos) + len(t.prefix)


def test_the_policy_may_change_its_mind_without_an_end_to_reuse(runtime: Runtime) -> None:
    """Passages of old turns stand behind the raw turns."""
    answers = ask_all(chat(runtime, options(policy="learned", expansion_fraction=0.3), positions=220))
    pairs = [(a, b) for a, b in pairwise(answers) if use(a)[1] == use(b)[1] > 0]
    turns = [[[p for p in answer.passages if p.score is None] for answer in pair] for pair in pairs]
    assert turns
    assert all([p.text for p in before] == [p.text for p in now] for before, now in turns)
    assert any([p.expanded for p in before] != [p.expanded for p in now] for before, now in turns)
    t = runtime.template
    for before, now in pairs:
        raw = use(before)[2]
        shared = [
            t.turn(encode(runtime, a.question), encode(runtime, a.answer)) for a in answers[: use(before)[1] + raw]
        ]
        assert now.stats.reused_positions >= len(t.bos) + len(t.prefix) + sum(map(len, shared[use(before)[1] :]))


# --- turns as passages


def test_old_turns_become_passages_of_one_position_a_chunk(runtime: Runtime, prompts: list[Composed]) -> None:
    answers = ask_all(chat(runtime, options(policy="none"), positions=150))
    last = answers[-1]
    assert last.history is not None
    dropped, passages, raw = use(last)
    assert (dropped, dropped + passages + raw) == (0, 5)
    assert passages >= 2
    assert raw >= 1
    turns = [passage for passage in last.passages if passage.score is None]
    assert list(dict.fromkeys(passage.doc_id for passage in turns)) == [f"turn {n + 1}" for n in range(passages)]
    said = [turn_text(Turn(answer.question, answer.answer)) for answer in answers[:passages]]
    assert "".join(turn.text for turn in turns) == "".join(said)
    around = len(runtime.template.passage_header) + len(runtime.template.passage_footer)
    t = runtime.template
    raw_ids = [t.turn(encode(runtime, a.question), encode(runtime, a.answer)) for a in answers[passages:5]]
    slots = sum(turn.num_chunks + around for turn in turns)
    assert last.history.positions == sum(map(len, raw_ids)) + slots <= last.history.budget == 150
    assert (prompts[-1].arrangement.ids == -1).sum() == last.stats.num_chunks


def test_a_turn_is_encoded_once_even_by_another_process(runtime: Runtime, library: SmallIndex, tmp_path: Path) -> None:
    asked, history, cache = options(policy="none"), HistoryOptions(positions=150), tmp_path / "chunks.sqlite"
    first = Runtime.open(library.path, device="cpu", chunk_cache=cache)
    conversation = first.chat(asked, history=history)
    for question in QUESTIONS[:5]:
        passages = use(conversation.ask(question))[1]
        assert first.chunk_encoder.misses == num_chunks(runtime, conversation.turns[:passages])
    assert passages
    second = Runtime.open(library.path, device="cpu", chunk_cache=cache)
    later = use(second.chat(asked, history=history, session=conversation.session).ask(QUESTIONS[5]))[1]
    assert second.chunk_encoder.hits == num_chunks(runtime, conversation.turns[:passages])
    assert second.chunk_encoder.misses == num_chunks(runtime, conversation.turns[passages:later])


def num_chunks(runtime: Runtime, turns: Sequence[Turn]) -> int:
    """Different chunks of the turns' passages."""
    passages = [made for turn in turns for made in runtime.encode_text("turn", turn_text(turn))]
    rows = [chunk_rows(columns.tokens, columns.chunk_size)[0] for _, columns in passages]
    return len({row.tobytes() for own in rows for row in own})


def test_with_every_chunk_expanded_the_encoder_is_never_loaded(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr("refrag_core.checkpoint.Checkpoint.load_encoder", refuse)
    answers = ask_all(chat(runtime, options(policy="all"), positions=80))
    assert [use(answer)[1] for answer in answers] == [0] * len(QUESTIONS)
    assert use(answers[-1])[0] > 0


def test_the_perplexity_policy_scores_old_turns(runtime: Runtime) -> None:
    answers = ask_all(chat(runtime, options(policy="perplexity", expansion_fraction=0.3), positions=120))
    turns = [passage for passage in answers[-1].passages if passage.score is None]
    assert turns
    ids = np.asarray(encode(runtime, turns[0].text), np.int32)
    surprise = ChunkScorer(runtime.decoder).score([ids], 16)[0]
    ranked = np.argsort(-surprise)[: len(turns[0].expanded)].tolist()
    assert sorted(ranked) == list(turns[0].expanded)


def test_where_the_decoder_scores_nothing_perplexity_leaves_turns_raw(library: SmallIndex) -> None:
    composing = Runtime.open(library.path, device="cpu", composes_only=True).pinned()
    turns = [Turn(question, "Yes.") for question in QUESTIONS]
    history = HistoryOptions(positions=120)
    for policy, passages in (("perplexity", 0), ("random", 1)):
        asked = options(policy=policy, expansion_fraction=0.3)
        made = prepare_turn(composing, "And?", turns, asked, history).use
        assert (made.passages > 0, made.dropped > 0) == (bool(passages), not passages)


# --- what does not fit


def test_dropped_turns_are_told(runtime: Runtime) -> None:
    answers = ask_all(chat(runtime, positions=0))
    assert [use(answer) for answer in answers] == [(n, 0, 0) for n in range(len(QUESTIONS))]
    alone = [runtime.ask(question, options()).answer for question in QUESTIONS]
    searched = ask_all(chat(runtime, positions=0, turn_weight=0))
    assert texts(searched) == alone


def test_turns_that_would_be_dropped_are_an_error_when_strict(runtime: Runtime) -> None:
    conversation = chat(runtime, options(strict=True), positions=10)
    conversation.ask(QUESTIONS[0])
    with pytest.raises(ConfigError, match=r"the oldest 1 of 1 turns do not fit the 10 positions .*--history-positions"):
        conversation.ask(QUESTIONS[1])
    assert len(conversation.turns) == 1


def test_the_history_leaves_room_within_the_decoder_s_positions(runtime: Runtime) -> None:
    conversation = chat(runtime, options(top_k=1), positions=100_000)
    answers = ask_all(conversation, QUESTIONS * 2)
    assert use(answers[-1])[0] > 0
    for answer in answers:
        assert answer.history is not None
        assert answer.history.positions <= answer.history.budget < tiny_models.MAX_POSITIONS / 2
        assert answer.stats.decoder_positions + NEW_TOKENS <= tiny_models.MAX_POSITIONS
        assert answer.passages


# --- sessions


@pytest.mark.parametrize("positions", [150, 1024])
def test_a_resumed_session_gives_the_same_next_answer(runtime: Runtime, tmp_path: Path, positions: int) -> None:
    asked = options(policy="learned", expansion_fraction=0.2)
    conversation = chat(runtime, asked, positions=positions)
    ask_all(conversation, QUESTIONS[:4])
    SessionFile(tmp_path / "session.json").write(conversation.session)
    session = SessionFile(tmp_path / "session.json").read()
    assert session == conversation.session
    resumed = runtime.chat(asked, history=HistoryOptions(positions=positions), session=session)
    for question in QUESTIONS[4:]:
        before, now = conversation.ask(question), resumed.ask(question)
        assert (now.answer, now.passages, now.history) == (before.answer, before.passages, before.history)
    assert resumed.session == conversation.session


def test_a_session_of_something_else_is_refused(runtime: Runtime) -> None:
    session = new_session(runtime)
    other = replace(session, checkpoint="0" * 64)
    with pytest.raises(SessionError, match=r"answered with checkpoint 000000000000, .*--adopt"):
        runtime.chat(session=other)
    with pytest.raises(SessionError, match=r"from content 000000000000 \(generation 2\), .*--adopt"):
        runtime.chat(session=replace(session, content_id="0" * 64))
    with pytest.raises(SessionError, match=r"\(generation 9\)"):
        runtime.chat(session=replace(session, content_id="0" * 64, version=9))
    adopted = runtime.chat(options(), session=other, adopt=True)
    adopted.ask(QUESTIONS[0])
    assert adopted.session.checkpoint == session.checkpoint


def test_a_session_goes_on_when_the_index_has_a_new_generation(library: SmallIndex) -> None:
    old = Runtime.open(library.path, version=1, device="cpu")
    conversation = chat(old)
    conversation.ask(QUESTIONS[0])
    assert conversation.session.version == 1
    newest = Runtime.open(library.path, device="cpu")
    assert newest.chat(options(), session=conversation.session).ask(QUESTIONS[1]).version == 2
    old.reload()
    assert conversation.ask(QUESTIONS[1]).version == 2
    assert conversation.session.version == 2


# --- a turn counts when it is complete


def test_an_interrupted_answer_leaves_the_conversation_as_it_was(runtime: Runtime) -> None:
    calm, disturbed = chat(runtime), chat(runtime)
    for conversation in (calm, disturbed):
        conversation.ask(QUESTIONS[0])

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disturbed.ask("Something quite different?", on_text=stop)
    assert disturbed.turns == calm.turns
    pieces: list[str] = []
    assert disturbed.ask(QUESTIONS[1], on_text=pieces.append).answer == calm.ask(QUESTIONS[1]).answer
    assert "".join(pieces).strip() == disturbed.turns[-1].answer


def test_a_filter_without_passages_makes_no_first_turn(runtime: Runtime) -> None:
    asked = options(retrieval=RetrievalOptions(where="year = 1"))
    conversation = chat(runtime, asked)
    answer = conversation.ask(QUESTIONS[0])
    assert (answer.answer, answer.passing, conversation.turns) == ("", 0, ())


def test_reset_forgets_all_turns(runtime: Runtime) -> None:
    conversation = chat(runtime, positions=60)
    first = ask_all(conversation, QUESTIONS[:3])
    conversation.reset()
    assert conversation.turns == ()
    assert texts(ask_all(conversation, QUESTIONS[:3])) == texts(first)


def test_what_is_searched_for_leans_towards_the_turn_before(runtime: Runtime) -> None:
    conversation = chat(runtime)
    first, second = ask_all(conversation, QUESTIONS[:2])
    question, turn = runtime.searcher.retriever.embed_queries([QUESTIONS[1], f"{QUESTIONS[0]}\n{first.answer}"])
    mixed = question + 0.5 * turn
    hits = runtime.reader.search((mixed / np.linalg.norm(mixed)).astype(np.float32), 2)
    assert [passage.score for passage in second.passages] == [round(score, 4) for _, score in hits]
    shown = [runtime.reader.describe(ref) for ref, _ in hits]
    assert [passage.passage for passage in second.passages] == [passage.passage_id for passage in shown]
    assert conversation.turns[1].documents == tuple(dict.fromkeys(passage.document_id for passage in shown))


def test_a_checkpoint_from_before_conversations_answers_the_same(
    runtime: Runtime, library: SmallIndex, tmp_path: Path
) -> None:
    old = tmp_path / "checkpoint"
    shutil.copytree(library.models / "checkpoint", old)
    config = json.loads((old / "config.json").read_text())
    del config["template"]["turns"]
    (old / "config.json").write_text(json.dumps(config))
    answers = ask_all(chat(Runtime.open(library.path, checkpoint=str(old), device="cpu")), QUESTIONS[:3])
    assert texts(answers) == texts(ask_all(chat(runtime), QUESTIONS[:3]))
